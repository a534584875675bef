package integration_test

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/crane"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestFetch: what wants a streamed image's layers says which it does not find, until `fetch` has got them, each once. containerd keeps them as long as the image, also where it is told to keep none.
func TestFetch(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref := registry.Host() + "/app:v1"
	img := pushSmall(t, ref, 43)
	run(t, "streamctl", "create", "--record", "", ref)
	for _, pull := range []node.Pull{node.Transfer, node.Local} {
		t.Run(string(pull), func(t *testing.T) {
			n := startNode(t, node.Options{Pull: pull, Stream: []string{registry.Host() + "/*"}})
			if pull == node.Local {
				discard := "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  discard_unpacked_layers = true\n"
				if err := os.WriteFile(filepath.Join(n.Dir, "conf.d/z.toml"), []byte(discard), 0o644); err != nil {
					t.Fatal(err)
				}
				if err := n.RestartContainerd(t.Context(), false); err != nil {
					t.Fatal(err)
				}
			}
			pullStreamed(t, registry, n, ref)
			pushed := startRegistry(t, registrytest.Options{}).Host() + "/pushed:v1"
			wantNoLayer(t, n, img, "images", "push", "--plain-http", pushed, ref)
			if _, err := n.Ctr(t.Context(), "images", "push", "--plain-http", registry.Host()+"/app:again", ref); err != nil {
				t.Errorf("a push to where the layers are: %v", err)
			}
			exportFetched(t, registry, n, ref, img)
			if _, err := n.Ctr(t.Context(), "images", "push", "--plain-http", pushed, ref); err != nil {
				t.Error(err)
			}
			wantImage(t, pushed, img)
			if _, err := n.Ctr(t.Context(), "images", "convert", "--uncompress", ref, registry.Host()+"/converted:v1"); err != nil {
				t.Error(err)
			}

			fetched := layersHere(t, n, img)
			ctr(t, n, "leases", "create", "--id", "collect")
			ctr(t, n, "leases", "delete", "--sync", "collect") // when it has collected what nobody refers to
			if got := layersHere(t, n, img); fetched != 3 || got != fetched {
				t.Errorf("of %d layers %d are left", fetched, got)
			}
			if out := fetchLayers(t, n, ref); !strings.Contains(out, "fetched 0 layers") {
				t.Errorf("fetched again: %s", out)
			}
			if _, err := tryRun(t, "streaming-snapshotter", "fetch", "--config", n.ConfigFile(), "--containerd", n.Socket(), ref+"-none"); err == nil || !strings.Contains(err.Error(), "no such image in its namespace k8s.io") {
				t.Errorf("an image that is not there: %v", err)
			}
		})
	}
}

// exportFetched exports a streamed image: not before its layers are fetched.
func exportFetched(t *testing.T, registry *registrytest.Registry, n *node.Node, ref string, img v1.Image) {
	t.Helper()
	archive := filepath.Join(tempDir(t), "image.tar")
	wantNoLayer(t, n, img, "images", "export", archive, ref)
	registry.Reset()
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	if out := fetchLayers(t, n, ref); !strings.Contains(out, fmt.Sprintf("fetched %d layers", len(m.Layers))) {
		t.Errorf("fetch says %s", out)
	}
	if got := wholeLayers(t, registry, img); got != len(m.Layers) {
		t.Errorf("%d downloads of %d layers", got, len(m.Layers))
	}
	if _, err := n.Ctr(t.Context(), "images", "export", archive, ref); err != nil {
		t.Fatal(err)
	}
	copied := registry.Host() + "/exported-" + path.Base(n.Dir) + ":v1"
	run(t, "skopeo", "copy", "--quiet", "--preserve-digests", "--dest-tls-verify=false", "oci-archive:"+archive, "docker://"+copied)
	wantImage(t, copied, img)
}

func fetchLayers(t *testing.T, n *node.Node, ref string) string {
	t.Helper()
	return run(t, "streaming-snapshotter", "fetch", "--config", n.ConfigFile(), "--containerd", n.Socket(), ref)
}

// wantNoLayer runs ctr, which must say that it does not find a layer of img.
func wantNoLayer(t *testing.T, n *node.Node, img v1.Image, args ...string) {
	t.Helper()
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	_, err = n.Ctr(t.Context(), args...)
	for _, l := range m.Layers {
		if err != nil && strings.Contains(err.Error(), "content digest "+l.Digest.String()+": not found") {
			return
		}
	}
	t.Errorf("ctr %q of an image whose layers are not here: %v", args, err)
}

// layersHere counts img's layers in containerd's content store.
func layersHere(t *testing.T, n *node.Node, img v1.Image) (here int) {
	t.Helper()
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	list, err := n.Ctr(t.Context(), "content", "ls", "--quiet")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers {
		if strings.Contains(list, l.Digest.String()) {
			here++
		}
	}
	return here
}

// wantImage wants the registry to have img, all of it, as ref.
func wantImage(t *testing.T, ref string, img v1.Image) {
	t.Helper()
	got, err := crane.Digest(ref, crane.WithContext(t.Context()), crane.Insecure)
	if want := digestOf(t, img); err != nil || got != want {
		t.Errorf("%s is %s, %v; want %s", ref, got, err, want)
	}
	run(t, "crane", "validate", "--insecure", "--remote", ref)
}

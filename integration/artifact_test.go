package integration_test

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/crane"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs/erofstest"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/lagproxy"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// artifactOf returns the artifact of the image that repo:v1 names at the registry, with its digest and its bytes.
func artifactOf(t *testing.T, registry *registrytest.Registry, repo string) (m *artifact.Manifest, dgst string, raw []byte) {
	t.Helper()
	var list struct {
		Manifests []struct{ Digest string }
	}
	if err := json.Unmarshal([]byte(run(t, "streamctl", "list-referrers", "--artifact-type", artifact.ArtifactType, "-o", "json", registry.Host()+"/"+repo+":v1")), &list); err != nil {
		t.Fatal(err)
	}
	if len(list.Manifests) != 1 {
		t.Fatalf("referrers are %+v, want one artifact", list)
	}
	dgst = list.Manifests[0].Digest
	raw = get(t, registry.URL()+"/v2/"+repo+"/manifests/"+dgst)
	m, err := artifact.DecodeManifest(raw)
	if err != nil {
		t.Fatal(err)
	}
	return m, dgst, raw
}

func get(t *testing.T, url string) []byte {
	t.Helper()
	r, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s, %v", url, r.Status, err)
	}
	return b
}

// TestArtifactIsAnImage: containerd with overlayfs, crane and skopeo pull and unpack an artifact by its digest as the image that it is, and get the same tree.
func TestArtifactIsAnImage(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref := registry.Host() + "/app:v1"
	img := pushSmall(t, ref, 20)
	run(t, "streamctl", "create", "--record", "", ref)
	_, dgst, _ := artifactOf(t, registry, "app")
	byDigest := registry.Host() + "/app@" + dgst

	t.Run("containerd", func(t *testing.T) {
		begin := time.Now()
		want := walkContainer(t, startNode(t, node.Options{Pull: node.Plain}), ref)
		n := startNode(t, node.Options{Pull: node.Plain}) // another: snapshots are shared by chain ID
		registry.Reset()
		got := walkContainer(t, n, byDigest)
		if layerDownloads(t, registry, byDigest) == nil {
			t.Error("the artifact's layers were not downloaded: this test compares nothing")
		}
		untimed := unpackTimes(want, begin)
		forgetTimes(want, untimed)
		forgetTimes(got, untimed)
		if diff := erofstest.Diff(got, want); diff != "" {
			t.Errorf("the artifact as an image differs from the image:\n%s", diff)
		}
		out, err := n.Run(t.Context(), byDigest, nil)
		if err != nil {
			t.Fatal(err)
		}
		checkSums(t, out, 20)
		checkIdentity(t, n, byDigest, dgst, img)
	})
	t.Run("crane", func(t *testing.T) {
		dir := tempDir(t)
		run(t, "crane", "export", byDigest, filepath.Join(dir, "artifact.tar"))
		run(t, "crane", "export", ref, filepath.Join(dir, "image.tar"))
		sums := map[string]string{}
		for _, name := range []string{"artifact.tar", "image.tar"} {
			sub := filepath.Join(dir, name+".d")
			if err := os.Mkdir(sub, 0o755); err != nil {
				t.Fatal(err)
			}
			run(t, "tar", "-xf", filepath.Join(dir, name), "-C", sub)
			sums[name] = run(t, filepath.Join(sub, "guest"), "sum", filepath.Join(sub, "data"))
			sums[name] = trimPaths(sums[name], sub)
		}
		if sums["artifact.tar"] != sums["image.tar"] {
			t.Error("crane exports another tree of the artifact than of the image")
		}
		checkSums(t, sums["artifact.tar"], 20)
		run(t, "crane", "copy", byDigest, registry.Host()+"/copy/crane:v1")
		if got := run(t, "crane", "digest", registry.Host()+"/copy/crane:v1"); got != dgst+"\n" {
			t.Errorf("crane copied it as %s, want %s", got, dgst)
		}
	})
	t.Run("skopeo", func(t *testing.T) {
		dir := tempDir(t)
		run(t, "skopeo", "copy", "--src-tls-verify=false", "docker://"+byDigest, "oci:"+dir+":artifact")
		run(t, "skopeo", "copy", "--dest-tls-verify=false", "oci:"+dir+":artifact", "docker://"+registry.Host()+"/copy/skopeo:v1")
		if got := run(t, "crane", "digest", registry.Host()+"/copy/skopeo:v1"); got != dgst+"\n" {
			t.Errorf("skopeo copied it as %s, want %s", got, dgst)
		}
	})
}

// TestDockerRegistry streams from a registry with the tag schema only, Debian's docker-registry.
func TestDockerRegistry(t *testing.T) {
	registry, err := node.StartDockerRegistry(t.Context(), tempDir(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := registry.Close(); err != nil {
			t.Error(err)
		}
	})
	proxy, err := lagproxy.Listen("unix", registry.Socket, lagproxy.Link{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { proxy.Close() })
	n := startNode(t, node.Options{Stream: []string{proxy.Addr() + "/team/*"}})
	ref := proxy.Addr() + "/team/app:v1"
	img := pushSmall(t, ref, 30)
	run(t, "streamctl", "create", "--record", "", "--profile", "none", ref)
	run(t, "streamctl", "verify", ref)

	before := proxy.Count()
	if err := n.Pull(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	count := proxy.Count().Sub(before)
	if size := imageSize(t, img); count.Down > size/20 {
		t.Errorf("the pull took %d bytes in %d requests; the image has %d", count.Down, count.Requests, size)
	}
	out, err := n.Run(t.Context(), ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	checkSums(t, out, 30)
	checkIdentity(t, n, ref, digestOf(t, img), img)

	// The layers are not on the node. containerd has the registry mount them from the repository that they are in.
	pushed := proxy.Addr() + "/other/app:v1"
	if _, err := n.Ctr(t.Context(), "images", "push", "--plain-http", pushed, ref); err != nil {
		t.Error(err)
	}
	wantImage(t, pushed, img)

	run(t, "streamctl", "delete", ref)
	if got, err := crane.Digest(ref, crane.Insecure); err != nil || got != digestOf(t, img) {
		t.Errorf("after the artifact was deleted the image is %s, %v", got, err)
	}
}

func imageSize(t *testing.T, img v1.Image) int64 {
	t.Helper()
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	var size int64
	for _, l := range m.Layers {
		size += l.Size
	}
	return size
}

package integration_test

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// containerds are the releases that nodes have; tools/containerd-VERSION/go.mod pins each but the newest, which all other tests run, and make .build/containerd-VERSION builds it.
func containerds() []string {
	if os.Getenv("FULL") != "" {
		return []string{"1.7", "2.2", "2.3", newest}
	}
	return []string{newest}
}

const newest = "2.4"

// programsOf is the directory of such a containerd, with its shim and ctr.
func programsOf(t *testing.T, version string) string {
	t.Helper()
	dir := toolsDir(checkout(t))
	if version != newest {
		dir = filepath.Join(filepath.Dir(dir), "containerd-"+version)
	}
	if _, err := os.Stat(filepath.Join(dir, "containerd")); err != nil {
		t.Skipf("%v: make .build/containerd-%s builds it", err, version)
	}
	return dir
}

// TestContainerdVersions pulls and runs with each release of containerd, its shims and their ctr, configured as deploy/containerd says: images stream, a container reads all of it, one in a user namespace too,
// what is not streamed is pulled in the normal way, fetched layers can be exported, and what is removed is freed.
func TestContainerdVersions(t *testing.T) {
	docs, err := os.ReadFile(filepath.Join(checkout(t), "docs/operations.md"))
	if err != nil {
		t.Fatal(err)
	}
	registry := startRegistry(t, registrytest.Options{})
	pause, ref, plain, mixed := registry.Host()+"/pause:1", registry.Host()+"/app:v1", registry.Host()+"/plain:v1", registry.Host()+"/mixed:v1"
	pushPause(t, pause)
	img := pushSmall(t, ref, 41)
	plainImg := pushSmall(t, plain, 42)
	run(t, "streamctl", "create", "--record", "", ref)
	pushAbove(t, ref, mixed)
	for _, version := range containerds() {
		programs := programsOf(t, version)
		pulls := []node.Pull{node.Transfer, node.Local}
		if version == "1.7" {
			pulls = []node.Pull{node.Old}
		}
		for _, pull := range pulls {
			t.Run(version+"/"+string(pull), func(t *testing.T) {
				n := startNode(t, node.Options{Programs: programs, Pull: pull, Pause: pause, Stream: []string{registry.Host() + "/*"}, Config: "cache_size = \"1GiB\""})
				c := runCheck(t, n, ref)
				wantPull := "local"
				if pull == node.Transfer {
					wantPull = "transfer"
				}
				exact := strings.TrimPrefix(c.Containerd.Version, "v")
				exact, _, _ = strings.Cut(exact, "+")
				if c.exit != 0 || len(c.Traps) > 0 || !strings.HasPrefix(exact, version+".") || c.Containerd.Pull != wantPull {
					t.Errorf("check: %+v", c)
				}
				if !strings.Contains(string(docs), exact) {
					t.Errorf("docs/operations.md does not say that this was run with %s", exact)
				}
				pullStreamed(t, registry, n, ref)
				checkIdentity(t, n, ref, digestOf(t, img), img)
				checkSums(t, runPod(t, n, ref), 41)
				if pull != node.Old { // which makes no ID-mapped mounts
					out, err := n.RunFlags(t.Context(), ref, idMaps(500_000))
					if err != nil {
						t.Fatal(err)
					}
					checkSums(t, out, 41)
				}
				runsMixed(t, n, mixed, version)
				if root := imageFS(t, n); root != filepath.Join(n.Dir, "s") {
					t.Errorf("CRI's image file system is %s", root)
				}
				exportFetched(t, registry, n, ref, img)

				registry.Reset()
				checkSums(t, runPod(t, n, plain), 42)
				if got := wholeLayers(t, registry, plainImg); got == 0 {
					t.Error("no layer was downloaded: that was not a normal pull")
				}
				for _, r := range []string{ref, plain, mixed, pause} { // the pause image has a layer of the others
					if _, err := n.Crictl(t.Context(), "rmi", r); err != nil {
						t.Fatal(err)
					}
				}
				eventually(t, "the cache is freed", func() bool { return len(cacheFiles(t, n)) == 0 })
			})
		}
	}
}

// pushAbove pushes the image base with one more layer, which has no artifact, as ref.
func pushAbove(t *testing.T, base, ref string) {
	t.Helper()
	pushFileAbove(t, base, ref, "above")
}

// pushFileAbove is pushAbove with any file, without an entry for the directory that it is in.
func pushFileAbove(t *testing.T, base, ref, name string) {
	t.Helper()
	layer := filepath.Join(tempDir(t), "layer.tar")
	f, err := os.Create(layer)
	if err != nil {
		t.Fatal(err)
	}
	w := &ociimage.Tar{Writer: tar.NewWriter(f)}
	if err := errors.Join(w.File(name, 0o644, []byte("above")), w.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	run(t, "crane", "append", "--base", base, "--new_layer", layer, "--new_tag", ref)
}

// runsMixed pulls and runs an image of pushAbove, whose lower layers are streamed already. In a user namespace it has all its files, or says with a containerd that cannot why it does not start.
func runsMixed(t *testing.T, n *node.Node, ref, version string) {
	t.Helper()
	checkSums(t, runPod(t, n, ref), 41)
	if version == "1.7" {
		return
	}
	out, err := n.RunFlags(t.Context(), ref, idMaps(500_000))
	if version != "2.2" {
		if err != nil {
			t.Fatal(err)
		}
		checkSums(t, out, 41)
		return
	}
	for _, want := range []string{"would lack the files", "upgrade it"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v\n%s", want, err, out)
		}
	}
}

// imageFS is where CRI says that its images are.
func imageFS(t *testing.T, n *node.Node) string {
	t.Helper()
	out, err := n.Crictl(t.Context(), "imagefsinfo")
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		Status struct {
			ImageFilesystems []struct{ FsID struct{ Mountpoint string } }
		}
	}
	if err := json.Unmarshal([]byte(out), &v); err != nil || len(v.Status.ImageFilesystems) == 0 {
		t.Fatalf("%v in %s", err, out)
	}
	return v.Status.ImageFilesystems[0].FsID.Mountpoint
}

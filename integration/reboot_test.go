package integration_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestReboot: the power goes while containers run, and the registry is not there when the node is back. The daemons start, the containers and images that were there start again
// out of the cache, without one request, and read the rest when the registry is back. Nothing of the former life is left.
func TestReboot(t *testing.T) {
	for i, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			seed := uint64(500 + i)
			registry := startRegistry(t, registrytest.Options{})
			pause, ref, plain := registry.Host()+"/pause:1", registry.Host()+"/app:v1", registry.Host()+"/plain:v1"
			pushPause(t, pause)
			pushSmall(t, ref, seed)
			pushSmall(t, plain, seed+100)
			for _, r := range []string{pause, ref} {
				run(t, "streamctl", "create", "--record", "", r)
			}
			n := startNode(t, node.Options{Mode: mode, Pause: pause, Stream: []string{registry.Host() + "/*"}})
			pullStreamed(t, registry, n, pause)
			pullStreamed(t, registry, n, ref)
			if err := n.Pull(t.Context(), plain); err != nil {
				t.Fatal(err)
			}
			// One container is there with what it has read, and another runs.
			out := ctr(t, n, "run", "--snapshotter", n.Snapshotter(), ref, n.ID("kept"), "/guest", "sum", "/data/small")
			checkSumsBelow(t, out, seed, "/data/small")
			// A crash may cost what was fetched in the last seconds, an orderly end does not.
			if err := n.StopSnapshotter(); err != nil {
				t.Fatal(err)
			}
			if err := n.StartSnapshotter(t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, err := n.RunPod(t.Context(), pause); err != nil {
				t.Fatal(err)
			}

			if err := n.PowerLoss(); err != nil {
				t.Fatal(err)
			}
			orphans := plantOrphans(t, filepath.Join(n.Dir, "s"))
			loseUnsynced(t, filepath.Join(n.Dir, "s"))
			back := registry.Inject(registrytest.Any, -1, registrytest.Reset(-1))
			registry.Reset()
			if err := n.Boot(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, path := range orphans {
				if _, err := os.Lstat(path); !os.IsNotExist(err) {
					t.Errorf("%s is left of the former life (%v)", path, err)
				}
			}
			if mounts, err := n.Mounts("s/snapshots"); err != nil || len(mounts) != 0 {
				t.Errorf("mounted before anybody uses it: %q, %v", mounts, err)
			}
			checkSumsBelow(t, ctr(t, n, "tasks", "start", n.ID("kept")), seed, "/data/small")
			if _, err := n.RunPod(t.Context(), pause); err != nil {
				t.Errorf("a pod of an image that is cached: %v", err)
			}
			out, err := n.Run(t.Context(), plain, nil)
			if err != nil {
				t.Fatal(err)
			}
			checkSums(t, out, seed+100)
			if got := registry.Requests(); len(got) != 0 {
				t.Errorf("%d requests to the registry, the first %s %s", len(got), got[0].Method, got[0].Path)
			}

			back()
			if out, err = n.Run(t.Context(), ref, nil); err != nil {
				t.Fatal(err)
			}
			checkSums(t, out, seed)
			ctr(t, n, "containers", "delete", n.ID("kept"))
		})
	}
}

// loseUnsynced does to the metadata images what a power loss may, as they are not synced: their names are there and their bytes are not.
func loseUnsynced(t *testing.T, root string) {
	t.Helper()
	images, err := filepath.Glob(filepath.Join(root, "images", "*", "*.erofs"))
	if err != nil || len(images) < 2 {
		t.Fatalf("metadata images: %q, %v", images, err)
	}
	for i, path := range images {
		fi, err := os.Stat(path)
		if err == nil {
			err = os.Truncate(path, 0)
		}
		if err == nil && i > 0 {
			err = os.Truncate(path, fi.Size()) // zeros
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// ctr runs ctr, which must succeed, and returns what it printed.
func ctr(t *testing.T, n *node.Node, args ...string) string {
	t.Helper()
	out, err := n.Ctr(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// plantOrphans makes what a daemon leaves in its root that is killed at the wrong moments.
func plantOrphans(t *testing.T, root string) (paths []string) {
	t.Helper()
	images, err := filepath.Glob(filepath.Join(root, "images", "*"))
	if err != nil || len(images) == 0 {
		t.Fatalf("images: %v, %v", images, err)
	}
	unknown := strings.Repeat("e", 64)
	for _, path := range []string{
		filepath.Join(images[0], "3.erofs.tmp123"),
		filepath.Join(images[0], "image.json.tmp123"),
		filepath.Join(root, "images", unknown, "image.json.tmp123"), // a record that was not finished
		filepath.Join(root, "indexes", unknown),                     // of an image that was not recorded
		filepath.Join(root, "indexes", unknown+".tmp123"),
		filepath.Join(root, "snapshots", "new-123", "fs", "file"),
		filepath.Join(root, "snapshots", "4711", "fs", "file"), // of a transaction that was not committed
		filepath.Join(root, "snapshots", "removed-9", "work", "work", "file"),
		filepath.Join(root, "devices.probe", "mount", "file"),
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
	}
	return paths
}

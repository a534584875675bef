package snapshot

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// served lists where the whole image, of two layers, is mounted through the daemon.
func (n *testNode) served(id string) []string {
	return n.mounts.At(filepath.Join(n.root, "images", id, "2.erofs"))
}

// mountAt mounts the image's chain until the end of the test, or until somebody else unmounts it.
func (n *testNode) mountAt(id string) (target string) {
	n.t.Helper()
	target = n.t.TempDir()
	if err := n.images.Mount(testContext(), id, 2, target); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() {
		for unix.Unmount(target, unix.MNT_DETACH) == nil {
		}
	})
	return target
}

// overlay mounts an overlay on lower, as a container's, until the end of the test.
func (n *testNode) overlay(lower string) (merged string) {
	n.t.Helper()
	dir := n.t.TempDir()
	for _, name := range []string{"upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			n.t.Fatal(err)
		}
	}
	merged = filepath.Join(dir, "merged")
	if err := unix.Mount("overlay", merged, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, dir, dir)); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { unix.Unmount(merged, unix.MNT_DETACH) })
	return merged
}

// reads are the chunks that the daemon was asked for.
func (n *testNode) reads() int64 {
	s := n.chunks.Stats()
	return s.Hits + s.Waits
}

func inDirectModes(t *testing.T, f func(t *testing.T, n *testNode)) {
	for _, mode := range []fs.Mode{fs.ModeFile, fs.ModeLoop} {
		t.Run(string(mode), func(t *testing.T) { f(t, newTestNodeMode(t, mode)) })
	}
}

// When all of an image is here, its mount is replaced by one that asks the daemon for nothing, and outlives it; its users go on with the old one.
// After a restart the daemon serves it until all is proven again.
func TestDirect(t *testing.T) {
	inDirectModes(t, func(t *testing.T, n *testNode) {
		n.startWith(1 << 30)
		img, files := pushHot(n)
		n.prepareAll(img, 0, "")
		id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
		if err != nil {
			t.Fatal(err)
		}
		target := n.mountAt(id)
		wantFiles(t, target, map[string]string{"hot0": files["hot0"]})
		old := n.overlay(target)
		if got := n.served(id); len(got) != 1 {
			t.Fatalf("served at %q", got)
		}
		n.poll("direct mount", func() bool { return len(n.served(id)) == 0 })
		n.reg.Inject(registrytest.Any, -1, registrytest.Status(http.StatusServiceUnavailable))
		before := n.reads()
		direct := n.overlay(target)
		wantFiles(t, direct, files)
		wantFiles(t, n.mountAt(id), files) // and a new one
		if got := n.reads(); got != before {
			t.Errorf("%d chunks were read through the daemon", got-before)
		}
		wantFiles(t, old, map[string]string{"cold1": files["cold1"]})
		if n.reads() == before {
			t.Error("who used the old mount uses the new one")
		}

		unused := n.overlay(target)
		n.stop()
		wantFiles(t, direct, files)
		wantFiles(t, unused, files) // nothing of which was read
		n.start()
		again := n.mountAt(id)
		wantFiles(t, again, files)
		if s := n.chunks.Stats(); s.Verified == 0 {
			t.Error("after a restart it was mounted directly at once")
		}
		n.poll("direct mount", func() bool { return len(n.served(id)) == 0 })
		before = n.reads()
		wantFiles(t, again, files)
		if got := n.reads(); got != before {
			t.Errorf("%d chunks were read through the daemon after a restart", got-before)
		}
		wantFiles(t, direct, files)
	})
}

// What is mounted directly is not given back, whatever room is needed, also in the next life, which finds it in use; other chunks are.
func TestDirectUnderLimit(t *testing.T) {
	inDirectModes(t, func(t *testing.T, n *testNode) {
		n.limit = 6 << 20
		n.startWith(1 << 30)
		img, files := pushHot(n)
		id := n.started(img, files)
		n.poll("completion", func() bool { return n.completed(id) })
		target := n.mountAt(id)
		n.poll("direct mount", func() bool { return len(n.served(id)) == 0 })
		merged := n.overlay(target)

		other := map[string]string{"a": noise(11, 3_000_000), "b": noise(12, 3_000_000)}
		img2 := n.push("app:other", tarOf(t, file{"a", other["a"]}), tarOf(t, file{"b", other["b"]}))
		n.convert(img2)
		n.prepareAll(img2, 0, "")
		id2, _, err := n.images.Find(testContext(), img2.ref, img2.manifest)
		if err != nil {
			t.Fatal(err)
		}
		for _, life := range []string{"same", "next"} {
			if life == "next" {
				n.background = 0 // nothing but reads
				n.restart()
			}
			n.poll("eviction", func() bool {
				n.wantMounted(id2, other)
				return n.chunks.Stats().Evicted > 0
			})
			if used := n.chunks.Status().Used; used > n.limit {
				t.Errorf("%s life: %d bytes used, of %d", life, used, n.limit)
			}
			whole, err := filepath.Glob(filepath.Join(n.root, "cache", "*", "whole"))
			if err != nil || len(whole) != 2 {
				t.Fatalf("%s life: files %q of two layers, %v", life, whole, err)
			}
			for _, path := range whole {
				f, err := os.Open(path)
				if err != nil {
					t.Fatal(err)
				}
				size, err := f.Seek(0, 2)
				if hole, holeErr := unix.Seek(int(f.Fd()), 0, unix.SEEK_HOLE); err != nil || holeErr != nil || hole != size {
					t.Errorf("%s life: a hole at %d of %d bytes, %v, %v", life, hole, size, err, holeErr)
				}
				f.Close()
			}
			for name := range files {
				f, err := os.Open(filepath.Join(merged, name))
				if err != nil {
					t.Fatal(err)
				}
				if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
					t.Fatal(err)
				}
				f.Close()
			}
			wantFiles(t, merged, files)
		}
	})
}

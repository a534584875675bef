package snapshot

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs"
)

// On a full disk a pull fails or is a normal one, nothing half made is left, and with room again it is streamed.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	n := newTestNodeMode(t, fs.ModeTree) // which can be on tmpfs
	img := n.push("app", threeLayers(t)...)
	n.convert(img)
	n.stop()
	n.root = filepath.Join(t.TempDir(), "small")
	if err := os.Mkdir(n.root, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("small", n.root, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(n.root, unix.MNT_DETACH) })
	n.start()
	// Free pages are taken away one by one: each step of a pull has its turn to fail.
	ballast := filepath.Join(n.root, "ballast")
	for free := int64(0); free <= 20; free++ {
		var st unix.Statfs_t
		if err := unix.Statfs(n.root, &st); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(ballast, make([]byte, max(0, int64(st.Bfree)-free)*int64(st.Bsize)), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := n.sn.Prepare(testContext(), "extract", "", img.labels(0))
		if isAlreadyExists(err) != n.sn.lookup(img.chainIDs[0].String(), "") {
			t.Errorf("%d pages free: got %v, which is not what is recorded", free, err)
		}
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
		if isAlreadyExists(err) {
			break
		}
		if err == nil {
			if err := n.sn.Remove(testContext(), "extract"); err != nil {
				t.Fatal(err)
			}
		}
		if err := n.sn.Cleanup(testContext()); err != nil {
			t.Fatal(err)
		}
		if left := append(n.dirs(), n.filesIn("images", "indexes")...); len(left) != 0 {
			t.Errorf("%d pages free: left: %q", free, left)
		}
	}
	n.wantContainer("container", n.prepareAll(img, 0, ""))
}

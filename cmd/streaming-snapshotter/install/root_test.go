package install

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestClearRoot: on a disk that others use, too, only the snapshotter's own mounts go, and no file.
func TestClearRoot(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	own, others := []string{"devices/1", "images/x/mnt", "snapshots/2/fs"}, []string{"kubelet/pods/1/volume", "snapshots.old/1"}
	for _, name := range append(append([]string{"."}, own...), others...) {
		dir := filepath.Join(root, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("test", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
		if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := clearRoot(root, false); err != nil {
		t.Fatal(err)
	}
	for _, name := range own {
		if _, err := os.Stat(filepath.Join(root, name, "file")); !os.IsNotExist(err) {
			t.Errorf("%s is mounted: %v", name, err)
		}
	}
	for _, name := range append(others, ".") {
		if _, err := os.Stat(filepath.Join(root, name, "file")); err != nil {
			t.Errorf("%s is not: %v", name, err)
		}
	}
	if err := clearRoot(root, true); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(root); !os.IsNotExist(err) {
		t.Errorf("what an install has made is there: %v", err)
	}
}

// TestMountedFrom: where containerd cannot be asked, what runs is seen by what is mounted, and what a pull has left is nothing that runs.
func TestMountedFrom(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("test", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	root := filepath.Join(dir, "root")
	for _, m := range []struct{ at, below string }{{"container", root}, {"containerd-mount1", root}, {"other", root + ".other"}} {
		upper, work, lower, at := filepath.Join(m.below, "snapshots", m.at, "fs"), filepath.Join(m.below, "snapshots", m.at, "work"), filepath.Join(dir, "lower"), filepath.Join(dir, m.at)
		for _, d := range []string{upper, work, lower, at} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Mount("test", at, "overlay", 0, "lowerdir="+lower+",upperdir="+upper+",workdir="+work); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
	}
	if list, err := mountedFrom(root); err != nil || len(list) != 1 || !strings.HasSuffix(list[0], "/container") {
		t.Errorf("got %q, %v", list, err)
	}
}

package install

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestClearRoot: on a disk that others use, too, only the snapshotter's own mounts go, and no file.
func TestClearRoot(t *testing.T) {
	needRoot(t)
	for name, as := range map[string]func(root string) string{
		"path":  func(root string) string { return root },
		"slash": func(root string) string { return root + "/" },
		"link": func(root string) string {
			link := filepath.Join(t.TempDir(), "link")
			if err := os.Symlink(filepath.Dir(root), link); err != nil {
				t.Fatal(err)
			}
			return filepath.Join(link, filepath.Base(root))
		},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			clearsRoot(t, root, as(root))
		})
	}
}

// clearsRoot clears root, which the configuration calls by another name.
func clearsRoot(t *testing.T, root, name string) {
	t.Helper()
	if in := (&installer{s: &store{record: record{Root: root, Installed: []file{{}}}}, o: Options{Root: name}}); in.unmoved() != nil {
		t.Error(in.unmoved())
	}
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
	if err := clearRoot(name, false); err != nil {
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
	if err := clearRoot(name, true); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(root); !os.IsNotExist(err) {
		t.Errorf("what an install has made is there: %v", err)
	}
}

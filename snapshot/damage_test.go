package snapshot

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// A metadata image that the disk has damaged, or that a power loss has left, as it is not synced, is made anew before it is mounted.
func TestDamagedMetadataImage(t *testing.T) {
	for _, c := range []struct {
		name   string
		damage func(whole []byte) []byte
	}{
		// "top" becomes "tod" in the directory's entries: an image that is well formed, of another tree.
		{"another tree", func(b []byte) []byte { return bytes.Replace(b, []byte("top"), []byte("tod"), 1) }},
		{"empty", func([]byte) []byte { return nil }},
		{"zeros", func(b []byte) []byte { return make([]byte, len(b)) }},
		{"its first block only", func(b []byte) []byte { return append(bytes.Clone(b[:1536]), make([]byte, len(b)-1536)...) }},
		{"all but its end", func(b []byte) []byte { return b[:len(b)-512] }},
		{"all but its first block", func(b []byte) []byte { return append(make([]byte, 1536), b[1536:]...) }},
	} {
		t.Run(c.name, func(t *testing.T) { testDamagedMetadataImage(t, c.damage) })
	}
}

func testDamagedMetadataImage(t *testing.T, damage func(whole []byte) []byte) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...)
	n.convert(img)
	top := n.prepareAll(img, 0, "")
	n.stop()
	images, err := filepath.Glob(filepath.Join(n.root, "images", "*", "*.erofs"))
	if err != nil || len(images) != 1 {
		t.Fatalf("metadata images: %v, %v", images, err)
	}
	whole, err := os.ReadFile(images[0])
	if err != nil {
		t.Fatal(err)
	}
	damaged := damage(whole)
	if bytes.Equal(whole, damaged) {
		t.Fatal("nothing to damage")
	}
	if err := os.WriteFile(images[0], damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	n.start()
	mounts, err := n.sn.Prepare(testContext(), "container", top)
	if err != nil {
		t.Fatal(err)
	}
	inMounts(t, mounts, func(root string) { wantFiles(t, root, threeLayersMerged) })
	if b, err := os.ReadFile(images[0]); err != nil || !bytes.Equal(b, whole) {
		t.Errorf("the image was not made anew (%v)", err)
	}
}

// TestMetadataImageChangedAfterPull: the daemon that has made it mounts none that was changed meanwhile, and reads it again for each mount but the first.
func TestMetadataImageChangedAfterPull(t *testing.T) {
	for _, again := range []bool{false, true} {
		n, _, top := pulled(t)
		path := n.only("images", "*", "*.erofs")
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		made, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if again {
			n.wantContainer("first", top)
			if err := n.images.Unmount(n.base(top)); err != nil {
				t.Fatal(err)
			}
		}
		n.poll("change that stat tells", func() bool {
			if err := os.WriteFile(path, bytes.Replace(whole, []byte("top"), []byte("tod"), 1), 0o600); err != nil {
				t.Fatal(err)
			}
			now, err := os.Stat(path)
			return err == nil && !now.ModTime().Equal(made.ModTime())
		})
		if again { // as a disk changes it
			if err := os.Chtimes(path, made.ModTime(), made.ModTime()); err != nil {
				t.Fatal(err)
			}
		}
		n.wantContainer("container", top)
		if b, err := os.ReadFile(path); err != nil || !bytes.Equal(b, whole) {
			t.Errorf("after a mount (%v): the image was not made anew (%v)", again, err)
		}
	}
}

// An index that the disk loses under a container costs it a read, not the daemon, and is fetched anew when it is next opened.
func TestLostIndex(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...)
	n.convert(img)
	top := n.prepareAll(img, 0, "")
	mounts, err := n.sn.Prepare(testContext(), "container", top)
	if err != nil {
		t.Fatal(err)
	}
	inMounts(t, mounts, func(root string) {
		for _, f := range n.filesIn("indexes") {
			if err := os.Truncate(f, 0); err != nil {
				t.Fatal(err)
			}
		}
		if b, err := os.ReadFile(filepath.Join(root, "top")); !errors.Is(err, unix.EIO) {
			t.Errorf("read %q, %v without an index", b, err)
		}
	})
	n.restart()
	if mounts, err = n.sn.Mounts(testContext(), "container"); err != nil {
		t.Fatal(err)
	}
	inMounts(t, mounts, func(root string) { wantFiles(t, root, threeLayersMerged) })
}

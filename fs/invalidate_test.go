package fs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// TestInvalidate: what the kernel has of an image's files is forgotten, also below an overlay and by a file that is open: reads ask the device again, and have its error if there is one.
func TestInvalidate(t *testing.T) {
	m := newImage()
	content := map[string][]byte{"dir/sub/b": noise(2, 1<<20), "c": noise(3, 5000)}
	m.add("dir", dir())
	m.add("dir/sub", dir())
	for name, b := range content {
		m.file(name, b)
	}
	m.file("empty", nil)
	m.file("never read", noise(4, 9000))
	inModes(t, func(t *testing.T, s *Server) {
		m.dev.fail(nil)
		target := mountImage(t, s, m.write(t, "image"))
		other := newImage()
		other.file("a", noise(7, 100_000))
		otherTarget := mountImage(t, s, other.write(t, "other"))
		merged := mountOverlay(t, target)
		read := func(name string) error {
			got, err := os.ReadFile(filepath.Join(merged, name))
			if err == nil && !bytes.Equal(got, content[name]) {
				err = errors.New("other bytes")
			}
			return err
		}
		open, err := os.Open(filepath.Join(merged, "dir/sub/b"))
		if err != nil {
			t.Fatal(err)
		}
		defer open.Close()
		for name := range content {
			if err := read(name); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := os.ReadFile(filepath.Join(otherTarget, "a")); err != nil {
			t.Fatal(err)
		}
		m.dev.fail(errors.New("in quarantine"))
		other.dev.fail(errors.New("away"))
		for name := range content { // the kernel has it
			if err := read(name); err != nil {
				t.Fatal(err)
			}
		}
		if got := s.Targets("image"); len(got) != 1 || got[0] != target {
			t.Errorf("it is mounted at %q, want %q", got, target)
		}
		if err := s.Invalidate("image"); err != nil {
			t.Fatal(err)
		}
		for name := range content {
			if read(name) == nil {
				t.Errorf("%s is read from the kernel's cache", name)
			}
		}
		if n, err := open.ReadAt(make([]byte, 4096), 512<<10); err == nil {
			t.Errorf("%d bytes are read by a file that is open", n)
		}
		if _, err := os.ReadFile(filepath.Join(otherTarget, "a")); err != nil {
			t.Errorf("another image: %v", err)
		}
		m.dev.fail(nil)
		for name := range content {
			if err := read(name); err != nil {
				t.Error(err)
			}
		}
		if err := s.Invalidate("unknown"); err != nil {
			t.Error(err)
		}
	})
}

// TestInvalidateMany: more files than one child takes.
func TestInvalidateMany(t *testing.T) {
	m := newImage()
	last := noise(1, 600)
	for i := range invalidateBatch {
		m.file(fmt.Sprintf("f%05d", i), noise(byte(i), 10))
	}
	m.file("z", last)
	inModes(t, func(t *testing.T, s *Server) {
		m.dev.fail(nil)
		target := mountImage(t, s, m.write(t, "image"))
		read := func() error {
			_, err := os.ReadFile(filepath.Join(target, "z"))
			return err
		}
		if err := read(); err != nil {
			t.Fatal(err)
		}
		m.dev.fail(errors.New("in quarantine"))
		if err := s.Invalidate("image"); err != nil {
			t.Fatal(err)
		}
		if read() == nil {
			t.Error("the last file is read from the kernel's cache")
		}
	})
}

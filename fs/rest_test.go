package fs

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs/erofstest"
)

// A tree's metadata is not in the process's memory before anybody looks at it, nor after Rest, and is read as before then.
func TestRest(t *testing.T) {
	s := newServer(t, Options{Mode: ModeTree})
	m := madeImage(func(m *erofstest.Maker) *erofs.Inode { return m.Wide(20_000, 60) })
	img := m.write(t, "image")
	fi, err := os.Stat(img.Metadata)
	if err != nil {
		t.Fatal(err)
	}
	all := int(fi.Size() >> 10)
	f, err := os.Open(img.Metadata)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tree, err := openTree("image", f, img.Device)
	if err != nil {
		t.Fatal(err)
	}
	if n := residentOf(t, img.Metadata); n > 0 {
		t.Errorf("%d of %d KiB of metadata are in memory before anybody looks at it", n, all)
	}
	unix.Munmap(tree.mapped)
	target := mountImage(t, s, img)
	m.compare(t, target)
	if n := residentOf(t, img.Metadata); n < all/2 {
		t.Errorf("%d of %d KiB of metadata are in memory after all was looked at", n, all)
	}
	s.Rest()
	if n := residentOf(t, img.Metadata); n > all/4 {
		t.Errorf("%d of %d KiB of metadata are in memory at rest", n, all)
	}
	m.compare(t, target)
}

// residentOf returns how much of the file at path is mapped in memory, KiB.
func residentOf(t *testing.T, path string) (kib int) {
	t.Helper()
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	here := false
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line := lines.Text()
		if first, _, _ := strings.Cut(line, " "); strings.Contains(first, "-") {
			here = strings.HasSuffix(line, path)
		}
		var n int
		if _, err := fmt.Sscanf(line, "Rss: %d kB", &n); here && err == nil {
			kib += n
		}
	}
	return kib
}

package erofs_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs/erofstest"
)

const deviceSize = 1 << 21

// trees are the trees that everything is tried with, for a block size.
func trees(blockSize int) map[string]*erofs.Inode {
	m := func(seed uint64) *erofstest.Maker {
		return &erofstest.Maker{Rand: rand.New(rand.NewPCG(seed, 0)), BlockSize: int64(blockSize), DeviceSize: deviceSize}
	}
	return map[string]*erofs.Inode{
		"root":    {Mode: 0o40700},
		"special": m(0).Special(),
		"wide":    m(0).Wide(20000, 255),
		"random1": m(1).Tree(300),
		"random2": m(2).Tree(3000),
	}
}

func write(tb testing.TB, root *erofs.Inode, blockSize int) []byte {
	tb.Helper()
	return writeParts(tb, root, blockSize, nil)
}

func writeParts(tb testing.TB, root *erofs.Inode, blockSize int, parts []int64) []byte {
	tb.Helper()
	var b bytes.Buffer
	if err := erofs.Write(&b, root, erofs.Options{BlockSize: blockSize, DeviceSize: deviceSize, Parts: parts}); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

// TestEquality writes trees and finds them again in the images: with this package's reader, and with the kernel.
func TestEquality(t *testing.T) {
	device := erofstest.Device(t, deviceSize)
	for _, blockSize := range []int{512, 4096} {
		for name, root := range trees(blockSize) {
			t.Run(fmt.Sprintf("%s-%d", name, blockSize), func(t *testing.T) {
				wantEqual(t, write(t, root, blockSize), root, device, device.Name())
			})
		}
	}
}

// wantEqual compares image, and its mounts with files as devices, with the tree under root, whose data is in device.
func wantEqual(t *testing.T, image []byte, root *erofs.Inode, device io.ReaderAt, files ...string) {
	t.Helper()
	o := erofstest.Options{MaxContent: 1 << 28}
	want, err := erofstest.ListTree(root, device, o)
	if err != nil {
		t.Fatal(err)
	}
	m, err := erofs.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Verify(); err != nil {
		t.Error(err)
	}
	got, err := erofstest.ListImage(m, device, o)
	if err != nil {
		t.Fatal(err)
	}
	if diff := erofstest.Diff(got, want); diff != "" {
		t.Fatalf("the image is read differently:\n%s", diff)
	}
	if os.Getuid() != 0 {
		t.Skip("only root can mount")
	}
	for _, loop := range []bool{false, true} {
		got, err := erofstest.Walk(erofstest.Mount(t, image, loop, files...), o)
		if err != nil {
			t.Fatal(err)
		}
		if diff := erofstest.Diff(got, want); diff != "" {
			t.Errorf("the mount (loop: %v) differs:\n%s", loop, diff)
		}
	}
}

// treeOfParts has a directory for each part of a data device, of files whose data lies there.
func treeOfParts(blockSize int64) (root *erofs.Inode, parts []int64) {
	root, parts = &erofs.Inode{Mode: 0o40755}, []int64{0, blockSize, 10 * blockSize, deviceSize / 2}
	for i, at := range parts {
		end := append(parts, deviceSize)[i+1]
		m := &erofstest.Maker{Rand: rand.New(rand.NewPCG(uint64(i), 2)), BlockSize: blockSize, DeviceSize: end - at}
		part := &erofs.Inode{Mode: 0o40755}
		for k, size := range []int64{end - at, (end-at)/2 + 7} {
			part.Entries = append(part.Entries, erofs.Dirent{Name: fmt.Sprint(k), Inode: &erofs.Inode{
				Mode: 0o100644, Size: size, Extents: []erofs.Extent{{DeviceOffset: at, Size: size}}}})
		}
		if i == len(parts)-1 { // large enough for the holes that the maker makes
			tree := m.Tree(200)
			move(tree, at)
			part.Entries = append(part.Entries, erofs.Dirent{Name: "tree", Inode: tree})
		}
		root.Entries = append(root.Entries, erofs.Dirent{Name: fmt.Sprint(at), Inode: part})
	}
	return root, parts
}

// move adds to all device offsets below dir.
func move(dir *erofs.Inode, by int64) {
	seen := map[*erofs.Inode]bool{}
	var walk func(ino *erofs.Inode)
	walk = func(ino *erofs.Inode) {
		if seen[ino] {
			return
		}
		seen[ino] = true
		for i := range ino.Extents {
			ino.Extents[i].DeviceOffset += by
		}
		for _, e := range ino.Entries {
			walk(e.Inode)
		}
	}
	walk(dir)
}

// TestParts mounts a data device that is several, and finds what is there in one.
func TestParts(t *testing.T) {
	device := erofstest.Device(t, deviceSize)
	all, err := os.ReadFile(device.Name())
	if err != nil {
		t.Fatal(err)
	}
	for _, blockSize := range []int64{512, 4096} {
		t.Run(fmt.Sprint(blockSize), func(t *testing.T) {
			root, parts := treeOfParts(blockSize)
			var files []string
			for i, at := range parts {
				files = append(files, filepath.Join(t.TempDir(), "part"))
				if err := os.WriteFile(files[i], all[at:append(parts, deviceSize)[i+1]], 0o600); err != nil {
					t.Fatal(err)
				}
			}
			wantEqual(t, writeParts(t, root, int(blockSize), parts), root, device, files...)
		})
	}
}

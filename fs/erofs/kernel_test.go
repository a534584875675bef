package erofs_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
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
	var b bytes.Buffer
	if err := erofs.Write(&b, root, erofs.Options{BlockSize: blockSize, DeviceSize: deviceSize}); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

// TestEquality writes trees and finds them again in the images: with this package's reader, and with the kernel.
func TestEquality(t *testing.T) {
	device := erofstest.Device(t, deviceSize)
	o := erofstest.Options{MaxContent: 1 << 28}
	for _, blockSize := range []int{512, 4096} {
		for name, root := range trees(blockSize) {
			t.Run(fmt.Sprintf("%s-%d", name, blockSize), func(t *testing.T) {
				want, err := erofstest.ListTree(root, device, o)
				if err != nil {
					t.Fatal(err)
				}
				image := write(t, root, blockSize)
				m, err := erofs.Open(image)
				if err != nil {
					t.Fatal(err)
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
					dir := erofstest.Mount(t, image, device.Name(), loop)
					got, err := erofstest.Walk(dir, o)
					if err != nil {
						t.Fatal(err)
					}
					if diff := erofstest.Diff(got, want); diff != "" {
						t.Errorf("the mount (loop: %v) differs:\n%s", loop, diff)
					}
				}
			})
		}
	}
}

package erofs_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs/erofstest"
)

// TestGoErofs has the images read by an implementation that knows nothing of this one.
func TestGoErofs(t *testing.T) {
	device := erofstest.Device(t, deviceSize)
	o := erofstest.Options{MaxContent: 1 << 24}
	for _, blockSize := range []int{512, 4096} {
		for name, root := range trees(blockSize) {
			t.Run(fmt.Sprintf("%s-%d", name, blockSize), func(t *testing.T) {
				want, err := erofstest.ListTree(root, device, o)
				if err != nil {
					t.Fatal(err)
				}
				got, err := erofstest.ListGoErofs(bytes.NewReader(write(t, root, blockSize)), device, o)
				if err != nil {
					t.Fatal(err)
				}
				if diff := erofstest.Diff(got, want); diff != "" {
					t.Errorf("go-erofs reads it differently:\n%s", diff)
				}
			})
		}
	}
}

func needFsck(t *testing.T) string {
	fsck, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Skip("no fsck.erofs here")
	}
	return fsck
}

// TestFsck has the images checked by erofs-utils. Version 1.5 knows no blocks but of 4096 bytes.
func TestFsck(t *testing.T) {
	fsck, device := needFsck(t), erofstest.Device(t, deviceSize)
	for name, root := range trees(4096) {
		t.Run(name, func(t *testing.T) {
			image := filepath.Join(t.TempDir(), "image")
			if err := os.WriteFile(image, write(t, root, 4096), 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(fsck, "--device="+device.Name(), image).CombinedOutput(); err != nil {
				t.Errorf("fsck.erofs: %v\n%s", err, out)
			}
		})
	}
}

// TestFsckUnpacks compares what erofs-utils unpack. Version 1.5 unpacks no attributes, no links and no holes, and sets a file's owner after the mode, which clears bits.
func TestFsckUnpacks(t *testing.T) {
	fsck, device := needFsck(t), erofstest.Device(t, deviceSize)
	if os.Getuid() != 0 {
		t.Skip("only root can make devices and give files away")
	}
	m := &erofstest.Maker{Rand: rand.New(rand.NewPCG(4, 4)), BlockSize: 4096, DeviceSize: deviceSize, NoHoles: true}
	root, dir := m.Tree(400), t.TempDir()
	image, unpacked := filepath.Join(dir, "image"), filepath.Join(dir, "unpacked")
	if err := os.WriteFile(image, write(t, root, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(fsck, "--device="+device.Name(), "--extract="+unpacked, image).CombinedOutput(); err != nil {
		t.Fatalf("fsck.erofs: %v\n%s", err, out)
	}
	o := erofstest.Options{MaxContent: erofstest.AllContent, NoXattr: func(string) bool { return true }}
	want, err := erofstest.ListTree(root, device, o)
	if err != nil {
		t.Fatal(err)
	}
	got, err := erofstest.Walk(unpacked, o)
	if err != nil {
		t.Fatal(err)
	}
	for _, entries := range [][]erofstest.Entry{got, want} {
		for i := range entries {
			entries[i].Mode &^= 0o6000
			entries[i].Nlink, entries[i].Link = 0, ""
		}
	}
	if diff := erofstest.Diff(got, want); diff != "" {
		t.Errorf("fsck.erofs unpacks it differently:\n%s", diff)
	}
}

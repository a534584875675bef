package erofs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs/erofstest"
)

// FuzzOpen reads all of a damaged image. A patch is five bytes: where, and what. The checksum is made right, so that the damage goes further than Open.
func FuzzOpen(f *testing.F) {
	var images [][]byte
	for seed, blockSize := range []int{512, 4096, 512, 512} {
		m := &erofstest.Maker{Rand: rand.New(rand.NewPCG(uint64(seed), 1)), BlockSize: int64(blockSize), DeviceSize: deviceSize}
		images = append(images, write(f, m.Tree(10*seed), blockSize))
		f.Add(byte(seed), uint16(0), []byte{0, 5, 0, 0xff, 0xff, 0, 5, 8, 0xff, 0x7f})
	}
	root, parts := treeOfParts(512)
	images = append(images, writeParts(f, root, 512, parts))
	f.Add(byte(len(images)-1), uint16(0), []byte{0, 4, 0xb8, 0, 0})
	f.Fuzz(func(t *testing.T, which byte, cut uint16, patches []byte) {
		image := bytes.Clone(images[int(which)%len(images)])
		image = image[:max(0, len(image)-int(cut))]
		for len(image) > 2 && len(patches) >= 5 {
			off := (int(patches[0])<<16 | int(patches[1])<<8 | int(patches[2])) % (len(image) - 1)
			copy(image[off:], patches[3:5])
			patches = patches[5:]
		}
		fixChecksum(image)
		m, err := erofs.Open(image)
		if err != nil {
			return
		}
		if err := m.Walk(func([]byte, uint64, uint8) error { return nil }); err != nil && !errors.Is(err, erofs.ErrCorrupt) {
			t.Fatal(err)
		}
		for nid := range uint64(len(image)/32 + 2) {
			readInode(t, m, nid, len(image))
		}
		readInode(t, m, 1<<63+5, len(image))
	})
}

// fixChecksum writes the checksum that the superblock should have.
func fixChecksum(image []byte) {
	if len(image) < 4096 || image[1036] != 9 && image[1036] != 12 {
		return
	}
	block := image[1024:max(1<<image[1036], 1536)]
	binary.LittleEndian.PutUint32(block[4:], 0)
	binary.LittleEndian.PutUint32(block[4:], ^crc32.Checksum(block, crc32.MakeTable(crc32.Castagnoli)))
}

// readInode calls everything there is for nid, and checks what must hold whatever the image says.
func readInode(t *testing.T, m *erofs.Image, nid uint64, imageSize int) {
	s, err := m.Stat(nid)
	if err != nil {
		return
	}
	entries, last := 0, uint64(0)
	err = m.ReadDir(nid, 0, func(name []byte, _ uint64, typ uint8, next uint64) bool {
		if len(name) == 0 || len(name) > 255 || next <= last || entries*12 > imageSize {
			t.Fatalf("nid %d: entry %d is %q of type %d, the next at %d after %d", nid, entries, name, typ, next, last)
		}
		entries, last = entries+1, next
		m.Lookup(nid, string(name))
		return true
	})
	if err == nil && s.Mode&0o170000 != 0o040000 {
		t.Fatalf("nid %d: listed a file of mode %#o", nid, s.Mode)
	}
	m.ReadDir(nid, uint64(s.Size)/2, func([]byte, uint64, uint8, uint64) bool { return false })
	m.Lookup(nid, "missing")
	if target, err := m.Readlink(nid); err == nil && int64(len(target)) != s.Size {
		t.Fatalf("nid %d: a target of %d bytes, size %d", nid, len(target), s.Size)
	}
	m.Xattrs(nid, func(name string) { m.Xattr(nid, name) })
	for off, calls := int64(0), 0; calls < 20; calls++ {
		data, dev, hole, n, err := m.Map(nid, off)
		if err != nil {
			break
		}
		if n <= 0 || n > s.Size-off || dev < 0 || hole && data != nil || data != nil && int64(len(data)) != n || dev > 1<<44 {
			t.Fatalf("nid %d, size %d, at %d: %d bytes at %d, %d embedded, hole %v", nid, s.Size, off, n, dev, len(data), hole)
		}
		off += n
	}
}

// FuzzWriteRead makes a tree, writes it and reads it back.
func FuzzWriteRead(f *testing.F) {
	f.Add(uint64(1), uint16(100), true)
	f.Add(uint64(2), uint16(1000), false)
	device := make([]byte, deviceSize)
	rand.NewChaCha8([32]byte{}).Read(device)
	f.Fuzz(func(t *testing.T, seed uint64, n uint16, large bool) {
		blockSize := 512
		if large {
			blockSize = 4096
		}
		m := &erofstest.Maker{Rand: rand.New(rand.NewPCG(seed, 2)), BlockSize: int64(blockSize), DeviceSize: deviceSize}
		root := m.Tree(int(n % 500))
		o := erofstest.Options{MaxContent: 1 << 16}
		want, err := erofstest.ListTree(root, bytes.NewReader(device), o)
		if err != nil {
			t.Fatal(err)
		}
		image, err := erofs.Open(write(t, root, blockSize))
		if err != nil {
			t.Fatal(err)
		}
		got, err := erofstest.ListImage(image, bytes.NewReader(device), o)
		if err != nil {
			t.Fatal(err)
		}
		if diff := erofstest.Diff(got, want); diff != "" {
			t.Fatal(diff)
		}
	})
}

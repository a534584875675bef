package erofs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs/erofstest"
	"golang.org/x/sys/unix"
)

func open(tb testing.TB, image []byte) *erofs.Image {
	tb.Helper()
	m, err := erofs.Open(image)
	if err != nil {
		tb.Fatal(err)
	}
	return m
}

// find returns the nid at a path.
func find(tb testing.TB, m *erofs.Image, names ...string) uint64 {
	tb.Helper()
	nid := m.Root()
	for _, name := range names {
		child, found, err := m.Lookup(nid, name)
		if err != nil || !found {
			tb.Fatalf("lookup of %q: %v, %v", name, found, err)
		}
		nid = child
	}
	return nid
}

func special(blockSize int) *erofs.Inode {
	m := &erofstest.Maker{Rand: rand.New(rand.NewPCG(0, 0)), BlockSize: int64(blockSize), DeviceSize: deviceSize}
	return m.Special()
}

func TestReaderAllocatesNothing(t *testing.T) {
	m := open(t, write(t, special(512), 512))
	names := find(t, m, "names")
	link, sparse, many := find(t, m, "symlinks", "4095"), find(t, m, "sparse", "large"), find(t, m, "xattrs", "many")
	entries := 0
	count := func([]byte, uint64, uint8, uint64) bool { entries++; return true }
	for name, f := range map[string]func() error{
		"Stat":           func() error { _, err := m.Stat(names); return err },
		"Lookup":         func() error { _, _, err := m.Lookup(names, "new\nline"); return err },
		"Lookup missing": func() error { _, _, err := m.Lookup(names, "missing"); return err },
		"ReadDir":        func() error { return m.ReadDir(names, 0, count) },
		"Readlink":       func() error { _, err := m.Readlink(link); return err },
		"Map":            func() error { _, _, _, _, err := m.Map(sparse, 1<<32+5); return err },
		"Xattr":          func() error { _, _, err := m.Xattr(many, "user.many-59"); return err },
	} {
		var err error
		if n := testing.AllocsPerRun(100, func() { err = errors.Join(err, f()) }); n != 0 || err != nil {
			t.Errorf("%s: %v allocations, %v", name, n, err)
		}
	}
}

func TestReaderErrors(t *testing.T) {
	image := write(t, special(512), 512)
	m := open(t, image)
	file, link := find(t, m, "sizes", "embedded-1"), find(t, m, "symlinks", "1")
	beyond := uint64(len(image))
	if _, err := m.Stat(beyond); !errors.Is(err, erofs.ErrCorrupt) {
		t.Errorf("stat beyond the image: %v", err)
	}
	for what, err := range map[string]error{
		"lookup in a file":       second(m.Lookup(file, "x")),
		"list a symlink":         m.ReadDir(link, 0, nil),
		"read a file as symlink": first(m.Readlink(file)),
		"map a directory":        mapError(m.Map(m.Root(), 0)),
		"map beyond the end":     mapError(m.Map(file, 1)),
		"map before the start":   mapError(m.Map(file, -1)),
	} {
		if err == nil || errors.Is(err, erofs.ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, found, err := m.Xattr(file, "system.unknown"); found || err != nil {
		t.Errorf("attribute that no image has: %v, %v", found, err)
	}
	for n := range len(image) { // no image is complete without its end; the padding may be missing
		if n < superEnd {
			if _, err := erofs.Open(image[:n]); !errors.Is(err, erofs.ErrCorrupt) {
				t.Fatalf("open of %d bytes: %v", n, err)
			}
		}
	}
	for _, off := range []int{1024, 1028, 1036, 1038, 1104, 1110, 1200, 1535} {
		damaged := bytes.Clone(image)
		damaged[off] ^= 4
		if _, err := erofs.Open(damaged); !errors.Is(err, erofs.ErrCorrupt) {
			t.Errorf("open with a bit flipped at %d: %v", off, err)
		}
	}
}

// superEnd is the end of what Open reads with 512-byte blocks.
const superEnd = 1536

func first(_ []byte, err error) error                            { return err }
func second(_ uint64, _ bool, err error) error                   { return err }
func mapError(_ []byte, _ int64, _ bool, _ int64, e error) error { return e }

// TestVerify: no bit of an image can change unnoticed, nor its length.
func TestVerify(t *testing.T) {
	check := func(b []byte) error {
		m, err := erofs.Open(b)
		if err != nil {
			return err
		}
		return m.Verify()
	}
	for _, blockSize := range []int{512, 4096} {
		image := write(t, special(blockSize), blockSize)
		if err := check(image); err != nil {
			t.Fatal(err)
		}
		r := rand.New(rand.NewPCG(1, 1))
		for i := range 400 {
			off := r.IntN(len(image))
			if i < 140 {
				off = 1020 + i // the superblock, and a little around it
			}
			bit := byte(1) << r.IntN(8)
			image[off] ^= bit
			if err := check(image); !errors.Is(err, erofs.ErrCorrupt) {
				t.Errorf("bit %#x of byte %d flipped: got %v, want %v", bit, off, err, erofs.ErrCorrupt)
			}
			image[off] ^= bit
		}
		for _, b := range [][]byte{nil, image[:4096], image[:len(image)-1], append(bytes.Clone(image), 0)} {
			if err := check(b); !errors.Is(err, erofs.ErrCorrupt) {
				t.Errorf("with %d of %d bytes: got %v, want %v", len(b), len(image), err, erofs.ErrCorrupt)
			}
		}
	}
}

func TestHasXattrs(t *testing.T) {
	root := &erofs.Inode{Mode: unix.S_IFDIR | 0o755}
	if open(t, write(t, root, 512)).HasXattrs() {
		t.Error("an image without attributes has some")
	}
	root.Entries = []erofs.Dirent{{Name: "f", Inode: &erofs.Inode{Mode: unix.S_IFREG, Xattrs: []erofs.Xattr{{Name: "user.a"}}}}}
	m := open(t, write(t, root, 512))
	if !m.HasXattrs() || m.NumInodes() != 2 {
		t.Errorf("HasXattrs %v, NumInodes %d; want true, 2", m.HasXattrs(), m.NumInodes())
	}
}

// TestMapInOnePiece: one call, and one chunk index, for what is in one piece.
func TestMapInOnePiece(t *testing.T) {
	const size = 1<<33 + 12345
	var b bytes.Buffer
	file := &erofs.Inode{Mode: unix.S_IFREG, Size: size, Extents: []erofs.Extent{{DeviceOffset: 512, Size: size}}}
	halves := &erofs.Inode{Mode: unix.S_IFREG, Size: size, Extents: []erofs.Extent{{DeviceOffset: 512, Size: 512}, {FileOffset: 512, DeviceOffset: 1024, Size: size - 512}}}
	root := &erofs.Inode{Mode: unix.S_IFDIR, Entries: []erofs.Dirent{{Name: "file", Inode: file}, {Name: "halves", Inode: halves}}}
	if err := erofs.Write(&b, root, erofs.Options{BlockSize: 512, DeviceSize: size + 512}); err != nil {
		t.Fatal(err)
	}
	if b.Len() != 4096 {
		t.Errorf("%d bytes for three inodes, want 4096", b.Len())
	}
	m := open(t, b.Bytes())
	for _, name := range []string{"file", "halves"} {
		for _, off := range []int64{0, 1, 511, 512, 1 << 32, size - 1} {
			_, dev, hole, n, err := m.Map(find(t, m, name), off)
			if dev != 512+off || hole || n != size-off || err != nil {
				t.Errorf("map %s at %d: %d bytes at %d, hole %v, %v", name, off, n, dev, hole, err)
			}
		}
	}
}

// TestLargeFiles reads files beyond 4 GiB at chosen places, with the kernel and with Map.
func TestLargeFiles(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can mount")
	}
	const size, bs = 9 << 30, 512
	device, err := os.Create(filepath.Join(t.TempDir(), "device"))
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	if err := device.Truncate(size); err != nil {
		t.Fatal(err)
	}
	places := []int64{0, 4096, 1 << 31, 1<<32 - 512, 1 << 32, 1<<32 + 512, 1<<33 + 7*512, size - 1<<20 - 4096}
	for i, off := range places {
		if _, err := device.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 512), off); err != nil {
			t.Fatal(err)
		}
	}
	files := map[string]*erofs.Inode{
		"piece":   {Mode: unix.S_IFREG, Size: size - 100, Extents: []erofs.Extent{{Size: size - 100}}},
		"shifted": {Mode: unix.S_IFREG, Size: size - 4096, Extents: []erofs.Extent{{DeviceOffset: 4096, Size: size - 4096}}},
		"sparse": {Mode: unix.S_IFREG, Size: 1 << 40, Extents: []erofs.Extent{
			{DeviceOffset: 1 << 31, Size: 1 << 20}, {FileOffset: 1 << 39, DeviceOffset: 1<<32 - 512, Size: 1 << 20}}},
	}
	root := &erofs.Inode{Mode: unix.S_IFDIR}
	for name, ino := range files {
		root.Entries = append(root.Entries, erofs.Dirent{Name: name, Inode: ino})
	}
	var b bytes.Buffer
	if err := erofs.Write(&b, root, erofs.Options{BlockSize: bs, DeviceSize: size}); err != nil {
		t.Fatal(err)
	}
	m := open(t, b.Bytes())
	for _, loop := range []bool{false, true} {
		dir := erofstest.Mount(t, b.Bytes(), loop, device.Name())
		for name, ino := range files {
			f, err := os.Open(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for _, off := range append([]int64{1 << 39, 1<<39 + 512, 1<<40 - 512, 5 << 30}, places...) {
				if off+512 > ino.Size {
					continue
				}
				want, got, mapped := make([]byte, 512), make([]byte, 512), make([]byte, 512)
				for _, x := range ino.Extents {
					if x.FileOffset <= off && off < x.FileOffset+x.Size {
						device.ReadAt(want, x.DeviceOffset+off-x.FileOffset)
					}
				}
				if _, err := f.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s at %d (loop: %v): %x..., %v; want %x...", name, off, loop, got[:4], err, want[:4])
				}
				_, dev, hole, n, err := m.Map(find(t, m, name), off)
				if !hole {
					device.ReadAt(mapped, dev)
				}
				if err != nil || n < 512 || !bytes.Equal(mapped, want) {
					t.Errorf("%s at %d mapped: %x..., %d bytes, %v; want %x...", name, off, mapped[:4], n, err, want[:4])
				}
			}
		}
	}
}

// TestDeviceEnd reads the last block of a device that is no multiple of a page, a block's part, and of a device with nothing.
func TestDeviceEnd(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can mount")
	}
	content := bytes.Repeat([]byte("0123456789abcdef"), 3*512/16)
	device := filepath.Join(t.TempDir(), "device")
	if err := os.WriteFile(device, content, 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	file := &erofs.Inode{Mode: unix.S_IFREG, Size: 100, Extents: []erofs.Extent{{DeviceOffset: 1024, Size: 100}}}
	root := &erofs.Inode{Mode: unix.S_IFDIR, Entries: []erofs.Dirent{{Name: "f", Inode: file}}}
	for _, loop := range []bool{false, true} {
		var b, none bytes.Buffer
		if err := errors.Join(erofs.Write(&b, root, erofs.Options{BlockSize: 512, DeviceSize: 1100}),
			erofs.Write(&none, &erofs.Inode{Mode: unix.S_IFDIR}, erofs.Options{BlockSize: 512})); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join(erofstest.Mount(t, b.Bytes(), loop, device), "f"))
		if err != nil || !bytes.Equal(got, content[1024:1124]) {
			t.Errorf("loop %v: %q, %v", loop, got, err)
		}
		if _, err := erofstest.Walk(erofstest.Mount(t, none.Bytes(), loop, empty), erofstest.Options{}); err != nil {
			t.Errorf("empty device, loop %v: %v", loop, err)
		}
	}
}

// TestInodeNumbers: the kernel shows the nid as st_ino.
func TestInodeNumbers(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can mount")
	}
	image := write(t, special(512), 512)
	m := open(t, image)
	dir := erofstest.Mount(t, image, false, erofstest.Device(t, deviceSize).Name())
	for _, names := range [][]string{nil, {"links"}, {"links", "f"}, {"sizes", "dir-0"}, {"symlinks", "1"}, {"devices", "null"}} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(append([]string{dir}, names...)...), &st); err != nil {
			t.Fatal(err)
		}
		s, err := m.Stat(find(t, m, names...))
		if err != nil || s.Ino != st.Ino || s.Size != st.Size {
			t.Errorf("%v: inode %d, size %d, %v; the kernel says %d, %d", names, s.Ino, s.Size, err, st.Ino, st.Size)
		}
	}
}

func BenchmarkReader(b *testing.B) {
	m := open(b, write(b, benchTree(100_000), 512))
	dir := find(b, m, "d050")
	file := find(b, m, "d050", "file-0500")
	names := make([]string, 1000)
	for i := range names {
		names[i] = fmt.Sprintf("file-%04d", i)
	}
	i := 0
	for name, f := range map[string]func() error{
		"Lookup":  func() error { i++; _, _, err := m.Lookup(dir, names[i%len(names)]); return err },
		"Stat":    func() error { _, err := m.Stat(file); return err },
		"Map":     func() error { _, _, _, _, err := m.Map(file, 5); return err },
		"Xattr":   func() error { _, _, err := m.Xattr(file, "security.capability"); return err },
		"ReadDir": func() error { return m.ReadDir(dir, 0, func([]byte, uint64, uint8, uint64) bool { return true }) },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := f(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestWalk: each name once, directories first, and no path that the kernel does not take.
func TestWalk(t *testing.T) {
	deep := &erofs.Inode{Mode: unix.S_IFDIR | 0o755}
	at := deep
	long := strings.Repeat("d", 255)
	for range 17 { // 4095 bytes with the slashes of the first 16
		next := &erofs.Inode{Mode: unix.S_IFDIR | 0o755}
		at.Entries = []erofs.Dirent{{Name: long, Inode: next}}
		at = next
	}
	shared := &erofs.Inode{Mode: unix.S_IFREG | 0o644, Nlink: 2}
	root := &erofs.Inode{Mode: unix.S_IFDIR | 0o755, Entries: []erofs.Dirent{
		{Name: "a", Inode: shared},
		{Name: "b", Inode: &erofs.Inode{Mode: unix.S_IFDIR | 0o755, Entries: []erofs.Dirent{{Name: "c", Inode: shared}, {Name: "d", Inode: &erofs.Inode{Mode: unix.S_IFLNK | 0o777, Size: 1, Data: []byte("c")}}}}},
		{Name: "e", Inode: deep},
	}}
	var image bytes.Buffer
	if err := erofs.Write(&image, root, erofs.Options{BlockSize: 512}); err != nil {
		t.Fatal(err)
	}
	want := []string{"a 8", "b 4", "b/c 8", "b/d 10", "e 4"}
	for n := 1; n <= 15; n++ {
		want = append(want, "e"+strings.Repeat("/"+long, n)+" 4")
	}
	var got []string
	nids := map[string]uint64{}
	m := open(t, image.Bytes())
	if err := m.Walk(func(path []byte, nid uint64, typ uint8) error {
		got = append(got, fmt.Sprintf("%s %d", path, typ))
		nids[string(path)] = nid
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, want) {
		t.Errorf("%d paths, want %d:\n%.200q\n%.200q", len(got), len(want), got, want)
	}
	if nids["a"] != nids["b/c"] || nids["b/c"] != find(t, m, "b", "c") {
		t.Errorf("inodes %v", nids["a"])
	}
	stop := errors.New("stop")
	if err := m.Walk(func([]byte, uint64, uint8) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("its function's error became %v", err)
	}
}

// TestWalkOfDamagedDirectories: a directory in itself, and a file that an entry calls a directory, as only damage makes them, are errors, and no walk is without end.
func TestWalkOfDamagedDirectories(t *testing.T) {
	directory := func(entries ...erofs.Dirent) *erofs.Inode {
		return &erofs.Inode{Mode: unix.S_IFDIR | 0o755, Entries: entries}
	}
	root := directory(erofs.Dirent{Name: "a", Inode: directory()}, erofs.Dirent{Name: "b", Inode: directory()}, erofs.Dirent{Name: "file", Inode: &erofs.Inode{Mode: unix.S_IFREG | 0o644}})
	var written bytes.Buffer
	if err := erofs.Write(&written, root, erofs.Options{BlockSize: 512}); err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	for _, to := range []string{".", "file"} {
		image := bytes.Clone(written.Bytes())
		m := open(t, image)
		target := find(t, m, to)
		table := bytes.Index(image, le.AppendUint64(nil, find(t, m, "a"))) // the entry of "a", the third of the root
		for _, name := range []string{"a", "b"} {
			nid := find(t, m, name)
			at := table + bytes.Index(image[table:], le.AppendUint64(nil, nid))
			le.PutUint64(image[at:], target)
			if got := find(t, m, name); got != target {
				t.Fatalf("%s is inode %d, was %d, not that of %s, %d", name, got, nid, to, target)
			}
		}
		if err := m.Walk(func([]byte, uint64, uint8) error { return nil }); !errors.Is(err, erofs.ErrCorrupt) {
			t.Errorf("a directory's entry leads to %s: got %v, want %v", to, err, erofs.ErrCorrupt)
		}
	}
}

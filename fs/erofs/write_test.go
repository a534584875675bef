package erofs_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs/erofstest"
	"golang.org/x/sys/unix"
)

// TestWriteErrors: what cannot be expressed is named by its path.
func TestWriteErrors(t *testing.T) {
	file := func(x ...erofs.Extent) *erofs.Inode { return &erofs.Inode{Mode: unix.S_IFREG, Size: 2000, Extents: x} }
	xattr := func(x ...erofs.Xattr) *erofs.Inode { return &erofs.Inode{Mode: unix.S_IFREG, Xattrs: x} }
	link := func(target string) *erofs.Inode { return &erofs.Inode{Mode: unix.S_IFLNK, Data: []byte(target)} }
	loop := &erofs.Inode{Mode: unix.S_IFDIR}
	loop.Entries = []erofs.Dirent{{Name: "loop", Inode: loop}}
	large := make([]erofs.Xattr, 5)
	for i := range large {
		large[i] = erofs.Xattr{Name: fmt.Sprintf("user.%d", i), Value: make([]byte, math.MaxUint16)}
	}
	for name, ino := range map[string]*erofs.Inode{
		"mode":                     {Mode: 0o644},
		"mode bits":                {Mode: unix.S_IFREG | 1<<16},
		"nanoseconds":              {Mode: unix.S_IFREG, MtimeNsec: 1e9},
		"cycle":                    loop,
		"no inode":                 {Mode: unix.S_IFDIR, Entries: []erofs.Dirent{{Name: "x"}}},
		"name empty":               {Mode: unix.S_IFDIR, Entries: []erofs.Dirent{{Name: "", Inode: file()}}},
		"name dot":                 {Mode: unix.S_IFDIR, Entries: []erofs.Dirent{{Name: "..", Inode: file()}}},
		"name slash":               {Mode: unix.S_IFDIR, Entries: []erofs.Dirent{{Name: "a/b", Inode: file()}}},
		"name NUL":                 {Mode: unix.S_IFDIR, Entries: []erofs.Dirent{{Name: "a\x00", Inode: file()}}},
		"name long":                {Mode: unix.S_IFDIR, Entries: []erofs.Dirent{{Name: strings.Repeat("n", 256), Inode: file()}}},
		"name twice":               {Mode: unix.S_IFDIR, Entries: []erofs.Dirent{{Name: "a", Inode: file()}, {Name: "b", Inode: file()}, {Name: "a", Inode: file()}}},
		"target empty":             link(""),
		"target long":              link(strings.Repeat("t", 4096)),
		"target NUL":               link("a\x00b"),
		"size negative":            {Mode: unix.S_IFREG, Size: -1},
		"data and extents":         {Mode: unix.S_IFREG, Size: 1, Data: []byte("x"), Extents: []erofs.Extent{{Size: 1}}},
		"data short":               {Mode: unix.S_IFREG, Size: 2, Data: []byte("x")},
		"extent empty":             file(erofs.Extent{}),
		"extent odd":               file(erofs.Extent{FileOffset: 100, Size: 512}),
		"extent odd on device":     file(erofs.Extent{DeviceOffset: 100, Size: 512}),
		"extent odd size":          file(erofs.Extent{Size: 100}),
		"extent beyond file":       file(erofs.Extent{FileOffset: 512, Size: 2000}),
		"extent beyond device":     file(erofs.Extent{DeviceOffset: deviceSize - 512, Size: 1024}),
		"extent huge":              file(erofs.Extent{DeviceOffset: math.MaxInt64 &^ 511, Size: 2000}),
		"extent before device":     file(erofs.Extent{DeviceOffset: -512, Size: 512}),
		"extents overlap":          file(erofs.Extent{Size: 1024}, erofs.Extent{FileOffset: 512, Size: 512}),
		"extents not in order":     file(erofs.Extent{FileOffset: 512, Size: 512}, erofs.Extent{Size: 512}),
		"chunks":                   {Mode: unix.S_IFREG, Size: 1 << 40, Extents: []erofs.Extent{{Size: 512}}},
		"xattr namespace":          xattr(erofs.Xattr{Name: "system.nfs4_acl"}),
		"xattr without suffix":     xattr(erofs.Xattr{Name: "user."}),
		"xattr ACL with suffix":    xattr(erofs.Xattr{Name: "system.posix_acl_access.x"}),
		"xattr name long":          xattr(erofs.Xattr{Name: "user." + strings.Repeat("n", 251)}),
		"xattr name NUL":           xattr(erofs.Xattr{Name: "user.\x00"}),
		"xattr value":              xattr(erofs.Xattr{Name: "user.x", Value: make([]byte, 1<<16)}),
		"xattr twice":              xattr(erofs.Xattr{Name: "user.x"}, erofs.Xattr{Name: "user.x", Value: []byte("1")}),
		"xattrs beyond an inode's": xattr(large...),
	} {
		root := &erofs.Inode{Mode: unix.S_IFDIR, Entries: []erofs.Dirent{{Name: "dir", Inode: &erofs.Inode{Mode: unix.S_IFDIR, Entries: []erofs.Dirent{{Name: "bad", Inode: ino}}}}}}
		err := erofs.Write(io.Discard, root, erofs.Options{BlockSize: 512, DeviceSize: deviceSize})
		if !errors.Is(err, erofs.ErrUnsupported) || !strings.Contains(err.Error(), ": /dir/bad: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	root := &erofs.Inode{Mode: unix.S_IFDIR}
	for _, o := range []erofs.Options{
		{}, {BlockSize: 1024}, {BlockSize: 512, DeviceSize: -1}, {BlockSize: 512, DeviceSize: 1 << 41},
		{BlockSize: 512, DeviceSize: deviceSize, Parts: []int64{}}, {BlockSize: 512, DeviceSize: deviceSize, Parts: []int64{512}},
		{BlockSize: 512, DeviceSize: deviceSize, Parts: []int64{0, 0}}, {BlockSize: 512, DeviceSize: deviceSize, Parts: []int64{0, 100}},
		{BlockSize: 512, DeviceSize: deviceSize, Parts: []int64{0, 2 * deviceSize}}, {BlockSize: 512, DeviceSize: deviceSize, Parts: make([]int64, 5000)},
	} {
		if err := erofs.Write(io.Discard, root, o); err == nil {
			t.Errorf("options %+v are accepted", o)
		}
	}
	two := &erofs.Inode{Mode: unix.S_IFDIR, Entries: []erofs.Dirent{{Name: "bad", Inode: file(erofs.Extent{Size: 1024}, erofs.Extent{FileOffset: 1024, DeviceOffset: 1024, Size: 512})}}}
	for _, at := range []int64{512, 1024} {
		if err := erofs.Write(io.Discard, two, erofs.Options{BlockSize: 512, DeviceSize: deviceSize, Parts: []int64{0, at}}); !errors.Is(err, erofs.ErrUnsupported) {
			t.Errorf("a file in two parts, the second at %d: error %v", at, err)
		}
	}
	if err := erofs.Write(io.Discard, file(), erofs.Options{BlockSize: 512}); err == nil {
		t.Error("a file is accepted as root")
	}
	if err := erofs.Write(io.Discard, nil, erofs.Options{BlockSize: 512}); err == nil {
		t.Error("no root is accepted")
	}
}

type failingWriter struct{ left int }

var errFull = errors.New("full")

func (w *failingWriter) Write(b []byte) (int, error) {
	if w.left -= len(b); w.left < 0 {
		return 0, errFull
	}
	return len(b), nil
}

func TestWriteReportsTheWriter(t *testing.T) {
	if err := erofs.Write(&failingWriter{1 << 17}, special(512), erofs.Options{BlockSize: 512, DeviceSize: deviceSize}); !errors.Is(err, errFull) || errors.Is(err, erofs.ErrUnsupported) {
		t.Errorf("got %v, want %v", err, errFull)
	}
}

// TestDeterminism: neither the order of entries and attributes nor the run matters, and the tree stays as it is.
func TestDeterminism(t *testing.T) {
	want := write(t, special(512), 512)
	root := special(512)
	shuffle(root, rand.New(rand.NewPCG(3, 3)))
	order := slices.Clone(root.Entries)
	if got := write(t, root, 512); !bytes.Equal(got, want) {
		t.Error("the order of entries changes the image")
	}
	if !slices.Equal(root.Entries, order) {
		t.Error("writing sorts the tree")
	}
	other := special(512)
	other.Entries[0].Inode.Mtime++
	if got := write(t, other, 512); bytes.Equal(got[1072:1088], want[1072:1088]) {
		t.Error("two images have the same UUID")
	}
}

func shuffle(ino *erofs.Inode, r *rand.Rand) {
	r.Shuffle(len(ino.Entries), func(i, j int) { ino.Entries[i], ino.Entries[j] = ino.Entries[j], ino.Entries[i] })
	r.Shuffle(len(ino.Xattrs), func(i, j int) { ino.Xattrs[i], ino.Xattrs[j] = ino.Xattrs[j], ino.Xattrs[i] })
	for _, e := range ino.Entries {
		shuffle(e.Inode, r)
	}
}

// TestGolden pins the bytes: images are cached by nodes, and a change of the writer must not go unnoticed.
func TestGolden(t *testing.T) {
	for blockSize, want := range map[int]string{
		512:  "9745b7aff0eb67dc419a2545630a6436fa1b21818c9147177aab06cf1bd59dd0",
		4096: "0033b2782661e898288bdb3f8bf97b779acbba960af8d741971b060989aba51b",
	} {
		m := &erofstest.Maker{Rand: rand.New(rand.NewPCG(7, 7)), BlockSize: int64(blockSize), DeviceSize: deviceSize}
		if got := fmt.Sprintf("%x", sha256.Sum256(write(t, m.Special(), blockSize))); got != want {
			t.Errorf("the image with blocks of %d is %s, want %s", blockSize, got, want)
		}
	}
}

// benchTree is a tree of n files, 1000 in a directory, as an image might have them.
func benchTree(n int) *erofs.Inode {
	root := &erofs.Inode{Mode: unix.S_IFDIR | 0o755}
	for d := range (n + 999) / 1000 {
		dir := &erofs.Inode{Mode: unix.S_IFDIR | 0o755, Mtime: int64(d)}
		for f := range min(1000, n-d*1000) {
			size := int64(1 + f*37%9000)
			dir.Entries = append(dir.Entries, erofs.Dirent{Name: fmt.Sprintf("file-%04d", f), Inode: &erofs.Inode{
				Mode: unix.S_IFREG | 0o644, Mtime: int64(f), Size: size, Extents: []erofs.Extent{{DeviceOffset: int64(f) << 9, Size: size}},
			}})
		}
		root.Entries = append(root.Entries, erofs.Dirent{Name: fmt.Sprintf("d%03d", d), Inode: dir})
	}
	return root
}

func BenchmarkWrite(b *testing.B) {
	root := benchTree(100_000)
	b.ReportAllocs()
	for b.Loop() {
		var n countingWriter
		if err := erofs.Write(&n, root, erofs.Options{BlockSize: 512, DeviceSize: deviceSize}); err != nil {
			b.Fatal(err)
		}
		b.SetBytes(int64(n))
	}
}

type countingWriter int64

func (w *countingWriter) Write(b []byte) (int, error) {
	*w += countingWriter(len(b))
	return len(b), nil
}

package fs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

// modes are the ways to mount, all of which all tests are run by.
var modes = []Mode{ModeFile, ModeLoop, ModeTree}

// testDevice is a Device in memory whose reads can be watched, held up and made to fail.
type testDevice struct {
	data []byte

	mu      sync.Mutex
	reads   int           // begun
	bytes   int64         // asked for
	running int           // in progress
	peak    int           // the most in progress at one time
	hold    chan struct{} // if not nil, reads wait for it to be closed
	err     error         // if not nil, what reads return
	delay   time.Duration // of each read: the link that the device stands for
}

func (d *testDevice) Size() int64 { return int64(len(d.data)) }

func (d *testDevice) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	d.mu.Lock()
	d.reads++
	d.bytes += int64(len(p))
	d.running++
	d.peak = max(d.peak, d.running)
	hold, err, delay := d.hold, d.err, d.delay
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		d.running--
		d.mu.Unlock()
	}()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	if delay > 0 {
		time.Sleep(delay)
	}
	if err != nil {
		return 0, err
	}
	return copy(p, d.data[min(off, int64(len(d.data))):]), nil
}

// block holds up reads until the function it returns is called.
func (d *testDevice) block(t testing.TB) (release func()) {
	hold := make(chan struct{})
	d.mu.Lock()
	d.hold = hold
	d.mu.Unlock()
	release = sync.OnceFunc(func() {
		d.mu.Lock()
		d.hold = nil
		d.mu.Unlock()
		close(hold)
	})
	t.Cleanup(release)
	return release
}

func (d *testDevice) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.err = err
}

func (d *testDevice) counts() (reads, running, peak int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.reads, d.running, d.peak
}

// eventually waits for what to become true.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("still not: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// newServer starts a Server and checks at the end of the test that Close leaves nothing behind.
func newServer(t testing.TB, o Options) *Server {
	t.Helper()
	dir := t.TempDir()
	if o.Dir == "" {
		o.Dir = filepath.Join(dir, "devices")
	}
	o.Log = slog.New(slog.DiscardHandler)
	before := leftovers(t, dir)
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil && !errors.Is(err, unix.EBUSY) {
			t.Errorf("close: %v", err)
		}
		eventually(t, "nothing left behind", func() bool { return !leftovers(t, dir).exceed(before) })
	})
	return s
}

// left counts what a Server might leave behind.
type left struct{ goroutines, files, mounts, loops int }

func (l left) exceed(o left) bool {
	return l.goroutines > o.goroutines || l.files > o.files || l.mounts > o.mounts || l.loops > o.loops
}

func leftovers(t testing.TB, dir string) left {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	l := left{goroutines: runtime.NumGoroutine(), files: len(files), mounts: strings.Count(string(mounts), dir)}
	backing, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, name := range backing {
		path, _ := os.ReadFile(name)
		l.loops += strings.Count(string(path), dir)
	}
	return l
}

// image is a tree with the data device that holds its files.
type image struct {
	root *erofs.Inode
	dev  *testDevice
}

func newImage() *image {
	return &image{root: dir(), dev: &testDevice{}}
}

func dir(entries ...erofs.Dirent) *erofs.Inode {
	return &erofs.Inode{Mode: unix.S_IFDIR | 0o755, Entries: entries}
}

// add adds an inode to the directory at path, whose parents exist.
func (m *image) add(path string, ino *erofs.Inode) *erofs.Inode {
	parent := m.root
	names := strings.Split(path, "/")
	for _, name := range names[:len(names)-1] {
		for _, e := range parent.Entries {
			if e.Name == name {
				parent = e.Inode
				break
			}
		}
	}
	parent.Entries = append(parent.Entries, erofs.Dirent{Name: names[len(names)-1], Inode: ino})
	return ino
}

// file adds a regular file whose content lies in the data device.
func (m *image) file(path string, content []byte) *erofs.Inode {
	const header = 512 // as if of a tar
	off := int64(len(m.dev.data)) + header
	m.dev.data = append(m.dev.data, bytes.Repeat([]byte{0xAA}, header)...)
	m.dev.data = append(m.dev.data, content...)
	m.dev.data = append(m.dev.data, make([]byte, -len(content)&511)...)
	ino := &erofs.Inode{Mode: unix.S_IFREG | 0o644, Size: int64(len(content))}
	if len(content) > 0 {
		ino.Extents = []erofs.Extent{{DeviceOffset: off, Size: int64(len(content))}}
	}
	return m.add(path, ino)
}

// write writes the metadata image into a new directory, and returns what to mount.
func (m *image) write(t testing.TB, id string) Image {
	t.Helper()
	path := filepath.Join(t.TempDir(), "metadata")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := erofs.Write(f, m.root, erofs.Options{BlockSize: 512, DeviceSize: m.dev.Size()}); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return Image{ID: id, Metadata: path, Device: m.dev}
}

// mountImage mounts img at a new directory until the end of the test.
func mountImage(t testing.TB, s *Server, img Image) string {
	t.Helper()
	target := t.TempDir()
	if err := s.Mount(t.Context(), img, target); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Unmount(target); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return target
}

// noise is n pseudo-random bytes.
func noise(seed int64, n int) []byte {
	p := make([]byte, n)
	rand.New(rand.NewSource(seed)).Read(p)
	return p
}

// richImage is a tree with all that a tree can have.
func richImage() *image {
	m := newImage()
	m.root.Mode = unix.S_IFDIR | 0o1777
	m.add("sizes", dir())
	for i, n := range []int{0, 1, 511, 512, 513, 4095, 4096, 4097, 65536, 100_000, 131_072, 3_000_001} {
		m.file(fmt.Sprintf("sizes/%d", n), noise(int64(i), n))
	}
	m.add("sizes/inline", &erofs.Inode{Mode: unix.S_IFREG | 0o600, Size: 1000, Data: noise(100, 1000)})
	m.add("sizes/inline-large", &erofs.Inode{Mode: unix.S_IFREG | 0o600, Size: 50_000, Data: noise(101, 50_000)})
	m.add("sparse", dir())
	m.add("sparse/hole", &erofs.Inode{Mode: unix.S_IFREG | 0o644, Size: 1 << 20})
	part := m.file("sparse/middle", noise(7, 8192))
	part.Extents[0].FileOffset, part.Size = 64<<10, 1_000_003
	m.add("sparse/huge", &erofs.Inode{Mode: unix.S_IFREG | 0o644, Size: 5<<30 + 17, Extents: []erofs.Extent{
		{FileOffset: 4<<30 + 4096, DeviceOffset: part.Extents[0].DeviceOffset, Size: 4096}}})
	m.add("links", dir())
	one := m.file("links/one", []byte("linked"))
	m.add("links/two", one)
	m.add("three", one)
	m.add("links/symlink", &erofs.Inode{Mode: unix.S_IFLNK | 0o777, Data: []byte("../three"), Size: 8})
	long := strings.Repeat("x/", 1500)
	m.add("links/long", &erofs.Inode{Mode: unix.S_IFLNK | 0o777, Data: []byte(long), Size: int64(len(long))})
	m.add("special", dir())
	m.add("special/null", &erofs.Inode{Mode: unix.S_IFCHR | 0o666, Rdev: uint32(unix.Mkdev(1, 3))})
	m.add("special/block", &erofs.Inode{Mode: unix.S_IFBLK | 0o640, Rdev: uint32(unix.Mkdev(259, 70000))})
	m.add("special/fifo", &erofs.Inode{Mode: unix.S_IFIFO | 0o600})
	m.add("special/socket", &erofs.Inode{Mode: unix.S_IFSOCK | 0o755})
	m.add("special/suid", &erofs.Inode{Mode: unix.S_IFREG | 0o6755})
	times := m.file("special/times", []byte("old"))
	times.UID, times.GID, times.Mtime, times.MtimeNsec = 70_000, 4_000_000_000, -5, 123_456_789
	m.add("special/future", &erofs.Inode{Mode: unix.S_IFREG, Mtime: 1 << 33, MtimeNsec: 999_999_999})
	attrs := m.file("special/attrs", []byte("with attributes"))
	attrs.Xattrs = []erofs.Xattr{
		{Name: "security.capability", Value: fileCapability},
		{Name: "user.empty"},
		{Name: "user.large", Value: noise(9, 1500)},
		{Name: "user.text", Value: []byte("value")},
	}
	many := m.add("many", dir())
	for i := range 3000 {
		many.Entries = append(many.Entries, erofs.Dirent{Name: fmt.Sprintf("file-%04d", i), Inode: one})
	}
	m.file("many/"+strings.Repeat("n", 255), []byte("long name"))
	m.add("empty", dir())
	return m
}

// fileCapability is security.capability of "cap_net_raw=ep", vfs_cap_data of revision 2.
var fileCapability = []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

// content returns what a regular file of m holds, up to n bytes from off.
func (m *image) content(ino *erofs.Inode, off, n int64) []byte {
	p := make([]byte, min(n, ino.Size-off))
	if ino.Data != nil {
		copy(p, ino.Data[off:])
	}
	for _, e := range ino.Extents {
		from, to := max(off, e.FileOffset), min(off+int64(len(p)), e.FileOffset+e.Size)
		if from < to {
			copy(p[from-off:to-off], m.dev.data[e.DeviceOffset+from-e.FileOffset:])
		}
	}
	return p
}

// compare compares the tree at path with ino, all the way down.
func (m *image) compare(t *testing.T, path string, ino *erofs.Inode, nlinks map[*erofs.Inode]int, inos map[*erofs.Inode]uint64) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Errorf("lstat: %v", &os.PathError{Op: "lstat", Path: path, Err: err})
		return
	}
	type attrs struct {
		mode, uid, gid uint32
		mtime, nsec    int64
		rdev           uint64
		size           int64
		nlink          int
	}
	want := attrs{ino.Mode, ino.UID, ino.GID, ino.Mtime, int64(ino.MtimeNsec), 0, ino.Size, nlinks[ino]}
	got := attrs{st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec, st.Rdev, st.Size, int(st.Nlink)}
	switch ino.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		want.size, got.size = 0, 0
		m.compareDir(t, path, ino, nlinks, inos)
	case unix.S_IFCHR, unix.S_IFBLK:
		want.rdev = unix.Mkdev(ino.Rdev>>8&0xfff, ino.Rdev&0xff|ino.Rdev>>12&0xfff00)
	case unix.S_IFLNK:
		if target, err := os.Readlink(path); target != string(ino.Data) {
			t.Errorf("%s: symlink to %q (%v), want %q", path, target, err, ino.Data)
		}
	case unix.S_IFREG:
		if _, seen := inos[ino]; !seen {
			m.compareFile(t, path, ino)
		}
		if st.Blocks < (st.Size+511)/512 {
			t.Errorf("%s: %d blocks for %d bytes", path, st.Blocks, st.Size)
		}
	}
	if got != want {
		t.Errorf("%s: attributes %+v, want %+v", path, got, want)
	}
	if same, ok := inos[ino]; ok && same != st.Ino {
		t.Errorf("%s: inode %d, its other name has %d", path, st.Ino, same)
	}
	inos[ino] = st.Ino
	compareXattrs(t, path, ino)
}

func (m *image) compareDir(t *testing.T, path string, ino *erofs.Inode, nlinks map[*erofs.Inode]int, inos map[*erofs.Inode]uint64) {
	entries, err := os.ReadDir(path)
	if err != nil || len(entries) != len(ino.Entries) {
		t.Errorf("%s: %d entries (%v), want %d", path, len(entries), err, len(ino.Entries))
		return
	}
	byName := map[string]*erofs.Inode{}
	for _, e := range ino.Entries {
		byName[e.Name] = e.Inode
	}
	for _, e := range entries {
		child := byName[e.Name()]
		if child == nil {
			t.Errorf("%s: unexpected entry %s", path, e.Name())
			continue
		}
		m.compare(t, filepath.Join(path, e.Name()), child, nlinks, inos)
	}
	if _, err := os.Lstat(filepath.Join(path, "no such name")); !os.IsNotExist(err) {
		t.Errorf("%s: a name that does not exist: %v", path, err)
	}
}

func (m *image) compareFile(t *testing.T, path string, ino *erofs.Inode) {
	f, err := os.Open(path)
	if err != nil {
		t.Error(err)
		return
	}
	defer f.Close()
	const part = 1 << 20
	for _, off := range []int64{0, 4<<30 - 4096, ino.Size - part} {
		if off = max(off, 0); off >= ino.Size {
			continue
		}
		want := m.content(ino, off, part)
		got := make([]byte, len(want))
		if _, err := io.ReadFull(io.NewSectionReader(f, off, part), got); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: content from %d differs (%v)", path, off, err)
		}
	}
	if n, err := f.ReadAt(make([]byte, 1), ino.Size); n != 0 || err != io.EOF {
		t.Errorf("%s: %d bytes (%v) at its end", path, n, err)
	}
}

func compareXattrs(t *testing.T, path string, ino *erofs.Inode) {
	list := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, list)
	if err != nil {
		t.Errorf("%s: listxattr: %v", path, err)
		return
	}
	if got := strings.Count(string(list[:n]), "\x00"); got != len(ino.Xattrs) {
		t.Errorf("%s: attributes %q, want %d", path, list[:n], len(ino.Xattrs))
	}
	for _, x := range ino.Xattrs {
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, x.Name, value)
		if err != nil || !bytes.Equal(value[:max(n, 0)], x.Value) {
			t.Errorf("%s: %s = %q (%v), want %q", path, x.Name, value[:max(n, 0)], err, x.Value)
		}
	}
}

// nlinks are the link counts of the tree under ino.
func nlinks(ino *erofs.Inode) map[*erofs.Inode]int {
	n := map[*erofs.Inode]int{ino: 2}
	var walk func(*erofs.Inode)
	walk = func(d *erofs.Inode) {
		for _, e := range d.Entries {
			n[e.Inode]++
			if e.Inode.Mode&unix.S_IFMT == unix.S_IFDIR {
				n[e.Inode] = 2
				n[d]++
				walk(e.Inode)
			}
		}
	}
	walk(ino)
	return n
}

package fs

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs/erofstest"
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

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
}

// newServer starts a Server and checks at the end of the test that Close leaves nothing behind.
func newServer(t testing.TB, o Options) *Server {
	t.Helper()
	needRoot(t)
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
	return Image{ID: id, Metadata: m.metadata(t, nil), Device: m.dev}
}

func (m *image) metadata(t testing.TB, parts []int64) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "metadata")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := erofs.Write(f, m.root, erofs.Options{BlockSize: 512, DeviceSize: m.dev.Size(), Parts: parts}); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
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
func noise(seed byte, n int) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(p)
	return p
}

// madeImage is a tree of package erofstest.
func madeImage(make func(*erofstest.Maker) *erofs.Inode) *image {
	const size = 4 << 20
	m := &erofstest.Maker{Rand: rand.New(rand.NewPCG(1, 2)), BlockSize: 512, DeviceSize: size}
	return &image{root: make(m), dev: &testDevice{data: noise(3, size)}}
}

// compare compares the mount at target with m.
func (m *image) compare(t *testing.T, target string) {
	t.Helper()
	options := erofstest.Options{MaxContent: 64 << 20}
	want, err := erofstest.ListTree(m.root, bytes.NewReader(m.dev.data), options)
	if err != nil {
		t.Fatal(err)
	}
	got, err := erofstest.Walk(target, options)
	if err != nil {
		t.Fatal(err)
	}
	if diff := erofstest.Diff(got, want); diff != "" {
		t.Error(diff)
	}
}

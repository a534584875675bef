package fs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// What runs in other processes than the test: the daemon, whose parent, the test, keeps its descriptors and kills it, and the reader.

// daemonArgs is what a daemon is started with.
type daemonArgs struct {
	Mode     Mode
	Dir      string
	Metadata string
	Direct   *Direct
	Targets  []string // where the image is mounted
	NoResend bool
	Step     string // of requests, at which it kills itself,
	Nth      int64  // for the nth time
	Stall    bool   // reads of the Device wait, and each is told on standard output
	Ahead    bool   // it reads ahead, again and again
	Kept     []string
}

// The descriptors of a daemon: the socket to its parent, then what is kept.
const daemonSocket = 3

// resumeImage is the image of the resume tests.
func resumeImage() *image {
	m := newImage()
	m.dev.delay = 500 * time.Microsecond // so that requests are in flight
	for d := range 4 {
		m.add(fmt.Sprintf("dir%d", d), dir())
		for f := range 20 {
			m.file(fmt.Sprintf("dir%d/file%02d", d, f), noise(byte(f), 100+f*f*150))
		}
	}
	m.file("large", noise(1, 3<<20))
	return m
}

// socketKeeper is the Keeper of a daemon: its parent.
type socketKeeper struct {
	mu   sync.Mutex
	kept map[string]*os.File
}

// keepMessage is what a daemon tells its parent, with a descriptor if it keeps something. The answer is one byte.
type keepMessage struct {
	Name string
	Drop bool
}

func (k *socketKeeper) send(m keepMessage, rights []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := unix.Sendmsg(daemonSocket, b, rights, nil, 0); err != nil {
		return err
	}
	n, err := unix.Read(daemonSocket, make([]byte, 1))
	if err == nil && n != 1 {
		err = io.ErrUnexpectedEOF
	}
	return err
}

func (k *socketKeeper) Keep(name string, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = raw.Control(func(fd uintptr) { sent = k.send(keepMessage{Name: name}, unix.UnixRights(int(fd))) })
	return errors.Join(err, sent)
}

func (k *socketKeeper) Drop(name string) error {
	return k.send(keepMessage{Name: name, Drop: true}, nil)
}

func (k *socketKeeper) Kept(name string) *os.File {
	f := k.kept[name]
	delete(k.kept, name)
	return f
}

func (k *socketKeeper) KeptNames() (names []string) {
	for name := range k.kept {
		names = append(names, name)
	}
	return names
}

// runDaemon serves until it is killed, or ends orderly, with its mounts, when its standard input ends; "leave" in it leaves them.
func runDaemon(arg string) error {
	var a daemonArgs
	if err := json.Unmarshal([]byte(arg), &a); err != nil {
		return err
	}
	k := &socketKeeper{kept: map[string]*os.File{}}
	for i, name := range a.Kept {
		unix.CloseOnExec(daemonSocket + 1 + i)
		k.kept[name] = os.NewFile(uintptr(daemonSocket+1+i), name)
	}
	m := resumeImage()
	var count atomic.Int64
	o := Options{
		Dir: a.Dir, Mode: a.Mode, Keep: k, noResend: a.NoResend, Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Resolve: func(_ context.Context, id string) (Device, error) { return m.dev, nil },
	}
	if a.Step != "" {
		o.step = func(step string) {
			if step == a.Step && count.Add(1) == a.Nth {
				unix.Kill(os.Getpid(), unix.SIGKILL)
			}
		}
	}
	var serving atomic.Bool
	if a.Stall {
		m.dev.hold = make(chan struct{})
		o.step = func(step string) {
			if step == "registered" && serving.Load() {
				fmt.Println("read")
			}
		}
	}
	s, err := New(o)
	if err != nil {
		return err
	}
	for _, target := range a.Targets {
		if err := s.Mount(context.Background(), Image{ID: "image", Metadata: a.Metadata, Device: m.dev, Direct: a.Direct}, target); err != nil {
			return err
		}
	}
	fmt.Println("serving")
	serving.Store(true)
	if a.Ahead {
		go func() {
			for s.ReadAhead(a.Targets[0], slices.Repeat([]Range{{"large", 0, 3 << 20}}, 5000)) == nil {
			}
		}()
	}
	in, err := io.ReadAll(os.Stdin)
	if err == nil && len(in) == 0 {
		err = s.UnmountAll()
	}
	return errors.Join(err, s.Close())
}

// readerReport is what a reader has seen.
type readerReport struct {
	Passes  int
	Longest time.Duration // of a system call
	Errors  []string
}

// runReader compares the tree at root with resumeImage, again and again, with cold names and data, until its standard input ends, at
// least once, and reports.
func runReader(root string) error {
	m := resumeImage()
	files := map[string][]byte{}
	for _, e := range m.root.Entries {
		if e.Inode.Mode&unix.S_IFMT == unix.S_IFREG {
			x := e.Inode.Extents[0]
			files[e.Name] = m.dev.data[x.DeviceOffset:][:x.Size]
		}
		for _, f := range e.Inode.Entries {
			x := f.Inode.Extents[0]
			files[filepath.Join(e.Name, f.Name)] = m.dev.data[x.DeviceOffset:][:x.Size]
		}
	}
	var ended atomic.Bool
	go func() {
		io.Copy(io.Discard, os.Stdin)
		ended.Store(true)
	}()
	var r readerReport
	for len(r.Errors) == 0 && (r.Passes == 0 || !ended.Load()) {
		r.pass(root, files)
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

func (r *readerReport) pass(root string, files map[string][]byte) {
	r.Passes++
	os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0) // names and inodes
	seen := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		seen++
		name, _ := filepath.Rel(root, path)
		return r.compare(path, files[name])
	})
	if err != nil {
		r.Errors = append(r.Errors, err.Error())
	}
	if seen != len(files) {
		r.Errors = append(r.Errors, fmt.Sprintf("%d files, want %d", seen, len(files)))
	}
}

// compare reads path in pieces, in an order of its own, having had the kernel forget its pages.
func (r *readerReport) compare(path string, want []byte) error {
	step := func(start time.Time) { r.Longest = max(r.Longest, time.Since(start)) }
	start := time.Now()
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	step(start)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Size != int64(len(want)) {
		return fmt.Errorf("%s: %d bytes, want %d, %v", path, st.Size, len(want), err)
	}
	const piece = 256 << 10
	got := make([]byte, piece)
	for _, i := range rand.Perm((len(want) + piece - 1) / piece) {
		off := i * piece
		end := min(off+piece, len(want))
		start := time.Now()
		n, err := unix.Pread(fd, got[:end-off], int64(off))
		step(start)
		if err != nil {
			return &os.PathError{Op: "read", Path: path, Err: err}
		}
		if !bytes.Equal(got[:n], want[off:end]) {
			return fmt.Errorf("%s: %d bytes at %d differ", path, n, off)
		}
	}
	return nil
}

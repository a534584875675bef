// Package fs mounts images: the FUSE session, data devices, trees, and EROFS on top. It asks a Device for bytes and knows
// nothing of registries.
//
// The kernel serves the file system wherever it can. In the modes file and loop, an image is an EROFS mount of its metadata image, an
// ordinary local file, and the only thing that comes here is a read of file data that is not in the page cache, as a READ of the image's
// data device, a file in one FUSE mount for all images. In mode tree, for kernels that cannot do this, each image is a FUSE mount of its
// own, whose every node is answered out of the same metadata image.
//
// A process in a read sees the right bytes or an error, never fewer or others. It can be killed at any time, and no other signal
// disturbs its read.
//
// The process that serves a mount must not map a file of it or execute a program that lies on it: the Go runtime does not know that such
// a thread waits, and if it wants to collect garbage meanwhile, waits for it with all the others that could answer. System calls are fine.
//
// The package does not verify or cache what a Device gives, does not make metadata images (package erofs does), and does not combine
// layers with a writable one (overlayfs does).
package fs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Device is an image's data device: the layers' tars of a chain laid end to end.
type Device interface {
	// ReadAt fills p from off and returns len(p), or less at the end of the device, or an error, which the reader sees as EIO. Less
	// elsewhere is an error too. ctx ends when the reader is killed, or the mount is gone. Called from many goroutines.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
	Size() int64
}

// Mode is a way to mount.
type Mode string

const (
	ModeAuto Mode = "auto"
	ModeFile Mode = "file" // file-backed EROFS
	ModeLoop Mode = "loop" // EROFS over loop devices
	ModeTree Mode = "tree" // the tree served through FUSE
)

// Image is what a mount needs.
type Image struct {
	ID       string // file name of its data device: [a-z0-9]+, unique, and of the same bytes whenever it is used
	Metadata string // path of the metadata image
	Device   Device
}

// DefaultReadAhead is the read-ahead of a mount, see Options. It decides how fast a file is read from a distant registry, and how much
// is fetched in vain around the page faults of mapped programs. Measured with 5 ms for each read of the device, 64 MiB read from
// start to end, and a program of 26 MB started that touches 14.0 MB (counted in chunks of 128 KiB):
//
//	read-ahead  64 MiB file   program fetches, starts in
//	   128 KiB      42 MB/s   14.7 MB          750 ms
//	   512 KiB     160 MB/s   16.4 MB          300 ms
//	     1 MiB     310 MB/s   19.0 MB          200 ms
//	     4 MiB     730 MB/s   22.5 MB          100 ms
//
// Random reads fetch nothing in vain, whatever it is.
const DefaultReadAhead = 512 << 10

// Options of a Server.
type Options struct {
	Dir       string       // where the FUSE of the data devices is mounted; created. A probe writes a file beside it
	Mode      Mode         // ModeAuto probes
	ReadAhead int64        // bytes the kernel reads ahead of a sequential reader of a file; 0 is DefaultReadAhead
	Log       *slog.Logger // nil is slog.Default()
}

// Server mounts images. Its methods may be called from many goroutines.
//
// LOCK ORDER: none. Nobody holds two of this package's locks at once, and only create is held across system calls.
type Server struct {
	dir       string
	mode      Mode
	reason    string
	readAhead int64
	log       *slog.Logger
	memory    *memory
	patience  time.Duration // releaseTimeout
	devices   *devices
	session   *session // of devices; nil in mode tree

	create sync.Mutex // held while an EROFS superblock is created, to tell its bdi

	mu     sync.Mutex
	closed bool
	busy   sync.WaitGroup    // calls of Mount and Unmount
	mounts map[string]*mount // by target
	trees  map[*tree]bool    // sessions of trees that have not ended, mounted or detached
}

// mount is a mounted image, or one being mounted or unmounted.
type mount struct {
	device *device // modes file and loop
	tree   *tree   // mode tree
	ready  bool
}

// New validates o, tries the way to mount that it asks for, or all in order for ModeAuto, and returns a Server, which serves until
// Close.
func New(o Options) (*Server, error) {
	if o.Dir == "" {
		return nil, errors.New("no directory for the data devices")
	}
	if o.ReadAhead == 0 {
		o.ReadAhead = DefaultReadAhead
	}
	if o.ReadAhead < 0 {
		return nil, fmt.Errorf("read-ahead of %d bytes", o.ReadAhead)
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	s := &Server{
		dir:       dir,
		readAhead: o.ReadAhead,
		log:       o.Log,
		memory:    newMemory(),
		patience:  releaseTimeout,
		devices:   newDevices(),
		mounts:    map[string]*mount{},
		trees:     map[*tree]bool{},
	}
	if err := s.choose(o.Mode); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// startDevices mounts the FUSE of the data devices.
func (s *Server) startDevices() error {
	if s.session != nil {
		return nil
	}
	// A mount whose daemon has died is in the way.
	if _, err := os.Stat(s.dir); errors.Is(err, unix.ENOTCONN) {
		if err := unmount(s.dir, unix.MNT_DETACH); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	session, err := mountDevices(s.dir, s.devices, s.sessionOptions())
	s.session = session
	return err
}

func (s *Server) stopDevices() error {
	if s.session == nil {
		return nil
	}
	err := s.session.close()
	s.session = nil
	return err
}

func (s *Server) sessionOptions() sessionOptions {
	return sessionOptions{log: s.log, memory: s.memory}
}

// Mode returns the mode in use, and, for ModeAuto, why the better ones were not taken.
func (s *Server) Mode() (Mode, string) { return s.mode, s.reason }

// Mount mounts img read-only at target, an existing directory. Several mounts may share a Device by the same ID; that of the first
// is used.
func (s *Server) Mount(ctx context.Context, img Image, target string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if !regexp.MustCompile(`^[a-z0-9]+$`).MatchString(img.ID) {
		return fmt.Errorf("mount: image ID %q is not of [a-z0-9]", img.ID)
	}
	target, err := filepath.Abs(target)
	if err != nil {
		return err
	}
	return s.mount(img, target)
}

func (s *Server) mount(img Image, target string) (err error) {
	m := &mount{}
	if err := s.reserve(target, m); err != nil {
		return err
	}
	defer s.busy.Done()
	if s.mode == ModeTree {
		err = s.mountTree(m, img, target)
	} else {
		err = s.mountErofs(m, img, target)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		delete(s.mounts, target)
		return fmt.Errorf("mount image %s: %w", img.ID, err)
	}
	m.ready = true
	return nil
}

// reserve enters m as the mount of target.
func (s *Server) reserve(target string, m *mount) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errors.New("mount: server is closed")
	}
	if s.mounts[target] != nil {
		return fmt.Errorf("mount: %s: %w", target, unix.EBUSY)
	}
	s.mounts[target] = m
	s.busy.Add(1)
	return nil
}

func (s *Server) mountErofs(m *mount, img Image, target string) error {
	dev, err := s.devices.acquire(img.ID, img.Device)
	if err != nil {
		return err
	}
	path := filepath.Join(s.dir, img.ID)
	if s.mode == ModeFile {
		err = s.mountFile(img.Metadata, path, target)
	} else {
		err = s.mountLoop(img.Metadata, path, target)
	}
	if err != nil {
		s.devices.release(dev)
		return err
	}
	m.device = dev
	return nil
}

// releaseTimeout bounds the wait for the kernel to let go of an unmounted image. It takes a moment, loop devices a few milliseconds,
// unless somebody still uses it, be it another mount namespace that is just being made.
const releaseTimeout = 5 * time.Second

// Unmount undoes Mount. Unmounting what is not mounted is no error. After Unmount has returned nil, the image's Device is not used any
// more, unless by another mount. A mount that is in use is detached from the directory tree and served until its last user is gone;
// the error is then EBUSY, and calling Unmount again returns nil.
func (s *Server) Unmount(target string) error {
	target, err := filepath.Abs(target)
	if err != nil {
		return err
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.busy.Add(1)
	s.mu.Unlock()
	defer s.busy.Done()
	return s.unmount(target)
}

func (s *Server) unmount(target string) error {
	s.mu.Lock()
	m := s.mounts[target]
	if m != nil && !m.ready {
		s.mu.Unlock()
		return fmt.Errorf("unmount %s: is being mounted or unmounted: %w", target, unix.EBUSY)
	}
	if m != nil {
		m.ready = false
	}
	s.mu.Unlock()

	err := unmount(target, 0)
	if errors.Is(err, unix.EBUSY) {
		err = unmount(target, unix.MNT_DETACH)
	}
	s.mu.Lock()
	if err == nil {
		delete(s.mounts, target)
	} else if m != nil {
		m.ready = true
	}
	s.mu.Unlock()
	if err != nil || m == nil {
		return err
	}
	return s.released(m, target)
}

// released waits until the kernel has let go of m, which is unmounted.
func (s *Server) released(m *mount, target string) error {
	var gone <-chan struct{}
	if m.tree != nil {
		gone = m.tree.session.done
	} else if s.devices.release(m.device) {
		gone = m.device.idle
	} else {
		return nil
	}
	timeout := time.NewTimer(s.patience)
	defer timeout.Stop()
	select {
	case <-gone:
		return nil
	case <-timeout.C:
		return fmt.Errorf("unmount %s: detached, but still in use: %w", target, unix.EBUSY)
	}
}

// Close unmounts everything and ends the sessions. What still uses a mount gets errors from then on, and Close an EBUSY.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.busy.Wait()
	s.mu.Lock()
	targets := slices.Collect(maps.Keys(s.mounts))
	s.mu.Unlock()
	var errs []error
	for _, target := range targets {
		errs = append(errs, s.unmount(target))
	}
	errs = append(errs, s.stopDevices())
	s.mu.Lock()
	trees := slices.Collect(maps.Keys(s.trees))
	s.mu.Unlock()
	for _, t := range trees {
		errs = append(errs, t.session.abort())
	}
	return errors.Join(errs...)
}

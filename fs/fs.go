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
// a thread waits, and if it wants to collect garbage meanwhile, waits for it with all the others that could answer. Nor must it make system
// calls that ask for an answer: killed meanwhile it could not die (see aside).
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
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Device is an image's data device: the layers' tars of a chain laid end to end.
type Device interface {
	// ReadAt fills p from off and returns len(p), or less at the end of the device, or an error, which the reader sees as EIO. Less
	// elsewhere is an error too. An empty p asks whether it may be read at all. ctx ends when the reader is killed, or the mount is gone. Called from many goroutines.
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
	Direct   *Direct // if not nil, another way to the same, which is taken if the mode allows it
	Started  bool    // a container of it has started before: see Server.Started
}

// DefaultReadAhead is the read-ahead of a mount, see Options: little, because the kernel knows neither chunks nor what a request costs, and reads ahead and around page
// faults whatever is there. A device that is far away reads ahead itself, as package cache does. Until ready, four images with a static profile fetched, at 512 and at 16 KiB:
// python-app 50.2 and 45.4 MB in 228 and 156 requests, node-app 30.3 and 26.6 MB in 70 and 42, postgres 25.0 and 21.0 MB in 83 and 53, nginx 23.9 and 16.5 MB in 143 and 67.
const DefaultReadAhead = 16 << 10

// farReadAhead is that of a mount whose data is all here, or whose containers have started: what the kernel reads in vain then keeps no start waiting.
// Reading a file of 64 MiB that is here (BenchmarkReadLarge, one machine), at 16 and 512 KiB: 1.6 and 2.0 GB/s in mode file, 1.3 and 1.8 loop, 1.1 and 1.2 tree; 5 ms away, in mode file:
// 253 and 283 MB/s.
const farReadAhead = 512 << 10

// Options of a Server.
type Options struct {
	Dir       string       // where the FUSE of the data devices is mounted; created. A probe writes a file beside it
	Mode      Mode         // ModeAuto probes
	ReadAhead int64        // bytes the kernel reads ahead of a sequential reader of a file; 0 is DefaultReadAhead
	Log       *slog.Logger // nil is slog.Default()

	// Foreign mounts images with nosuid and nodev: to be looked at by users of the host, where they must give nobody privileges.
	// Without it they are the root file systems of containers, in directories that are root's alone.
	Foreign bool

	// Keep makes mounts outlive the process: its successor serves them on, and processes that read meanwhile wait for it. Nil: mounts
	// end with the process.
	Keep Keeper
	// Resolve returns the Device of an image that a predecessor mounted, when it is first read. It may block, and reads wait, until the
	// caller is ready. A Device that is an io.Closer is closed when it is not used any more. Needed with Keep.
	Resolve func(ctx context.Context, id string) (Device, error)

	step     func(step string) // see session.step
	noResend bool              // see sessionOptions
}

// Server mounts images. Its methods may be called from many goroutines.
//
// LOCK ORDER: replacing before all others. Nobody holds two of these at once, and only replacing and creating are held across system calls.
type Server struct {
	dir       string
	want      Mode // of Options
	mode      Mode
	reason    string
	readAhead int64
	log       *slog.Logger
	memory    *memory
	patience  time.Duration // releaseTimeout
	keep      Keeper
	resolve   func(ctx context.Context, id string) (Device, error)
	options   sessionOptions // of all sessions
	devices   *devices       // of new mounts; nil in mode tree
	former    []*devices     // of a predecessor, which have no new mounts
	resumed   []*about       // the sessions that were resumed

	failedReads atomic.Int64

	creating  sync.Mutex // held while an EROFS superblock is created, to tell its bdi
	replacing sync.Mutex // held by Replace

	mu       sync.Mutex
	closed   bool
	busy     sync.WaitGroup    // calls of Mount and Unmount
	mounts   map[string]*mount // by target
	trees    map[*tree]bool    // sessions of trees that have not ended, mounted or detached
	lastName int               // number in the last name given to a kept session
}

// mount is a mounted image, or one being mounted or unmounted.
type mount struct {
	id       string
	tree     *tree // mode tree, or
	devices  *devices
	device   *device     // nil for a direct mount
	record   int         // in the state of devices' session
	metadata string      // path
	bdi      []string    // that have the read-ahead; none of a predecessor's mount
	ahead    *os.Process // of a ReadAhead

	ready   bool
	resumed bool // mounted by a predecessor
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
	if o.Keep != nil && o.Resolve == nil {
		return nil, errors.New("no way to resolve the images of a predecessor")
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	s := &Server{
		dir:       dir,
		want:      o.Mode,
		readAhead: o.ReadAhead,
		log:       o.Log,
		memory:    newMemory(),
		patience:  releaseTimeout,
		keep:      o.Keep,
		resolve:   o.Resolve,
		mounts:    map[string]*mount{},
		trees:     map[*tree]bool{},
	}
	s.options = sessionOptions{log: o.Log, memory: s.memory, step: o.step, noResend: o.noResend, onFail: func() { s.failedReads.Add(1) }}
	if o.Foreign {
		s.options.flags = unix.MS_NOSUID | unix.MS_NODEV
	}
	if s.keep != nil {
		s.resume()
	}
	if err := s.choose(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// startDevices mounts the FUSE of the data devices.
func (s *Server) startDevices() error {
	if s.devices != nil {
		return nil
	}
	for unix.Unmount(s.dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
		// A mount that nobody serves, or nobody for new mounts, is in the way.
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	d, err := mountDevices(s.dir, s.options)
	if err == nil {
		s.devices = d
	}
	return err
}

// keepDevices makes the mounts of data devices to come outlive the process.
func (s *Server) keepDevices() error {
	if s.devices == nil || s.keep == nil || s.devices.session.name != "" {
		return nil
	}
	a := about{Kind: kindDevices, Mode: s.mode, Want: s.want, Reason: s.reason}
	return s.devices.session.keepAs(s.newName(), s.keep, a, nil)
}

// stopDevices undoes startDevices, unless a predecessor's mounts use them.
func (s *Server) stopDevices() error {
	if s.devices == nil || s.devices.session.name != "" {
		return nil
	}
	err := s.devices.session.close()
	s.devices = nil
	return err
}

// newName returns a name to keep a session by.
func (s *Server) newName() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastName++
	return keptName(s.lastName)
}

// Mode returns the mode in use, and, for ModeAuto, why the better ones were not taken.
func (s *Server) Mode() (Mode, string) { return s.mode, s.reason }

// MountedImage is an image that is mounted at a target.
type MountedImage struct {
	ID     string
	Target string
	Direct bool // from local files: the daemon serves nothing of it
}

// Mounts lists what is mounted, by this Server or a predecessor of it, by target.
func (s *Server) Mounts() (list []MountedImage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for target, m := range s.mounts {
		if m.ready {
			list = append(list, MountedImage{m.id, target, m.tree == nil && m.device == nil})
		}
	}
	slices.SortFunc(list, func(a, b MountedImage) int { return strings.Compare(a.Target, b.Target) })
	return list
}

// FailedReads returns how many reads have ended in an I/O error since New.
func (s *Server) FailedReads() int64 { return s.failedReads.Load() }

// Mounted reports whether an image is mounted at target, by this Server or a predecessor of it.
func (s *Server) Mounted(target string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.mounts[filepath.Clean(target)]
	return m != nil && m.ready
}

// Mount mounts img read-only at target, an existing directory. Several mounts may share a Device by the same ID; that of the first
// is used. If a predecessor has mounted the image there, nothing is done.
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

// Started says that a first container of the image with the metadata image of this path has started: the kernel may read further ahead in what is opened from now on
// in its mounts, but for those of a predecessor, which keep the read-ahead that they have.
func (s *Server) Started(metadata string) {
	s.mu.Lock()
	var bdis []string
	for _, m := range s.mounts {
		if m.ready && m.metadata == metadata {
			bdis = append(bdis, m.bdi...)
		}
	}
	s.mu.Unlock()
	if len(bdis) > 0 {
		s.setReadAhead(bdis, false, true)
	}
}

// Close ends the Server. Without a Keeper it unmounts everything: what still uses a mount gets errors from then on, and Close an EBUSY.
// With one it leaves the mounts to a successor: no Device is used when it returns, but goroutines wait for requests until the process
// ends, which must be soon.
func (s *Server) Close() error {
	if s.keep == nil {
		return s.UnmountAll()
	}
	s.end()
	errs := []error{s.stopDevices()}
	for _, session := range s.sessions() {
		if session.name != "" {
			session.detach()
		} else {
			errs = append(errs, session.close())
		}
	}
	return errors.Join(errs...)
}

// UnmountAll unmounts everything, for good, and ends the sessions. What still uses a mount gets errors from then on, and UnmountAll an
// EBUSY. Only Close may be called after it.
func (s *Server) UnmountAll() error {
	s.end()
	s.mu.Lock()
	targets := slices.Collect(maps.Keys(s.mounts))
	s.mu.Unlock()
	var errs []error
	for _, target := range targets {
		errs = append(errs, s.unmount(target))
	}
	if s.devices != nil {
		errs = append(errs, s.devices.session.close())
		s.devices = nil
	}
	for _, session := range s.sessions() {
		errs = append(errs, session.abort())
	}
	s.former = nil
	return errors.Join(errs...)
}

// Rest gives back what memory reads have taken, for when nobody reads.
func (s *Server) Rest() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for t := range s.trees {
		t.rest()
	}
}

// end refuses calls of Mount and Unmount, and waits for those in progress.
func (s *Server) end() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.busy.Wait()
}

// sessions returns all that have not ended.
func (s *Server) sessions() (all []*session) {
	if s.devices != nil {
		all = append(all, s.devices.session)
	}
	for _, d := range s.former {
		all = append(all, d.session)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for t := range s.trees {
		all = append(all, t.session)
	}
	return all
}

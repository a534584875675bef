package fs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

// Opcodes of fuse_kernel.h that the session knows itself.
const (
	opLookup      = 1
	opRead        = 15
	opInit        = 26
	opReadDir     = 28
	opInterrupt   = 36
	opReadDirPlus = 44
)

const (
	// maxRead bounds one READ, and so its buffer. 1 MiB is the kernel's default limit (256 pages).
	maxRead = 1 << 20
	// maxBackground bounds the READs that the kernel has in flight on one connection, those of asynchronous direct I/O and of
	// read-ahead. The kernel's 12 would let one container's read-ahead into a slow registry stop all others, whose data is cached.
	maxBackground = 4096
	// maxRequest is the size of a reader's buffer: the least that the kernel takes (FUSE_MIN_READ_BUFFER), as nobody writes.
	maxRequest = 8 << 10
	maxWrite   = 4 << 10
	// maxPayload bounds what an answer of the protocol server holds: a directory listing or an extended attribute, whose limit it is.
	maxPayload = 64 << 10
	// minReaders is how many goroutines read requests when there are none, and so about how many threads a session costs.
	minReaders = 2
	// maxReply is maxPayload with the header and the largest fixed part.
	maxReply = maxPayload + 512
	// resent is set in the unique of a request that the kernel sends again (FUSE_NOTIFY_RESEND).
	resent = 1 << 63
	// forever is how long the kernel may keep what cannot change.
	forever = 10 * 365 * 24 * time.Hour
)

const outHeaderSize = int(unsafe.Sizeof(fuse.OutHeader{}))

// filesystem is what a session serves. All methods but read answer at once, from memory or a memory map, and are called by go-fuse's
// protocol server; read may wait for the network.
type filesystem interface {
	fuse.RawFileSystem
	// read fills p from off of the file node and returns len(p), or less at the end of the file.
	read(ctx context.Context, node uint64, off int64, p []byte) (int, error)
}

// session is one FUSE connection: a descriptor of /dev/fuse, its mount, and the goroutines that serve it.
//
// go-fuse's protocol server encodes and decodes, and answers all that needs no waiting on the goroutine that read the request. The
// session itself answers READ, and INTERRUPT, because it knows the READs in flight. A READ may wait for the network, so before it does,
// it sees to it that another goroutine reads requests.
//
// A session outlives its process if it is kept (see keepAs): its successor replays INIT, finds the requests in flight in their slots
// (see state), and everything else means to it what it meant before: node ids are a function of what they name, handles are recorded,
// and FORGET is ignored.
type session struct {
	target  string
	device  *os.File // of /dev/fuse
	fd      int      // device's
	dev     uint64   // device number of the mount; its minor number is the connection's
	fs      filesystem
	proto   *fuse.ProtocolServer
	state   *state
	init    []byte // the kernel's INIT request
	keep    Keeper // nil if name is empty
	name    string // that it is kept by
	log     *slog.Logger
	failed  LogLimit          // READs
	memory  *memory           // shared by a Server's sessions
	step    func(step string) // a test's: called where a process may die
	onFail  func()            // sessionOptions.onFail
	ctx     context.Context   // ends when the connection does; the parent of the READs' contexts
	cancel  context.CancelFunc
	done    chan struct{}  // closed when the connection has ended and all goroutines have
	work    sync.WaitGroup // all goroutines but the one that closes done
	answers sync.WaitGroup // READs in flight

	readers atomic.Int32 // goroutines that read or are about to

	mu     sync.Mutex          // held when frozen is set, so that no READ begins after it
	frozen atomic.Bool         // nothing is answered any more: what is in flight is the successor's
	reads  map[uint64]*reading // in flight, by unique
}

// reading is a READ in flight.
type reading struct {
	slot    slot
	in      fuse.ReadIn
	ctx     context.Context
	cancel  context.CancelFunc
	watched bool // guarded by session.mu
}

// sessionOptions say how to mount and serve a session.
type sessionOptions struct {
	flags    uintptr // of mount(2)
	proto    fuse.MountOptions
	log      *slog.Logger
	memory   *memory
	step     func(step string)
	noResend bool   // a test's: resume as on a kernel without FUSE_NOTIFY_RESEND
	ended    func() // called once, when the session has ended
	onFail   func() // called when a read ends in an I/O error; nil for nothing
}

// newSession mounts f at target and serves it until it is unmounted everywhere. It takes st.
func newSession(target string, f filesystem, st *state, o sessionOptions) (*session, error) {
	device, err := mountFUSE(target, o.flags)
	if err != nil {
		return nil, errors.Join(err, st.close())
	}
	s := makeSession(target, device, f, st, o)
	err = s.handshake()
	if err == nil {
		s.dev, err = deviceNumber(target)
	}
	if err != nil {
		unix.Unmount(target, unix.MNT_DETACH)
		s.device.Close()
		return nil, errors.Join(fmt.Errorf("mount FUSE at %s: %w", target, err), st.close())
	}
	s.start(o.ended)
	return s, nil
}

func makeSession(target string, device *os.File, f filesystem, st *state, o sessionOptions) *session {
	o.proto.MaxWrite = maxRead // go-fuse has one number for both
	o.proto.MaxBackground = maxBackground
	o.proto.DisabledCapabilities |= fuse.CAP_PASSTHROUGH // would make EROFS above a stacked file system, which it refuses to be
	o.proto.ExtraCapabilities |= fuse.CAP_HAS_RESEND
	o.proto.Logger = slog.NewLogLogger(o.log.Handler(), slog.LevelDebug)
	s := &session{
		target: target,
		device: device,
		fd:     int(device.Fd()),
		fs:     f,
		proto:  fuse.NewProtocolServer(f, &o.proto),
		state:  st,
		log:    o.log,
		memory: o.memory,
		step:   o.step,
		onFail: o.onFail,
		done:   make(chan struct{}),
		reads:  map[uint64]*reading{},
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// start starts the goroutines.
func (s *session) start(ended func()) {
	s.readers.Store(minReaders)
	for range minReaders {
		s.work.Go(s.serve)
	}
	go func() {
		s.work.Wait()
		s.cancel()
		s.device.Close()
		s.state.close()
		if !s.frozen.Load() {
			s.drop()
		}
		if ended != nil {
			ended()
		}
		close(s.done)
	}()
}

// handshake answers the kernel's first request, INIT, and keeps it.
func (s *session) handshake() error {
	req, reply := make([]byte, maxRequest), make([]byte, maxReply)
	n, err := readRequest(s.fd, req)
	if err != nil {
		return fmt.Errorf("read INIT: %w", err)
	}
	if op := header(req[:n]).Opcode; op != opInit {
		return fmt.Errorf("first request has opcode %d, not INIT", op)
	}
	s.init = slices.Clone(req[:n])
	n, status := s.proto.HandleRequest([][]byte{req[:n]}, [][]byte{reply})
	if !status.Ok() || n < outHeaderSize+int(unsafe.Sizeof(fuse.InitOut{})) {
		return fmt.Errorf("answer INIT: %v", status)
	}
	(*fuse.InitOut)(unsafe.Pointer(&reply[outHeaderSize])).MaxWrite = maxWrite // go-fuse gives that of READ
	s.write(reply[:n])
	return nil
}

// at tells a test where the session is with a request.
func (s *session) at(step string) {
	if s.step != nil {
		s.step(step)
	}
}

// serve reads and answers requests until the connection ends, or enough others do.
func (s *session) serve() {
	for {
		sl := s.state.get()
		s.state.prepare(sl)
		n, err := readRequest(s.fd, sl.req)
		waiting := s.readers.Add(-1)
		if err != nil {
			s.state.put(sl)
			s.cancel()
			if !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ECONNABORTED) {
				s.log.Error("read FUSE request", "mount", s.target, "error", err)
			}
			return
		}
		s.at("read")
		sl.req = sl.req[:n]
		if isRead(sl.req) {
			r := s.startRead(sl)
			if r == nil {
				return
			}
			if waiting == 0 {
				s.readers.Add(1)
				s.work.Go(s.serve)
			}
			s.read(r)
		} else {
			s.handle(sl)
		}
		if s.readers.Add(1) > minReaders {
			s.readers.Add(-1)
			return
		}
	}
}

// readRequest reads one request from fd. It returns ENODEV after the last unmount.
func readRequest(fd int, p []byte) (int, error) {
	for {
		n, err := unix.Read(fd, p)
		switch {
		case err == unix.EINTR || err == unix.EAGAIN || err == unix.ENOENT: // ENOENT: its caller died while we read it
		case err != nil:
			return 0, err
		case n < int(unsafe.Sizeof(fuse.InHeader{})):
			return 0, fmt.Errorf("request of %d bytes", n)
		default:
			return n, nil
		}
	}
}

// header returns the header of a request, in place. req is the start of an allocation or a slot, hence aligned.
func header(req []byte) *fuse.InHeader { return (*fuse.InHeader)(unsafe.Pointer(&req[0])) }

func isRead(req []byte) bool {
	return header(req).Opcode == opRead && len(req) >= int(unsafe.Sizeof(fuse.ReadIn{}))
}

// readIn returns the READ in a slot, in place.
func (sl slot) readIn() *fuse.ReadIn { return (*fuse.ReadIn)(unsafe.Pointer(&sl.req[0])) }

// pollHack is a name, as in a LOOKUP, that go-fuse's protocol server finds in every root, for itself.
const pollHack = ".go-fuse-epoll-hack\x00"

// handle answers a request other than READ.
func (s *session) handle(sl slot) {
	defer s.finish(sl)
	req := sl.req
	h := header(req)
	switch {
	case h.Opcode == opLookup && string(req[unsafe.Sizeof(*h):]) == pollHack:
		var out fuse.EntryOut
		status := s.fs.Lookup(nil, h, pollHack[:len(pollHack)-1], &out)
		s.reply(h.Unique, status, unsafe.Slice((*byte)(unsafe.Pointer(&out)), unsafe.Sizeof(out)))
	case h.Opcode == opInterrupt && len(req) >= int(unsafe.Sizeof(fuse.InterruptIn{})):
		s.interrupt(h.Unique, (*fuse.InterruptIn)(unsafe.Pointer(&req[0])).Unique)
	default:
		if (h.Opcode == opReadDir || h.Opcode == opReadDirPlus) && len(req) >= int(unsafe.Sizeof(fuse.ReadIn{})) {
			in := (*fuse.ReadIn)(unsafe.Pointer(&req[0]))
			in.Size = min(in.Size, maxPayload) // the kernel asks again for the rest
		}
		reply := s.memory.replies.Get().(*[maxReply]byte)
		defer s.memory.replies.Put(reply)
		var n int
		var status fuse.Status
		if err := mapped.Guard(func() { n, status = s.proto.HandleRequest([][]byte{req}, [][]byte{reply[:]}) }); err != nil {
			s.log.Error("answer FUSE request", "mount", s.target, "opcode", h.Opcode, "node", h.NodeId, "error", err)
			n, status = 0, fuse.EIO
		}
		switch {
		case n > 0:
			s.write(reply[:n])
		case !status.Ok():
			s.reply(h.Unique, status, nil)
		}
	}
}

// reply answers the request unique with payload, or with an error.
func (s *session) reply(unique uint64, status fuse.Status, payload []byte) {
	h := fuse.OutHeader{Unique: unique, Status: -int32(status)}
	if !status.Ok() {
		payload = nil
	}
	h.Length = uint32(outHeaderSize + len(payload))
	head := unsafe.Slice((*byte)(unsafe.Pointer(&h)), outHeaderSize)
	if len(payload) == 0 {
		s.write(head)
		return
	}
	s.write(head, payload)
}

// finish gives back the slot of a request that has been answered.
func (s *session) finish(sl slot) {
	s.at("replied")
	if !s.frozen.Load() {
		s.state.put(sl)
		s.at("cleared")
	}
}

// write writes one reply. ENOENT says that nobody waits for it any more, ENODEV and ENOTCONN that the mount is gone.
func (s *session) write(parts ...[]byte) {
	s.at("answer")
	if s.frozen.Load() {
		return
	}
	_, err := unix.Writev(s.fd, parts)
	if err != nil && err != unix.ENOENT && err != unix.ENODEV && err != unix.ENOTCONN {
		s.log.Error("write FUSE reply", "mount", s.target, "error", err)
	}
}

// startRead registers a READ, so that it can be interrupted. It returns nil if the session is frozen.
func (s *session) startRead(sl slot) *reading {
	r := &reading{slot: sl, in: *sl.readIn()}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.frozen.Load() {
		return nil
	}
	s.answers.Add(1)
	r.ctx, r.cancel = context.WithCancel(s.ctx)
	s.reads[r.in.Unique&^resent] = r
	return r
}

// read answers a READ.
func (s *session) read(r *reading) {
	defer func() {
		r.cancel()
		s.mu.Lock()
		delete(s.reads, r.in.Unique&^resent) // nobody changes its slot from here on
		s.mu.Unlock()
		s.finish(r.slot)
		s.answers.Done()
	}()
	s.at("registered")
	n := 0
	buf, err := s.memory.get(r.ctx, int(min(r.in.Size, maxRead)))
	if err == nil {
		defer s.memory.put(buf)
		if fault := mapped.Guard(func() { n, err = s.fs.read(r.ctx, r.in.NodeId, int64(r.in.Offset), buf) }); fault != nil {
			err = fault
		}
	}
	if err != nil {
		status := errno(r.ctx, err)
		if status == fuse.EIO && !s.frozen.Load() {
			if s.onFail != nil {
				s.onFail()
			}
			s.failed.Log(s.log, time.Now(), slog.LevelError, "read", "mount", s.target, "node", r.in.NodeId, "offset", r.in.Offset, "size", r.in.Size, "error", err)
		}
		s.reply(r.in.Unique, status, nil)
		return
	}
	s.reply(r.in.Unique, fuse.OK, buf[:n])
}

// errno is what the kernel is told of err: that the read was cancelled, or that the data could not be had.
func errno(ctx context.Context, err error) fuse.Status {
	if ctx.Err() != nil {
		return fuse.EINTR
	}
	return fuse.EIO
}

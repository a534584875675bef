package fs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"regexp"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Keeper keeps descriptors beyond the life of this process, for its successor: systemd's descriptor store, or a parent process. It is
// safe for concurrent use. Names are of [a-z0-9-], at most 200 bytes; those of this package begin with "fuse-".
type Keeper interface {
	// Keep keeps a copy of f, which stays the caller's, under name, instead of what was kept by that name. When it has returned nil, the
	// copy outlives this process, however it ends.
	Keep(name string, f *os.File) error
	// Drop closes what is kept under name, if anything.
	Drop(name string) error
	// Kept returns what a predecessor kept under name, as a file of the caller's, or nil if it kept nothing or Kept has returned it
	// before. It stays kept.
	Kept(name string) *os.File
	// KeptNames lists the names for which Kept would return a file.
	KeptNames() []string
}

// What is kept of a session: its connection, its state, and in mode tree the metadata image, because the image's file may be gone or
// made again in another form when the successor needs it.
const (
	stateSuffix    = "-state"
	metadataSuffix = "-metadata"
)

var sessionName = regexp.MustCompile(`^fuse-([0-9]+)(` + stateSuffix + `|` + metadataSuffix + `)?$`)

// keepAs makes the session outlive this process. Before, it dies with it, so nobody may use its mount yet. metadata may be nil.
func (s *session) keepAs(name string, k Keeper, a about, metadata *os.File) error {
	a.Target, a.Dev, a.Init = s.target, s.dev, s.init
	if err := s.state.setAbout(a); err != nil {
		return err
	}
	s.keep, s.name = k, name
	if metadata != nil {
		if err := k.Keep(name+metadataSuffix, metadata); err != nil {
			return fmt.Errorf("keep metadata image: %w", err)
		}
	}
	if err := k.Keep(name+stateSuffix, s.state.file); err != nil {
		return fmt.Errorf("keep state of %s: %w", s.target, err)
	}
	if err := k.Keep(name, s.device); err != nil { // the last: without it a successor forgets the others
		return fmt.Errorf("keep connection of %s: %w", s.target, err)
	}
	return nil
}

// drop undoes keepAs.
func (s *session) drop() {
	if s.name == "" {
		return
	}
	if err := dropSession(s.keep, s.name); err != nil {
		s.log.Warn("descriptors of a mount stay kept", "mount", s.target, "error", err)
	}
}

func dropSession(k Keeper, name string) error {
	return errors.Join(k.Drop(name), k.Drop(name+stateSuffix), k.Drop(name+metadataSuffix))
}

// kept is what a predecessor has kept of a session.
type kept struct {
	name     string
	device   *os.File
	state    *state
	about    *about
	slots    []slot // in use
	metadata *os.File
}

// takeKept takes a session that a predecessor has kept, nil if it was not complete.
func takeKept(k Keeper, name string) (*kept, error) {
	device, file, metadata := k.Kept(name), k.Kept(name+stateSuffix), k.Kept(name+metadataSuffix)
	p := &kept{name: name, device: device, metadata: metadata}
	var err error
	if device != nil && file != nil {
		p.state, p.about, p.slots, err = openState(file)
	} else if file != nil {
		file.Close()
	}
	if p.about != nil {
		return p, nil
	}
	return nil, errors.Join(err, p.close())
}

func (p *kept) close() error {
	var errs []error
	for _, f := range []*os.File{p.device, p.metadata} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	if p.state != nil {
		errs = append(errs, p.state.close())
	}
	return errors.Join(errs...)
}

// resumeSession serves f to the connection of p, which it takes but for the metadata, from where the predecessor left off.
func resumeSession(p *kept, k Keeper, f filesystem, o sessionOptions) (*session, error) {
	s := makeSession(p.about.Target, p.device, f, p.state, o)
	s.keep, s.name, s.init, s.dev = k, p.name, p.about.Init, p.about.Dev
	reply := make([]byte, maxReply)
	n, status := s.proto.HandleRequest([][]byte{s.init}, [][]byte{reply}) // the kernel has had its answer
	if n < outHeaderSize+int(unsafe.Sizeof(fuse.InitOut{})) || !status.Ok() {
		return nil, fmt.Errorf("replay INIT of %s: %v", s.target, status)
	}
	s.at("replayed")
	if negotiated := (*fuse.InitOut)(unsafe.Pointer(&reply[outHeaderSize])).Flags64(); negotiated&fuse.CAP_HAS_RESEND != 0 && !o.noResend {
		if err := s.resend(); err != nil {
			s.log.Warn("no FUSE_NOTIFY_RESEND; answering from the record", "mount", s.target, "error", err)
		} else {
			s.at("resent")
			for _, sl := range p.slots {
				s.state.put(sl)
			}
			p.slots = nil
		}
	}
	s.execute(p.slots)
	s.start(o.ended)
	return s, nil
}

// resend has the kernel send again all that it has sent and got no answer to, and tell of interrupts again.
func (s *session) resend() error {
	h := fuse.OutHeader{Length: uint32(outHeaderSize), Status: -fuse.NOTIFY_RESEND}
	_, err := unix.Write(s.fd, unsafe.Slice((*byte)(unsafe.Pointer(&h)), outHeaderSize))
	return err
}

// execute answers the requests that a predecessor has read. It may have answered some: the kernel refuses a second answer, and never
// uses a unique again.
func (s *session) execute(slots []slot) {
	var others []slot
	for _, sl := range slots {
		if !isRead(sl.req) {
			others = append(others, sl)
			continue
		}
		r := s.startRead(sl)
		if r.in.Padding == interrupted {
			r.watched = true
			s.work.Go(func() { watch(r) })
		}
		s.work.Go(func() { s.read(r) })
	}
	for _, sl := range others { // INTERRUPTs after the READs that they are of
		s.handle(sl)
	}
}

// detach stops answering. What is in flight, and what the goroutines that are reading still read, is the successor's. No READ is in
// progress any more when it returns, but goroutines wait for requests until the process ends.
func (s *session) detach() {
	s.mu.Lock()
	s.frozen.Store(true)
	s.mu.Unlock()
	s.cancel()
	s.answers.Wait()
}

// lateDevice is the Device of an image that a predecessor mounted. It is asked for when it is first read.
type lateDevice struct {
	id      string
	size    int64
	resolve func(ctx context.Context, id string) (Device, error)
	log     *slog.Logger
	turn    chan struct{} // holds one token while nobody resolves
	dev     Device        // guarded by turn
}

func (s *Server) newLateDevice(id string, size int64) *lateDevice {
	d := &lateDevice{id: id, size: size, resolve: s.resolve, log: s.log, turn: make(chan struct{}, 1)}
	d.turn <- struct{}{}
	return d
}

func (d *lateDevice) Size() int64 { return d.size }

func (d *lateDevice) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	dev, err := d.get(ctx)
	if err != nil {
		return 0, fmt.Errorf("open image %s again: %w", d.id, err)
	}
	return dev.ReadAt(ctx, p, off)
}

func (d *lateDevice) get(ctx context.Context) (Device, error) {
	select {
	case <-d.turn:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { d.turn <- struct{}{} }()
	if d.dev != nil {
		return d.dev, nil
	}
	dev, err := d.resolve(ctx, d.id)
	if err != nil {
		return nil, err
	}
	if dev.Size() != d.size {
		return nil, errors.Join(fmt.Errorf("has %d bytes, and had %d", dev.Size(), d.size), closeDevice(dev))
	}
	d.dev = dev
	return dev, nil
}

// close lets go of the Device. Nobody reads any more.
func (d *lateDevice) close() {
	if err := closeDevice(d.dev); err != nil {
		d.log.Warn("close image", "image", d.id, "error", err)
	}
}

func closeDevice(dev Device) error {
	if c, ok := dev.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// resume serves the mounts that predecessors have kept. What cannot be served does not keep others, or the Server, from it.
func (s *Server) resume() {
	for _, n := range keptSessions(s.keep) {
		s.lastName = max(s.lastName, n)
		name := keptName(n)
		p, err := takeKept(s.keep, name)
		switch {
		case errors.Is(err, errState):
			s.log.Error("another release's mount is left alone: reads from it wait for that release", "kept", name, "error", err)
			continue
		case err == nil && p != nil:
			err = s.resumeKept(p)
		}
		if err != nil {
			s.log.Error("resume a mount; its users get errors", "kept", name, "error", err)
		}
		if err != nil || p == nil {
			if err := dropSession(s.keep, name); err != nil {
				s.log.Warn("descriptors of a mount stay kept", "kept", name, "error", err)
			}
		}
	}
}

// resumeKept serves p, which it takes.
func (s *Server) resumeKept(p *kept) (err error) {
	defer func() {
		if p.metadata != nil {
			p.metadata.Close()
		}
		if err != nil {
			p.metadata = nil
			err = errors.Join(err, p.close())
		}
	}()
	if p.about.Kind == kindTree {
		return s.resumeTree(p)
	}
	return s.resumeDevices(p)
}

// resumeTree serves the kept tree of p.
func (s *Server) resumeTree(p *kept) error {
	if p.metadata == nil {
		return errors.New("its metadata image is not kept")
	}
	t, err := openTree(p.about.ID, p.metadata, s.newLateDevice(p.about.ID, p.about.Size))
	if err != nil {
		return err
	}
	if err := s.startTree(t, func(o sessionOptions) (*session, error) { return resumeSession(p, s.keep, t, o) }); err != nil {
		return err
	}
	if mountedAs(p.about.Target, p.about.Dev) {
		s.mounts[p.about.Target] = &mount{id: p.about.ID, tree: t, ready: true, resumed: true}
	}
	s.resumed = append(s.resumed, p.about)
	return nil
}

// resumeDevices serves the kept data devices of p. Those that are not mounted at the Server's directory any more serve no new mounts.
func (s *Server) resumeDevices(p *kept) error {
	d := newDevices(p.state)
	var errs []error
	adopted := map[string]*mount{}
	err := p.state.loadRecords(func(i int, r mountRecord) {
		m := &mount{id: r.ID, devices: d, record: i, metadata: r.Metadata, ready: true, resumed: true}
		mounted := s.mounts[r.Target] == nil && adopted[r.Target] == nil && mountedAs(r.Target, r.Dev)
		if r.Direct {
			if mounted {
				adopted[r.Target] = m
			} else {
				m.drop()
			}
			return
		}
		e, err := d.load(r, s.newLateDevice(r.ID, r.Size))
		if err != nil {
			errs = append(errs, err)
		} else if mounted {
			e.mounts++
			m.device = e
			adopted[r.Target] = m
		} else {
			e.records = append(e.records, i)
		}
	})
	if err := errors.Join(append(errs, err)...); err != nil {
		return err
	}
	d.forgetUnused()
	if d.session, err = resumeSession(p, s.keep, d, deviceOptions(s.options)); err != nil {
		return err
	}
	maps.Copy(s.mounts, adopted)
	if p.about.Target == s.dir && mountedAs(s.dir, p.about.Dev) {
		s.devices, s.resumed = d, append(s.resumed, p.about)
	} else {
		s.former = append(s.former, d)
	}
	return nil
}

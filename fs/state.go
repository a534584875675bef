package fs

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// state is what must not die with the process that serves a session: a memfd, all of it mapped. Its parts, native byte order:
//
//	offset  size
//	     0  8             stateMagic, which has the version: a release with another layout refuses it
//	     8  4             size of the about record, 0 until the session can be resumed
//	    12  <= 64 KiB     the about record, JSON
//	 1 MiB  8192 x 4 KiB  mounts of a session of data devices: size (4 bytes, 0 is a free place) and a mountRecord, JSON
//	33 MiB  65536 x 16    open files of such a session: node id, and handle (0 is a free place)
//	34 MiB  16384 x 8 KiB slots: each a request in flight, as read from /dev/fuse; its length is 0 in a free slot
//
// Only what was ever used takes memory. Whatever instant the process is killed at, each part is one that was whole before or is whole
// after: sizes, handles and lengths are what is written last. The kernel writes a request into its slot in the read(2) that takes it
// off its queue, and a killed thread leaves that system call first.
type state struct {
	file *os.File
	mem  []byte

	mu    sync.Mutex     // guards what follows, and the finding of free places
	free  *sync.Cond     // a slot has been put back
	low   []int          // free slots below hotSlots, taken first
	high  []int          // other free slots that were used before
	fresh int            // slots from here on were never used
	opens map[uint64]int // places of open files, by handle
}

const (
	stateMagic = "FUSE st\x01"

	aboutAt   = 12
	aboutSize = 64 << 10

	recordsAt  = 1 << 20
	maxRecords = 8192
	recordSize = 4 << 10

	opensAt  = recordsAt + maxRecords*recordSize
	maxOpens = 64 << 10
	openSize = 16

	slotsAt = opensAt + maxOpens*openSize
	// maxSlots bounds the requests in flight: maxBackground, and one for each thread that waits by itself. When all are taken no more are
	// read, until one is answered.
	maxSlots = 16 << 10
	slotSize = maxRequest
	// hotSlots keep their memory when they are free, and the first of them are never swapped out: if the kernel had to fetch a page to put
	// a request into just when the process is killed, it would fail the request.
	hotSlots    = 256
	lockedSlots = 4

	stateSize = slotsAt + maxSlots*slotSize
)

// about says what a session is. It is written once, when the session can be resumed.
type about struct {
	Kind   string // kindDevices or kindTree
	Target string // absolute
	Dev    uint64 // device number of the FUSE mount
	Init   []byte // the kernel's INIT request
	Mode   Mode   // that images are mounted in
	Want   Mode   // that was configured
	Reason string // why Mode was chosen
	ID     string // of a tree's image
	Size   int64  // of a tree's Device
}

const (
	kindDevices = "devices"
	kindTree    = "tree"
)

// mountRecord is a use of a data device, or a direct mount.
type mountRecord struct {
	ID     string
	Size   int64  // of the Device
	Target string // absolute; empty if the image is not mounted there any more, but in use
	Dev    uint64 // device number of the mount
	// Not there in records of older releases, which do not look at it either:
	Metadata string // path of the metadata image
	Direct   bool   // the mount needs no data device: see Direct
}

// errState: a session's state that this release does not understand.
var errState = errors.New("state of another release")

func newState() (*state, error) {
	fd, err := unix.MemfdCreate("streaming-snapshotter", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("create memory file: %w", err)
	}
	f := os.NewFile(uintptr(fd), "state")
	if err := f.Truncate(stateSize); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	// Nobody can make it shorter under the mapping.
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return nil, errors.Join(fmt.Errorf("seal memory file: %w", err), f.Close())
	}
	s, err := mapState(f)
	if err == nil {
		copy(s.mem, stateMagic)
	}
	return s, err
}

func mapState(f *os.File) (*state, error) {
	mem, err := unix.Mmap(int(f.Fd()), 0, stateSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("map state: %w", err), f.Close())
	}
	unix.Mlock(mem[slotsAt : slotsAt+lockedSlots*slotSize]) // or not: see hotSlots
	s := &state{file: f, mem: mem, opens: map[uint64]int{}}
	s.free = sync.NewCond(&s.mu)
	return s, nil
}

// openState opens the state that a predecessor left in f, which it takes. The about record is nil if the session was not complete. The
// slots that are in use are returned, not to be given out before release.
func openState(f *os.File) (*state, *about, []slot, error) {
	fi, err := f.Stat()
	if err == nil && fi.Size() != stateSize {
		err = fmt.Errorf("%w: %d bytes", errState, fi.Size())
	}
	if err != nil {
		return nil, nil, nil, errors.Join(err, f.Close())
	}
	s, err := mapState(f)
	if err != nil {
		return nil, nil, nil, err
	}
	if string(s.mem[:len(stateMagic)]) != stateMagic {
		return nil, nil, nil, errors.Join(errState, s.close())
	}
	n := *s.word(8)
	if n == 0 {
		return s, nil, nil, nil
	}
	var a about
	if n > aboutSize {
		err = fmt.Errorf("about record of %d bytes", n)
	} else {
		err = json.Unmarshal(s.mem[aboutAt:aboutAt+n], &a)
	}
	if err != nil {
		return nil, nil, nil, errors.Join(errState, err, s.close())
	}
	var used []slot
	s.each(slotsAt, stateSize, slotSize, func(i int) {
		s.fresh = max(s.fresh, i+1)
		if sl := s.slot(i); header(sl.req).Length != 0 {
			used = append(used, sl)
		} else {
			s.put(sl)
		}
	})
	s.loadOpens()
	return s, &a, used, nil
}

func (s *state) close() error { return errors.Join(unix.Munmap(s.mem), s.file.Close()) }

func (s *state) word(off int) *uint32 { return (*uint32)(unsafe.Pointer(&s.mem[off])) }

// each calls f for the elements between two offsets that may have been used, without touching, and so taking, the memory of others.
func (s *state) each(from, to, size int, f func(i int)) {
	next := from // element not visited yet
	for {
		data, err := unix.Seek(int(s.file.Fd()), int64(next), unix.SEEK_DATA)
		if err != nil || data >= int64(to) {
			return // ENXIO: nothing more
		}
		hole, err := unix.Seek(int(s.file.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			hole = int64(to)
		}
		i := max((int(data)-from)/size, (next-from)/size)
		for ; from+i*size < min(int(hole), to); i++ {
			f(i)
		}
		if next = max(from+i*size, int(hole)); next >= to {
			return
		}
	}
}

// setAbout completes the state.
func (s *state) setAbout(a about) error {
	b, err := json.Marshal(a)
	if err != nil {
		return err
	}
	if len(b) > aboutSize {
		return fmt.Errorf("about record of %d bytes", len(b))
	}
	copy(s.mem[aboutAt:], b)
	atomic.StoreUint32(s.word(8), uint32(len(b)))
	return nil
}

// slot is the place of one request in flight.
type slot struct {
	i   int
	req []byte // maxRequest bytes, or those of the request
}

func (s *state) slot(i int) slot {
	at := slotsAt + i*slotSize
	n := *s.word(at)
	if n == 0 || n > slotSize {
		n = slotSize
	}
	return slot{i, s.mem[at : at+int(n) : at+slotSize]}
}

// get takes a free slot, waiting for one.
func (s *state) get() slot {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		for _, list := range []*[]int{&s.low, &s.high} {
			if n := len(*list); n > 0 {
				i := (*list)[n-1]
				*list = (*list)[:n-1]
				return s.slot(i)
			}
		}
		if s.fresh < maxSlots {
			s.fresh++
			return s.slot(s.fresh - 1)
		}
		s.free.Wait()
	}
}

// put clears a slot and gives it back.
func (s *state) put(sl slot) {
	at := slotsAt + sl.i*slotSize
	atomic.StoreUint32(s.word(at), 0)
	if sl.i >= hotSlots {
		unix.Madvise(s.mem[at:at+slotSize], unix.MADV_REMOVE)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if sl.i < hotSlots {
		s.low = append(s.low, sl.i)
	} else {
		s.high = append(s.high, sl.i)
	}
	s.free.Signal()
}

// prepare makes the memory of a free slot present, so that the kernel need not when it puts a request there.
func (s *state) prepare(sl slot) {
	atomic.StoreUint32(s.word(slotsAt+sl.i*slotSize), 0)
}

// addRecord records a mount and returns its place.
func (s *state) addRecord(r mountRecord) (int, error) {
	b, err := json.Marshal(r)
	if err != nil {
		return 0, err
	}
	if len(b) > recordSize-4 {
		return 0, fmt.Errorf("record of a mount of %d bytes", len(b))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range maxRecords {
		at := recordsAt + i*recordSize
		if *s.word(at) == 0 {
			copy(s.mem[at+4:], b)
			atomic.StoreUint32(s.word(at), uint32(len(b)))
			return i, nil
		}
	}
	return 0, fmt.Errorf("more than %d mounts", maxRecords)
}

func (s *state) dropRecord(i int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	atomic.StoreUint32(s.word(recordsAt+i*recordSize), 0)
}

// loadRecords calls f for each mount recorded by a predecessor.
func (s *state) loadRecords(f func(i int, r mountRecord)) error {
	var errs []error
	s.each(recordsAt, opensAt, recordSize, func(i int) {
		at := recordsAt + i*recordSize
		n := int(*s.word(at))
		if n == 0 {
			return
		}
		var r mountRecord
		if err := json.Unmarshal(s.mem[at+4:at+4+min(n, recordSize-4)], &r); err != nil {
			errs = append(errs, fmt.Errorf("record of a mount: %w", err))
			return
		}
		f(i, r)
	})
	return errors.Join(errs...)
}

// addOpen records an open file and reports whether it is new: a request may be executed twice. ENFILE says that there are too many.
func (s *state) addOpen(node, handle uint64) (bool, fuse.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.opens[handle]; ok {
		return false, fuse.OK
	}
	for i := range maxOpens {
		if p := s.open(i); p[1] == 0 {
			p[0] = node
			atomic.StoreUint64(&p[1], handle)
			s.opens[handle] = i
			return true, fuse.OK
		}
	}
	return false, fuse.Status(unix.ENFILE)
}

func (s *state) dropOpen(handle uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, ok := s.opens[handle]
	if ok {
		atomic.StoreUint64(&s.open(i)[1], 0)
		delete(s.opens, handle)
	}
	return ok
}

func (s *state) open(i int) *[2]uint64 {
	return (*[2]uint64)(unsafe.Pointer(&s.mem[opensAt+i*openSize]))
}

// loadOpens finds the files that were open when a predecessor ended.
func (s *state) loadOpens() {
	s.each(opensAt, slotsAt, openSize, func(i int) {
		if p := s.open(i); p[1] != 0 {
			s.opens[p[1]] = i
		}
	})
}

// opensOf counts the open files of a node.
func (s *state) opensOf(node uint64) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, i := range s.opens {
		if s.open(i)[0] == node {
			n++
		}
	}
	return n
}

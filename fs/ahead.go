package fs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// aheadStep is how much is asked for at once: what the kernel reads of one call whatever the mount's read-ahead is (io_pages of a bdi, which are VM_READAHEAD_PAGES or more).
// With DefaultReadAhead in its place postgres' start took 2836 READs of this process, and takes 1000.
const aheadStep = 128 << 10

// Range is a part of a regular file of a mounted image: Size bytes from Off on. No part of its path is a symlink.
type Range struct {
	Path      string // from the root of the image, without a leading slash
	Off, Size int64  // bytes
}

// ReadAhead has the kernel read ranges of the image that is mounted at target into its cache, in their order, beside whoever uses the mount: a read of what the kernel has costs
// no request to this process, of which a start makes thousands. It waits until all was asked for. It is cut short if the mount is unmounted, or if somebody else reads ahead
// there; that is no error, and nor is it if nothing is mounted. It ends with this process, too: to a successor, who reads ahead would be a user of the mount like others.
func (s *Server) ReadAhead(target string, ranges []Range) error {
	calls, err := callsAhead(target, ranges)
	if err != nil {
		return fmt.Errorf("read ahead: %w", err)
	}
	s.mu.Lock()
	m := s.mounts[filepath.Clean(target)]
	if s.closed || m == nil || !m.ready || m.ahead != nil {
		s.mu.Unlock()
		return nil
	}
	c, err := startAside(-1, calls)
	if err != nil {
		s.mu.Unlock()
		return fmt.Errorf("read ahead: %w", err)
	}
	p, err := os.FindProcess(c.pid) // the one that c is, as it was not waited for
	m.ahead = p
	s.mu.Unlock()
	err = errors.Join(err, c.wait())
	s.mu.Lock()
	defer s.mu.Unlock()
	m.ahead = nil
	if p != nil {
		p.Release()
	}
	if err != nil && m.ready {
		return fmt.Errorf("read ahead at %s: %w", target, err)
	}
	return nil
}

// callsAhead are the calls of the child that reads ahead. One reads as much as the mount's read-ahead or io_pages, whichever is more (force_page_cache_ra of mm/readahead.c).
func callsAhead(target string, ranges []Range) ([]call, error) {
	root, err := callOpen(target, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	calls := []call{callDieWithParent(), root}
	for _, r := range ranges {
		p, err := unix.BytePtrFromString(r.Path)
		if err != nil {
			return nil, err
		}
		calls = append(calls, call{trap: unix.SYS_OPENAT, args: [5]uintptr{0, uintptr(unsafe.Pointer(p)), unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK}, keep: unsafe.Pointer(p)})
		for off, end := r.Off, r.Off+r.Size; off < end; off += aheadStep {
			calls = append(calls, call{trap: unix.SYS_READAHEAD, args: [5]uintptr{1, uintptr(off), uintptr(min(aheadStep, end-off))}})
		}
		calls = append(calls, callClose(1))
	}
	return calls, nil
}

package fs

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

// invalidateBatch is how many files one child has the kernel forget: its calls are in memory.
const invalidateBatch = 4096

// Targets lists where image id is mounted, by this Server or a predecessor of it, in whatever way.
func (s *Server) Targets(id string) (targets []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for target, m := range s.mounts {
		if m.ready && m.id == id {
			targets = append(targets, target)
		}
	}
	slices.Sort(targets)
	return targets
}

// Invalidate has the kernel forget what it has read of the files of image id, where it is mounted: the next read of them asks the Device, also below an overlay and by a file that is open. What processes have mapped at
// the moment stays in the modes file and loop, and everywhere what they have looked up. It asks the Device for nothing. It waits for reads in flight, so these must end.
func (s *Server) Invalidate(id string) error {
	s.mu.Lock()
	erofsMounts := map[string]string{} // metadata images by target
	for target, m := range s.mounts {
		if m.ready && m.id == id && m.tree == nil {
			erofsMounts[target] = m.metadata
		}
	}
	var trees []*tree
	for t := range s.trees {
		if t.id == id {
			trees = append(trees, t)
		}
	}
	s.mu.Unlock()
	var errs []error
	for target, metadata := range erofsMounts {
		if err := invalidateErofs(target, metadata); err != nil {
			errs = append(errs, fmt.Errorf("have the kernel forget what is read at %s: %w", target, err))
		}
	}
	for _, t := range trees {
		if err := t.invalidate(); err != nil {
			errs = append(errs, fmt.Errorf("have the kernel forget what is read at %s: %w", t.session.target, err))
		}
	}
	return errors.Join(errs...)
}

// regularFiles calls f with the path and nid of each regular file of image.
func regularFiles(image *erofs.Image, f func(path []byte, nid uint64)) (err error) {
	if fault := mapped.Guard(func() {
		err = image.Walk(func(path []byte, nid uint64, typ uint8) error {
			if typ == unix.DT_REG {
				f(path, nid)
			}
			return nil
		})
	}); fault != nil {
		return fault
	}
	return err
}

// invalidateErofs opens each file and gives it the advice that it is not needed, in children: see aside. Opening asks for nothing but the metadata image, which is local.
func invalidateErofs(target, metadata string) error {
	f, err := os.Open(metadata)
	if err != nil {
		return err
	}
	defer f.Close()
	mem, err := mapped.Open(f)
	if err != nil {
		return err
	}
	defer unix.Munmap(mem)
	image, err := erofs.Open(mem)
	if err != nil {
		return err
	}
	root, err := callOpen(target, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	calls := []call{root}
	var failed error
	flush := func() {
		if len(calls) > 1 {
			failed = errors.Join(failed, aside(-1, calls...))
			calls = calls[:1]
		}
	}
	err = regularFiles(image, func(path []byte, _ uint64) {
		name := append(slices.Clone(path), 0)
		at := unsafe.Pointer(unsafe.SliceData(name))
		calls = append(calls,
			call{trap: unix.SYS_OPENAT, args: [5]uintptr{0, uintptr(at), unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK}, keep: at},
			call{trap: unix.SYS_FADVISE64, args: [5]uintptr{1, 0, 0, unix.FADV_DONTNEED}},
			callClose(1))
		if len(calls) > 3*invalidateBatch {
			flush()
		}
	})
	flush()
	return errors.Join(err, failed)
}

// notifyInval is FUSE_NOTIFY_INVAL_INODE, for the whole of a file's data.
type notifyInval struct {
	fuse.OutHeader
	node     uint64
	off, len int64
}

// invalidate notifies the kernel of each file, in children: a notification waits for the pages that are being read.
func (t *tree) invalidate() error {
	var calls []call
	var failed error
	flush := func() {
		if len(calls) > 0 {
			conn, err := t.session.device.SyscallConn() // while it is used the descriptor is not another's
			if err == nil {
				err = conn.Control(func(fd uintptr) { failed = errors.Join(failed, aside(int(fd), calls...)) })
			}
			if !errors.Is(err, os.ErrClosed) { // then nothing is mounted
				failed = errors.Join(failed, err)
			}
			calls = nil
		}
	}
	err := regularFiles(t.image, func(_ []byte, nid uint64) {
		n := &notifyInval{node: t.node(nid)}
		n.Length, n.Status = uint32(unsafe.Sizeof(*n)), -fuse.NOTIFY_INVAL_INODE
		at := unsafe.Pointer(n)
		// ENOENT: the kernel knows no such node, and so has nothing of it.
		calls = append(calls, call{trap: unix.SYS_WRITE, args: [5]uintptr{0, uintptr(at), unsafe.Sizeof(*n)}, keep: at, may: unix.ENOENT})
		if len(calls) >= invalidateBatch {
			flush()
		}
	})
	flush()
	return errors.Join(err, failed)
}

package cache

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// disk is where the files of layers are. Tests put one in place that fails.
type disk interface {
	// open opens the file at path for reading and writing, and makes it and its directory if they do not exist. On a read-only disk it opens
	// what is there.
	open(path string) (file, error)
	// remove deletes the file at path, if there is one.
	remove(path string) error
	rename(from, to string) error // in one directory
}

// file is a file of a layer. Its methods may be called from many goroutines.
type file interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	size() (int64, error)
	truncate(size int64) error
	datasync() error // fdatasync(2)
	// punch gives back the blocks of [off, off+n), which reads as zeros then. The size stays.
	punch(off, n int64) error
}

type osDisk struct{}

func (osDisk) open(path string) (file, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, unix.EROFS) {
		if f, err := os.Open(path); err == nil {
			return &readOnlyFile{osFile: osFile{f}}, nil
		}
	}
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osDisk) remove(path string) error {
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (osDisk) rename(from, to string) error { return os.Rename(from, to) }

type osFile struct{ *os.File }

func (f osFile) size() (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

func (f osFile) truncate(size int64) error { return f.Truncate(size) }

func (f osFile) datasync() error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); err != unix.EINTR {
			return os.NewSyscallError("fdatasync", err)
		}
	}
}

func (f osFile) punch(off, n int64) error {
	for {
		if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n); err != unix.EINTR {
			return os.NewSyscallError("fallocate", err)
		}
	}
}

// readOnlyFile is a file on a disk that was read-only when it was opened. What writes to it finds out whether it still is.
type readOnlyFile struct {
	osFile

	mu       sync.Mutex
	writable *os.File
}

func (f *readOnlyFile) open() (w osFile, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.writable == nil {
		f.writable, err = os.OpenFile(f.Name(), os.O_RDWR, 0)
	}
	return osFile{f.writable}, err
}

func (f *readOnlyFile) WriteAt(p []byte, off int64) (int, error) {
	w, err := f.open()
	if err != nil {
		return 0, err
	}
	return w.WriteAt(p, off)
}

func (f *readOnlyFile) truncate(size int64) error {
	w, err := f.open()
	if err != nil {
		return err
	}
	return w.truncate(size)
}

func (f *readOnlyFile) punch(off, n int64) error {
	w, err := f.open()
	if err != nil {
		return err
	}
	return w.punch(off, n)
}

func (f *readOnlyFile) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.writable != nil {
		return errors.Join(f.writable.Close(), f.osFile.Close())
	}
	return f.osFile.Close()
}

// lockDir opens dir and locks it against other processes. The kernel drops the lock with the process, however that ends.
func lockDir(dir string) (*os.File, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		d.Close()
		return nil, fmt.Errorf("lock %s, which another process may have open: %w", dir, err)
	}
	return d, nil
}

package cache

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// disk is where the files of layers are. Tests put one in place that fails.
type disk interface {
	// open opens the file at path for reading and writing, and makes it and its directory if they do not exist.
	open(path string) (file, error)
	// remove deletes the file at path, if there is one.
	remove(path string) error
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

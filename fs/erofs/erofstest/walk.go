package erofstest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Walk lists the directory dir of any file system, in depth-first order. It reads like an application: a difference between what a directory says of an
// entry's type and what the entry says itself is an error. It works below any depth, and beyond file names that make a path too long.
func Walk(dir string, o Options) ([]Entry, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("walk %s: %w", dir, err)
	}
	w := &walker{options: o, first: make(map[inodeKey]string), buf: make([]byte, 1<<18)}
	f := os.NewFile(uintptr(fd), dir)
	defer f.Close()
	if err := w.entry(fd, ".", "/", 0); err != nil {
		return nil, fmt.Errorf("walk %s: %w", dir, err)
	}
	if err := w.dir(f, "/"); err != nil {
		return nil, fmt.Errorf("walk %s: %w", dir, err)
	}
	return w.entries, nil
}

type inodeKey struct{ dev, ino uint64 }

type walker struct {
	options Options
	first   map[inodeKey]string // the first path of files with several names
	buf     []byte
	entries []Entry
}

// dir lists what is in directory f, at path p.
func (w *walker) dir(f *os.File, p string) error {
	children, err := f.ReadDir(-1)
	if err != nil {
		return fmt.Errorf("%s: %w", quote(p), err)
	}
	slices.SortFunc(children, func(a, b os.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	fd := int(f.Fd())
	for _, c := range children {
		child := path.Join(p, c.Name())
		err := w.entry(fd, c.Name(), child, c.Type())
		if w.options.NoGhosts && errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", quote(child), err)
		}
		if w.entries[len(w.entries)-1].Mode&unix.S_IFMT != unix.S_IFDIR {
			continue
		}
		sub, err := unix.Openat(fd, c.Name(), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("%s: %w", quote(child), err)
		}
		g := os.NewFile(uintptr(sub), c.Name())
		err = w.dir(g, child)
		g.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// entry adds the entry name of directory fd, whose type the directory gives as typ.
func (w *walker) entry(fd int, name, p string, typ os.FileMode) error {
	var st unix.Stat_t
	if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if name != "." && typ != fileType(st.Mode) {
		return fmt.Errorf("its directory says it is of type %v, stat says mode %#o", typ, st.Mode)
	}
	e := Entry{Path: p, Mode: st.Mode, UID: st.Uid, GID: st.Gid, Nlink: uint64(st.Nlink), Mtime: st.Mtim.Sec, MtimeNsec: uint32(st.Mtim.Nsec)}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Size = st.Size
		if e.Size <= w.options.MaxContent {
			e.Content, err = w.content(fd, name, e.Size)
		}
	case unix.S_IFLNK:
		e.Size = st.Size
		var n int
		n, err = unix.Readlinkat(fd, name, w.buf)
		e.Target = string(w.buf[:max(n, 0)])
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Rdev = EncodeDev(unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)))
	case unix.S_IFDIR:
		if w.options.NoDirNlink {
			e.Nlink = 0
		}
	}
	if err == nil {
		e.Xattrs, err = w.xattrs(fmt.Sprintf("/proc/self/fd/%d/%s", fd, name))
	}
	if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		key := inodeKey{uint64(st.Dev), st.Ino}
		if first, found := w.first[key]; found {
			e.Link = first
		} else {
			w.first[key] = p
		}
	}
	w.entries = append(w.entries, e)
	return err
}

// fileType returns the type of fs.FileMode for st_mode.
func fileType(mode uint32) os.FileMode {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return 0
	case unix.S_IFDIR:
		return os.ModeDir
	case unix.S_IFLNK:
		return os.ModeSymlink
	case unix.S_IFIFO:
		return os.ModeNamedPipe
	case unix.S_IFSOCK:
		return os.ModeSocket
	case unix.S_IFBLK:
		return os.ModeDevice
	case unix.S_IFCHR:
		return os.ModeDevice | os.ModeCharDevice
	}
	return os.ModeIrregular
}

// EncodeDev returns a device number in the form of Linux's new_encode_dev.
func EncodeDev(major, minor uint32) uint32 { return minor&0xff | major<<8 | (minor&^0xff)<<12 }

// content hashes a file. Its size must be the one that stat gave.
func (w *walker) content(fd int, name string, size int64) (string, error) {
	file, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NOATIME|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(file)
	hash, total := sha256.New(), int64(0)
	for {
		n, err := unix.Read(file, w.buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return "", err
		}
		if n == 0 {
			break
		}
		total += int64(n)
		hash.Write(w.buf[:n])
	}
	if total != size {
		return "", fmt.Errorf("%d bytes, but stat says %d: %w", total, size, io.ErrUnexpectedEOF)
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

// xattrs returns the attributes of the file at p, nil if there are none.
func (w *walker) xattrs(p string) (map[string]string, error) {
	n, err := unix.Llistxattr(p, w.buf)
	if errors.Is(err, unix.ENOTSUP) || n == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list xattrs: %w", err)
	}
	var all map[string]string
	for _, name := range strings.Split(strings.TrimSuffix(string(w.buf[:n]), "\x00"), "\x00") {
		if w.options.NoXattr != nil && w.options.NoXattr(name) {
			continue
		}
		n, err := unix.Lgetxattr(p, name, w.buf)
		if err != nil {
			return nil, fmt.Errorf("xattr %s: %w", name, err)
		}
		if all == nil {
			all = make(map[string]string)
		}
		if _, twice := all[name]; twice {
			return nil, fmt.Errorf("xattr %s is listed twice", name)
		}
		all[name] = string(w.buf[:n])
	}
	return all, nil
}

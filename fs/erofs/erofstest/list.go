package erofstest

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"golang.org/x/sys/unix"
)

// ListTree lists a tree, with file data from device. It takes the tree for valid.
func ListTree(root *erofs.Inode, device io.ReaderAt, o Options) ([]Entry, error) {
	t := &treeLister{options: o, device: device, first: make(map[*erofs.Inode]int), nlink: make(map[*erofs.Inode]uint64)}
	if err := t.list(root, "/"); err != nil {
		return nil, err
	}
	for i, ino := range t.inodes {
		if ino.Mode&unix.S_IFMT != unix.S_IFDIR {
			t.entries[i].Nlink = cmp.Or(uint64(ino.Nlink), t.nlink[ino])
		}
	}
	return t.entries, nil
}

type treeLister struct {
	options Options
	device  io.ReaderAt
	first   map[*erofs.Inode]int // index of a file's first entry
	nlink   map[*erofs.Inode]uint64
	entries []Entry
	inodes  []*erofs.Inode // of the entries
}

func (t *treeLister) add(e Entry, ino *erofs.Inode) {
	t.entries, t.inodes = append(t.entries, e), append(t.inodes, ino)
}

func (t *treeLister) list(ino *erofs.Inode, p string) error {
	e := Entry{Path: p, Mode: ino.Mode, UID: ino.UID, GID: ino.GID, Mtime: ino.Mtime, MtimeNsec: ino.MtimeNsec}
	for _, x := range ino.Xattrs {
		if t.options.NoXattr != nil && t.options.NoXattr(x.Name) {
			continue
		}
		if e.Xattrs == nil {
			e.Xattrs = make(map[string]string)
		}
		e.Xattrs[x.Name] = string(x.Value)
	}
	switch ino.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return t.dir(ino, e)
	case unix.S_IFREG:
		e.Size = ino.Size
		if e.Size <= t.options.MaxContent {
			content, err := hashTree(ino, t.device)
			if err != nil {
				return fmt.Errorf("%s: %w", p, err)
			}
			e.Content = content
		}
	case unix.S_IFLNK:
		e.Target, e.Size = string(ino.Data), int64(len(ino.Data))
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Rdev = ino.Rdev
	}
	if first, found := t.first[ino]; found {
		e.Link = t.entries[first].Path
	} else {
		t.first[ino] = len(t.entries)
	}
	t.nlink[ino]++
	t.add(e, ino)
	return nil
}

func (t *treeLister) dir(ino *erofs.Inode, e Entry) error {
	e.Nlink = 2
	for _, c := range ino.Entries {
		if c.Inode.Mode&unix.S_IFMT == unix.S_IFDIR {
			e.Nlink++
		}
	}
	if t.options.NoDirNlink {
		e.Nlink = 0
	}
	t.add(e, ino)
	entries := slices.SortedFunc(slices.Values(ino.Entries), func(a, b erofs.Dirent) int { return strings.Compare(a.Name, b.Name) })
	for _, c := range entries {
		if err := t.list(c.Inode, path.Join(e.Path, c.Name)); err != nil {
			return err
		}
	}
	return nil
}

func hashTree(ino *erofs.Inode, device io.ReaderAt) (string, error) {
	h := sha256.New()
	if len(ino.Data) > 0 {
		h.Write(ino.Data)
		return hex.EncodeToString(h.Sum(nil)), nil
	}
	off := int64(0)
	for _, x := range ino.Extents {
		hashZeros(h, x.FileOffset-off)
		if n, err := io.Copy(h, io.NewSectionReader(device, x.DeviceOffset, x.Size)); err != nil || n != x.Size {
			return "", cmp.Or(err, io.ErrUnexpectedEOF)
		}
		off = x.FileOffset + x.Size
	}
	hashZeros(h, ino.Size-off)
	return hex.EncodeToString(h.Sum(nil)), nil
}

func hashZeros(h hash.Hash, n int64) {
	zeros := make([]byte, min(n, 1<<16))
	for ; n > 0; n -= int64(len(zeros)) {
		h.Write(zeros[:min(n, int64(len(zeros)))])
	}
}

// ListImage lists a metadata image, with file data from device. It also looks every name up, and resumes each directory after every entry.
func ListImage(m *erofs.Image, device io.ReaderAt, o Options) ([]Entry, error) {
	l := &imageLister{m: m, options: o, device: device, first: make(map[uint64]string)}
	if err := l.list(m.Root(), "/", m.Root()); err != nil {
		return nil, err
	}
	return l.entries, nil
}

type imageLister struct {
	m       *erofs.Image
	options Options
	device  io.ReaderAt
	first   map[uint64]string
	entries []Entry
}

func (l *imageLister) list(nid uint64, p string, parent uint64) error {
	s, err := l.m.Stat(nid)
	if err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	e := Entry{Path: p, Mode: s.Mode, UID: s.UID, GID: s.GID, Nlink: uint64(s.Nlink), Mtime: s.Mtime, MtimeNsec: s.MtimeNsec, Rdev: s.Rdev}
	if e.Xattrs, err = l.xattrs(nid); err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	switch s.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if l.options.NoDirNlink {
			e.Nlink = 0
		}
		l.entries = append(l.entries, e)
		return l.dir(nid, p, parent)
	case unix.S_IFREG:
		if e.Size = s.Size; e.Size <= l.options.MaxContent {
			e.Content, err = l.content(nid, s.Size)
		}
	case unix.S_IFLNK:
		var target []byte
		target, err = l.m.Readlink(nid)
		e.Target, e.Size = string(target), s.Size
	}
	if err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	if first, found := l.first[nid]; found {
		e.Link = first
	} else {
		l.first[nid] = p
	}
	l.entries = append(l.entries, e)
	return nil
}

type child struct {
	name string
	nid  uint64
	typ  uint8
	next uint64
}

func (l *imageLister) dir(nid uint64, p string, parent uint64) error {
	var children []child
	add := func(name []byte, nid uint64, typ uint8, next uint64) bool {
		children = append(children, child{string(name), nid, typ, next})
		return true
	}
	if err := l.m.ReadDir(nid, 0, add); err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	if err := l.checkDir(nid, children); err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	for _, c := range children {
		s, err := l.m.Stat(c.nid)
		if err != nil || uint32(c.typ) != s.Mode&unix.S_IFMT>>12 {
			return fmt.Errorf("%s: entry %q of type %d is an inode of mode %#o, %v", p, c.name, c.typ, s.Mode, err)
		}
		if c.name == "." && c.nid != nid || c.name == ".." && c.nid != parent {
			return fmt.Errorf("%s: entry %q leads to %d", p, c.name, c.nid)
		}
		if c.name != "." && c.name != ".." {
			if err := l.list(c.nid, path.Join(p, c.name), nid); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkDir looks up what a directory has, and what it has not, and resumes it after each entry.
func (l *imageLister) checkDir(nid uint64, children []child) error {
	if !slices.IsSortedFunc(children, func(a, b child) int { return cmp.Compare(a.name, b.name) }) {
		return errors.New("entries are not sorted")
	}
	for i, c := range children {
		if got, found, err := l.m.Lookup(nid, c.name); got != c.nid || !found || err != nil {
			return fmt.Errorf("lookup %q: %d, %v, %v; want %d", c.name, got, found, err, c.nid)
		}
		if _, found, err := l.m.Lookup(nid, c.name+"\x00"); found || err != nil {
			return fmt.Errorf("lookup of a name after %q: %v, %v", c.name, found, err)
		}
		following := child{}
		err := l.m.ReadDir(nid, c.next, func(name []byte, nid uint64, typ uint8, next uint64) bool {
			following = child{string(name), nid, typ, next}
			return false
		})
		want := child{}
		if i+1 < len(children) {
			want = children[i+1]
		}
		if err != nil || following != want {
			return fmt.Errorf("resumed after %q: %+v, %v; want %+v", c.name, following, err, want)
		}
	}
	return nil
}

func (l *imageLister) xattrs(nid uint64) (map[string]string, error) {
	var all map[string]string
	var failed error
	err := l.m.Xattrs(nid, func(name string) {
		if l.options.NoXattr != nil && l.options.NoXattr(name) {
			return
		}
		value, found, err := l.m.Xattr(nid, name)
		if err != nil || !found {
			failed = fmt.Errorf("xattr %q: %v, %w", name, found, err)
		}
		if all == nil {
			all = make(map[string]string)
		}
		all[name] = string(value)
	})
	return all, cmp.Or(err, failed)
}

func (l *imageLister) content(nid uint64, size int64) (string, error) {
	h := sha256.New()
	for off := int64(0); off < size; {
		data, dev, hole, n, err := l.m.Map(nid, off)
		switch {
		case err != nil:
			return "", err
		case n <= 0 || n > size-off:
			return "", fmt.Errorf("map at %d of %d: %d bytes", off, size, n)
		case hole:
			hashZeros(h, n)
		case data != nil:
			h.Write(data[:n])
		default:
			if copied, err := io.Copy(h, io.NewSectionReader(l.device, dev, n)); err != nil || copied != n {
				return "", cmp.Or(err, io.ErrUnexpectedEOF)
			}
		}
		off += n
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

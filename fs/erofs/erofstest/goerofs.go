package erofstest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"

	goerofs "github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"
)

// ListGoErofs lists a metadata image as github.com/erofs/go-erofs, which shares no code with this project, reads it.
func ListGoErofs(image, device io.ReaderAt, o Options) ([]Entry, error) {
	root, err := goerofs.Open(image, goerofs.WithExtraDevices(device))
	if err != nil {
		return nil, fmt.Errorf("go-erofs: %w", err)
	}
	tree, ok := root.(fs.ReadLinkFS)
	if !ok {
		return nil, fmt.Errorf("go-erofs: %T reads no symlinks", root)
	}
	var entries []Entry
	first := make(map[int64]string)
	err = fs.WalkDir(tree, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		e, ino, err := goErofsEntry(tree, p, o)
		if err != nil {
			return err
		}
		if d.Type() != e.fileMode().Type() {
			return fmt.Errorf("%s: its directory says it is of type %v", p, d.Type())
		}
		if e.Mode&unix.S_IFMT != unix.S_IFDIR {
			if link, found := first[ino]; found {
				e.Link = link
			} else {
				first[ino] = e.Path
			}
		}
		entries = append(entries, e)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("go-erofs: %w", err)
	}
	return entries, nil
}

func (e Entry) fileMode() fs.FileMode { return fileType(e.Mode) }

func goErofsEntry(tree fs.ReadLinkFS, p string, o Options) (e Entry, ino int64, err error) {
	info, err := tree.Lstat(p)
	if err != nil {
		return e, 0, err
	}
	s, ok := info.Sys().(*goerofs.Stat)
	if !ok {
		return e, 0, fmt.Errorf("%s: a %T", p, info.Sys())
	}
	e = Entry{
		Path: path.Join("/", p), Mode: statMode(s.Mode), UID: s.UID, GID: s.GID, Nlink: uint64(s.Nlink), Mtime: int64(s.Mtime), MtimeNsec: s.MtimeNs,
	}
	for name, value := range s.Xattrs {
		if o.NoXattr != nil && o.NoXattr(name) {
			continue
		}
		if e.Xattrs == nil {
			e.Xattrs = make(map[string]string)
		}
		if strings.HasPrefix(name, "system.posix_acl") {
			name = strings.TrimSuffix(name, ".") // go-erofs 0.3.1 has a wrong prefix here
		}
		e.Xattrs[name] = value
	}
	switch e.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if o.NoDirNlink {
			e.Nlink = 0
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Rdev = s.Rdev
	case unix.S_IFLNK:
		e.Size = s.Size
		e.Target, err = tree.ReadLink(p)
	case unix.S_IFREG:
		if e.Size = s.Size; e.Size <= o.MaxContent {
			e.Content, err = goErofsContent(tree, p)
		}
	}
	return e, s.Ino, err
}

func goErofsContent(tree fs.FS, p string) (string, error) {
	f, err := tree.Open(p)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("%s: %w", p, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// statMode returns st_mode for m.
func statMode(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	for _, bit := range []struct {
		from fs.FileMode
		to   uint32
	}{{fs.ModeSetuid, unix.S_ISUID}, {fs.ModeSetgid, unix.S_ISGID}, {fs.ModeSticky, unix.S_ISVTX}} {
		if m&bit.from != 0 {
			mode |= bit.to
		}
	}
	for _, typ := range []uint32{unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK, unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFBLK, unix.S_IFCHR} {
		if fileType(typ) == m.Type() {
			return mode | typ
		}
	}
	return mode
}

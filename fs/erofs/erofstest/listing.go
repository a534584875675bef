// Package erofstest is for the tests of whatever produces or shows file system trees: it lists a directory of any file system, a tree
// (erofs.Inode) and a metadata image in one form, says how two listings differ, makes trees with everything that a file
// system can hold, and mounts metadata images.
//
// A listing has what an application can see: names, types, permissions, owners, sizes, modification times to the nanosecond, device numbers,
// symlink targets, extended attributes, content, which names are one file, and how many. It leaves out inode numbers, access and change times, sizes of directories and blocks.
package erofstest

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Entry is a name in a tree.
type Entry struct {
	Path      string // from the root: "/" is the root, "/a/b" below it
	Mode      uint32 // st_mode
	UID, GID  uint32
	Nlink     uint64
	Size      int64 // of regular files and symlinks
	Mtime     int64 // seconds
	MtimeNsec uint32
	Rdev      uint32            // as Linux's new_encode_dev
	Target    string            // of symlinks
	Link      string            // the first path of the same file, if this is another
	Xattrs    map[string]string // by full name
	Content   string            // SHA-256 of a regular file, in hexadecimal, unless Options exclude it
}

// Options say what of a tree to list. Listings are comparable if they were made with the same.
type Options struct {
	// MaxContent is the size up to which regular files are read, bytes. Zero reads none.
	MaxContent int64
	// NoDirNlink lists no link counts of directories, where file systems differ (overlayfs shows 1 for merged directories).
	NoDirNlink bool
	// NoGhosts leaves out names that a directory has and that cannot be found there: overlayfs shows a whiteout inside an opaque directory so.
	NoGhosts bool
	// NoXattr, if set, says which attributes to leave out.
	NoXattr func(name string) bool
}

// AllContent as MaxContent reads every file.
const AllContent = 1<<63 - 1

// Diff describes how got departs from want, a line for each difference, a few dozen at most. It is empty if they are equal.
func Diff(got, want []Entry) string {
	var lines []string
	left := make(map[string]Entry, len(want))
	for _, e := range want {
		left[e.Path] = e
	}
	for _, e := range got {
		w, found := left[e.Path]
		if !found {
			lines = append(lines, fmt.Sprintf("%s: unexpected or twice (%s)", quote(e.Path), describe(e)))
			continue
		}
		delete(left, e.Path)
		lines = append(lines, differences(e, w)...)
	}
	for _, path := range slices.Sorted(maps.Keys(left)) {
		lines = append(lines, fmt.Sprintf("%s: missing (%s)", quote(path), describe(left[path])))
	}
	const most = 40
	if n := len(lines); n > most {
		lines = append(lines[:most], fmt.Sprintf("... and %d more differences", n-most))
	}
	return strings.Join(lines, "\n")
}

func describe(e Entry) string {
	return fmt.Sprintf("mode %#o, owner %d:%d, size %d", e.Mode, e.UID, e.GID, e.Size)
}

// differences describes how entry got departs from want, of the same path.
func differences(got, want Entry) []string {
	var lines []string
	check := func(what string, g, w any) {
		if g != w {
			lines = append(lines, fmt.Sprintf("%s: %s is %v, want %v", quote(got.Path), what, g, w))
		}
	}
	check("mode", fmt.Sprintf("%#o", got.Mode), fmt.Sprintf("%#o", want.Mode))
	check("owner", fmt.Sprintf("%d:%d", got.UID, got.GID), fmt.Sprintf("%d:%d", want.UID, want.GID))
	check("link count", got.Nlink, want.Nlink)
	check("size", got.Size, want.Size)
	check("mtime", mtime(got), mtime(want))
	check("device number", got.Rdev, want.Rdev)
	check("target", quote(got.Target), quote(want.Target))
	check("first name", quote(got.Link), quote(want.Link))
	check("content", got.Content, want.Content)
	if !maps.Equal(got.Xattrs, want.Xattrs) {
		check("xattrs", xattrs(got), xattrs(want))
	}
	return lines
}

func mtime(e Entry) string {
	return fmt.Sprintf("%d.%09d (%s)", e.Mtime, e.MtimeNsec, time.Unix(e.Mtime, int64(e.MtimeNsec)).UTC().Format(time.RFC3339Nano))
}

func xattrs(e Entry) string {
	var b bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(e.Xattrs)) {
		fmt.Fprintf(&b, " %s=%s", name, quote(e.Xattrs[name]))
	}
	return "{" + strings.TrimPrefix(b.String(), " ") + "}"
}

// quote shows s, or the beginning of it.
func quote(s string) string {
	const most = 120
	if len(s) > most {
		return fmt.Sprintf("%q... (%d bytes)", s[:most], len(s))
	}
	return fmt.Sprintf("%q", s)
}

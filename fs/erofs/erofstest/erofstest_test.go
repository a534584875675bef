package erofstest

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestDiff: every field counts, and what is on one side only.
func TestDiff(t *testing.T) {
	base := Entry{Path: "/f", Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: 3, Mtime: 5, MtimeNsec: 6, Content: "abc", Xattrs: map[string]string{"user.a": "1"}}
	if diff := Diff([]Entry{base}, []Entry{base}); diff != "" {
		t.Errorf("an entry differs from itself: %s", diff)
	}
	for want, change := range map[string]func(*Entry){
		"mode":          func(e *Entry) { e.Mode |= unix.S_ISUID },
		"owner":         func(e *Entry) { e.GID = 1 },
		"link count":    func(e *Entry) { e.Nlink = 2 },
		"size":          func(e *Entry) { e.Size = 4 },
		"mtime":         func(e *Entry) { e.MtimeNsec++ },
		"device number": func(e *Entry) { e.Rdev = 1 },
		"target":        func(e *Entry) { e.Target = "x" },
		"first name":    func(e *Entry) { e.Link = "/e" },
		"content":       func(e *Entry) { e.Content = "abd" },
		"xattrs":        func(e *Entry) { e.Xattrs = map[string]string{"user.a": "2"} },
		"unexpected":    func(e *Entry) { e.Path = "/g" },
		"missing":       func(e *Entry) { e.Path = "/g" },
	} {
		other := base
		change(&other)
		if diff := Diff([]Entry{other}, []Entry{base}); !strings.Contains(diff, want) {
			t.Errorf("a change of %s gives %q", want, diff)
		}
	}
	if diff := Diff([]Entry{base, base}, []Entry{base}); diff == "" {
		t.Error("a path that is there twice makes no difference")
	}
}

// TestWalk lists a directory that was made with the ordinary system calls, and finds what it was made of.
func TestWalk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can make devices")
	}
	m := &Maker{Rand: rand.New(rand.NewPCG(1, 1)), BlockSize: 512, DeviceSize: 4096}
	device := make([]byte, 4096)
	root := dir(0o750,
		named("links", m.links()),
		named("devices", devices()),
		named("deep", m.deep(30)),
	)
	o := Options{MaxContent: AllContent}
	for _, e := range root.Entries[0].Inode.Entries { // the files of links are larger than the device
		if e.Name == "hidden" {
			e.Inode.Nlink = 0
		}
		if e.Name == "f" {
			e.Inode.Size, e.Inode.Extents = 1000, e.Inode.Extents[:1]
			e.Inode.Extents[0].Size = 1000
		}
	}
	want, err := ListTree(root, bytes.NewReader(device), o)
	if err != nil {
		t.Fatal(err)
	}
	top := filepath.Join(t.TempDir(), "tree")
	for _, e := range want {
		create(t, top, e)
	}
	for i := len(want) - 1; i >= 0; i-- { // directories last: what is made in them changes their time
		times := []unix.Timespec{{Sec: want[i].Mtime, Nsec: int64(want[i].MtimeNsec)}, {Sec: want[i].Mtime, Nsec: int64(want[i].MtimeNsec)}}
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, top+want[i].Path, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Walk(top, o)
	if err != nil {
		t.Fatal(err)
	}
	if diff := Diff(got, want); diff != "" {
		t.Error(diff)
	}
}

func create(t *testing.T, top string, e Entry) {
	t.Helper()
	p := top + e.Path
	var err error
	switch {
	case e.Link != "":
		if err := os.Link(top+e.Link, p); err != nil {
			t.Fatal(err)
		}
		return
	case e.Mode&unix.S_IFMT == unix.S_IFDIR:
		err = os.Mkdir(p, 0o700)
	case e.Mode&unix.S_IFMT == unix.S_IFLNK:
		err = os.Symlink(e.Target, p)
	case e.Mode&unix.S_IFMT == unix.S_IFREG:
		err = os.WriteFile(p, make([]byte, e.Size), 0o600)
	default:
		major, minor := e.Rdev>>8&0xfff, e.Rdev&0xff|e.Rdev>>12&0xfff00
		err = unix.Mknod(p, e.Mode, int(unix.Mkdev(major, minor)))
	}
	if err == nil && e.Mode&unix.S_IFMT != unix.S_IFLNK {
		err = unix.Chmod(p, e.Mode&0o7777)
	}
	for name, value := range e.Xattrs {
		if err == nil {
			err = unix.Lsetxattr(p, name, []byte(value), 0)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

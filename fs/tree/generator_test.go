package tree

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
	"time"
)

// chooser decides what a generated layer holds.
type chooser interface{ IntN(n int) int }

// bytesChooser takes decisions from a fuzzer's input; at its end everything is the first choice.
type bytesChooser struct{ b []byte }

func (c *bytesChooser) IntN(n int) int {
	if len(c.b) == 0 {
		return 0
	}
	v := int(c.b[0])
	c.b = c.b[1:]
	return v % n
}

func pick[T any](c chooser, choices ...T) T { return choices[c.IntN(len(choices))] }

// oneIn is true one time in n.
func oneIn(c chooser, n int) bool { return c.IntN(n) == n-1 }

// generator makes layers that like conflicts: few names, all kinds of files.
type generator struct {
	chooser
	named []string // by entries of this layer
	dirs  []string // those that were directories
}

func (g *generator) path() string {
	if len(g.named) > 0 && oneIn(g, 4) {
		return g.named[g.IntN(len(g.named))]
	}
	if len(g.dirs) > 0 && oneIn(g, 3) {
		return g.dirs[g.IntN(len(g.dirs))] + "/" + pick(g, "a", "b", "c", "l")
	}
	depth := pick(g, 1, 1, 2, 2, 3, 3, 4)
	var names []string
	for range depth {
		names = append(names, pick(g, "a", "b", "c", "d", "l"))
	}
	return strings.Join(names, "/")
}

// spelled returns p as builders write it.
func (g *generator) spelled(p string) string {
	switch g.IntN(16) {
	case 12:
		return "./" + p
	case 13:
		return "/" + p
	case 14:
		return pick(g, "../", "a/../", "./a/./../", "x/../../", "//") + p
	case 15:
		return strings.Replace(p, "/", pick(g, "//", "/./", "/../"), 1)
	}
	return p
}

func (g *generator) target() string {
	switch g.IntN(8) {
	case 0:
		return "/" + g.path()
	case 1:
		return pick(g, ".", "..", "/", "./", "../..", "../../..")
	case 2, 3:
		return "../" + g.path()
	case 4:
		return g.path() + "/"
	}
	return g.path()
}

func (g *generator) layer() (entries []*tar.Header) {
	g.named, g.dirs = nil, nil
	for range 1 + g.IntN(12) {
		h := g.entry()
		entries = append(entries, h)
		if oneIn(g, 20) {
			entries = append(entries, h)
		}
	}
	return entries
}

func (g *generator) entry() *tar.Header {
	p := g.path()
	h := &tar.Header{
		Name:    g.spelled(p),
		Mode:    pick[int64](g, 0o755, 0o644, 0o600, 0, 0o4755, 0o2755, 0o2775, 0o1777, 0o7777, 0o107755),
		Uid:     pick(g, 0, 0, 1, 1000, 65534, 4294967294, 4294967295),
		Gid:     pick(g, 0, 0, 2, 1000, 100000, 4294967295),
		ModTime: time.Unix(int64(pick(g, 1600000000, 1500000000, 1, 0, -5, 5000000000))+int64(g.IntN(100)), int64(pick(g, 0, 0, 123456789, 999999999))),
		Format:  tar.FormatPAX,
	}
	if oneIn(g, 5) {
		h.AccessTime = time.Unix(1650000000, 0)
	}
	switch g.IntN(40) {
	case 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10:
		h.Typeflag = tar.TypeDir
		h.Name += pick(g, "/", "/", "")
	case 11, 12, 13, 14, 15, 16, 17, 18, 19, 20:
		h.Typeflag = tar.TypeReg
		h.Size = pick[int64](g, 0, 1, 7, 511, 512, 513, 2000)
	case 21, 22, 23, 24, 25:
		h.Typeflag = tar.TypeSymlink
		h.Linkname = g.target()
	case 26, 27, 28, 29:
		h.Typeflag = tar.TypeLink
		h.Linkname = g.spelled(g.path())
		if len(g.named) > 0 && !oneIn(g, 8) {
			h.Linkname = g.spelled(g.named[g.IntN(len(g.named))]) + pick(g, "", "", "", "", "/", "/.", "/..")
		}
	case 30, 31, 32, 33:
		h.Typeflag = pick[byte](g, tar.TypeReg, tar.TypeReg, tar.TypeReg, tar.TypeDir)
		dir, name := splitLast(p)
		h.Name = g.spelled(dir + whiteoutPrefix + name)
	case 34, 35:
		h.Typeflag = tar.TypeReg
		dir, _ := splitLast(p)
		if oneIn(g, 2) {
			dir = p + "/"
		}
		h.Name = g.spelled(dir + opaqueName)
	case 36:
		h.Typeflag = tar.TypeChar
		h.Devmajor, h.Devminor = pick[int64](g, 0, 0, 1, 4095, 4096, 8), pick[int64](g, 0, 0, 3, 255, 256, 1048575, 1048576)
	case 37:
		h.Typeflag = pick[byte](g, tar.TypeFifo, tar.TypeBlock)
		h.Devmajor, h.Devminor = 0, pick[int64](g, 0, 7)
	case 38:
		return &tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: pick(g, "pax_global_header", p), PAXRecords: map[string]string{"comment": "x"}}
	case 39:
		g.oddity(h, p)
	}
	g.xattrs(h)
	g.named = append(g.named, p)
	if h.Typeflag == tar.TypeDir {
		g.dirs = append(g.dirs, p)
	}
	return h
}

func splitLast(p string) (dir, name string) {
	i := strings.LastIndexByte(p, '/') + 1
	return p[:i], p[i:]
}

// oddity makes h one of the rare things.
func (g *generator) oddity(h *tar.Header, p string) {
	h.Typeflag = tar.TypeReg
	switch g.IntN(12) {
	case 0:
		h.Name = pick(g, ".wh.", ".wh..", ".wh...", ".wh..wh.a", ".wh..wh.plnk", ".wh..wh..opq/a", ".wh.a/b")
	case 1:
		h.Name = p + "/" + pick(g, ".wh.", ".wh..", ".wh...", ".wh..wh.a")
	case 2:
		h.Name = pick(g, ".", "./", "/", "..", "../..")
		h.Typeflag, h.Linkname = pick[byte](g, tar.TypeDir, tar.TypeSymlink), "a"
	case 3:
		h.Typeflag = tar.TypeCont
	case 4:
		h.Name = p + "/" + strings.Repeat("n", pick(g, 254, 255, 256))
	case 5:
		h.Name = whiteoutPrefix + strings.Repeat("n", pick(g, 251, 252, 255, 256))
	case 6:
		h.Typeflag, h.Linkname = tar.TypeSymlink, strings.Repeat("t", pick(g, 1000, 4095, 4096))
	case 7:
		h.Typeflag, h.Linkname = tar.TypeLink, pick(g, ".", "..", "/", "a/..", "a/.", "../a", "./a", "/a")
	case 8:
		h.Typeflag, h.Name = tar.TypeDir, opaqueName
	case 9:
		h.Typeflag, h.Linkname = tar.TypeLink, p // to itself
	default:
		h.Typeflag, h.Linkname = tar.TypeSymlink, p // to itself
	}
}

// aclOf returns a POSIX ACL of pairs of tag and permissions, and their ids.
func aclOf(id uint32, tagPerms ...uint16) string {
	b := binary.LittleEndian.AppendUint32(nil, aclVersion)
	for i := 0; i < len(tagPerms); i += 2 {
		b = binary.LittleEndian.AppendUint16(b, tagPerms[i])
		b = binary.LittleEndian.AppendUint16(b, tagPerms[i+1])
		b = binary.LittleEndian.AppendUint32(b, id)
	}
	return string(b)
}

func (g *generator) acl() string {
	id := uint32(pick(g, 0, 1000, 70000))
	perm := func() uint16 { return uint16(g.IntN(8)) }
	switch g.IntN(10) {
	case 0, 1:
		return aclOf(id, aclUserObj, perm(), aclGroupObj, perm(), aclOther, perm())
	case 2:
		return aclOf(id, aclUserObj, perm(), aclGroupObj, perm(), aclMask, perm(), aclOther, perm())
	case 3:
		return aclOf(id, aclUserObj, perm(), aclUser, perm(), aclUser, perm(), aclGroupObj, perm(), aclGroup, perm(), aclMask, perm(), aclOther, perm())
	case 4:
		if oneIn(g, 2) {
			return g.invalidACL(id)
		}
	case 5:
		return aclOf(id)
	case 6:
		return pick(g, "", "\x01\x00\x00\x00", "\x03\x00\x00\x00abcdefgh")
	}
	return aclOf(id, aclUserObj, perm(), aclUser, perm(), aclGroupObj, perm(), aclMask, perm(), aclOther, perm())
}

func (g *generator) invalidACL(id uint32) string {
	return pick(g,
		"\x02\x00\x00", "\x02\x00\x00\x00abc",
		aclOf(id, aclUserObj, 7, aclUser, 7, aclGroupObj, 7, aclOther, 7),
		aclOf(id, aclUserObj, 7, aclGroupObj, 7, aclUser, 7, aclMask, 7, aclOther, 7),
		aclOf(id, aclUserObj, 7, aclGroupObj, 7),
		aclOf(id, aclGroupObj, 7, aclOther, 7),
		aclOf(id, aclUserObj, 7, aclUserObj, 7, aclGroupObj, 7, aclOther, 7),
		aclOf(id, aclUserObj, 7, aclGroupObj, 7, aclMask, 7, aclMask, 7, aclOther, 7),
		aclOf(id, aclUserObj, 7, aclGroupObj, 7, aclOther, 7, aclOther, 7),
		aclOf(id, aclUserObj, 8, aclGroupObj, 7, aclOther, 7),
		aclOf(id, aclUserObj, 7, aclGroupObj, 7, 0x40, 7, aclOther, 7),
		aclOf(^uint32(0), aclUserObj, 7, aclUser, 7, aclGroupObj, 7, aclMask, 7, aclOther, 7),
	)
}

func (g *generator) xattrs(h *tar.Header) {
	if !oneIn(g, 3) {
		return
	}
	set := func(name, value string) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrRecord+name] = value
	}
	for range 1 + g.IntN(2) {
		switch g.IntN(12) {
		case 0, 1, 2:
			set("user."+pick(g, "a", "b"), pick(g, "", "v", "w\x00x"))
		case 3:
			set("trusted."+pick(g, "a", "overlay.opaque", "overlay.redirect"), "y")
		case 4:
			set("security."+pick(g, "test", "other"), pick(g, "", "label"))
		case 5:
			set(capability, pick(g, "\x01\x00\x00\x02"+strings.Repeat("\x00\x04\x00\x00", 4), "\x00\x00\x00\x02"+strings.Repeat("\x01", 16),
				"\x01\x00\x00\x03"+strings.Repeat("\x00", 16)+"\xe8\x03\x00\x00"))
		case 6:
			if oneIn(g, 8) {
				set(capability, pick(g, "\x01\x00\x00\x02", "\x00\x00\x00\x01"+strings.Repeat("\x00", 8), "abc",
					"\x01\x00\x00\x03"+strings.Repeat("\x00", 16)+"\xff\xff\xff\xff"))
			}
		case 7:
			set(pick(g, "system.foo", "nonsense", "btrfs.compression", "user", "security", "userx.y", "user.overlay.opaque"), "y")
		case 8:
			if oneIn(g, 8) {
				set(pick(g, "user.", "security.", "system.", "trusted.", "", strings.Repeat("n", 300), "user."+strings.Repeat("n", 250)), "y")
			}
		case 9, 10:
			if h.Typeflag == tar.TypeDir || oneIn(g, 8) {
				set(aclDefault, g.acl())
			}
		case 11:
			set(aclAccess, g.acl())
		}
	}
}

// tarOf writes a tar. Regular files hold their position in the layer and their name, over and over.
func tarOf(t testing.TB, entries ...*tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i, h := range entries {
		if err := w.WriteHeader(h); err != nil {
			t.Fatalf("%+v: %v", h, err)
		}
		if h.Typeflag == tar.TypeReg {
			text := fmt.Sprintf("%d %s;", i, h.Name)
			if _, err := w.Write([]byte(strings.Repeat(text, int(h.Size)/len(text)+1)[:h.Size])); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

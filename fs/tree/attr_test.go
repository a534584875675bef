package tree

import (
	"archive/tar"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"
)

const testCapability = "\x01\x00\x00\x02" + "\x00\x04\x00\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00"

// TestAttributes has the rules of owners, modes, times and xattrs. All are compared with containerd and overlayfs, too.
func TestAttributes(t *testing.T) {
	entry := func(spec string, change func(h *tar.Header)) *tar.Header {
		h := parseEntries(spec)[0]
		if change != nil {
			change(h)
		}
		return h
	}
	xattr := func(name, value string) func(h *tar.Header) {
		return func(h *tar.Header) { h.PAXRecords = map[string]string{xattrRecord + name: value} }
	}
	like := func(mode int64, uid, gid int, sec int64) func(h *tar.Header) {
		return func(h *tar.Header) { h.Mode, h.Uid, h.Gid, h.ModTime = mode, uid, gid, time.Unix(sec, 5) }
	}
	extended := aclOf(7, aclUserObj, 7, aclUser, 5, aclGroupObj, 5, aclMask, 7, aclOther, 0)
	for name, c := range map[string]struct {
		layers [][]*tar.Header
		path   string
		want   string // as formatted below
	}{
		"all modes, owners, times": {[][]*tar.Header{{entry("f", like(0o7751, 4294967294, 100000, 1234))}}, "/f", "107751 4294967294:100000 1234.000000005"},
		"no such owner":            {[][]*tar.Header{{entry("f", like(0o644, 4294967295, 4294967295, 1))}}, "/f", "100644 0:0 1.000000005"},
		"type bits in the mode":    {[][]*tar.Header{{entry("f", like(0o120644, 0, 0, 1))}}, "/f", "100644 0:0 1.000000005"},
		"before 1970":              {[][]*tar.Header{{entry("f", like(0o644, 0, 0, -100))}}, "/f", "100644 0:0 0.000000000"},
		"after 2262":               {[][]*tar.Header{{entry("f", like(0o644, 0, 0, 9223372037))}}, "/f", "100644 0:0 0.000000000"},
		"latest time":              {[][]*tar.Header{{entry("f", like(0o644, 0, 0, 9223372036))}}, "/f", "100644 0:0 9223372036.000000005"},
		"directory twice":          {[][]*tar.Header{{entry("d/", like(0o755, 1, 1, 1)), entry("d/", like(0o700, 2, 4294967295, 2)), entry("d/f", nil)}}, "/d", "40700 2:1 2.000000005"},
		"topmost directory's":      {[][]*tar.Header{{entry("d/", like(0o755, 1, 1, 1))}, {entry("d/", like(0o700, 2, 2, 2))}}, "/d", "40700 2:2 2.000000005"},

		"new parent":                     {[][]*tar.Header{{entry("d/f", like(0o600, 3, 3, 3))}}, "/d", "40755 0:0 3.000000005"},
		"parent of lower layer":          {[][]*tar.Header{{entry("d/", like(0o2711, 1, 2, 3))}, {entry("d/f", nil)}}, "/d", "42711 1:2 3.000000005"},
		"opaque parent of lower layer":   {[][]*tar.Header{{entry("d/", like(0o2711, 1, 2, 3))}, {entry("d/"+opaqueName, nil)}}, "/d", "42711 1:2 3.000000005"},
		"parent through a lower symlink": {[][]*tar.Header{{entry("usr/lib/", like(0o711, 1, 2, 3)), entry("lib->usr/lib", nil)}, {entry("lib/f", nil)}}, "/lib", "40711 1:2 3.000000005"},
		"parent hidden by a lower file":  {[][]*tar.Header{{entry("d/", like(0o711, 1, 2, 3))}, {entry("d", nil)}, {entry("d/f", like(0o644, 0, 0, 9))}}, "/d", "40755 0:0 9.000000005"},
		"parent in a setgid directory":   {[][]*tar.Header{{entry("d/", like(0o2755, 5, 6, 7)), entry("d/e/f", like(0o644, 0, 0, 9))}}, "/d/e", "40755 0:6 9.000000005"},
		"parent with xattrs":             {[][]*tar.Header{{entry("d/", xattr("user.a", "1"))}, {entry("d/f", nil)}}, "/d", `40755 0:0 1600000000.123456789 user.a="1"`},

		"hard link's attributes win":     {[][]*tar.Header{{entry("f", like(0o644, 1, 1, 1)), entry("h=>f", like(0o600, 2, 2, 2))}}, "/f", "100600 2:2 2.000000005"},
		"hard link to a symlink":         {[][]*tar.Header{{entry("l->x", like(0o777, 1, 1, 1)), entry("h=>l", like(0o600, 2, 2, 2))}}, "/l", "120777 2:2 2.000000005"},
		"capability":                     {[][]*tar.Header{{entry("f", xattr(capability, testCapability))}}, "/f", "100644 0:0 1600000000.123456789" + fmt.Sprintf(" %s=%q", capability, testCapability)},
		"hard link drops the capability": {[][]*tar.Header{{entry("f", xattr(capability, testCapability)), entry("h=>f", nil)}}, "/f", "100644 0:0 1600000000.123456789"},
		"hard link repeats capability":   {[][]*tar.Header{{entry("f", nil), entry("h=>f", xattr(capability, testCapability))}}, "/f", "100644 0:0 1600000000.123456789" + fmt.Sprintf(" %s=%q", capability, testCapability)},
		"empty xattr":                    {[][]*tar.Header{{entry("f", xattr("user.a", ""))}}, "/f", `100644 0:0 1600000000.123456789 user.a=""`},
		"trusted xattr":                  {[][]*tar.Header{{entry("d/", xattr("trusted.overlay.opaque", "y"))}}, "/d", "40755 0:0 1600000000.123456789"},
		"user xattr of a symlink":        {[][]*tar.Header{{entry("l->x", xattr("user.a", "y"))}}, "/l", "120777 0:0 1600000000.123456789"},
		"security xattr of a symlink":    {[][]*tar.Header{{entry("l->x", xattr("security.a", "y"))}}, "/l", `120777 0:0 1600000000.123456789 security.a="y"`},
		"xattr of no namespace":          {[][]*tar.Header{{entry("f", xattr("fruit", "y"))}}, "/f", "100644 0:0 1600000000.123456789"},
		"xattrs of a directory add up":   {[][]*tar.Header{{entry("d/", xattr("user.a", "1")), entry("d/", xattr("user.b", "2"))}}, "/d", `40755 0:0 1600000000.123456789 user.a="1" user.b="2"`},
		"xattrs of merged ones do not":   {[][]*tar.Header{{entry("d/", xattr("user.a", "1"))}, {entry("d/", xattr("user.b", "2"))}}, "/d", `40755 0:0 1600000000.123456789 user.b="2"`},
		"ACL under the mode":             {[][]*tar.Header{{entry("f", xattr(aclAccess, extended))}}, "/f", "100644 0:0 1600000000.123456789" + fmt.Sprintf(" %s=%q", aclAccess, aclIDs(7, aclUserObj, 6, aclUser, 5, aclGroupObj, 5, aclMask, 4, aclOther, 4))},
		"ACL that is only a mode":        {[][]*tar.Header{{entry("f", xattr(aclAccess, aclOf(0, aclUserObj, 7, aclGroupObj, 7, aclOther, 7)))}}, "/f", "100644 0:0 1600000000.123456789"},
		"inherited ACL":                  {[][]*tar.Header{{entry("d/", xattr(aclDefault, extended)), entry("d/f", nil)}}, "/d/f", "100644 0:0 1600000000.123456789" + fmt.Sprintf(" %s=%q", aclAccess, aclIDs(7, aclUserObj, 6, aclUser, 5, aclGroupObj, 5, aclMask, 4, aclOther, 4))},
	} {
		t.Run(name, func(t *testing.T) {
			var layers [][]byte
			for _, l := range c.layers {
				layers = append(layers, tarOf(t, l...))
			}
			entries, err := mergeAndCompare(t, layers...)
			if err != nil {
				t.Fatal(err)
			}
			e := at(entries, c.path)
			got := fmt.Sprintf("%o %d:%d %d.%09d", e.Mode, e.UID, e.GID, e.Mtime, e.MtimeNsec)
			for _, name := range slices.Sorted(maps.Keys(e.Xattrs)) {
				got += fmt.Sprintf(" %s=%q", name, e.Xattrs[name])
			}
			if got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

// aclIDs is aclOf with ids only where they mean something, as the kernel gives them back.
func aclIDs(id uint32, tagPerms ...uint16) string {
	a, err := parseACL([]byte(aclOf(id, tagPerms...)))
	if err != nil {
		panic(err)
	}
	return string(a)
}

func TestHiddenLinksCount(t *testing.T) {
	entries, err := mergeAndCompare(t, tarOf(t, parseEntries("a b=>a c=>a")...), tarOf(t, parseEntries(".wh.a b")...))
	if err != nil {
		t.Fatal(err)
	}
	if got := at(entries, "/c").Nlink; got != 3 {
		t.Errorf("link count %d, want 3: the names in the layer", got)
	}
}

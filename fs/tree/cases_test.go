package tree

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs/erofstest"
)

// TestCases has a name for every rule that is easily got wrong. Each layer is a list of entries: dir/, file,
// symlink->target, hard=>link, device:c:1:3. The visible tree is written the same way; a refusal is the words of its reason.
// All are compared with containerd and overlayfs, too.
func TestCases(t *testing.T) {
	for name, c := range map[string]struct {
		layers []string
		want   string // or what the refusal of the last layer says
	}{
		"upper file hides lower":              {[]string{"d/ d/f", "d"}, "d"},
		"upper directory hides lower file":    {[]string{"d", "d/ d/f"}, "d/ d/f"},
		"directories merge":                   {[]string{"d/ d/a", "d/ d/b", "d/ d/c"}, "d/ d/a d/b d/c"},
		"file between directories hides":      {[]string{"d/ d/a", "d", "d/ d/c"}, "d/ d/c"},
		"directory hides lower symlink":       {[]string{"usr/lib/ usr/lib/x lib->usr/lib", "lib/y"}, "lib/ lib/y usr/ usr/lib/ usr/lib/x"},
		"symlink in a layer is followed":      {[]string{"usr/lib/ lib->usr/lib lib/y"}, "lib->usr/lib usr/ usr/lib/ usr/lib/y"},
		"absolute symlink is bounded":         {[]string{"c/ l->/c l/y"}, "c/ c/y l->/c"},
		"dotdot symlink is bounded":           {[]string{"c/ d/ d/l->../../../c d/l/y"}, "c/ c/y d/ d/l->../../../c"},
		"symlink to nothing makes its target": {[]string{"l->a/b l/y"}, "a/ a/b/ a/b/y l->a/b"},
		"chain of symlinks":                   {[]string{"c/d/ b->c a->b a/d/x"}, "a->b b->c c/ c/d/ c/d/x"},
		"symlink loop":                        {[]string{"a->b b->a a/x"}, "too many symlinks"},
		"chain to an absolute symlink":        {[]string{"c/ b->/c a->b a/d/x"}, "outside of the layer"},
		"directory entry replaces symlink":    {[]string{"d/ l->d l/ l/x"}, "d/ l/ l/x"},

		"whiteout":                             {[]string{"d/ d/a d/b", "d/ d/.wh.a"}, "d/ d/b"},
		"whiteout of nothing":                  {[]string{"a", ".wh.b d/.wh.c"}, "a d/"},
		"whiteout of a directory":              {[]string{"d/ d/a", ".wh.d"}, ""},
		"whiteout stops the merge":             {[]string{"d/ d/a", ".wh.d", "d/ d/b"}, "d/ d/b"},
		"whiteout, then directory, one layer":  {[]string{"d/ d/a", ".wh.d d/ d/b"}, "d/ d/a d/b"},
		"whiteout, then file, one layer":       {[]string{"d/ d/a", ".wh.d d"}, "d"},
		"whiteout, then entry below":           {[]string{"d/ d/a", ".wh.d d/b"}, "not a directory"},
		"file, then whiteout, one layer":       {[]string{"foo", "foo .wh.foo"}, "file exists"},
		"directory, then whiteout, one layer":  {[]string{"foo", "foo/ .wh.foo"}, "file exists"},
		"whiteout twice":                       {[]string{"foo", ".wh.foo .wh.foo"}, "file exists"},
		"whiteout in the bottom layer":         {[]string{"foo bar .wh.foo .wh.none"}, "bar"},
		"directory deleted in bottom layer":    {[]string{"d/ .wh.d"}, "set time: no such file"},
		"directory deleted and made again":     {[]string{"d/ d/a .wh.d d/ d/b"}, "d/ d/b"},
		"whiteout without a name":              {[]string{"a", ".wh."}, "invalid whiteout name"},
		"whiteout of dot":                      {[]string{"a", "d/.wh.."}, "invalid whiteout name"},
		"whiteout of dotdot":                   {[]string{"a", "d/.wh..."}, "invalid whiteout name"},
		"whiteout of a whiteout":               {[]string{"a", ".wh..wh.a"}, "a"},
		"whiteout names in the middle of path": {[]string{"a", ".wh.a/b .wh..wh..opq/c"}, ".wh..wh..opq/ .wh..wh..opq/c .wh.a/ .wh.a/b a"},
		"whiteout as a directory's entry":      {[]string{"a b", ".wh.a/"}, "b"},
		"whiteout of a long name":              {[]string{"a " + strings.Repeat("n", 255), ".wh." + strings.Repeat("n", 255)}, "a"},
		"whiteout of a name too long":          {[]string{"a", ".wh." + strings.Repeat("n", 256)}, "file name too long"},
		"device 0:0 is a whiteout":             {[]string{"a b", "a:c:0:0"}, "b"},
		"device 0:0 in the bottom layer":       {[]string{"a:c:0:0 b"}, "b"},
		"device truncated to 0:0":              {[]string{"a b", "a:c:4096:1048576"}, "b"},
		"block device 0:0 is a device":         {[]string{"a b", "a:b:0:0"}, "a:b:0:0 b"},
		"hard link to a whiteout":              {[]string{"a b", ".wh.a b=>a"}, ""},

		"opaque":                             {[]string{"d/ d/a d/e/ d/e/f", "d/ d/.wh..wh..opq d/b"}, "d/ d/b"},
		"opaque last":                        {[]string{"d/ d/a", "d/ d/b d/.wh..wh..opq"}, "d/ d/b"},
		"opaque without an entry of its own": {[]string{"d/ d/a", "d/.wh..wh..opq"}, "d/"},
		"opaque below a merge":               {[]string{"d/ d/a", "d/ d/.wh..wh..opq d/b", "d/ d/c"}, "d/ d/b d/c"},
		"opaque twice":                       {[]string{"d/ d/a", "d/.wh..wh..opq d/.wh..wh..opq"}, "d/"},
		"opaque root has no effect":          {[]string{"a", ".wh..wh..opq b"}, "a b"},
		"whiteout in an opaque directory":    {[]string{"d/ d/a", "d/ d/.wh..wh..opq d/.wh.a d/b"}, "d/ d/b"},
		"opaque directory made again":        {[]string{"d/ d/a", "d/ d/.wh..wh..opq d d/"}, "d/ d/a"},
		"opaque in bottom keeps entries":     {[]string{"d/ d/a d/e/f d/.wh..wh..opq d/b"}, "d/ d/a d/b"},
		"opaque root in the bottom layer":    {[]string{"i/f e/ e/f .wh..wh..opq"}, "e/ e/f"},
		"opaque in bottom works once":        {[]string{"d/ d/.wh..wh..opq d/e/f d/.wh..wh..opq"}, "d/ d/e/ d/e/f"},
		"opaque through a symlink":           {[]string{"d/ d/a", "d/ l->d l/.wh..wh..opq"}, "d/ l->d"},

		"dot names":                              {[]string{"./ ./a ./d/ ./d/b"}, "a d/ d/b"},
		"the root's entry":                       {[]string{"./ a", "./ / .. b"}, "a b"},
		"absolute names":                         {[]string{"/a /d/b"}, "a d/ d/b"},
		"dotdot names":                           {[]string{"../a x/../b d/../../c"}, "a b c"},
		"the same name twice":                    {[]string{"a a->b a"}, "a"},
		"directory twice":                        {[]string{"d/ d/a d/ d/b"}, "d/ d/a d/b"},
		"file over directory":                    {[]string{"e d/ d/a d d=>e"}, "d e=>d"},
		"file over directory, left":              {[]string{"d/ d/a d"}, "d"},
		"directory over file":                    {[]string{"d d/ d/a"}, "d/ d/a"},
		"entry below a file":                     {[]string{"a a/b"}, "not a directory"},
		"entry far below a file":                 {[]string{"a a/b/c"}, "not a directory"},
		"entry before its directory":             {[]string{"d/e/f d/e/ d/"}, "d/ d/e/ d/e/f"},
		"below a lower file":                     {[]string{"a", "a/b"}, "a/ a/b"},
		"far below a lower file":                 {[]string{"a", "a/b/c"}, "not a directory"},
		"far below a lower whiteout":             {[]string{"a", ".wh.a", "a/b/c"}, "not a directory"},
		"directory's time set through a symlink": {[]string{"a/ l->a a l->b"}, "a l->b"},
		"directory replaced by a dangling link":  {[]string{"a/ a->b"}, "set time: no such file"},
		"long name":                              {[]string{strings.Repeat("n", 255)}, strings.Repeat("n", 255)},
		"name too long":                          {[]string{strings.Repeat("n", 256)}, "file name too long"},
		"symlink too long":                       {[]string{"l->" + strings.Repeat("n", 4096)}, "file name too long"},
		"empty symlink":                          {[]string{"l->"}, "no such file"},
		"empty layers":                           {[]string{"", "a", ""}, "a"},

		"hard links":                        {[]string{"d/a e/b=>d/a c=>e/b"}, "c d/ d/a=>c e/ e/b=>c"},
		"hard link to a symlink":            {[]string{"l->a h=>l"}, "h->a l=>h"},
		"hard link through a symlink":       {[]string{"d/a l->d h=>l/a"}, "d/ d/a h=>d/a l->d"},
		"hard link with a final slash":      {[]string{"a l->a h=>l/"}, "a h=>a l->a"},
		"hard link to a lower file":         {[]string{"a", "b=>a"}, "no such file"},
		"hard link to a directory":          {[]string{"d/ h=>d"}, "operation not permitted"},
		"hard link to itself":               {[]string{"a a=>a"}, "no such file"},
		"hard link outside":                 {[]string{"a h=>../../a"}, "a h=>a"},
		"hard link to dotdot":               {[]string{"a h=>.."}, "operation not permitted"},
		"hard link to a later file":         {[]string{"h=>a a"}, "no such file"},
		"hard link below a file":            {[]string{"a h=>a/b/c"}, "not a directory"},
		"hard link's first name is deleted": {[]string{"a b=>a c=>a", ".wh.a"}, "b c=>b"},
		"hard link replaced in one layer":   {[]string{"a b=>a a"}, "a b"},

		"global header":                   {[]string{"g:g a"}, "a"},
		"global header removes its name":  {[]string{"a b/ b/c a:g b:g"}, "set time: no such file"},
		"global header makes its parents": {[]string{"d/g:g"}, "d/"},
		"unknown type":                    {[]string{"a:7"}, "unhandled tar header type"},
		"fifo":                            {[]string{"p:p"}, "p:p"},
	} {
		t.Run(name, func(t *testing.T) {
			var layers [][]byte
			for _, l := range c.layers {
				layers = append(layers, tarOf(t, parseEntries(l)...))
			}
			entries, err := mergeAndCompare(t, layers...)
			got := spell(entries)
			if err != nil {
				got = err.Error()
				if strings.Contains(got, c.want) && c.want != "" {
					return
				}
			}
			if got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

// mergeAndCompare merges layers and compares the tree with containerd's. What only this package refuses is told by errHost.
func mergeAndCompare(t *testing.T, layers ...[]byte) ([]erofstest.Entry, error) {
	t.Helper()
	o := newOracle(t)
	var c chain
	var refused error
	for _, b := range layers {
		c = c.with(t, b)
		if refused == nil {
			refused = o.apply(t, b)
		}
	}
	root, err := Merge(context.Background(), c.layers, 512)
	if err != nil {
		if refused == nil && !errors.Is(err, errHost) || !errors.Is(err, ErrRefused) {
			t.Errorf("refused, but containerd accepts: %v", err)
		}
		return nil, err
	}
	if refused != nil {
		t.Fatalf("containerd refuses: %v", refused)
	}
	entries := c.list(t, root)
	o.differ(t, o.walk(t), entries)
	return entries, nil
}

// at returns the entry of a path.
func at(entries []erofstest.Entry, p string) erofstest.Entry {
	for _, e := range entries {
		if e.Path == p {
			return e
		}
	}
	return erofstest.Entry{}
}

var testTime = time.Unix(1600000000, 123456789)

func parseEntries(list string) (entries []*tar.Header) {
	for _, s := range strings.Fields(list) {
		h := &tar.Header{Name: s, Typeflag: tar.TypeReg, Mode: 0o644, ModTime: testTime, Format: tar.FormatPAX, Size: 10}
		if name, target, ok := strings.Cut(s, "=>"); ok {
			h.Typeflag, h.Name, h.Linkname = tar.TypeLink, name, target
		} else if name, target, ok := strings.Cut(s, "->"); ok {
			h.Typeflag, h.Name, h.Linkname = tar.TypeSymlink, name, target
		} else if f := strings.Split(s, ":"); len(f) > 1 {
			h.Name, h.Typeflag = f[0], map[string]byte{"c": tar.TypeChar, "b": tar.TypeBlock, "p": tar.TypeFifo, "g": tar.TypeXGlobalHeader, "7": tar.TypeCont}[f[1]]
			if len(f) > 2 {
				fmt.Sscan(f[2], &h.Devmajor)
				fmt.Sscan(f[3], &h.Devminor)
			}
		} else if strings.HasSuffix(s, "/") || s == ".." {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		}
		if h.Typeflag != tar.TypeReg {
			h.Size = 0
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			h = &tar.Header{Name: h.Name, Typeflag: h.Typeflag, PAXRecords: map[string]string{"comment": "x"}}
		}
		entries = append(entries, h)
	}
	return entries
}

// spell is parseEntries the other way round.
func spell(entries []erofstest.Entry) string {
	var list []string
	for _, e := range entries {
		name, format := strings.TrimPrefix(e.Path, "/"), e.Mode&unix.S_IFMT
		switch {
		case name == "":
			continue
		case e.Link != "":
			name += "=>" + e.Link[1:]
		case format == unix.S_IFDIR:
			name += "/"
		case format == unix.S_IFLNK:
			name += "->" + e.Target
		case format == unix.S_IFIFO:
			name += ":p"
		case format == unix.S_IFCHR, format == unix.S_IFBLK:
			kind := map[uint32]string{unix.S_IFCHR: "c", unix.S_IFBLK: "b"}[format]
			name += fmt.Sprintf(":%s:%d:%d", kind, unix.Major(uint64(e.Rdev)), unix.Minor(uint64(e.Rdev)))
		}
		list = append(list, name)
	}
	slices.Sort(list)
	return strings.Join(list, " ")
}

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

func TestRefusalNamesLayerAndEntry(t *testing.T) {
	c := chain{}.with(t, tarOf(t, parseEntries("a")...)).with(t, tarOf(t, parseEntries("d/ b=>d/a")...))
	_, err := Merge(context.Background(), c.layers, 512)
	want := `layer 1: entry "b": layer cannot be streamed: link target "d/a": no such file or directory`
	if !errors.Is(err, ErrRefused) || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestLimits(t *testing.T) {
	links := parseEntries("f" + strings.Repeat(" h=>f", 1))
	for i := range maxLinks {
		links = append(links, &tar.Header{Typeflag: tar.TypeLink, Name: fmt.Sprint("links/", i), Linkname: "f"})
	}
	for name, entries := range map[string][]*tar.Header{
		"links": links,
		"path":  parseEntries(strings.Repeat("n/", maxPath/2) + "x"),
		"xattr": {{Typeflag: tar.TypeReg, Name: "f", PAXRecords: map[string]string{xattrRecord + "user.a": strings.Repeat("v", maxXattr+1)}}},
		"xattrs": {{Typeflag: tar.TypeReg, Name: "f", PAXRecords: map[string]string{
			xattrRecord + "user.a": strings.Repeat("v", maxXattr), xattrRecord + "user.b": strings.Repeat("v", maxXattr), xattrRecord + "user.c": strings.Repeat("v", maxXattr)}}},
	} {
		t.Run(name, func(t *testing.T) {
			c := chain{}.with(t, tarOf(t, entries...))
			if _, err := Merge(context.Background(), c.layers, 512); !errors.Is(err, ErrRefused) {
				t.Errorf("got %v, want ErrRefused", err)
			}
		})
	}
}

func TestTooManySteps(t *testing.T) {
	c := chain{}.with(t, tarOf(t, parseEntries("t/d/d/d/f l->t k->l")...))
	s := source{entries: func() entryReader { return c.layers[0].Index.Entries() }, tarSize: c.layers[0].Index.TarSize}
	f := &files{blockSize: 512, scattered: map[*node]scattered{}}
	root, err := applyLayer(context.Background(), &s, nil, f)
	if err != nil {
		t.Fatal(err)
	}
	for f.steps = 0; ; {
		_, err := f.resolve(root, "k/d/d/d/f")
		if errors.Is(err, errTooManySteps) {
			break
		}
		if err != nil || f.steps == 0 || f.steps > maxSteps+100 {
			t.Fatalf("got %v after %d steps", err, f.steps)
		}
		f.steps += maxSteps / 8
	}
}

func TestCancelled(t *testing.T) {
	c := chain{}.with(t, tarOf(t, parseEntries("a")...))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Merge(ctx, c.layers, 512); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

func TestDataOutsideOfTheTar(t *testing.T) {
	for name, e := range map[string]*artifact.Entry{
		"after its end":    {Header: &tar.Header{Size: 513}, DataOffset: 512},
		"far after":        {Header: &tar.Header{Size: 512}, DataOffset: 1 << 62},
		"before":           {Header: &tar.Header{Size: 512}, DataOffset: -512},
		"out of order":     {Header: &tar.Header{Size: 1024}, Sparse: []artifact.SparseRun{{FileOffset: 512, TarOffset: 0, Size: 512}, {FileOffset: 0, TarOffset: 512, Size: 512}}},
		"over each other":  {Header: &tar.Header{Size: 1024}, Sparse: []artifact.SparseRun{{FileOffset: 0, TarOffset: 0, Size: 512}, {FileOffset: 511, TarOffset: 512, Size: 512}}},
		"after its file":   {Header: &tar.Header{Size: 512}, Sparse: []artifact.SparseRun{{FileOffset: 512, TarOffset: 0, Size: 512}}},
		"of negative size": {Header: &tar.Header{Size: 512}, Sparse: []artifact.SparseRun{{FileOffset: 0, TarOffset: 0, Size: -512}}},
	} {
		t.Run(name, func(t *testing.T) {
			e.Name, e.Typeflag = "f", tar.TypeReg
			s := source{entries: func() entryReader { return &entryList{e} }, tarSize: 1024}
			if _, err := merge(context.Background(), []source{s}, 512); !errors.Is(err, artifact.ErrInvalid) {
				t.Errorf("got %v, want %v", err, artifact.ErrInvalid)
			}
		})
	}
}

func TestNoLayers(t *testing.T) {
	root, err := Merge(context.Background(), nil, 512)
	if err != nil || root.Mode != unix.S_IFDIR|0o755 || len(root.Entries) != 0 {
		t.Errorf("got %+v, %v; want an empty directory", root, err)
	}
}

// sparseTar returns a tar of one PAX 1.0 sparse file: parts are pairs of offset and size.
func sparseTar(size int64, parts ...int64) []byte {
	var body, m bytes.Buffer
	fmt.Fprintf(&m, "%d\n", len(parts)/2)
	for i := 0; i < len(parts); i += 2 {
		fmt.Fprintf(&m, "%d\n%d\n", parts[i], parts[i+1])
		body.WriteString(strings.Repeat(string(rune('a'+i)), int(parts[i+1])))
	}
	m.Write(make([]byte, -m.Len()&511))
	m.Write(body.Bytes())
	var records bytes.Buffer
	for _, r := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=f", fmt.Sprintf("GNU.sparse.realsize=%d", size)} {
		n := len(r) + 4 // the length's own two digits, a space and a newline
		fmt.Fprintf(&records, "%d %s\n", n, r)
	}
	var b bytes.Buffer
	writeRaw(&b, "x", 'x', records.Bytes())
	writeRaw(&b, "GNUSparseFile.0/f", '0', m.Bytes())
	b.Write(make([]byte, 1024))
	return b.Bytes()
}

// writeRaw writes an entry that archive/tar would not.
func writeRaw(b *bytes.Buffer, name string, typeflag byte, body []byte) {
	h := make([]byte, 512)
	copy(h, name)
	copy(h[100:], "0000644\x000000000\x000000000\x00")
	copy(h[124:], fmt.Sprintf("%011o\x00%011o\x00", len(body), testTime.Unix()))
	copy(h[148:], "        ")
	h[156] = typeflag
	copy(h[257:], "ustar\x0000")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	b.Write(h)
	b.Write(body)
	b.Write(make([]byte, -len(body)&511))
}

func TestSparse(t *testing.T) {
	for name, c := range map[string]struct {
		size    int64
		parts   []int64
		extents int  // 0: no data, or
		inImage bool // in the metadata image
	}{
		"aligned":                 {4096, []int64{512, 1024, 2048, 512, 4096, 0}, 2, false},
		"ends with its file":      {1300, []int64{0, 512, 1024, 276}, 2, false},
		"part ends in a block":    {4096, []int64{0, 100}, 0, true},
		"part begins in a block":  {4096, []int64{100, 412, 512, 512}, 0, true},
		"parts follow each other": {4096, []int64{0, 100, 100, 412, 1024, 512}, 2, false},
		"only hole":               {4096, []int64{4096, 0}, 0, false},
		"no parts":                {4096, nil, 0, false},
		"empty":                   {0, nil, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			b := sparseTar(c.size, c.parts...)
			if _, err := mergeAndCompare(t, b, tarOf(t, parseEntries("other")...)); err != nil {
				t.Fatal(err)
			}
			root, err := Merge(context.Background(), chain{}.with(t, b).layers, 512)
			if err != nil {
				t.Fatal(err)
			}
			f := root.Entries[0].Inode
			if len(f.Extents) != c.extents || (f.Data != nil) != c.inImage {
				t.Errorf("got %d extents and %d bytes in the image, want %d and %v", len(f.Extents), len(f.Data), c.extents, c.inImage)
			}
		})
	}
}

func TestSparseLimits(t *testing.T) {
	half := sparseTar(maxData/2+1, 100, 100)
	hidden := tarOf(t, parseEntries("f")...)
	for name, c := range map[string]struct {
		layers [][]byte
		want   error
	}{
		"too much data":                  {[][]byte{sparseTar(maxData+1, 100, 100)}, ErrRefused},
		"hidden files have none":         {[][]byte{half, half, half}, nil},
		"a large hole is no data":        {[][]byte{sparseTar(maxFile, 512, 512)}, nil},
		"too large":                      {[][]byte{sparseTar(maxFile+1, 512, 512), hidden}, ErrRefused},
		"old GNU format (as containerd)": {[][]byte{oldSparse()}, ErrRefused},
	} {
		t.Run(name, func(t *testing.T) {
			var chain chain
			for _, b := range c.layers {
				chain = chain.with(t, b)
			}
			if _, err := Merge(context.Background(), chain.layers, 512); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	if _, err := mergeAndCompare(t, oldSparse()); err == nil {
		t.Error("the old format is not refused")
	}
}

// oldSparse returns a tar with a sparse file of the old GNU format, all hole.
func oldSparse() []byte {
	var b bytes.Buffer
	h := make([]byte, 512)
	copy(h, "f")
	copy(h[100:], "0000644\x000000000\x000000000\x0000000000000\x0000000000000\x00        S")
	copy(h[257:], "ustar  \x00")
	copy(h[483:], "00000001000\x00")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	b.Write(h)
	b.Write(make([]byte, 1024))
	return b.Bytes()
}

// BenchmarkMerge merges 100,000 entries of five layers: directories of 20 files, a part of which layers above replace or delete.
// What it adds to reading the headers, which depends on their format, is what BenchmarkEntries does not take.
func BenchmarkMerge(b *testing.B) {
	for _, format := range []tar.Format{tar.FormatUSTAR, tar.FormatPAX} {
		b.Run(format.String(), func(b *testing.B) {
			c := benchmarkChain(b, format)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Merge(context.Background(), c.layers, 512); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkEntries(b *testing.B) {
	for _, format := range []tar.Format{tar.FormatUSTAR, tar.FormatPAX} {
		b.Run(format.String(), func(b *testing.B) {
			c := benchmarkChain(b, format)
			b.ReportAllocs()
			for b.Loop() {
				for _, l := range c.layers {
					r := l.Index.Entries()
					for {
						if _, err := r.Next(); err == io.EOF {
							break
						} else if err != nil {
							b.Fatal(err)
						}
					}
					r.Close()
				}
			}
		})
	}
}

func benchmarkChain(t testing.TB, format tar.Format) (c chain) {
	for layer := range 5 {
		var entries []*tar.Header
		for i := range 20000 {
			dir := fmt.Sprintf("usr/lib/python3/dist-packages/package%03d/module%02d/", (i+layer*19000)/400, i/20%20)
			name := fmt.Sprintf("%sfile%d.py", dir, i%20)
			if i%20 == 0 {
				name = dir
			} else if i%20 == 1 && layer > 0 {
				name = dir + whiteoutPrefix + "file1.py"
			}
			h := parseEntries(name)[0]
			if h.Format = format; format == tar.FormatUSTAR {
				h.ModTime = h.ModTime.Truncate(time.Second)
			}
			entries = append(entries, h)
		}
		c = c.with(t, tarOf(t, entries...))
	}
	return c
}

package tree

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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

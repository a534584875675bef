package tree

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

// file is what the tests compare of a file. The names of one inode share the first of them as Group.
type file struct {
	Mode, UID, GID, Nlink, Rdev uint32
	Size                        int64
	Mtime                       string
	Target, Content, Group      string
	Xattrs                      string
}

// oracle unpacks layers as containerd's differ does for its overlayfs snapshotter (core/diff/apply/apply_linux.go):
// the bottom one to a directory, the others to upper directories.
type oracle struct {
	dir    string
	start  time.Time
	uppers []string // topmost first
	made   int
}

func newOracle(t testing.TB) *oracle {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("unpacking layers and mounting overlayfs needs root")
	}
	dir, err := os.MkdirTemp("", "tree")
	if err != nil {
		t.Fatal(err)
	}
	o := &oracle{dir: dir, start: time.Now().Add(-time.Second)}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return o
}

// apply unpacks one more layer; a layer that is refused leaves nothing.
func (o *oracle) apply(t testing.TB, tar []byte) error {
	t.Helper()
	upper := filepath.Join(o.dir, fmt.Sprint(o.made))
	o.made++
	if err := os.Mkdir(upper, 0o755); err != nil {
		t.Fatal(err)
	}
	var opts []archive.ApplyOpt
	if len(o.uppers) > 0 {
		opts = append(opts, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(o.uppers))
	}
	if _, err := archive.Apply(context.Background(), upper, bytes.NewReader(tar), opts...); err != nil {
		return err
	}
	o.uppers = append([]string{upper}, o.uppers...)
	return nil
}

// walk mounts the layers as a container's root and returns its files by path.
func (o *oracle) walk(t testing.TB) map[string]file {
	t.Helper()
	return o.walkOverlay(t, o.uppers)
}

// walkOverlay mounts an overlay over lowers and returns its files by path.
func (o *oracle) walkOverlay(t testing.TB, lowers []string) map[string]file {
	t.Helper()
	at := func(name string) string { return filepath.Join(o.dir, name) }
	for _, d := range []string{"upper", "work", "root"} {
		if err := os.MkdirAll(at(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	options := fmt.Sprintf("workdir=%s,upperdir=%s,lowerdir=%s,index=off", at("work"), at("upper"), strings.Join(lowers, ":"))
	if err := unix.Mount("overlay", at("root"), "overlay", 0, options); err != nil {
		t.Fatalf("mount overlay: %v", err)
	}
	defer func() {
		if err := unix.Unmount(at("root"), 0); err != nil {
			t.Fatalf("unmount: %v", err) // and leave it: removing would go on into the mount
		}
	}()
	files := map[string]file{}
	inodes := map[uint64]string{}
	o.walkDir(t, at("root"), "", files, inodes)
	return files
}

// walkImage writes root's metadata image, mounts it with its data device, and returns what an overlay over it shows.
func (o *oracle) walkImage(t testing.TB, c chain, root *erofs.Inode) map[string]file {
	t.Helper()
	var image bytes.Buffer
	if err := erofs.Write(&image, root, erofs.Options{BlockSize: 512, DeviceSize: int64(len(c.device))}); err != nil {
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(o.dir, name) }
	device := append(bytes.Clone(c.device), make([]byte, -len(c.device)&511)...)
	if err := errors.Join(os.WriteFile(at("image"), image.Bytes(), 0o600), os.WriteFile(at("device"), device, 0o600), os.MkdirAll(at("lower"), 0o755)); err != nil {
		t.Fatal(err)
	}
	err := unix.Mount(at("image"), at("lower"), "erofs", unix.MS_RDONLY, "device="+at("device"))
	if err == unix.ENOTBLK {
		t.Skip("this kernel mounts EROFS from block devices only")
	}
	if err != nil {
		t.Fatalf("mount metadata image: %v", err)
	}
	defer func() {
		if err := unix.Unmount(at("lower"), 0); err != nil {
			t.Fatalf("unmount: %v", err)
		}
	}()
	return o.walkOverlay(t, []string{at("lower")})
}

func (o *oracle) walkDir(t testing.TB, root, dir string, files map[string]file, inodes map[uint64]string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(root, dir))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		p := dir + "/" + e.Name()
		var st unix.Stat_t
		err := unix.Lstat(root+p, &st)
		if err == unix.ENOENT {
			continue // a whiteout in a directory that is not merged: listed, but not there
		}
		if err != nil {
			t.Fatal(err)
		}
		f := file{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Mtime: fmt.Sprintf("%d.%09d", st.Mtim.Sec, st.Mtim.Nsec), Xattrs: readXattrs(t, root+p)}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			if !time.Unix(st.Mtim.Sec, st.Mtim.Nsec).Before(o.start) {
				f.Mtime = "time of unpacking"
			}
		case unix.S_IFREG:
			b, err := os.ReadFile(root + p)
			if err != nil {
				t.Fatal(err)
			}
			f.Content = string(b)
		case unix.S_IFLNK:
			if f.Target, err = os.Readlink(root + p); err != nil {
				t.Fatal(err)
			}
		case unix.S_IFCHR, unix.S_IFBLK:
			f.Rdev = uint32(st.Rdev)
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			files[p] = f
			o.walkDir(t, root, p, files, inodes)
			continue
		}
		f.Nlink, f.Size = uint32(st.Nlink), st.Size
		if inodes[st.Ino] == "" {
			inodes[st.Ino] = p
		}
		f.Group = inodes[st.Ino]
		files[p] = f
	}
}

func readXattrs(t testing.TB, p string) string {
	t.Helper()
	list, value := make([]byte, 65536), make([]byte, 65536)
	n, err := unix.Llistxattr(p, list)
	if err != nil {
		t.Fatalf("list xattrs of %s: %v", p, err)
	}
	var all []string
	for _, name := range strings.Split(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		n, err := unix.Lgetxattr(p, name, value)
		if err != nil {
			t.Fatalf("get xattr %s of %s: %v", name, p, err)
		}
		all = append(all, fmt.Sprintf("%s=%q", name, value[:n]))
	}
	sort.Strings(all)
	return strings.Join(all, " ")
}

// chain is the same layers as Merge takes them.
type chain struct {
	layers []Layer
	device []byte
}

// with returns c with one layer more.
func (c chain) with(t testing.TB, tar []byte) chain {
	t.Helper()
	var blob bytes.Buffer
	l, err := artifact.EncodeLayer(context.Background(), &blob, bytes.NewReader(tar), artifact.EncodeOptions{Workers: 1})
	if err != nil {
		t.Fatalf("encode layer: %v", err)
	}
	index, err := artifact.DecodeIndex(blob.Bytes()[l.IndexOffset:])
	if err != nil {
		t.Fatalf("decode index: %v", err)
	}
	device := append(bytes.Clone(c.device), make([]byte, -len(c.device)&511)...)
	layer := Layer{Index: index, Base: int64(len(device)), ReadAt: func(_ context.Context, p []byte, off int64) (int, error) {
		return bytes.NewReader(tar).ReadAt(p, off)
	}}
	return chain{append(append([]Layer(nil), c.layers...), layer), append(device, tar...)}
}

// walkTree returns the files of a merged tree by path.
func (c chain) walkTree(t testing.TB, root *erofs.Inode) map[string]file {
	t.Helper()
	files := map[string]file{}
	c.walkInode(t, root, "", files, map[*erofs.Inode]string{})
	return files
}

func (c chain) walkInode(t testing.TB, dir *erofs.Inode, path string, files map[string]file, groups map[*erofs.Inode]string) {
	entries := append([]erofs.Dirent(nil), dir.Entries...)
	sort.Slice(entries, func(i, j int) bool { return entries[i].Name < entries[j].Name })
	for _, e := range entries {
		n, p := e.Inode, path+"/"+e.Name
		if _, ok := files[p]; ok {
			t.Fatalf("%s is there twice", p)
		}
		f := file{Mode: n.Mode, UID: n.UID, GID: n.GID, Rdev: n.Rdev, Mtime: fmt.Sprintf("%d.%09d", n.Mtime, n.MtimeNsec)}
		var xattrs []string
		for _, x := range n.Xattrs {
			xattrs = append(xattrs, fmt.Sprintf("%s=%q", x.Name, x.Value))
		}
		sort.Strings(xattrs)
		f.Xattrs = strings.Join(xattrs, " ")
		if n.Mode&unix.S_IFMT == unix.S_IFDIR {
			files[p] = f
			c.walkInode(t, n, p, files, groups)
			continue
		}
		f.Nlink, f.Size = n.Nlink, n.Size
		if n.Mode&unix.S_IFMT == unix.S_IFLNK {
			f.Target, f.Size = string(n.Data), int64(len(n.Data))
		} else {
			f.Content = c.content(t, p, n)
		}
		if groups[n] == "" {
			groups[n] = p
		}
		f.Group = groups[n]
		files[p] = f
	}
}

// content reads a file as the kernel would: through its extents, or from the metadata image.
func (c chain) content(t testing.TB, p string, n *erofs.Inode) string {
	if n.Data != nil {
		if n.Extents != nil || int64(len(n.Data)) != n.Size {
			t.Fatalf("%s: %d bytes of data and %d extents in a file of %d bytes", p, len(n.Data), len(n.Extents), n.Size)
		}
		return string(n.Data)
	}
	b := make([]byte, n.Size)
	end := int64(0)
	for i, e := range n.Extents {
		if e.FileOffset%512 != 0 || e.DeviceOffset%512 != 0 || e.Size <= 0 || e.FileOffset < end || e.Size%512 != 0 && i != len(n.Extents)-1 {
			t.Fatalf("%s: bad extent %+v", p, e)
		}
		end = e.FileOffset + e.Size
		copy(b[e.FileOffset:end], c.device[e.DeviceOffset:e.DeviceOffset+e.Size])
		if rest := -end & 511; rest != 0 && end < n.Size {
			t.Fatalf("%s: extent %+v ends within a block and within the file", p, e)
		}
	}
	return string(b)
}

// compare reports how two trees differ; in got, times that containerd takes from the clock count as equal.
func compare(t testing.TB, want, got map[string]file) bool {
	t.Helper()
	paths := map[string]bool{}
	for p := range want {
		paths[p] = true
	}
	for p := range got {
		paths[p] = true
	}
	equal := true
	for p := range paths {
		w, inWant := want[p]
		g, inGot := got[p]
		if w.Mtime == "time of unpacking" {
			w.Mtime = g.Mtime
		}
		if inWant != inGot || w != g {
			equal = false
			t.Errorf("%q: differs (there: %v, here: %v)\n containerd %+v\n       tree %+v", p, inWant, inGot, w, g)
		}
	}
	return equal
}

func TestMain(m *testing.M) {
	log.L.Logger.SetOutput(io.Discard) // the applier warns of xattrs that it ignores
	os.Exit(m.Run())
}

package tree

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs/erofstest"
)

// Link counts of directories are the file system's; names that cannot be found are overlayfs' whiteouts.
var listing = erofstest.Options{MaxContent: erofstest.AllContent, NoDirNlink: true, NoGhosts: true}

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
	dir, err := os.MkdirTemp("", "tree") // a short path: mount options are limited to a page
	if err != nil {
		t.Fatal(err)
	}
	o := &oracle{dir: dir, start: time.Now().Add(-time.Second)}
	for _, d := range []string{"upper", "work", "root"} {
		err = errors.Join(err, os.Mkdir(o.at(d), 0o755))
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func (o *oracle) at(name string) string { return filepath.Join(o.dir, name) }

// apply unpacks one more layer; a layer that is refused leaves nothing.
func (o *oracle) apply(t testing.TB, tar []byte) error {
	t.Helper()
	upper := o.at(fmt.Sprint(o.made))
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

// walk lists what a container sees of the layers.
func (o *oracle) walk(t testing.TB) []erofstest.Entry {
	t.Helper()
	return o.walkOverlay(t, o.uppers...)
}

func (o *oracle) walkOverlay(t testing.TB, lowers ...string) []erofstest.Entry {
	t.Helper()
	options := fmt.Sprintf("workdir=%s,upperdir=%s,lowerdir=%s,index=off", o.at("work"), o.at("upper"), strings.Join(lowers, ":"))
	if err := unix.Mount("overlay", o.at("root"), "overlay", 0, options); err != nil {
		t.Fatalf("mount overlay: %v", err)
	}
	entries, err := erofstest.Walk(o.at("root"), listing)
	if err := unix.Unmount(o.at("root"), 0); err != nil {
		t.Fatalf("unmount: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

// walkImage lists what a container sees of root's metadata image.
func (o *oracle) walkImage(t testing.TB, c chain, root *erofs.Inode) []erofstest.Entry {
	t.Helper()
	var image bytes.Buffer
	err := errors.Join(erofs.Write(&image, root, erofs.Options{BlockSize: 512, DeviceSize: int64(len(c.device))}), os.WriteFile(o.at("device"), c.device, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	return o.walkOverlay(t, erofstest.Mount(t, image.Bytes(), false, o.at("device")))
}

// differ reports how got departs from what containerd shows. Times that containerd takes from the clock count as equal.
func (o *oracle) differ(t testing.TB, want, got []erofstest.Entry) bool {
	t.Helper()
	times := map[string]erofstest.Entry{}
	for _, e := range got {
		times[e.Path] = e
	}
	for i := range want {
		e := &want[i]
		if g, ok := times[e.Path]; ok && !time.Unix(e.Mtime, int64(e.MtimeNsec)).Before(o.start) && e.Mode&unix.S_IFMT == unix.S_IFDIR {
			e.Mtime, e.MtimeNsec = g.Mtime, g.MtimeNsec
		}
	}
	diff := erofstest.Diff(got, want)
	if diff != "" {
		t.Error(diff)
	}
	return diff != ""
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
	layer := Layer{Index: index, Base: int64(len(c.device)), ReadAt: func(_ context.Context, p []byte, off int64) (int, error) {
		return bytes.NewReader(tar).ReadAt(p, off)
	}}
	device := append(bytes.Clone(c.device), tar...)
	return chain{append(append([]Layer(nil), c.layers...), layer), append(device, make([]byte, -len(tar)&511)...)}
}

func (c chain) list(t testing.TB, root *erofs.Inode) []erofstest.Entry {
	t.Helper()
	checkWritable(t, root, int64(len(c.device)))
	entries, err := erofstest.ListTree(root, bytes.NewReader(c.device), listing)
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

// checkWritable makes sure that a metadata image can express the tree.
func checkWritable(t testing.TB, root *erofs.Inode, deviceSize int64) {
	t.Helper()
	if err := erofs.Write(io.Discard, root, erofs.Options{BlockSize: 512, DeviceSize: deviceSize}); err != nil {
		t.Errorf("write metadata image: %v", err)
	}
}

func TestMain(m *testing.M) {
	log.L.Logger.SetOutput(io.Discard) // the applier warns of xattrs that it ignores
	os.Exit(m.Run())
}

package snapshot

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// dirTar makes a layer's tar of a directory of all modes, owners and attributes.
func dirTar(t *testing.T, h tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	h.Name, h.Typeflag, h.ModTime = "opt/", tar.TypeDir, time.Unix(1e9, 0)
	if err := errors.Join(w.WriteHeader(&h), w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

var (
	truth = tar.Header{Mode: 0o750, Uid: 7, PAXRecords: map[string]string{"SCHILY.xattr.user.is": "true"}}
	lies  = tar.Header{Mode: 0o777, Uid: 6, PAXRecords: map[string]string{"SCHILY.xattr.user.is": "lies"}}
)

// wantDir compares what opt in root is with h.
func wantDir(t *testing.T, root string, h tar.Header) {
	t.Helper()
	var st unix.Stat_t
	opt, is := filepath.Join(root, "opt"), make([]byte, 10)
	if err := unix.Lstat(opt, &st); err != nil {
		t.Fatal(err)
	}
	size, err := unix.Getxattr(opt, "user.is", is)
	if err != nil {
		t.Fatal(err)
	}
	if int64(st.Mode&0o7777) != h.Mode || int(st.Uid) != h.Uid || string(is[:size]) != h.PAXRecords["SCHILY.xattr.user.is"] {
		t.Errorf("opt has mode %o, owner %d, attribute %s; want %o, %d, %v", st.Mode&0o7777, st.Uid, is[:size], h.Mode, h.Uid, h.PAXRecords)
	}
}

// pushLie pushes an image of which the first layer is true, and an artifact in which it is lie.
func (n *testNode) pushLie(name string, lie []byte, tars ...[]byte) testImage {
	n.t.Helper()
	img := n.push(name, tars...)
	forged := slices.Concat([][]byte{lie}, tars[1:])
	n.attachTars(img, forged, func(i int, index []byte, _ digest.Digest) []byte { return claim(index, digest.FromBytes(tars[i])) })
	return img
}

// unpackOn pulls the layers of img from first on onto parent as containerd does in the normal way, and returns the name of the top snapshot.
func (n *testNode) unpackOn(img testImage, first int, parent string) string {
	n.t.Helper()
	for i := first; i < len(img.chainIDs); i++ {
		key, name := fmt.Sprintf("test/%d/extract-%d %s", i, i, img.chainIDs[i]), fmt.Sprintf("test/%d/%s", i, img.chainIDs[i])
		mounts, err := n.sn.Prepare(testContext(), key, parent, img.labels(i))
		if err == nil {
			err = n.unpack(testContext(), Layer{ChainID: img.chainIDs[i], Number: i}, func(do func([]mount.Mount) error) error { return do(mounts) })
		}
		if err == nil {
			err = n.sn.Commit(testContext(), name, key)
		}
		if err != nil {
			n.t.Fatal(err)
		}
		parent = name
	}
	return parent
}

// found has the proof of img find that it lies.
func (n *testNode) found(img testImage) {
	n.t.Helper()
	id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
	if err == nil {
		err = n.images.Prove(testContext(), id, func(int64) {})
	}
	if !errors.Is(err, stream.ErrQuarantined) {
		n.t.Fatalf("%s: %v", img.ref, err)
	}
}

func unproven(t *testing.T) *testNode {
	n := provingNode(t, fs.ModeFile)
	n.background = 0
	return n
}

// TestUnpackedOnALie: layers that containerd has unpacked on a lie, and that have its directories' modes, owners and attributes, are unpacked once more when it is found, for what begins on them then; what their own tars have stays as it is.
func TestUnpackedOnALie(t *testing.T) {
	n := unproven(t)
	asked := n.unpacks()
	n.restart()
	base := dirTar(t, truth)
	img := n.pushLie("app", dirTar(t, lies), base)
	files := map[string]string{"opt/one": "one", "opt/two": "two", "srv/three": "three"}
	above := n.push("above", base, tarOf(t, file{"opt/one", "one"}), tarOf(t, file{"opt/two", "two"}, file{"srv/", ""}, file{"srv/three", "three"}))
	same := n.push("same", base, dirTar(t, lies), tarOf(t, file{"opt/one", "one"}))
	lowest := n.prepareAll(img, 0, "")
	top, own := n.unpackOn(above, 1, lowest), n.unpackOn(same, 1, lowest)
	before := n.container("before", top)
	wantDir(t, before, lies)
	n.found(img)
	pulled := len(asked())
	after := n.container("after", top)
	wantDir(t, after, truth)
	wantFiles(t, after, files)
	wantDir(t, n.container("own", own), lies) // its image says so
	wantDir(t, n.container("again", top), truth)
	var chains []digest.Digest
	for _, l := range asked()[pulled:] {
		chains = append(chains, l.ChainID)
	}
	if want := slices.Concat(above.chainIDs, same.chainIDs[1:]); !slices.Equal(chains, want) {
		t.Errorf("unpacked were %q, want %q", chains, want)
	}
	if u, err := n.sn.Usage(testContext(), top); err != nil || u.Inodes < 6 {
		t.Errorf("usage %+v, %v", u, err)
	}
	later := n.push("later", base, tarOf(t, file{"opt/late", "late"}))
	late := n.unpackOn(later, 1, lowest) // on the truth
	pulled = len(asked())
	wantDir(t, n.container("late", late), truth)
	if got := asked()[pulled:]; len(got) > 0 {
		t.Errorf("unpacked once more was %+v", got)
	}
	n.unpack = nil
	n.restart()
	after = n.container("restarted", top)
	wantDir(t, after, truth)
	wantFiles(t, after, files)
	for _, key := range []string{"before", "after", "own", "again", "late", "restarted", top, own, late} {
		if err := n.sn.Remove(testContext(), key); err != nil {
			t.Error(err)
		}
	}
}

// TestStaleInVain: of a layer that was unpacked on a lie, nothing new begins until it can be had.
func TestStaleInVain(t *testing.T) {
	n := unproven(t)
	n.unpacks()
	unpack, away := n.unpack, false
	n.unpack = func(ctx context.Context, l Layer, into func(func([]mount.Mount) error) error) error {
		if away && l.Number == 1 {
			return errors.New("the registry is away")
		}
		return unpack(ctx, l, into)
	}
	n.restart()
	base := dirTar(t, truth)
	img := n.pushLie("app", dirTar(t, lies), base)
	top := n.unpackOn(n.push("above", base, tarOf(t, file{"opt/one", "one"})), 1, n.prepareAll(img, 0, ""))
	n.found(img)
	away = true
	if _, err := n.sn.Prepare(testContext(), "container", top); !errors.Is(err, errStale) {
		t.Errorf("%v", err)
	}
	away = false
	wantDir(t, n.container("container", top), truth)
}

// TestUnpackedOnASecondLie: so is a layer that was unpacked in the place of a lie, when what it was unpacked on turns out to be another's. What runs has its files.
func TestUnpackedOnASecondLie(t *testing.T) {
	n := unproven(t)
	n.unpacks()
	n.restart()
	base, program := dirTar(t, truth), tarOf(t, file{"opt/program", big("good")})
	lower := n.pushLie("lower", dirTar(t, lies), base)
	upper := n.push("upper", base, program)
	forged := [][]byte{base, tarOf(t, file{"opt/program", big("evil")})}
	n.attachTars(upper, forged, func(i int, index []byte, _ digest.Digest) []byte {
		return claim(index, digest.FromBytes([][]byte{base, program}[i]))
	})
	top := n.prepareAll(upper, 1, n.prepareAll(lower, 0, ""))
	n.found(upper)
	between := n.container("between", top)
	wantDir(t, between, lies)
	n.found(lower)
	after := n.container("after", top)
	wantDir(t, after, truth)
	for _, root := range []string{between, after} {
		wantFiles(t, root, map[string]string{"opt/program": big("good")})
	}
	n.unpack = nil
	n.restart()
	after = n.container("restarted", top)
	wantDir(t, after, truth)
	wantFiles(t, between, map[string]string{"opt/program": big("good")})
	for _, key := range []string{"between", "after", "restarted", top} {
		if err := n.sn.Remove(testContext(), key); err != nil {
			t.Error(err)
		}
	}
	if left, err := filepath.Glob(filepath.Join(n.root, "snapshots/*", replacedInfix+"*")); err != nil || len(left) > 0 {
		t.Errorf("%q stay, %v", left, err)
	}
}

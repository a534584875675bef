package snapshot

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// dirs lists what lies in the snapshots directory.
func (n *testNode) dirs() []string {
	n.t.Helper()
	entries, err := os.ReadDir(filepath.Join(n.root, "snapshots"))
	if err != nil {
		n.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// pulled returns a node that has pulled an image of three layers, and the name of its top snapshot.
func pulled(t *testing.T) (n *testNode, img testImage, top string) {
	n = newTestNode(t)
	img = n.push("app", threeLayers(t)...)
	n.convert(img)
	return n, img, n.prepareAll(img, 0, "")
}

func (n *testNode) wantContainer(key, top string) {
	n.t.Helper()
	mounts, err := n.sn.Prepare(testContext(), key, top)
	if err != nil {
		n.t.Fatal(err)
	}
	inMounts(n.t, mounts, func(root string) { wantFiles(n.t, root, threeLayersMerged) })
}

// base returns where the chain is mounted that top stands on.
func (n *testNode) base(top string) string {
	n.t.Helper()
	base, err := n.sn.streamedBase(testContext(), top)
	if err != nil || base == nil {
		n.t.Fatalf("base of %s: %v, %v", top, base, err)
	}
	return n.sn.fsPath(base.id)
}

// Who keeps something for the images that are streamed from a repository can tell when the last snapshot of one is gone.
func TestOrigins(t *testing.T) {
	n, img, top := pulled(t)
	var told [][]stream.Origin
	n.onForget = func() {
		list, err := n.images.Origins()
		if err != nil {
			t.Error(err)
		}
		told = append(told, list)
	}
	want := []stream.Origin{{Repository: registryclient.Repository(n.reg.Host() + "/app"), Config: n.artifactOf(img).Config.Digest}}
	if got, err := n.images.Origins(); err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	names := n.names()
	if err := n.sn.Remove(testContext(), top); err != nil || len(told) > 0 {
		t.Errorf("%v, told %v while there are snapshots", err, told)
	}
	for _, name := range slices.Backward(names[:len(names)-1]) {
		if err := n.sn.Remove(testContext(), name); err != nil {
			t.Error(err)
		}
	}
	if len(told) != 1 || len(told[0]) != 0 {
		t.Errorf("told %v, want once, with none left", told)
	}
}

// A container must not start on the bare directory of a snapshot that somebody has unmounted.
func TestUnmountedByOthers(t *testing.T) {
	n, _, top := pulled(t)
	n.wantContainer("first", top)
	if err := unix.Unmount(n.base(top), 0); err != nil {
		t.Fatal(err)
	}
	n.wantContainer("second", top)
}

// An image is removed while a process still has a file of it open, and pulled again: both see all of it.
func TestRemoveInUse(t *testing.T) {
	n, img, top := pulled(t)
	ctx := testContext()
	n.wantContainer("container", top)
	held, err := os.Open(filepath.Join(n.base(top), "etc/base"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	for name := "container"; name != ""; {
		info, err := n.sn.Stat(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.sn.Remove(ctx, name); err != nil {
			t.Fatal(err)
		}
		name = info.Parent
	}
	if left := n.dirs(); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	n.wantContainer("again", n.prepareAll(img, 0, ""))
	if b, err := io.ReadAll(held); err != nil || string(b) != "from the base" {
		t.Errorf("the open file: got %q, %v", b, err)
	}
}

// What a crash leaves between any two steps is made whole at the next start.
func TestCrash(t *testing.T) {
	cases := map[string]func(n *testNode) error{
		"before the transaction: directories of nobody": func(n *testNode) error {
			for _, d := range []string{"4711/fs/x", "new-123/fs", "removed-9/fs"} {
				if err := os.MkdirAll(filepath.Join(n.root, "snapshots", d), 0o755); err != nil {
					return err
				}
			}
			return nil
		},
		"after the transaction: directories lost": func(n *testNode) error {
			return os.RemoveAll(filepath.Join(n.root, "snapshots"))
		},
		"halfway through a removal": func(n *testNode) error {
			return os.Rename(filepath.Join(n.root, "snapshots", "1"), filepath.Join(n.root, "snapshots", "removed-1"))
		},
	}
	for name, crash := range cases {
		t.Run(name, func(t *testing.T) {
			n, _, top := pulled(t)
			n.stop()
			if err := crash(n); err != nil {
				t.Fatal(err)
			}
			n.start()
			if got := n.dirs(); len(got) != 3 {
				t.Errorf("directories: got %v, want those of three snapshots", got)
			}
			n.wantContainer("container", top)
		})
	}
}

// A streamed snapshot whose image is gone is an error, not an empty directory.
func TestLostImage(t *testing.T) {
	n, _, top := pulled(t)
	n.stop()
	if err := os.RemoveAll(filepath.Join(n.root, "images")); err != nil {
		t.Fatal(err)
	}
	n.start()
	if mounts, err := n.sn.Prepare(testContext(), "container", top); err == nil {
		t.Errorf("got %v, want an error", mounts)
	}
}

// When a transaction cannot be completed, the pull is a normal one, and nothing lies where the next snapshot's directory will be.
func TestRolledBack(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...)
	n.convert(img)
	ctx := testContext()
	id, _, err := n.images.Find(ctx, img.ref, img.manifest)
	if err != nil {
		t.Fatal(err)
	}
	taken := &streamedSnapshot{image: id, layers: 3}
	taken.setName("extract")
	if _, err := n.sn.Snapshotter.Prepare(ctx, taken.name, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := n.sn.Prepare(ctx, "extract", "", img.labels(0)); err != nil {
		t.Fatalf("got %v, want mounts for a normal pull", err)
	}
	if got := n.dirs(); len(got) != 2 {
		t.Errorf("directories: got %v, want two", got)
	}
	if n.sn.lookup(img.chainIDs[0].String(), "") {
		t.Error("a snapshot is promised that was not made")
	}
}

// Who went away during the search gets no snapshot, and no log line.
func TestPrepareCancelled(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...)
	ctx, cancel := context.WithCancel(testContext())
	cancel()
	if _, err := n.sn.Prepare(ctx, "extract", "", img.labels(0)); err == nil {
		t.Error("got mounts, want an error")
	}
	if left := n.dirs(); len(left) != 0 || n.log.lines() != 0 {
		t.Errorf("left: %v; log:\n%s", left, n.log.b.String())
	}
}

// A root behind a symbolic link: what a dead daemon left mounted below it is found.
func TestRootIsSymlink(t *testing.T) {
	n, _, top := pulled(t)
	path := n.base(top)
	n.stop()
	if err := unix.Mount("left", path, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(n.root, link); err != nil {
		t.Fatal(err)
	}
	n.root = link
	n.start()
	n.wantContainer("container", top)
}

func TestStreamedName(t *testing.T) {
	image := strings.Repeat("0a", 32)
	sn := &streamedSnapshot{image: image, layers: 120}
	sn.setName("k8s.io/7/extract-123 sha256:abc")
	got, err := parseStreamed("5", snapshots.Info{Name: sn.name})
	if err != nil || got == nil || got.image != image || got.layers != 120 || got.id != "5" {
		t.Errorf("got %+v", got)
	}
	for _, name := range []string{
		"", "k8s.io/7/extract-123", "sha256:" + image, image, "x" + sn.name,
		"streamed/7/" + sn.name, "streamed/7/", // a client's keys, in a namespace of that name
	} {
		if got, err := parseStreamed("5", snapshots.Info{Name: name}); got != nil || err != nil {
			t.Errorf("%q: got %+v, %v, want none", name, got, err)
		}
	}
	for _, name := range []string{
		"streamed/" + image, "streamed/" + image + "/0/k", "streamed/" + image + "/x/k", "streamed/" + image + "/9999999/k",
		"streamed/v2/7/k", "streamed//k", "streamed/",
	} {
		if got, err := parseStreamed("5", snapshots.Info{Name: name}); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%q: got %+v, %v, want ErrFailedPrecondition", name, got, err)
		}
	}
}

// Labels are the client's to change, without harm to what is streamed.
func TestUpdateLabels(t *testing.T) {
	n, _, top := pulled(t)
	if _, err := n.sn.Update(testContext(), snapshots.Info{Name: top, Labels: map[string]string{"a": "b"}}); err != nil {
		t.Fatal(err)
	}
	n.restart()
	n.wantContainer("container", top)
	if err := n.sn.Remove(testContext(), top); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("got %v, want ErrFailedPrecondition", err)
	}
}

// The same image in two repositories, of which one has the artifact: each is asked, and what one lacks is not held against the other.
func TestTwoRepositories(t *testing.T) {
	n := newTestNode(t)
	ctx := testContext()
	without := n.push("without", threeLayers(t)...)
	with := n.push("app", threeLayers(t)...)
	if with.manifest != without.manifest {
		t.Fatal("not the same image")
	}
	n.convert(with)
	n.stop()
	n.retryAfter = time.Hour
	n.start()
	if _, _, err := n.images.Find(ctx, without.ref, without.manifest); err == nil {
		t.Error("got an artifact of a repository without")
	}
	if _, _, err := n.images.Find(ctx, with.ref, with.manifest); err != nil {
		t.Error(err)
	}
}

// An image that was forgotten is looked for anew.
func TestFindForgotten(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...)
	n.convert(img)
	ctx := testContext()
	for range 2 {
		id, chain, err := n.images.Find(ctx, img.ref, img.manifest)
		if err != nil {
			t.Fatal(err)
		}
		target := t.TempDir()
		if err := n.images.Mount(ctx, id, len(chain), target); err != nil {
			t.Fatal(err)
		}
		if err := n.images.Unmount(target); err != nil {
			t.Fatal(err)
		}
		if err := n.images.Forget(id); err != nil {
			t.Fatal(err)
		}
	}
}

// When the daemon stops, a pull does not wait for its search.
func TestEndSearches(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...)
	n.convert(img)
	asked := make(chan struct{}, 1)
	n.reg.Inject(registrytest.Referrers, -1, func(r *registrytest.Registry, next http.Handler) http.Handler {
		asked <- struct{}{}
		return registrytest.Stall(-1)(r, next)
	})
	found := make(chan error, 1)
	go func() {
		_, _, err := n.images.Find(testContext(), img.ref, img.manifest)
		found <- err
	}()
	<-asked
	n.images.EndSearches()
	if err := <-found; reason.Of(err) != reason.Stopping {
		t.Errorf("got %v, want STOPPING", err)
	}
	if _, _, err := n.images.Find(testContext(), img.ref, img.manifest); reason.Of(err) != reason.Stopping {
		t.Errorf("after Close: got %v, want STOPPING", err)
	}
}

// An old proof stays as long as an image on the node names what it is of.
func TestOldProofs(t *testing.T) {
	n := newTestNodeWith(t, func(n *testNode) { n.deadline = time.Hour })
	tars := threeLayers(t)
	img := n.push("app", tars...)
	n.convert(img)
	n.prepareAll(img, 0, "")
	used := ledger.Key{DiffID: digest.FromBytes(tars[0]), Index: n.artifactOf(img).Layers[0].IndexDigest}
	other := ledger.Key{DiffID: digest.FromString("removed"), Index: digest.FromString("long ago")}
	for _, k := range []ledger.Key{used, other} {
		if err := n.ledger.Prove(ledger.Proof{Key: k, At: time.Now().AddDate(-1, 0, 0)}); err != nil {
			t.Fatal(err)
		}
	}
	n.restart()
	if !n.ledger.Proven(used) || n.ledger.Proven(other) {
		t.Errorf("after a restart: of an image that is here: %v, of none: %v", n.ledger.Proven(used), n.ledger.Proven(other))
	}
	// What cannot be read may name it.
	if err := n.ledger.Prove(ledger.Proof{Key: other, At: time.Now().AddDate(-1, 0, 0)}); err != nil {
		t.Fatal(err)
	}
	n.stop()
	n.rewrite(n.only("images", "*", "image.json"), func(b []byte) []byte { return bytes.Replace(b, []byte(`"version":1`), []byte(`"version":2`), 1) })
	n.start()
	if !n.ledger.Proven(other) {
		t.Error("dropped beside a record of a newer release")
	}
}

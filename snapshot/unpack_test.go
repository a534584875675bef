package snapshot

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// unpacks has layers unpacked by containerd's own code, out of the test's registry, and returns what was asked for.
func (n *testNode) unpacks() (asked func() []Layer) {
	store, err := local.NewStore(n.t.TempDir())
	if err != nil {
		n.t.Fatal(err)
	}
	applier := apply.NewFileSystemApplier(store)
	var mu sync.Mutex
	var list []Layer
	n.unpack = func(ctx context.Context, l Layer, into func(func([]mount.Mount) error) error) error {
		mu.Lock()
		list = append(list, l)
		mu.Unlock()
		d := l.Source.Layer
		repo, _, _ := strings.Cut(strings.TrimPrefix(l.Source.Ref, n.reg.Host()+"/"), "@")
		for _, img := range n.pushed {
			if l.Source.Ref == "" && l.Number < len(img.chainIDs) && img.chainIDs[l.Number] == l.ChainID {
				d, repo = img.layers[l.Number], strings.TrimPrefix(img.ref, n.reg.Host()+"/")
			}
		}
		resp, err := http.Get(n.reg.URL() + "/v2/" + repo + "/blobs/" + d.Digest.String())
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if err := content.WriteBlob(ctx, store, d.Digest.String(), resp.Body, d); err != nil {
			return err
		}
		return into(func(mounts []mount.Mount) error {
			got, err := applier.Apply(ctx, d, mounts)
			if err == nil && l.Source.Ref != "" && got.Digest != l.Source.DiffID {
				err = fmt.Errorf("layer %d is %s, not %s", l.Number, got.Digest, l.Source.DiffID)
			}
			return err
		})
	}
	return func() []Layer {
		mu.Lock()
		defer mu.Unlock()
		return list
	}
}

// quarantined has a container on an image that is in quarantine since, and returns the name and the directory of its top snapshot.
func (n *testNode) quarantined() (img testImage, root, top, dir string) {
	img, base := n.pushForged("app")
	top = n.prepareAll(img, 0, "")
	root = n.container("container", top)
	wantFiles(n.t, root, map[string]string{"program": big("evil"), "base": base})
	n.next(stream.Quarantined)
	sn, err := n.sn.streamedBase(testContext(), top)
	if err != nil {
		n.t.Fatal(err)
	}
	return img, root, top, filepath.Dir(n.sn.fsPath(sn.id))
}

// TestUnpackedInstead: what is pulled or started on an image in quarantine has the image's own layers, which are unpacked once; after a restart without asking anybody, and for all pulls. What runs reads errors.
func TestUnpackedInstead(t *testing.T) {
	inAllModes(t, func(t *testing.T, n *testNode) {
		asked := n.unpacks()
		n.restart()
		img, old, top, dir := n.quarantined()
		above := n.push("above", append(honestLayers(t), tarOf(t, file{"above", "above"}))...)
		good := map[string]string{"program": big("good"), "base": big("base"), "other": big("same")}
		var all sync.WaitGroup
		for _, key := range []string{"extract-1 above", "extract-2 above"} {
			all.Go(func() {
				if _, err := n.sn.Prepare(testContext(), key, top, above.labels(2)); err != nil {
					t.Errorf("no normal pull: %v; log:\n%s", err, n.log.b.String())
				}
			})
		}
		all.Wait()
		if t.Failed() {
			return
		}
		mounts, err := n.sn.Mounts(testContext(), "extract-1 above")
		if err != nil {
			t.Fatal(err)
		}
		inMounts(t, mounts, func(root string) { wantFiles(t, root, good) })
		root := n.container("next", top)
		wantFiles(t, root, good)
		if b, err := os.ReadFile(filepath.Join(old, "base")); !errors.Is(err, unix.EIO) {
			t.Errorf("what ran before reads %d bytes, %v", len(b), err)
		}
		list := asked()
		if len(list) != 2 {
			t.Fatalf("%d layers were unpacked, want 2, once", len(list))
		}
		for i, l := range list {
			if l.ChainID != img.chainIDs[i] || l.Number != i || l.Ref != above.ref || l.Manifest != above.manifest || l.Source.Ref != n.reg.Host()+"/app@"+img.manifest.String() {
				t.Errorf("asked for %+v", l)
			}
		}
		if u, err := n.sn.Usage(testContext(), top); err != nil || u.Size < int64(len(big("good"))+len(big("same"))) || u.Inodes != 3 {
			t.Errorf("usage %+v, %v", u, err)
		}
		left := filepath.Join(dir, unpackingInfix+"left", "fs") // by a daemon that was killed
		if err := os.MkdirAll(left, 0o700); err != nil {
			t.Fatal(err)
		}
		n.unpack = nil
		n.restart()
		if _, err := os.Lstat(left); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("what a killed daemon has left is there: %v", err)
		}
		wantFiles(t, n.container("restarted", top), good)
		if got := n.prepareAll(img, 0, ""); got != top {
			t.Errorf("another pull is given %s", got)
		}
		for _, key := range []string{"container", "next", "restarted", "extract-1 above", "extract-2 above", top} {
			if err := n.sn.Remove(testContext(), key); err != nil {
				t.Error(err)
			}
		}
		if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s stays: %v", dir, err)
		}
	})
}

// TestUnpackInVain: the error of what cannot be unpacked says both why. It is tried again, goes on when its caller has gone, and ends with the snapshotter.
func TestUnpackInVain(t *testing.T) {
	n := provingNode(t, fs.ModeFile)
	begun, end := make(chan struct{}, 10), make(chan error)
	n.unpack = func(ctx context.Context, l Layer, into func(func([]mount.Mount) error) error) error {
		return into(func([]mount.Mount) error {
			if l.Number == 0 {
				return nil
			}
			begun <- struct{}{}
			select {
			case err := <-end:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}
	n.restart()
	_, _, top, dir := n.quarantined()
	start := func(ctx context.Context, key string) chan error {
		result := make(chan error, 1)
		go func() {
			_, err := n.sn.Prepare(ctx, key, top)
			result <- err
		}()
		return result
	}
	first := start(testContext(), "first")
	<-begun
	end <- errors.New("the registry is away")
	if err := <-first; !errors.Is(err, stream.ErrQuarantined) || !strings.Contains(err.Error(), "the registry is away") {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(testContext())
	gone := start(ctx, "gone")
	<-begun
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	joined := start(testContext(), "joined")
	end <- nil
	if err := <-joined; err != nil {
		t.Error(err)
	}
	if len(begun) > 0 {
		t.Error("begun once more")
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 2 {
		t.Errorf("%v, %v: want fs and %s", files, err, unpackedName)
	}

	if err := os.RemoveAll(filepath.Join(dir, unpackedName)); err != nil {
		t.Fatal(err)
	}
	n.restart()
	last := start(testContext(), "last")
	<-begun
	n.restart() // or it never returns
	if err := <-last; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// TestOneOfTwo: of two snapshots of one chain, of which one must not be used, containerd is shown the other's reference; of both, once one is unpacked.
func TestOneOfTwo(t *testing.T) {
	n := provingNode(t, fs.ModeFile)
	n.unpacks()
	n.restart()
	img, _, bad, _ := n.quarantined()
	n.attachTars(img, honestLayers(t), func(_ int, index []byte, _ digest.Digest) []byte { return index })
	good := n.prepareAll(img, 0, "") // which takes one that is shown alone
	if good == bad {
		t.Fatal("the one in quarantine is taken")
	}
	rows := map[string]bool{}
	if err := n.sn.Walk(testContext(), func(_ context.Context, i snapshots.Info) error {
		rows[i.Name] = i.Labels[snapshots.LabelSnapshotRef] != ""
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if shown, here := rows[bad]; shown || !here || !rows[good] || len(rows) != 5 {
		t.Errorf("containerd is shown %v", rows)
	}
	n.container("next", bad)
	if err := n.sn.Walk(testContext(), func(_ context.Context, i snapshots.Info) error {
		if i.Name == bad && i.Labels[snapshots.LabelSnapshotRef] == "" {
			t.Error("what was unpacked is not shown")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

package snapshot

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// containerd is containerd's metadata store over the node's snapshotter: what its clients talk to, and what collects garbage.
type containerd struct {
	*testing.T
	db *metadata.DB
	sn snapshots.Snapshotter
}

func newContainerd(t *testing.T, n *testNode) *containerd {
	dir := t.TempDir()
	cs, err := local.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	b, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	db := metadata.NewDB(b, cs, map[string]snapshots.Snapshotter{"streaming": n.sn})
	if err := db.Init(context.Background()); err != nil {
		t.Fatal(err)
	}
	return &containerd{t, db, db.Snapshotter("streaming")}
}

var root = snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "yes"})

func (c *containerd) collect() {
	c.Helper()
	ctx := namespaces.WithNamespace(context.Background(), "garbage")
	if _, err := c.sn.Prepare(ctx, "garbage", ""); err != nil {
		c.Fatal(err)
	}
	if err := c.sn.Remove(ctx, "garbage"); err != nil { // without which there is nothing to look for
		c.Fatal(err)
	}
	if _, err := c.db.GarbageCollect(ctx); err != nil {
		c.Fatal(err)
	}
}

// pull prepares layer i of img, which must be streamed.
func (c *containerd) pull(ctx context.Context, img testImage, i int) {
	c.Helper()
	parent := ""
	if i > 0 {
		parent = img.chainIDs[i-1].String()
	}
	_, err := c.sn.Prepare(ctx, fmt.Sprintf("extract-%d %s", i, img.chainIDs[i]), parent, img.labels(i), root)
	if !errdefs.IsAlreadyExists(err) {
		c.Fatalf("layer %d: got %v, want ErrAlreadyExists", i, err)
	}
	if info, err := c.sn.Stat(ctx, img.chainIDs[i].String()); err != nil || info.Kind != snapshots.KindCommitted || info.Parent != parent {
		c.Fatalf("layer %d: got %+v, %v", i, info, err)
	}
}

func (c *containerd) backend(n *testNode) (names []string) {
	c.Helper()
	if err := n.sn.Walk(context.Background(), func(_ context.Context, info snapshots.Info) error {
		names = append(names, info.Name)
		return nil
	}); err != nil {
		c.Fatal(err)
	}
	return names
}

// Two namespaces pull the same image while garbage is collected between the layers, which takes the snapshots made in advance.
func TestGarbageCollection(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...)
	n.convert(img)
	c := newContainerd(t, n)
	one := namespaces.WithNamespace(context.Background(), "one")
	two := namespaces.WithNamespace(context.Background(), "two")
	for i := range img.chainIDs {
		c.pull(one, img, i)
		c.collect()
		if got := c.backend(n); len(got) != i+1 {
			t.Errorf("after layer %d: got %q, want %d", i, got, i+1)
		}
	}
	for i := range img.chainIDs {
		c.pull(two, img, i)
		c.collect()
	}
	if got := c.backend(n); len(got) != 3 {
		t.Errorf("pulled twice: got %q, want 3", got)
	}
	top := img.chainIDs[2].String()
	mounts, err := c.sn.Prepare(two, "container", top, root)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.sn.View(two, "single", img.chainIDs[0].String(), root); err != nil { // a bind mount of one layer
		t.Fatal(err)
	}
	if u, err := c.sn.Usage(two, top); err != nil || u.Size == 0 { // at least its index and metadata image
		t.Errorf("usage: %+v, %v, want some", u, err)
	}

	for i := 2; i >= 0; i-- {
		if err := c.sn.Remove(one, img.chainIDs[i].String()); err != nil {
			t.Fatal(err)
		}
	}
	c.collect()
	inMounts(t, mounts, func(root string) { wantFiles(t, root, threeLayersMerged) })

	for _, key := range []string{"container", "single", top, img.chainIDs[1].String(), img.chainIDs[0].String()} {
		if err := c.sn.Remove(two, key); err != nil {
			t.Fatal(err)
		}
	}
	c.collect()
	if got := c.backend(n); len(got) != 0 || len(n.dirs()) != 0 || len(n.filesIn("images", "indexes")) != 0 {
		t.Errorf("left: %q, %q, %q", got, n.dirs(), n.filesIn("images", "indexes"))
	}
}

// An image is pulled in the normal way, gets its artifact, and a second image on the same base streams what is above. With the first
// image gone and the base with it, all is streamed.
func TestConvertedAfterPull(t *testing.T) {
	n := newTestNode(t)
	tars := threeLayers(t)
	base := n.push("base", tars[0])
	c := newContainerd(t, n)
	ctx := namespaces.WithNamespace(context.Background(), "one")
	key := "extract"
	mounts, err := c.sn.Prepare(ctx, key, "", base.labels(0))
	if err != nil {
		t.Fatal(err)
	}
	inMounts(t, mounts, func(root string) { untar(t, root, tars[0]) })
	if err := c.sn.Commit(ctx, base.chainIDs[0].String(), key, root); err != nil {
		t.Fatal(err)
	}

	img := n.push("app", tars...)
	n.convert(img)
	if _, err := c.sn.Prepare(ctx, "extract-0", "", img.labels(0)); !errdefs.IsAlreadyExists(err) {
		t.Fatalf("got %v, want ErrAlreadyExists", err)
	}
	for range 2 {
		for i := 1; i < 3; i++ {
			c.pull(ctx, img, i)
		}
		mounts, err := c.sn.Prepare(ctx, "container", img.chainIDs[2].String(), root)
		if err != nil {
			t.Fatal(err)
		}
		inMounts(t, mounts, func(root string) { wantFiles(t, root, threeLayersMerged) })
		for _, key := range []string{"container", img.chainIDs[2].String(), img.chainIDs[1].String(), img.chainIDs[0].String()} {
			if err := c.sn.Remove(ctx, key); err != nil {
				t.Fatal(err)
			}
		}
		c.collect()
		c.pull(ctx, img, 0)
	}
}

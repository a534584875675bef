package snapshot

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// A container's mounts map its IDs, with one lower directory and with several; an image's author cannot have the layers unpacked that way.
func TestIDMaps(t *testing.T) {
	n, img, top := pulled(t)
	ctx := testContext()
	maps := snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotUIDMapping: "0:100000:65536",
		snapshots.LabelSnapshotGIDMapping: "0:200000:65536",
	})
	mapped := func(mounts []mount.Mount, err error) bool {
		t.Helper()
		if err != nil || len(mounts) != 1 {
			t.Fatalf("got %v, %v", mounts, err)
		}
		return slices.Contains(mounts[0].Options, "uidmap=0:100000:65536") && slices.Contains(mounts[0].Options, "gidmap=0:200000:65536")
	}
	if mounts, err := n.sn.Prepare(ctx, "container", top, maps); !mapped(mounts, err) {
		t.Errorf("Prepare: %v", mounts)
	}
	if mounts, err := n.sn.Mounts(ctx, "container"); !mapped(mounts, err) {
		t.Errorf("Mounts: %v", mounts)
	}
	if mounts, err := n.sn.View(ctx, "view", top, maps); !mapped(mounts, err) {
		t.Errorf("View: %v", mounts)
	}
	n.deleteArtifact(img)
	other := n.push("other", tarOf(t, file{"other", "other"}))
	if mounts, err := n.sn.Prepare(ctx, "extract", "", other.labels(0), maps); mapped(mounts, err) {
		t.Errorf("a layer is unpacked with %v", mounts)
	}
}

// Where containerd does not map what is mounted below a directory, a container in a user namespace is refused if layers are above the streamed ones, and it alone: nothing is left of it.
func TestIDMapsAbove(t *testing.T) {
	n, img, top := pulled(t)
	ctx := testContext()
	maps := snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotUIDMapping: "0:100000:65536",
		snapshots.LabelSnapshotGIDMapping: "0:100000:65536",
	})
	n.deleteArtifact(img)
	if _, err := n.sn.Prepare(ctx, "layer", top); err != nil {
		t.Fatal(err)
	}
	if err := n.sn.Commit(ctx, "mixed", "layer"); err != nil {
		t.Fatal(err)
	}
	if _, err := n.sn.Prepare(ctx, "made before", "mixed", maps); err != nil {
		t.Fatal(err)
	}
	old := errors.New("containerd is too old")
	n.sn.MapsBelow = func(context.Context) error { return old }
	refused := func(mounts []mount.Mount, err error) bool {
		return errors.Is(err, old) && errdefs.IsFailedPrecondition(err) && mounts == nil
	}
	if mounts, err := n.sn.Prepare(ctx, "container", "mixed", maps); !refused(mounts, err) {
		t.Errorf("Prepare: %v, %v", mounts, err)
	}
	if mounts, err := n.sn.View(ctx, "view", "mixed", maps); !refused(mounts, err) {
		t.Errorf("View: %v, %v", mounts, err)
	}
	if mounts, err := n.sn.Mounts(ctx, "made before"); !refused(mounts, err) {
		t.Errorf("Mounts: %v, %v", mounts, err)
	}
	for _, name := range []string{"container", "view"} {
		if _, err := n.sn.Stat(ctx, name); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := n.sn.Prepare(ctx, "of all that is streamed", top, maps); err != nil {
		t.Error(err)
	}
	if _, err := n.sn.Prepare(ctx, "without a user namespace", "mixed"); err != nil {
		t.Error(err)
	}
	n.sn.MapsBelow = func(context.Context) error { return nil }
	if _, err := n.sn.Prepare(ctx, "container", "mixed", maps); err != nil {
		t.Error(err)
	}
}

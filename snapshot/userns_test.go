package snapshot

import (
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
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

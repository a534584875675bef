package install

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/image-spec/identity"
)

// active lists the snapshots that containers may have, as NAMESPACE/NAME.
func active(ctx context.Context, cl *client.Client, snapshotter string) (map[string]bool, error) {
	list := map[string]bool{}
	return list, eachNamespace(ctx, cl, func(ctx context.Context, ns string) error {
		return cl.SnapshotService(snapshotter).Walk(ctx, func(_ context.Context, i snapshots.Info) error {
			if i.Kind != snapshots.KindCommitted {
				list[ns+"/"+i.Name] = true
			}
			return nil
		})
	})
}

// removeSnapshots removes all of a snapshotter's, but none of a container that is being made: an active one that is not idle, and not of an extraction.
func removeSnapshots(ctx context.Context, cl *client.Client, snapshotter string, idle map[string]bool) error {
	return eachNamespace(ctx, cl, func(ctx context.Context, ns string) error {
		sn := cl.SnapshotService(snapshotter)
		images, err := cl.ListImages(ctx)
		if err != nil {
			return err
		}
		for _, img := range images { // containerd does not list what its record has and the snapshotter has not, and keeps what that stands on
			ids, err := img.RootFS(ctx)
			if err != nil {
				continue // of another platform, or no image: it has no snapshots
			}
			for _, id := range slices.Backward(identity.ChainIDs(slices.Clone(ids))) {
				if err := sn.Remove(ctx, id.String()); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
					return fmt.Errorf("remove snapshot %s: %w", id, err)
				}
			}
		}
		return removeAll(ctx, sn, func(name string) bool {
			return idle[ns+"/"+name] || strings.HasPrefix(name, snapshots.UnpackKeyPrefix+"-")
		})
	})
}

// removeAll removes all snapshots, those before that others stand on. One on which something stands that was not listed waits for the next list, until a minute has passed in which
// none could be removed.
func removeAll(ctx context.Context, sn snapshots.Snapshotter, may func(name string) bool) error {
	for {
		var left, removed int
		var final error
		err := until(ctx, "snapshots that others stand on", func(ctx context.Context) (err error) {
			left, removed, err = removeLeaves(ctx, sn, may)
			if errdefs.IsFailedPrecondition(err) && removed == 0 {
				return err
			}
			if !errdefs.IsFailedPrecondition(err) {
				final = err
			}
			return nil
		})
		if err := errors.Join(err, final); err != nil || left == 0 {
			return err
		}
	}
}

// removeLeaves removes the snapshots on which none stands, and says how many there were in all. What one may not be removed is an error.
func removeLeaves(ctx context.Context, sn snapshots.Snapshotter, may func(name string) bool) (all, removed int, err error) {
	parents, list := map[string]bool{}, []snapshots.Info{}
	if err := sn.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		parents[i.Parent] = true
		list = append(list, i)
		return nil
	}); err != nil {
		return 0, 0, err
	}
	var stuck error
	for _, i := range list {
		if parents[i.Name] {
			continue
		}
		if i.Kind != snapshots.KindCommitted && !may(i.Name) {
			return len(list), removed, fmt.Errorf("snapshot %s has come meanwhile: a container is being made of it", i.Name)
		}
		err := sn.Remove(ctx, i.Name)
		if err != nil && !errdefs.IsNotFound(err) {
			err = fmt.Errorf("remove snapshot %s: %w", i.Name, err)
			if !errdefs.IsFailedPrecondition(err) {
				return len(list), removed, err
			}
			stuck = err
			continue
		}
		removed++
	}
	return len(list), removed, stuck
}

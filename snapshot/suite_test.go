package snapshot

import (
	"context"
	"io"
	"log/slog"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
)

// TestSnapshotterSuite runs containerd's conformance suite. The name matters: under another one even upstream's overlay fails its Rename case.
func TestSnapshotterSuite(t *testing.T) {
	testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		n := newTestNode(t)
		sn, err := New(root, n.images, slog.New(slog.NewTextHandler(io.Discard, nil)), nil)
		if err != nil {
			return nil, nil, err
		}
		return sn, sn.Close, nil
	})
}

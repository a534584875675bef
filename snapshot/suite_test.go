package snapshot

import (
	"context"
	"flag"
	"io"
	"log/slog"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/containerd/v2/pkg/testutil"
)

// TestSnapshotterSuite runs containerd's conformance suite. The name matters: under another one even upstream's overlay fails its Rename case.
func TestSnapshotterSuite(t *testing.T) {
	if err := flag.Set("test.root", "true"); err != nil { // containerd's flag, without which its tests skip themselves
		t.Fatal(err)
	}
	testutil.RequiresRoot(t)
	testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		n := newTestNode(t)
		sn, err := New(root, n.images, slog.New(slog.NewTextHandler(io.Discard, nil)))
		if err != nil {
			return nil, nil, err
		}
		return sn, sn.Close, nil
	})
}

package snapshot

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// names lists all snapshots, parents first. The caller may hold mu.
func (n *testNode) names() (names []string) {
	n.t.Helper()
	err := n.sn.Snapshotter.Walk(testContext(), func(_ context.Context, info snapshots.Info) error {
		names = append(names, info.Name)
		return nil
	})
	if err != nil && !errdefs.IsNotFound(err) { // which says that nothing was ever created
		n.t.Error(err)
	}
	slices.Sort(names) // by length of the chain
	return names
}

// Snapshots that are removed as soon as they are made, before this package has noted them, are not promised to later pulls.
func TestRemovedWhileMade(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...)
	n.convert(img)
	removeAll := func(remove func(context.Context, string) error) (removed int) {
		names := n.names()
		for _, name := range slices.Backward(names) {
			if err := remove(testContext(), name); err != nil {
				t.Error(err)
			}
		}
		return len(names)
	}
	for end := time.Now().Add(time.Minute); ; {
		done := make(chan error)
		go func() {
			_, err := n.sn.Prepare(testContext(), "extract", "", img.labels(0))
			done <- err
		}()
		hit, ended := false, false
		for !ended {
			n.sn.mu.Lock()
			if !hit && len(n.sn.streamed) == 0 {
				hit = removeAll(n.sn.Snapshotter.Remove) > 0 // the first half of Remove; the second would find nothing
			}
			n.sn.mu.Unlock()
			select {
			case err := <-done:
				if ended = true; !isAlreadyExists(err) {
					t.Fatal(err)
				}
			default:
			}
		}
		if hit {
			break
		}
		removeAll(n.sn.Remove)
		if time.Now().After(end) {
			t.Fatal("the moment between making and noting never came")
		}
	}
	if n.sn.lookup(img.chainIDs[0].String(), "") {
		t.Error("a snapshot is promised that is not there")
	}
	n.prepareAll(img, 0, "")
}

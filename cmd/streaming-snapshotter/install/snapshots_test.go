package install

import (
	"context"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
)

// hiding is a snapshotter whose first list lacks a snapshot: one that has come since, or that containerd does not list.
type hiding struct {
	snapshots.Snapshotter
	name  string
	lists int
}

func (h *hiding) Walk(ctx context.Context, f snapshots.WalkFunc, filters ...string) error {
	h.lists++
	return h.Snapshotter.Walk(ctx, func(ctx context.Context, i snapshots.Info) error {
		if h.lists == 1 && i.Name == h.name {
			return nil
		}
		return f(ctx, i)
	}, filters...)
}

// TestRemoveAll: all go, the top ones first; what stands on one and was not listed is waited for, and what a container has is none of ours.
func TestRemoveAll(t *testing.T) {
	for name, c := range map[string]struct {
		hide, keep string
		left       int
		lists      int
	}{
		"all":    {"", "", 0, 4}, // the last finds none
		"late":   {"top", "", 0, 5},
		"in use": {"", "container", 3, 1},
	} {
		t.Run(name, func(t *testing.T) {
			sn, err := native.NewSnapshotter(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer sn.Close()
			parent := ""
			for _, name := range []string{"bottom", "top"} {
				if _, err := sn.Prepare(t.Context(), "extract-1 "+name, parent); err != nil {
					t.Fatal(err)
				}
				if err := sn.Commit(t.Context(), name, "extract-1 "+name); err != nil {
					t.Fatal(err)
				}
				parent = name
			}
			if _, err := sn.Prepare(t.Context(), "container", parent); err != nil {
				t.Fatal(err)
			}
			if c.hide != "" { // as a leaf that stands on what is listed as one
				if err := sn.Remove(t.Context(), "container"); err != nil {
					t.Fatal(err)
				}
				c.lists--
			}
			h := &hiding{Snapshotter: sn, name: c.hide}
			err = removeAll(t.Context(), h, func(name string) bool { return name != c.keep })
			if (err != nil) != (c.keep != "") || err != nil && !strings.Contains(err.Error(), c.keep+" has come meanwhile") {
				t.Errorf("got %v", err)
			}
			left := 0
			if err := sn.Walk(t.Context(), func(context.Context, snapshots.Info) error { left++; return nil }); err != nil {
				t.Fatal(err)
			}
			if left != c.left || h.lists != c.lists {
				t.Errorf("%d snapshots are left after %d lists, want %d after %d", left, h.lists, c.left, c.lists)
			}
		})
	}
}

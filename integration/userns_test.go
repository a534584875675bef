package integration_test

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestUserNamespaces runs containers of one image with different ID mappings and without one, at once: each sees the image as its own root's, nothing is copied, and
// the end of one is nothing to the others.
func TestUserNamespaces(t *testing.T) {
	for i, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			seed := uint64(700 + i)
			registry := startRegistry(t, registrytest.Options{})
			ref := registry.Host() + "/app:v1"
			pushSmall(t, ref, seed)
			run(t, "streamctl", "create", "--record", "", ref)
			n := startNode(t, node.Options{Mode: mode, Stream: []string{registry.Host() + "/*"}})
			pullStreamed(t, registry, n, ref)
			bases := []uint32{0, 100_000, 300_000}
			for _, base := range bases {
				args := []string{"run", "--detach", "--snapshotter", n.Snapshotter()}
				ctr(t, n, append(append(args, idMaps(base)...), ref, name(base), "/guest", "pause")...)
			}
			for _, base := range bases {
				wantOwner(t, n, base)
			}
			if list := ctr(t, n, "snapshots", "--snapshotter", n.Snapshotter(), "list"); strings.Contains(list, "-remap") || strings.Count(list, "\n") != 1+3+len(bases) {
				t.Errorf("want the snapshots of three layers and of %d containers:\n%s", len(bases), list)
			}
			for left := bases; len(left) > 1; {
				ctr(t, n, "tasks", "delete", "--force", name(left[0]))
				ctr(t, n, "containers", "delete", name(left[0]))
				left = left[1:]
				for _, base := range left {
					wantOwner(t, n, base)
				}
			}
			// One that reads what nobody has read.
			out, err := n.RunFlags(t.Context(), ref, idMaps(500_000))
			if err != nil {
				t.Fatal(err)
			}
			checkSums(t, out, seed)
		})
	}
}

func name(base uint32) string { return fmt.Sprintf("from-%d", base) }

// idMaps are ctr's flags for a user namespace whose IDs begin at base outside.
func idMaps(base uint32) []string {
	if base == 0 {
		return nil
	}
	m := fmt.Sprintf("0:%d:65536", base)
	return []string{"--remap-labels", "--uidmap", m, "--gidmap", m}
}

// wantOwner checks that a file of the image belongs to base in the container of that name, and that its first page can be read.
func wantOwner(t *testing.T, n *node.Node, base uint32) {
	t.Helper()
	pid, err := n.PID(name(base))
	if err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/proc/%d/root/data/big", pid)
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if sys := st.Sys().(*syscall.Stat_t); sys.Uid != base || sys.Gid != base {
		t.Errorf("%s: the file belongs to %d:%d, want %d", name(base), sys.Uid, sys.Gid, base)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Read(make([]byte, 4096)); err != nil {
		t.Errorf("%s: %v", name(base), err)
	}
}

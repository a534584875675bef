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

// TestUserNamespaces runs pods of one image in different user namespaces and in none, at once: each sees the image as its own root's, nothing is copied, and
// the end of one is nothing to the others.
func TestUserNamespaces(t *testing.T) {
	for i, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			seed := uint64(700 + i)
			registry := startRegistry(t, registrytest.Options{})
			ref, pause := registry.Host()+"/app:v1", registry.Host()+"/pause:1"
			pushSmall(t, ref, seed)
			pushPause(t, pause)
			run(t, "streamctl", "create", "--record", "", ref)
			n := startNode(t, node.Options{Mode: mode, Pause: pause, Stream: []string{registry.Host() + "/*"}})
			pullStreamed(t, registry, n, ref)
			bases := []uint32{0, 100_000, 300_000}
			var pods []*node.Container
			for _, base := range bases {
				c, err := n.RunPodFrom(t.Context(), base, ref, "/guest", "pause")
				if err != nil {
					t.Fatal(err)
				}
				pods = append(pods, c)
			}
			for i, base := range bases {
				wantOwner(t, n, pods[i], base)
			}
			if list := ctr(t, n, "snapshots", "--snapshotter", n.Snapshotter(), "list"); strings.Contains(list, "-remap") || strings.Count(list, "\n") != 1+3+2*len(bases) {
				t.Errorf("want the snapshots of three layers (the pause image has one of them), and two of each of %d pods:\n%s", len(bases), list)
			}
			for len(pods) > 1 {
				if err := pods[0].Remove(t.Context()); err != nil {
					t.Fatal(err)
				}
				pods, bases = pods[1:], bases[1:]
				for i, base := range bases {
					wantOwner(t, n, pods[i], base)
				}
			}
			// One of ctr's, that reads what nobody has read.
			out, err := n.RunFlags(t.Context(), ref, idMaps(500_000))
			if err != nil {
				t.Fatal(err)
			}
			checkSums(t, out, seed)
		})
	}
}

// idMaps are ctr's flags for a user namespace whose IDs begin at base outside.
func idMaps(base uint32) []string {
	m := fmt.Sprintf("0:%d:65536", base)
	return []string{"--remap-labels", "--uidmap", m, "--gidmap", m}
}

// wantOwner checks that a file of the image belongs to base in the container, and that its first page can be read.
func wantOwner(t *testing.T, n *node.Node, c *node.Container, base uint32) {
	t.Helper()
	pid, err := n.PID(c.ID)
	if err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/proc/%d/root/data/big", pid)
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if sys := st.Sys().(*syscall.Stat_t); sys.Uid != base || sys.Gid != base {
		t.Errorf("from %d: the file belongs to %d:%d", base, sys.Uid, sys.Gid)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Read(make([]byte, 4096)); err != nil {
		t.Errorf("from %d: %v", base, err)
	}
}

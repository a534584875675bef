package integration_test

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs/erofstest"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestDirect: once all of an image is on the node, new containers of it read local files. Nobody keeps the daemon's mounts, and it is killed: a container that was started
// before loses what it has not read, and one that was started after sees the whole tree, as overlayfs shows it.
func TestDirect(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref := registry.Host() + "/app:v1"
	const seed = 90
	pushSmall(t, ref, seed)
	run(t, "streamctl", "create", "--record", "", ref)
	begin := time.Now()
	want := walkContainer(t, startNode(t, node.Options{Pull: node.Plain}), ref)
	untimed := unpackTimes(want, begin)
	forgetTimes(want, untimed)
	modes := []string{"file", "loop"}
	nodes := map[string]*node.Node{}
	for _, mode := range modes { // their containers' starts are over at the same time
		n := startNode(t, node.Options{Mode: mode, Stream: []string{registry.Host() + "/*"}, Config: `background_bandwidth = "1GiB"`})
		pullStreamed(t, registry, n, ref)
		ctr(t, n, "run", "--detach", "--snapshotter", n.Snapshotter(), ref, n.ID("old"), "/guest", "pause")
		nodes[mode] = n
	}
	for _, mode := range modes {
		n := nodes[mode]
		eventually(t, "a mount of local files in mode "+mode, func() bool { return mountedDirectly(t, n) })
	}
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			n := nodes[mode]
			ctr(t, n, "run", "--detach", "--snapshotter", n.Snapshotter(), ref, n.ID("new"), "/guest", "pause")
			dir := tempDir(t)
			if err := n.Mount(t.Context(), ref, dir); err != nil {
				t.Fatal(err)
			}
			n.KillSnapshotter()
			got, err := erofstest.Walk(dir, erofstest.Options{MaxContent: erofstest.AllContent, NoDirNlink: true, NoGhosts: true})
			if err != nil {
				t.Fatal(err)
			}
			forgetTimes(got, untimed)
			if diff := erofstest.Diff(got, want); diff != "" {
				t.Errorf("without a daemon it is not what overlayfs shows:\n%s", diff)
			}
			checkSums(t, ctr(t, n, "tasks", "exec", "--exec-id", "sum", n.ID("new"), "/guest", "sum", "/data"), seed)
			if out, err := n.Ctr(t.Context(), "tasks", "exec", "--exec-id", "sum", n.ID("old"), "/guest", "sum", "/data/big"); err == nil && !strings.Contains(out, "errno=5 ") {
				t.Errorf("the container that needs the daemon has read without it: %s", out)
			}
			if err := n.StartSnapshotter(t.Context()); err != nil {
				t.Fatal(err)
			}
			checkSums(t, ctr(t, n, "tasks", "exec", "--exec-id", "again", n.ID("new"), "/guest", "sum", "/data"), seed)
			sumIn(t, n, ref, seed, "/data")
			eventually(t, "a mount of local files again", func() bool { return mountedDirectly(t, n) })
			out, err := n.RunFlags(t.Context(), ref, idMaps(500_000))
			if err != nil {
				t.Fatalf("in a user namespace: %v", err)
			}
			checkSums(t, out, seed)
			if err := n.Unmount(t.Context(), dir); err != nil {
				t.Error(err)
			}
		})
	}
}

// mountedDirectly reports whether a chain is mounted from local files, and none through the daemon: what is mounted is the metadata image, or a loop device of it.
func mountedDirectly(t *testing.T, n *node.Node) bool {
	t.Helper()
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(filepath.Join(n.Dir, "s/snapshots")))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range infos {
		if m.FSType == "erofs" && strings.HasPrefix(m.Source, "/dev/loop") {
			return slices.ContainsFunc(n.Loops(), func(file string) bool { return strings.HasSuffix(file, "/direct.erofs") })
		}
		if m.FSType == "erofs" {
			return strings.HasSuffix(m.Source, "/direct.erofs")
		}
	}
	return false
}

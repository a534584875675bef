package integration_test

import (
	"bytes"
	"os"
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
	nodes := localNodes(t, registry, ref, node.Options{}, func(n *node.Node) {
		ctr(t, n, "run", "--detach", "--snapshotter", n.Snapshotter(), ref, n.ID("old"), "/guest", "pause")
	})
	for mode, n := range nodes {
		t.Run(mode, func(t *testing.T) {
			if s, err := statusOf(t, n); err != nil || len(s.Images) != 1 || s.Images[0].Direct != 1 || s.Images[0].Through != 0 || s.Images[0].Local != s.Images[0].Size {
				t.Errorf("the status says %+v, %v", s.Images, err)
			}
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

// localNodes starts a node in each mode that reads local files, pulls ref there, uses it, and waits until it is mounted from local files. A start is over half a
// minute after it has read something new: on all nodes at the same time.
func localNodes(t *testing.T, registry *registrytest.Registry, ref string, o node.Options, use func(n *node.Node)) map[string]*node.Node {
	t.Helper()
	o.Stream, o.Config = []string{registry.Host() + "/*"}, `background_bandwidth = "1GiB"`
	nodes := map[string]*node.Node{}
	for _, o.Mode = range []string{"file", "loop"} {
		n := startNode(t, o)
		pullStreamed(t, registry, n, ref)
		use(n)
		nodes[o.Mode] = n
	}
	for mode, n := range nodes {
		eventually(t, "a mount of local files in mode "+mode, func() bool { return mountedDirectly(t, n) })
	}
	return nodes
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

// What the disk damages of local files is found and mended by the next start of the daemon, and containers that come then read the image, whatever the mount of the former
// life has in its page cache.
func TestDirectDamaged(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref := registry.Host() + "/app:v1"
	const seed = 91
	pushSmall(t, ref, seed)
	run(t, "streamctl", "create", "--record", "", ref)
	for mode, n := range localNodes(t, registry, ref, node.Options{Supervise: true}, func(n *node.Node) { sumIn(t, n, ref, seed, "/data") }) {
		t.Run(mode, func(t *testing.T) {
			want := sums(t, n, ref)
			good := map[string][]byte{}
			for _, file := range cacheFiles(t, n) {
				if b, err := os.ReadFile(file); err == nil && filepath.Base(file) == "whole" && !bytes.Contains(b, []byte("\x7fELF")) {
					good[file] = b
					flipBytes(t, file)
				}
			}
			if sums(t, n, ref) == want { // and has it in the page cache
				t.Fatal("the damage is not seen")
			}
			eventually(t, "a daemon that can be killed", n.KillSupervised)
			eventually(t, "the image as it was", func() bool { return sums(t, n, ref) == want })
			for file, want := range good {
				if b, err := os.ReadFile(file); err != nil || !bytes.Equal(b, want) {
					t.Errorf("%s is not mended: %v", file, err)
				}
			}
		})
	}
}

// sums returns what a container of Small's image reads below /data.
func sums(t *testing.T, n *node.Node, ref string) string {
	t.Helper()
	out, err := n.Run(t.Context(), ref, nil, "/guest", "sum", "/data")
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// A daemon that is killed before it has saved a record of an image's first start completes the image all the same.
func TestFirstStartKilled(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref := registry.Host() + "/app:v1"
	const seed = 92
	pushSmall(t, ref, seed)
	run(t, "streamctl", "create", "--record", "", ref)
	n := startNode(t, node.Options{Mode: "file", Stream: []string{registry.Host() + "/*"}, Config: `background_bandwidth = "1GiB"`, Supervise: true})
	pullStreamed(t, registry, n, ref)
	ctr(t, n, "run", "--detach", "--snapshotter", n.Snapshotter(), ref, n.ID("c"), "/guest", "pause")
	n.KillSupervised()
	eventually(t, "completion", func() bool {
		done, _ := filepath.Glob(filepath.Join(n.Dir, "s/images/*/completed"))
		return len(done) == 1
	})
}

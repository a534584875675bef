package integration_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestCycles pulls, runs and removes an image again and again: what the daemon holds is then as after the first time, in each mode.
func TestCycles(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref := registry.Host() + "/app:v1"
	pushSmall(t, ref, 67)
	run(t, "streamctl", "create", "--record", "", ref)
	cycles := 5 // in each mode
	if os.Getenv("FULL") != "" {
		cycles = 334
	}
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			n := startNode(t, node.Options{Mode: mode, Stream: []string{registry.Host() + "/*"}})
			cycle := func() {
				pullStreamed(t, registry, n, ref)
				sumIn(t, n, ref, 67, "/data")
				if _, err := n.Crictl(t.Context(), "rmi", ref); err != nil {
					t.Fatal(err)
				}
				eventually(t, "the snapshots are gone", func() bool {
					left, err := os.ReadDir(filepath.Join(n.Dir, "s/snapshots"))
					return err == nil && len(left) == 0
				})
			}
			cycle()
			first := holdingsOf(t, n)
			for range cycles - 1 {
				cycle()
			}
			var now holdings
			defer func() {
				t.Logf("after 1 and %d cycles: %d and %d descriptors, %d and %d sockets, %d and %d threads, %d and %d files", cycles,
					len(first.descriptors), len(now.descriptors), first.sockets, now.sockets, first.threads, now.threads, len(first.files), len(now.files))
				if t.Failed() {
					t.Logf("first: %+v\nnow: %+v", first, now)
				}
			}()
			// Connections that wait to be used again come and go, a few.
			eventually(t, "no more than after the first cycle", func() bool {
				now = holdingsOf(t, n)
				return len(now.descriptors) <= len(first.descriptors) && now.sockets <= first.sockets+4 && slices.Equal(now.mounts, first.mounts) &&
					slices.Equal(now.loops, first.loops) && slices.Equal(now.files, first.files)
			})
			// Go keeps a thread for each system call that ever blocked beside others.
			if now.threads > first.threads+16 {
				t.Errorf("%d threads, %d after the first cycle", now.threads, first.threads)
			}
		})
	}
}

// holdings is what a leak of the daemon would show in.
type holdings struct {
	descriptors, mounts, loops, files []string // descriptors but for sockets
	sockets, threads                  int
}

func holdingsOf(t *testing.T, n *node.Node) (h holdings) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d", n.SnapshotterPID())
	descriptors, err := os.ReadDir(proc + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range descriptors {
		target, err := os.Readlink(filepath.Join(proc, "fd", d.Name()))
		if strings.HasPrefix(target, "socket:") {
			h.sockets++
		} else if err == nil { // else closed meanwhile
			h.descriptors = append(h.descriptors, target)
		}
	}
	tasks, err := os.ReadDir(proc + "/task")
	if err != nil {
		t.Fatal(err)
	}
	h.threads = len(tasks)
	if h.mounts, err = n.Mounts("."); err != nil {
		t.Fatal(err)
	}
	h.loops = n.Loops()
	for _, dir := range []string{"s", "run"} {
		err := filepath.WalkDir(filepath.Join(n.Dir, dir), func(path string, _ fs.DirEntry, err error) error {
			// containerd's own state changes with its garbage collection.
			if err == nil && !strings.HasPrefix(path, filepath.Join(n.Dir, "run/c/")) {
				h.files = append(h.files, path)
			}
			if os.IsNotExist(err) {
				return nil
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(h.mounts)
	slices.Sort(h.loops)
	return h
}

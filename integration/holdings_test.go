package integration_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
)

// holdings is what a leak of the snapshotter would show in: of its processes together, the daemon and the supervisor if there is one, and of the node.
type holdings struct {
	descriptors, mounts, loops, files []string // descriptors but for sockets
	sockets, threads, goroutines      int
	memory                            int // resident, not of files, KiB
}

func (h holdings) String() string {
	return fmt.Sprintf("%d descriptors, %d sockets, %d threads, %d goroutines, %d MiB, %d mounts, %d loop devices, %d files",
		len(h.descriptors), h.sockets, h.threads, h.goroutines, h.memory>>10, len(h.mounts), len(h.loops), len(h.files))
}

// wantNoMoreThan waits until n holds no more than first, and logs what it holds.
func wantNoMoreThan(t *testing.T, n *node.Node, first holdings) {
	t.Helper()
	var now holdings
	defer func() {
		t.Logf("first %v\nnow   %v", first, now)
		if t.Failed() {
			t.Logf("first: %+q\nnow: %+q", first.lists(), now.lists())
		}
	}()
	// Connections to the registry that wait to be used again come and go; each has two goroutines.
	const connections = 16
	eventually(t, "no more than at first", func() bool {
		now = holdingsOf(t, n)
		return len(now.descriptors) <= len(first.descriptors) && now.sockets <= first.sockets+connections &&
			now.goroutines <= first.goroutines+2*connections &&
			slices.Equal(now.mounts, first.mounts) && slices.Equal(now.loops, first.loops) && slices.Equal(now.files, first.files)
	})
	// Go keeps a thread for each system call that ever blocked beside others, and memory that it has no use for.
	if now.threads > first.threads+16 {
		t.Errorf("%d threads, %d at first", now.threads, first.threads)
	}
	if now.memory > first.memory+64<<10 {
		t.Errorf("%d MiB resident, %d at first", now.memory>>10, first.memory>>10)
	}
}

func (h holdings) lists() [][]string { return [][]string{h.descriptors, h.mounts, h.loops, h.files} }

func holdingsOf(t *testing.T, n *node.Node) (h holdings) {
	t.Helper()
	pids, err := n.Processes()
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		h.addProcess(t, fmt.Sprintf("/proc/%d", pid))
	}
	status, err := statusOf(t, n)
	if err != nil {
		t.Fatal(err)
	}
	h.goroutines = status.Goroutines
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

// status is a part of what the daemon says of itself.
type status struct {
	Goroutines  int
	Cache       struct{ Evicted int64 }
	NotStreamed []struct {
		Image  string
		Reason reason.Code
	} `json:"not_streamed"`
	Images []struct{ Size, Local, Direct, Through int64 }
	Hosts  []struct {
		Host        string
		Credentials []string
	}
}

func statusOf(t *testing.T, n *node.Node) (s status, err error) {
	t.Helper()
	out, err := tryRun(t, "streaming-snapshotter", "status", "-o", "json", "--config", filepath.Join(n.Dir, "snapshotter.toml"))
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal([]byte(out), &s)
}

func (h *holdings) addProcess(t *testing.T, proc string) {
	t.Helper()
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
	h.threads += len(tasks)
	b, err := os.ReadFile(proc + "/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := bytes.Cut(b, []byte("RssAnon:"))
	kib := 0
	if _, err := fmt.Sscan(string(rest), &kib); err != nil {
		t.Fatalf("RssAnon in %s/status: %v", proc, err)
	}
	h.memory += kib
}

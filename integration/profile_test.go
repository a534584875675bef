package integration_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestProfileRecord records the start of an image on a node that runs it already, whose daemon was killed meanwhile, and starts it on another, which asks the registry
// for nothing once the hot blob is there.
func TestProfileRecord(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref := registry.Host() + "/app:v1"
	pushSmall(t, ref, 60)
	run(t, "streamctl", "create", "--record", "", ref)
	first := startNode(t, node.Options{Stream: []string{registry.Host() + "/*"}, Supervise: true})
	pullStreamed(t, registry, first, ref)
	if _, err := first.Run(t.Context(), ref, nil, "/guest", "sum", "/data"); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) { // until the daemon's record is on disk
		if saved, err := filepath.Glob(first.Dir + "/s/images/*/first-use.part"); err == nil && len(saved) == 1 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("no record of the first start")
		}
	}
	export := func() string {
		return run(t, "streaming-snapshotter", "profile", "export", "--config", first.ConfigFile(), ref)
	}
	before := export()
	if !first.KillSupervised() {
		t.Fatal("there was no daemon to kill")
	}
	record := filepath.Join(tempDir(t), "record.json")
	recordTo := func(path, until, dir string) {
		t.Helper()
		out := run(t, "streaming-snapshotter", "profile", "record", "--config", first.ConfigFile(), "--containerd", first.Socket(), until, ref, "--", "/guest", "sum", dir)
		if !strings.Contains(out, `"chunks":[[`) {
			t.Fatalf("profile record prints %q", out)
		}
		if err := os.WriteFile(path, []byte(out[strings.Index(out, `{"version"`):]), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, until := range []string{"--until-log=/data/small", "--for=1m"} { // a line comes; it ends by itself, when it has read all
		recordTo(record, until, "/data/small")
	}
	interruptRecord(t, first, ref)
	if out, err := first.Ctr(t.Context(), "namespaces", "ls", "-q"); err != nil || strings.Contains(out, "streaming-profile") {
		t.Errorf("namespaces: %q, %v", out, err)
	}
	if left, err := filepath.Glob(first.Dir + "/s/record-*"); err != nil || len(left) > 0 {
		t.Errorf("left in the daemon's directory: %q, %v", left, err)
	}
	if after := export(); after != before {
		t.Errorf("profile export prints\n%s\nafterwards, before it was\n%s", after, before)
	}
	run(t, "streamctl", "profile", "push", "--source", "recorded", ref, record)

	second := startNode(t, node.Options{Stream: []string{registry.Host() + "/*"}})
	pullStreamed(t, registry, second, ref)
	var p artifact.Profile
	b, err := os.ReadFile(record)
	if err == nil {
		err = json.Unmarshal(b, &p)
	}
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		var status struct{ Cache cache.Stats }
		if err := json.Unmarshal([]byte(run(t, "streaming-snapshotter", "status", "--config", second.ConfigFile(), "-o", "json")), &status); err != nil {
			t.Fatal(err)
		}
		if status.Cache.Hot == int64(len(p.Chunks)) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("of %d chunks in the profile %+v came", len(p.Chunks), status.Cache)
		}
	}
	asked, _ := registry.Count(registrytest.OfBlobs)
	if _, err := second.Run(t.Context(), ref, nil, "/guest", "sum", "/data/small"); err != nil {
		t.Fatal(err)
	}
	if after, _ := registry.Count(registrytest.OfBlobs); after != asked {
		t.Errorf("the container asked the registry %d times", after-asked)
	}

	// What is attached, and would be read ahead, is not in the next record.
	all, again := record+".all", record+".again"
	recordTo(all, "--for=1m", "/data")
	run(t, "streamctl", "profile", "push", "--source", "recorded", ref, all)
	recordTo(again, "--for=1m", "/data/small")
	var q artifact.Profile
	if b, err = os.ReadFile(again); err == nil {
		err = json.Unmarshal(b, &q)
	}
	if err != nil || len(q.Chunks) > len(p.Chunks) {
		t.Errorf("a record of %d chunks with a profile of more, of %d without: %v", len(q.Chunks), len(p.Chunks), err)
	}
}

// interruptRecord interrupts a `profile record` as a terminal does under a container that runs for ever: that is a way to say that it is ready.
func interruptRecord(t *testing.T, n *node.Node, ref string) {
	t.Helper()
	c := exec.CommandContext(t.Context(), "streaming-snapshotter", "profile", "record", "--config", n.ConfigFile(), "--containerd", n.Socket(), ref, "--",
		"/guest", "watch", "/data/small")
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var out bytes.Buffer
	c.Stdout = &out
	said, err := c.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(said); !strings.HasPrefix(lines.Text(), "pass "); {
		if !lines.Scan() {
			t.Fatalf("the container says nothing: %v", c.Wait())
		}
	}
	go io.Copy(io.Discard, said)
	syscall.Kill(-c.Process.Pid, syscall.SIGINT)
	if err := c.Wait(); err != nil || !strings.Contains(out.String(), `"chunks":[[`) {
		t.Errorf("interrupted: %q, %v", out.String(), err)
	}
}

package integration_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestProfileRecord records the start of an image on one node, and starts it on another, which asks the registry for nothing once the hot blob is there.
func TestProfileRecord(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref := registry.Host() + "/app:v1"
	pushSmall(t, ref, 60)
	run(t, "streamctl", "create", "--record", "", ref)
	first := startNode(t, node.Options{Stream: []string{registry.Host() + "/*"}})
	record := filepath.Join(tempDir(t), "record.json")
	for _, until := range []string{"--until-log=/data/small", "--for=1m"} { // a line comes; it ends by itself, when it has read all
		out := run(t, "streaming-snapshotter", "profile", "record", "--config", first.ConfigFile(), "--containerd", first.Socket(), until, ref, "--", "/guest", "sum", "/data/small")
		if !strings.Contains(out, `"chunks":[[`) {
			t.Fatalf("profile record prints %q", out)
		}
		if err := os.WriteFile(record, []byte(out[strings.Index(out, `{"version"`):]), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := first.Ctr(t.Context(), "--namespace", "streaming-profile", "images", "ls", "-q"); err != nil || strings.TrimSpace(out) != "" {
		t.Errorf("the run left %q, %v", out, err)
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
	before, _ := registry.Count(registrytest.OfBlobs)
	if _, err := second.Run(t.Context(), ref, nil, "/guest", "sum", "/data/small"); err != nil {
		t.Fatal(err)
	}
	if after, _ := registry.Count(registrytest.OfBlobs); after != before {
		t.Errorf("the container asked the registry %d times", after-before)
	}
}

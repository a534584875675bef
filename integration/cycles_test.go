package integration_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

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
			eventually(t, "the chunks are gone", func() bool { return len(cacheFiles(t, n)) == 0 })
			first, begin := holdingsOf(t, n), time.Now()
			for range cycles - 1 {
				cycle()
			}
			t.Logf("%d cycles, %v each", cycles, time.Since(begin)/time.Duration(cycles-1))
			wantNoMoreThan(t, n, first)
		})
	}
}

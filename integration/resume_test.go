package integration_test

import (
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

// TestResume kills the daemon again and again under one container that compares a tree and another that compiles a program, both in a loop: no
// error, no difference, in each mode. Then a container that starts afterwards sees the image too.
func TestResume(t *testing.T) {
	registry := goRegistry(t)
	app, compiler := registry.Host()+"/app:v1", registry.Host()+"/go:v1"
	const seed = 71
	pushSmall(t, app, seed)
	run(t, "streamctl", "create", "--record", "", app)
	pushGo(t, compiler)
	kills := 4
	if os.Getenv("FULL") != "" {
		kills = 100
	}
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			n := startNode(t, node.Options{Mode: mode, Stream: []string{registry.Host() + "/*"}, Supervise: true})
			pullStreamed(t, registry, n, app)
			pullStreamed(t, registry, n, compiler)
			s := &soak{t: t, n: n, seed: seed, app: app, compiler: compiler}
			s.startWatchers()
			for range kills {
				time.Sleep(200*time.Millisecond + rand.N(1800*time.Millisecond)) // the fault itself: at any moment of what the containers do
				eventually(t, "a daemon that can be killed", n.KillSupervised)
			}
			s.stopWatchers()
			t.Logf("%d kills, %d rounds", kills, s.rounds)
			eventually(t, "a daemon that answers", func() bool {
				_, err := n.Ctr(t.Context(), "snapshots", "--snapshotter", n.Snapshotter(), "list")
				return err == nil
			})
			sumIn(t, n, app, seed, "/data")
		})
	}
}

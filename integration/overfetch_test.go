package integration_test

import (
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestOverFetch compares what a container fetches until it has answered with the frames of the chunks that it touches: with read-ahead turned
// off, a page fault reads a page and a miss fetches a chunk.
func TestOverFetch(t *testing.T) {
	registry := goRegistry(t)
	pause, ref := registry.Host()+"/pause:1", registry.Host()+"/go:1"
	pushPause(t, pause)
	pushGo(t, ref)
	fetched := func(config string) int64 {
		n := startNode(t, node.Options{Pause: pause, Stream: []string{registry.Host() + "/*"}, Config: config})
		if err := n.Pull(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
		registry.Reset()
		if out := runPod(t, n, ref); !strings.Contains(out, "compiled and run by") {
			t.Fatalf("the container said %q", out)
		}
		requests, bytes := registry.Count(registrytest.OfBlobs)
		t.Logf("%q: %d requests, %.1f MB", config, requests, float64(bytes)/1e6)
		return bytes
	}
	touched := fetched("read_ahead = false")
	if got := fetched(""); float64(got) > 1.2*float64(touched) {
		t.Errorf("fetched %d bytes for chunks of %d that were touched, more than 1.2 times", got, touched)
	}
}

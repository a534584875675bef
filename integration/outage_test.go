package integration_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/crane"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/lagproxy"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestRegistryProcess stops docker-registry, kills it and starts it again under a container that reads cold files: it waits, and goes on.
func TestRegistryProcess(t *testing.T) {
	dir := tempDir(t)
	registry, err := node.StartDockerRegistry(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { registry.Close() })
	proxy, err := lagproxy.Listen("unix", registry.Socket, lagproxy.Link{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { proxy.Close() })
	n := startNode(t, node.Options{Stream: []string{proxy.Addr() + "/*"}})
	ref := proxy.Addr() + "/app:v1"
	pushSmall(t, ref, 70)
	run(t, "streamctl", "create", "--record", "", ref)
	if err := n.Pull(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	sumIn(t, n, ref, 70, "/data/small")

	if err := registry.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := proxy.Count()
	done := make(chan struct{})
	go func() {
		defer close(done)
		sumIn(t, n, ref, 70, "/data")
	}()
	asked := func(times int64) func() bool {
		return func() bool { c := proxy.Count().Sub(before); return c.Requests+c.Connections >= times }
	}
	eventually(t, "a read reaches the stopped registry", asked(1))
	registry.Kill()
	before = proxy.Count()
	eventually(t, "the reads are tried again", asked(5))
	select {
	case <-done:
		t.Fatal("the container ended without its registry")
	default:
	}
	again, err := node.StartDockerRegistry(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := again.Close(); err != nil {
			t.Error(err)
		}
	})
	<-done
}

// TestRetention deletes the artifact, its blobs too, after the image was mounted: what was not read yet comes from the image's own layers, each of
// which is read once, also after a restart of the daemon.
func TestRetention(t *testing.T) {
	dir := tempDir(t)
	registry := startRegistry(t, registrytest.Options{Dir: dir})
	ref := registry.Host() + "/app:v1"
	img := pushSmall(t, ref, 71)
	run(t, "streamctl", "create", "--record", "", ref)
	n := startNode(t, node.Options{Stream: []string{registry.Host() + "/*"}})
	pullStreamed(t, registry, n, ref)
	sumIn(t, n, ref, 71, "/data/small")

	m, dgst, _ := artifactOf(t, registry, "app")
	if err := crane.Delete(registry.Host()+"/app@"+dgst, crane.Insecure); err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers {
		if err := os.Remove(filepath.Join(dir, "sha256", l.Digest.Encoded())); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.StopSnapshotter(); err != nil {
		t.Fatal(err)
	}
	if err := n.StartSnapshotter(t.Context()); err != nil {
		t.Fatal(err)
	}
	registry.Reset()
	sumIn(t, n, ref, 71, "/data")
	if got := wholeLayers(t, registry, img); got == 0 || got > len(m.Layers) {
		t.Errorf("%d reads of the image's %d layers", got, len(m.Layers))
	}
	registry.Reset()
	sumIn(t, n, ref, 71, "/data")
	if got, _ := registry.Count(); got > 0 {
		t.Errorf("%d requests for what is on the node", got)
	}
}

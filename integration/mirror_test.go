package integration_test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
)

// writeHosts configures the hosts of a registry on a node.
func writeHosts(t *testing.T, n *node.Node, registry, text string) {
	t.Helper()
	dir := filepath.Join(n.HostsDir(), registry)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestReplicaBehind: a replica that has the manifests of an image and its artifact, and not their blobs yet, costs a pull and its containers a question for each blob where another host comes
// after it. As the only host it is a reason for a normal pull, which has a name.
func TestReplicaBehind(t *testing.T) {
	registry, replica := startRegistry(t, registrytest.Options{}), startRegistry(t, registrytest.Options{})
	ref, alone := registry.Host()+"/app:v1", replica.Host()+"/app:v1"
	img := pushSmall(t, ref, 83)
	if err := ociimage.Push(t.Context(), img, alone); err != nil {
		t.Fatal(err)
	}
	for _, r := range []string{ref, alone} { // the same artifact
		run(t, "streamctl", "create", "--record", "", r)
	}
	replica.Inject(func(req *http.Request) bool { return snapshotters(req) && registrytest.Blobs(req) }, -1, registrytest.Status(http.StatusNotFound))
	ofSnapshotter := func(q registrytest.Request) bool {
		return strings.HasPrefix(q.Header.Get("User-Agent"), "streaming-snapshotter")
	}

	n := startNode(t, node.Options{Stream: []string{registry.Host() + "/*"}})
	writeHosts(t, n, registry.Host(), fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\", \"resolve\", \"referrers\"]\n", registry.URL(), replica.URL()))
	replica.Reset()
	registry.Reset()
	if err := n.Pull(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if got := wholeLayers(t, registry, img) + wholeLayers(t, replica, img); got > 0 {
		t.Errorf("a pull that streams downloaded %d layers", got)
	}
	sumIn(t, n, ref, 83, "/data")
	if got, _ := registry.Count(func(q registrytest.Request) bool { return !registrytest.OfBlobs(q) }); got > 0 {
		t.Errorf("the registry was asked %d times for what the replica has", got)
	}
	for _, r := range []*registrytest.Registry{replica, registry} {
		if got, _ := r.Count(registrytest.OfBlobs, ofSnapshotter); got == 0 {
			t.Errorf("%s was asked for no blob", r.Host())
		}
	}

	n = startNode(t, node.Options{Stream: []string{replica.Host() + "/*"}})
	if err := n.Pull(t.Context(), alone); err != nil {
		t.Fatal(err)
	}
	if got := lastNormalPull(t, n, alone); got != reason.Incomplete {
		t.Errorf("without another host the status says %q, want %s", got, reason.Incomplete)
	}
	sumIn(t, n, alone, 83, "/data")
}

// TestSiteCache: what one node has read through an nginx with the configuration of deploy/mirror costs the registry nothing when a second node reads it, be the registry's blobs
// its own or elsewhere; without the nginx nodes read from the registry.
func TestSiteCache(t *testing.T) {
	for name, redirects := range map[string]bool{"own blobs": false, "redirects": true} {
		t.Run(name, func(t *testing.T) {
			registry := startRegistry(t, registrytest.Options{TLS: true, ClampRanges: true, RedirectBlobs: redirects})
			dir := tempDir(t)
			ca := filepath.Join(dir, "registry.pem")
			if err := os.WriteFile(ca, registry.CAPEM(), 0o644); err != nil {
				t.Fatal(err)
			}
			t.Setenv("SSL_CERT_FILE", ca) // of streamctl
			ref := registry.Host() + "/app:v1"
			pushSmall(t, ref, 80)
			run(t, "streamctl", "create", "--record", "", ref)
			cert, err := node.MakeCertificate(dir)
			if err != nil {
				t.Fatal(err)
			}
			cache, err := node.StartNginx(t.Context(), dir, cert.CertFile, cert.KeyFile, node.Upstream{Addr: registry.Host(), Name: "example.com", CAFile: ca})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { cache.Close() }) // a second time if all is well

			var counts []int
			for i := range 3 {
				if i == 2 {
					if err := cache.Close(); err != nil {
						t.Fatal(err)
					}
				}
				n := startNode(t, node.Options{Stream: []string{registry.Host() + "/*"}})
				writeHosts(t, n, registry.Host(), fmt.Sprintf("server = %q\nca = %q\n[host.\"https://%s\"]\ncapabilities = [\"pull\", \"resolve\", \"referrers\"]\nca = %q\n", "https://"+registry.Host(), ca, cache.Addr, cert.CAFile))
				registry.Reset()
				if err := n.Pull(t.Context(), ref); err != nil {
					t.Fatal(err)
				}
				sumIn(t, n, ref, 80, "/data")
				requests, bytes := registry.Count(func(q registrytest.Request) bool { return strings.Contains(q.Path, "/blobs/") })
				t.Logf("node %d: %d requests for blobs, %d bytes", i+1, requests, bytes)
				counts = append(counts, requests)
			}
			if counts[0] == 0 || counts[1] != 0 || counts[2] == 0 {
				t.Errorf("requests of the nodes for blobs: %v, want some, none, and some without the cache", counts)
			}
		})
	}
}

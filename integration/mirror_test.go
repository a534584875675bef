package integration_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

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
				hosts := filepath.Join(n.HostsDir(), registry.Host())
				text := fmt.Sprintf("server = %q\nca = %q\n[host.\"https://%s\"]\ncapabilities = [\"pull\", \"resolve\", \"referrers\"]\nca = %q\n", "https://"+registry.Host(), ca, cache.Addr, cert.CAFile)
				if err := os.MkdirAll(hosts, 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(hosts, "hosts.toml"), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
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

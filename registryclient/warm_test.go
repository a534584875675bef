package registryclient

import (
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// countingServer is a registry of one blob that counts connections and requests.
func countingServer(t *testing.T, http2 bool, blob []byte) (s *httptest.Server, conns, requests *atomic.Int64) {
	conns, requests = new(atomic.Int64), new(atomic.Int64)
	s = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		requests.Add(1)
		http.ServeContent(w, req, "", time.Time{}, strings.NewReader(string(blob)))
	}))
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			conns.Add(1)
		}
	}
	s.EnableHTTP2 = http2
	if !http2 {
		s.TLS = &tls.Config{NextProtos: []string{"http/1.1"}}
	}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s, conns, requests
}

// What a pull asks for after its manifests finds connections.
func TestSpareConnections(t *testing.T) {
	blob := noise(1000)
	dgst := digest.FromBytes(blob)
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			s, conns, requests := countingServer(t, http2, blob)
			host := strings.TrimPrefix(s.URL, "https://")
			c := newClient(t, Options{HostsDir: hostsDir(t, host, fmt.Sprintf("server = %q\nca = %q\n", s.URL, write(t, "ca.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))))})
			repo := Repository(host + "/app")
			r, err := c.registry(host)
			if err != nil {
				t.Fatal(err)
			}
			var shaken atomic.Int64
			for _, tr := range r.transports {
				if tr.TLSClientConfig != nil {
					tr.TLSClientConfig.VerifyConnection = func(tls.ConnectionState) error {
						shaken.Add(1)
						return nil
					}
				}
			}
			if _, err := c.Manifest(t.Context(), repo, dgst, 1<<20); err != nil {
				t.Fatal(err)
			}
			pollUntil(t, func() bool { return conns.Load() == 1+spareConns && shaken.Load() == 1+spareConns })
			if n := requests.Load(); n != 1 {
				t.Errorf("%d requests, want 1: nothing is asked for the connections' sake", n)
			}
			if !http2 {
				if _, err := readRange(t.Context(), c, repo, dgst, 10, 20, 0); err != nil { // meanwhile the last handshake ends
					t.Fatal(err)
				}
				var wg sync.WaitGroup
				gate := make(chan struct{})
				for range 1 + spareConns {
					wg.Go(func() {
						<-gate
						if _, err := readRange(t.Context(), c, repo, dgst, 10, 20, 0); err != nil {
							t.Error(err)
						}
					})
				}
				close(gate)
				wg.Wait()
				if n := conns.Load(); n > 1+spareConns+spareConns/2 {
					t.Errorf("%d connections, and there were %d that nobody used", n, 1+spareConns)
				}
			}

			// After a while: again, unless one connection is enough.
			h := r.hosts[0]
			h.mu.Lock()
			for _, p := range h.places {
				p.asked = time.Time{}
			}
			h.mu.Unlock()
			r.closeIdle()
			conns.Store(0)
			if _, err := c.Manifest(t.Context(), repo, dgst, 1<<20); err != nil {
				t.Fatal(err)
			}
			if !http2 {
				pollUntil(t, func() bool { return conns.Load() == 1+spareConns })
			} else if n := conns.Load(); n > 1 {
				t.Errorf("%d connections, one is enough", n)
			}
		})
	}
}

func pollUntil(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it has not come true in time")
		}
	}
}

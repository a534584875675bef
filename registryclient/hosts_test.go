package registryclient

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"iter"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

func fixed(user, secret string) Credentials {
	return offer(Credential{"fixed", user, secret})
}

// offer is credentials that are the same everywhere, of the source that served last first.
func offer(list ...Credential) Credentials {
	return func(_ context.Context, p Place) iter.Seq2[Credential, error] {
		return func(yield func(Credential, error) bool) {
			rank := func(c Credential) int {
				if c.Source == p.Last {
					return 0
				}
				return 1
			}
			for _, c := range slices.SortedStableFunc(slices.Values(list), func(a, b Credential) int { return rank(a) - rank(b) }) {
				if !yield(c, nil) {
					return
				}
			}
		}
	}
}

// hostsDir makes a certs.d with one hosts.toml, for registry, and returns it.
func hostsDir(t testing.TB, registry, toml string) string {
	t.Helper()
	dir := t.TempDir()
	writeHosts(t, dir, registry, toml)
	return dir
}

func writeHosts(t testing.TB, dir, registry, toml string) {
	t.Helper()
	d := filepath.Join(dir, registry)
	if err := os.MkdirAll(d, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(d, "hosts.toml"), []byte(toml), 0o644); err != nil {
		t.Fatal(err)
	}
}

// serverTOML names r as the server and trusts its certificate.
func serverTOML(t testing.TB, r *registrytest.Registry, more string) string {
	t.Helper()
	s := fmt.Sprintf("server = %q\n", r.URL())
	if b := r.CAPEM(); b != nil {
		s += fmt.Sprintf("ca = %q\n", write(t, "ca.pem", b))
	}
	return s + more
}

func write(t testing.TB, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// refusing returns an address where nobody listens.
func refusing(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

const domain = "registry.example.com"

func TestMirrors(t *testing.T) {
	const repo = Repository(domain + "/team/app")
	data := noise(1000)
	setup := func(t *testing.T) (mirror, origin *registrytest.Registry, blob digest.Digest, c *Client) {
		mirror, origin = registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
		blob = origin.PutBlob("team/app", data)
		toml := fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\"]\n", origin.URL(), mirror.URL())
		return mirror, origin, blob, newClient(t, Options{HostsDir: hostsDir(t, domain, toml)})
	}
	read := func(t *testing.T, c *Client, blob digest.Digest, try int) {
		t.Helper()
		if b, err := readRange(t.Context(), c, repo, blob, 10, 20, try); err != nil || !bytes.Equal(b, data[10:30]) {
			t.Errorf("try %d: got %d bytes, %v", try, len(b), err)
		}
	}

	t.Run("in order", func(t *testing.T) {
		mirror, origin, blob, c := setup(t)
		mirror.PutBlob("team/app", data)
		read(t, c, blob, 0)
		wantRequests(t, mirror, 1)
		wantRequests(t, origin, 0)
		if got, want := mirror.Requests()[0].Query, "ns="+domain; got != want {
			t.Errorf("the mirror was asked with %q, want %q", got, want)
		}
		read(t, c, blob, 1) // the mirror's bytes were wrong
		wantRequests(t, mirror, 1)
		wantRequests(t, origin, 1)
		read(t, c, blob, 2) // so were the registry's
		wantRequests(t, mirror, 2)
	})
	t.Run("lacks the blob", func(t *testing.T) {
		mirror, origin, blob, c := setup(t)
		for range 2 {
			read(t, c, blob, 0)
		}
		wantRequests(t, mirror, 2)
		wantRequests(t, origin, 2)
		if _, err := readRange(t.Context(), c, repo, digest.FromString("x"), 0, 1, 0); !errors.Is(err, ErrNotFound) {
			t.Errorf("got %v for what nobody has, want ErrNotFound", err)
		}
	})
	t.Run("fails", func(t *testing.T) {
		mirror, origin, blob, c := setup(t)
		mirror.Inject(registrytest.Any, -1, registrytest.Status(503))
		for range 3 {
			read(t, c, blob, 0)
		}
		wantRequests(t, mirror, 1) // and then after the others
		wantRequests(t, origin, 3)
		// What the registry has not is not looked for at a mirror that is down.
		if _, err := readRange(t.Context(), c, repo, digest.FromString("x"), 0, 1, 0); !errors.Is(err, ErrNotFound) {
			t.Errorf("got %v, want ErrNotFound", err)
		}
		wantRequests(t, mirror, 1)
	})
	t.Run("breaks off", func(t *testing.T) {
		mirror, origin, blob, c := setup(t)
		mirror.PutBlob("team/app", data)
		mirror.Inject(registrytest.Blobs, -1, registrytest.Reset(5))
		read(t, c, blob, 0)
		wantRequests(t, mirror, 1)
		wantRequests(t, origin, 1)
		if got, want := origin.Requests()[0].Range, "bytes=15-29"; got != want {
			t.Errorf("the registry was asked for %s, want %s", got, want)
		}
	})
	t.Run("registry is away", func(t *testing.T) {
		mirror, origin, blob, c := setup(t)
		c.o.Budget = 500 * time.Millisecond
		mirror.PutBlob("team/app", data)
		origin.Close()
		read(t, c, blob, 0)
		_, err := readRange(t.Context(), c, repo, digest.FromString("x"), 0, 1, 0)
		if err == nil || errors.Is(err, ErrNotFound) {
			t.Errorf("got %v, and what the registry has is not known", err)
		}
	})
	t.Run("comes back", func(t *testing.T) {
		mirror, origin, blob, c := setup(t)
		mirror.PutBlob("team/app", data)
		mirror.Inject(registrytest.Any, 1, registrytest.Status(503))
		origin.Inject(registrytest.Any, 2, registrytest.Status(503))
		read(t, c, blob, 0)
	})
	t.Run("may not resolve", func(t *testing.T) {
		mirror, origin, _, c := setup(t)
		subject, _ := put(t, mirror, artifactType)
		put(t, origin, artifactType)
		if _, _, err := c.Resolve(t.Context(), string(repo)+":latest"); err != nil {
			t.Error(err)
		}
		wantRequests(t, mirror, 0)
		if _, _, err := c.Resolve(t.Context(), string(repo)+"@"+subject.String()); err != nil {
			t.Error(err)
		}
		wantRequests(t, mirror, 1)
		if found, err := c.Referrers(t.Context(), repo, subject, artifactType); err != nil || len(found) != 1 {
			t.Errorf("got %d referrers, %v", len(found), err)
		}
		wantRequests(t, mirror, 1)
	})
	t.Run("is not there", func(t *testing.T) {
		origin := registrytest.Start(t, registrytest.Options{})
		blob := origin.PutBlob("team/app", data)
		c := newClient(t, Options{HostsDir: hostsDir(t, "_default", fmt.Sprintf("server = %q\n[host.\"http://%s\"]\n", origin.URL(), refusing(t)))})
		read(t, c, blob, 0)
		wantRequests(t, origin, 1)
	})
}

func TestOverridePath(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	blob := r.PutBlob("team/app", []byte("x"))
	toml := fmt.Sprintf("server = \"http://%s/v2/team\"\noverride_path = true\n", r.Host())
	c := newClient(t, Options{HostsDir: hostsDir(t, domain, toml)})
	if _, err := c.Blob(t.Context(), domain+"/app", blob, 1); err != nil {
		t.Error(err)
	}
	if got, want := r.Requests()[0].Path, "/v2/team/app/blobs/"+blob.String(); got != want {
		t.Errorf("asked for %s, want %s", got, want)
	}
}

func TestTLS(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{TLS: true})
	blob := r.PutBlob("team/app", []byte("x"))
	server := fmt.Sprintf("server = %q\n", r.URL())
	for name, tc := range map[string]struct {
		toml string
		ok   bool
	}{
		"unknown authority": {server, false},
		"ca":                {serverTOML(t, r, ""), true},
		"skip_verify":       {server + "skip_verify = true\n", true},
		"plain http":        {fmt.Sprintf("server = \"http://%s\"\n", r.Host()), false},
	} {
		c := newClient(t, Options{HostsDir: hostsDir(t, domain, tc.toml)})
		start := time.Now()
		if _, err := c.Blob(t.Context(), domain+"/team/app", blob, 1); (err == nil) != tc.ok {
			t.Errorf("%s: got %v, want success %v", name, err, tc.ok)
		}
		if d := time.Since(start); d > time.Second {
			t.Errorf("%s: took %v: it was tried again", name, d)
		}
	}
}

// TestServerAmongHosts: a registry that hosts.toml has as its server and as a host, with a CA, is asked once, and what it lacks is not found: there is no other one of unknown authority.
func TestServerAmongHosts(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{TLS: true})
	toml := fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = ['pull', 'resolve']\nca = %q\n", r.URL(), r.URL(), write(t, "ca.pem", r.CAPEM()))
	c := newClient(t, Options{HostsDir: hostsDir(t, domain, toml)})
	if _, _, err := c.Resolve(t.Context(), domain+"/team/none:v1"); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v, want that it is not found", err)
	}
	if _, err := c.Referrers(t.Context(), domain+"/team/none", digest.FromString("none"), ""); err != nil {
		t.Errorf("referrers: %v", err)
	}
}

func TestClientCertificate(t *testing.T) {
	cert, key, pair := selfSigned(t)
	r := registrytest.Start(t, registrytest.Options{})
	blob := r.PutBlob("team/app", []byte("x"))
	s := httptest.NewUnstartedServer(r)
	pool := x509.NewCertPool()
	pool.AddCert(pair.Leaf)
	s.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	defer s.Close()
	toml := fmt.Sprintf("server = %q\nskip_verify = true\n", s.URL)
	c := newClient(t, Options{HostsDir: hostsDir(t, domain, toml)})
	if _, err := c.Blob(t.Context(), domain+"/team/app", blob, 1); err == nil {
		t.Error("got in without a certificate")
	}
	c = newClient(t, Options{HostsDir: hostsDir(t, domain, toml+fmt.Sprintf("client = [[%q, %q]]\n", cert, key))})
	if _, err := c.Blob(t.Context(), domain+"/team/app", blob, 1); err != nil {
		t.Error(err)
	}
}

func selfSigned(t testing.TB) (certFile, keyFile string, pair tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "node"}, NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
	if pair, err = tls.X509KeyPair(certPEM, keyPEM); err != nil {
		t.Fatal(err)
	}
	return write(t, "node.cert", certPEM), write(t, "node.key", keyPEM), pair
}

// A changed hosts.toml counts without a new client; an unchanged one keeps what was learnt.
func TestHostsChange(t *testing.T) {
	one, two := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
	blob := one.PutBlob("team/app", []byte("x"))
	two.PutBlob("team/app", []byte("x"))
	dir := hostsDir(t, domain, serverTOML(t, one, ""))
	c := newClient(t, Options{HostsDir: dir})
	ask := func() {
		t.Helper()
		if _, err := c.Blob(t.Context(), domain+"/team/app", blob, 1); err != nil {
			t.Fatal(err)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.registries[domain].checked = time.Time{} // long ago
	}
	ask()
	first := c.registries[domain]
	ask()
	if c.registries[domain] != first {
		t.Error("the hosts were read anew without a change")
	}
	wantRequests(t, one, 2)
	writeHosts(t, dir, domain, serverTOML(t, two, "# changed\n"))
	ask()
	wantRequests(t, one, 2)
	wantRequests(t, two, 1)
}

func TestDefaultHosts(t *testing.T) {
	c := newClient(t, Options{})
	for domain, want := range map[string]string{
		"docker.io": "https://registry-1.docker.io/v2", "ghcr.io": "https://ghcr.io/v2", "localhost:5000": "http://localhost:5000/v2",
		"127.0.0.1:80": "http://127.0.0.1:80/v2", "[::1]:5000": "http://[::1]:5000/v2", "localhost.example.com": "https://localhost.example.com/v2",
	} {
		r, err := c.registry(domain)
		if err != nil || len(r.hosts) != 1 {
			t.Errorf("%s: got %+v, %v", domain, r, err)
			continue
		}
		if h := r.hosts[0]; h.Scheme+"://"+h.Host+h.Path != want || h.ns != "" {
			t.Errorf("%s: got %s://%s%s, ns %q, want %s", domain, h.Scheme, h.Host, h.Path, h.ns, want)
		}
	}
}

// The same connection serves one range after the other.
func TestKeepAlive(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	data := noise(1000)
	blob := r.PutBlob("team/app", data)
	seen := map[string]bool{}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		seen[req.RemoteAddr] = true
		r.ServeHTTP(w, req)
	}))
	defer s.Close()
	c := newClient(t, Options{})
	repo := Repository(strings.TrimPrefix(s.URL, "http://") + "/team/app")
	for off := range int64(10) {
		if _, err := readRange(t.Context(), c, repo, blob, off, 50, 0); err != nil {
			t.Fatal(err)
		}
	}
	c.Close() // so that the server is done with seen
	if len(seen) != 1 {
		t.Errorf("10 ranges took %d connections", len(seen))
	}
}

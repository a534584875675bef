package registryclient

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// A mirror that is silent in the middle of an error, or of a token, does not use up the time in which the registry would answer.
func TestSilentInTheMiddle(t *testing.T) {
	for name, prepare := range map[string]func(mirror *registrytest.Registry){
		"error": func(mirror *registrytest.Registry) {
			mirror.Inject(registrytest.Blobs, -1, func(r *registrytest.Registry, _ http.Handler) http.Handler {
				return registrytest.Stall(1)(r, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					w.WriteHeader(http.StatusServiceUnavailable)
					w.Write([]byte(`{"errors": []}`))
				}))
			})
		},
		"token": func(mirror *registrytest.Registry) {
			mirror.RequireToken(registrytest.TokenOptions{})
			mirror.Inject(registrytest.Tokens, -1, registrytest.Stall(1))
		},
	} {
		for _, tls := range []bool{false, true} { // HTTP/2, too
			t.Run(fmt.Sprintf("%s, tls %v", name, tls), func(t *testing.T) {
				t.Parallel()
				mirror, origin := registrytest.Start(t, registrytest.Options{TLS: tls}), registrytest.Start(t, registrytest.Options{})
				data := noise(1000)
				blob := origin.PutBlob("team/app", data)
				prepare(mirror)
				toml := fmt.Sprintf("server = %q\n[host.%q]\nskip_verify = true\n", origin.URL(), mirror.URL())
				c := newClient(t, Options{HostsDir: hostsDir(t, domain, toml), Stall: 300 * time.Millisecond})
				b, err := readRange(t.Context(), c, domain+"/team/app", blob, 0, 1000, 0)
				if err != nil || !bytes.Equal(b, data) {
					t.Errorf("got %d bytes, %v", len(b), err)
				}
				if n, _ := mirror.Count(); n == 0 {
					t.Error("the mirror was not asked")
				}
			})
		}
	}
}

// A challenge that is longer than any is not parsed.
func TestLongChallenge(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	subject, _ := put(t, r, artifactType)
	r.RequireToken(registrytest.TokenOptions{})
	challenge := fmt.Sprintf(`Bearer realm="%s/token",service="registrytest",scope="repository:team/app:pull",x="`, r.URL())
	for _, size := range []int{maxChallenge, maxChallenge + 1} {
		r.Reset()
		remove := r.Inject(registrytest.Manifests, 1, registrytest.AnswerHeader("WWW-Authenticate", challenge+strings.Repeat("x", size-1-len(challenge))+`"`))
		_, err := newClient(t, Options{}).Manifest(t.Context(), repoOf(r), subject, 1<<20)
		remove()
		if long := size > maxChallenge; (err != nil) != long {
			t.Errorf("a challenge of %d bytes: got error %v", size, err)
		}
	}
	wantRequests(t, r, 1) // no token
}

// Errors end up in logs: they show some of what a host has sent, however much that was.
func TestErrorsAreShort(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	subject, _ := put(t, r, artifactType)
	long := strings.Repeat("x", 1<<20)
	for name, fault := range map[string]registrytest.Fault{
		"media type":       registrytest.Answer(ocispec.MediaTypeImageIndex, `{"mediaType": "`+long+`"}`),
		"content encoding": registrytest.AnswerHeader("Content-Encoding", long[:50_000]),
	} {
		remove := r.Inject(registrytest.Referrers, -1, fault)
		_, err := newClient(t, Options{}).Referrers(t.Context(), repoOf(r), subject, artifactType)
		remove()
		if err == nil || len(err.Error()) > 2*maxErrorText {
			t.Errorf("%s: want a short error, got one of %d bytes", name, len(fmt.Sprint(err)))
		}
	}
}

// A registry that redirects to ever other places does not take a file descriptor for each.
func TestRedirectsToManyPlaces(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	data := noise(10)
	l, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	closed := sync.NewCond(&mu)
	store := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Range", "bytes 0-9/10")
		w.WriteHeader(http.StatusPartialContent)
		w.Write(data)
	}))
	store.Listener.Close()
	store.Listener = l
	store.Config.ConnState = func(c net.Conn, s http.ConnState) {
		mu.Lock()
		defer mu.Unlock()
		if open[c] = s == http.StateNew || s == http.StateActive || s == http.StateIdle; !open[c] {
			delete(open, c)
			closed.Broadcast()
		}
	}
	store.Start()
	defer store.Close()
	port := l.Addr().(*net.TCPAddr).Port
	c := newClient(t, Options{})
	for i := range maxIdleConns + 50 {
		blob := r.PutBlob("team/app", fmt.Append(nil, i))
		remove := r.Inject(registrytest.Blobs, 1, registrytest.Status(307, "Location", fmt.Sprintf("http://127.1.%d.%d:%d/", i/250, 1+i%250, port)))
		if b, err := readRange(t.Context(), c, repoOf(r), blob, 0, 10, 0); err != nil || !bytes.Equal(b, data) {
			t.Fatalf("place %d: got %d bytes, %v", i, len(b), err)
		}
		remove()
	}
	// The server hears of what was closed a little later.
	late := time.AfterFunc(10*time.Second, closed.Broadcast)
	defer late.Stop()
	mu.Lock()
	defer mu.Unlock()
	for begin := time.Now(); len(open) > maxIdleConns && time.Since(begin) < 10*time.Second; {
		closed.Wait()
	}
	if len(open) > maxIdleConns {
		t.Errorf("%d connections are open, want at most %d", len(open), maxIdleConns)
	}
}

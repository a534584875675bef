package report

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/starts"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

// answers is a service that fails as a real one does when it is told to: what a real one makes of reports is tested in integration. It keeps what it has taken.
type answers struct {
	*httptest.Server
	mu     sync.Mutex
	status int    // 0 takes all
	away   string // the registry whose reports fail
	take   int    // at most, of a report
	paths  []string
	tokens []string
	taken  []starts.Start
	nodes  map[string]bool
	raw    string
}

func startAnswers(t *testing.T) *answers {
	a := &answers{take: starts.MaxStarts, nodes: map[string]bool{}}
	a.Server = httptest.NewTLSServer(a)
	t.Cleanup(a.Close)
	return a
}

func (a *answers) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	b, err := io.ReadAll(req.Body)
	if err != nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.paths, a.tokens, a.raw = append(a.paths, req.Method+" "+req.URL.Path), append(a.tokens, req.Header.Get("Authorization")), string(b)
	status := a.status
	if a.away != "" && strings.Contains(req.URL.Path, a.away) {
		status = http.StatusServiceUnavailable
	}
	if status != 0 {
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"errors":[{"code":"X","message":"it is %d"}]}`, status)
		return
	}
	var r starts.Report
	if err := json.Unmarshal(b, &r); err != nil || r.Check() != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	n := min(len(r.Starts), a.take)
	a.taken = append(a.taken, r.Starts[:n]...)
	a.nodes[r.Node] = true
	fmt.Fprintf(w, `{"taken":%d,"counted":%d}`, n, n)
}

func (a *answers) set(status, take int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.status, a.take = status, take
}

func (a *answers) asked() (paths []string, taken int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.paths, len(a.taken)
}

func start(n int) starts.Start {
	return starts.Start{Manifest: digest.FromString(fmt.Sprint(n % 3)), Artifact: digest.FromString("a"), Profile: starts.None, Pull: 0.2, Reads: 1 + float64(n)}
}

const app = registryclient.Repository("registry.example.com:5000/team/app")

// newReporter returns one of a, which runs until the test ends, and what OnError was told.
func newReporter(t *testing.T, a *answers, change ...func(*Options)) (*Reporter, chan error) {
	t.Helper()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate().Raw})
	for name, b := range map[string][]byte{"ca": cert, "token": []byte("one\n")} {
		if err := os.WriteFile(at(name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	errs := make(chan error, 100)
	o := Options{Server: a.URL + "/base", TokenFile: at("token"), CAFile: at("ca"), IDFile: at("id"), Agent: "test", OnError: func(err error) { errs <- err }}
	for _, f := range change {
		f(&o)
	}
	r, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	r.collect, r.pause = 10*time.Millisecond, time.Millisecond
	return r, errs
}

// run runs r until the test ends.
func run(t *testing.T, r *Reporter) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { r.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
}

func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// Starts are told of at the service, each once, though it fails for a while and takes a part of a report only.
func TestReports(t *testing.T) {
	a := startAnswers(t)
	r, errs := newReporter(t, a)
	a.set(http.StatusServiceUnavailable, 2)
	for n := range 5 {
		r.Add(app, start(n))
	}
	r.Add("docker.io/library/nginx", start(9))
	if st := r.Status(); st.Waiting != 6 || st.Told != 0 {
		t.Errorf("status %+v", st)
	}
	run(t, r)
	if err := <-errs; err == nil || !strings.Contains(err.Error(), "it is 503") {
		t.Errorf("told of %v", err)
	}
	if st := r.Status(); st.Waiting != 6 || st.Error == "" {
		t.Errorf("status %+v", st)
	}
	a.set(0, 2)
	until(t, "all are told", func() bool { return r.Status().Told == 6 })
	if err := <-errs; err != nil {
		t.Errorf("told of %v, want that it works again", err)
	}
	paths, taken := a.asked()
	if taken != 6 || paths[0] != "POST /base/v1/registries/registry.example.com:5000/repositories/team/app/_starts" || !slices.Contains(paths, "POST /base/v1/registries/docker.io/repositories/library/nginx/_starts") {
		t.Errorf("taken %d, asked %q", taken, paths)
	}
	seen := map[float64]bool{}
	for _, st := range a.taken {
		seen[st.Reads] = true
	}
	if len(seen) != 6 || len(a.nodes) != 1 || a.tokens[0] != "Bearer one" {
		t.Errorf("told of %v, by %v, with %q", seen, a.nodes, a.tokens[0])
	}
	if host, err := os.Hostname(); err == nil && strings.Contains(a.raw, host) {
		t.Errorf("the host's name is in %s", a.raw)
	}
	if st := r.Status(); st.Waiting != 0 || st.Dropped != 0 || st.Error != "" {
		t.Errorf("status %+v", st)
	}
	again, err := New(r.o)
	if err != nil || !a.nodes[again.node] {
		t.Errorf("after a restart the node is another one: %v", err)
	}
}

// A registry whose reports the service cannot take keeps those of no other waiting, however often they fail.
func TestOneRegistryIsAway(t *testing.T) {
	a := startAnswers(t)
	a.away = "registry.example.com:5000"
	r, errs := newReporter(t, a)
	r.pause = time.Hour
	r.Add(app, start(1))
	run(t, r)
	if err := <-errs; err == nil {
		t.Error("told of nothing")
	}
	r.Add(app, start(2))
	for n := range 3 {
		r.Add("docker.io/library/nginx", start(n))
		until(t, "the other registry's are told", func() bool { return r.Status().Told == int64(n+1) })
	}
	if paths, _ := a.asked(); len(paths) != 4 {
		t.Errorf("asked %q", paths)
	}
	if st := r.Status(); st.Waiting != 2 || !strings.Contains(st.Error, "503") || len(errs) != 0 {
		t.Errorf("status %+v, told of %d changes", st, len(errs))
	}
}

// What the service will never take, what is too much and what is too old is left out; a token that is not valid yet is tried again.
func TestDropped(t *testing.T) {
	a := startAnswers(t)
	r, errs := newReporter(t, a)
	for n := range maxWaiting + 10 {
		r.Add(app, start(n))
	}
	if st := r.Status(); st.Waiting != maxWaiting || st.Dropped != 10 {
		t.Errorf("status %+v", st)
	}
	r.queue[0].since = r.queue[0].since.Add(-2 * maxAge)
	a.set(http.StatusNotFound, 0)
	run(t, r)
	until(t, "all are left out", func() bool { st := r.Status(); return st.Waiting == 0 && st.Dropped == maxWaiting+10 })
	if err := <-errs; err == nil || !strings.Contains(err.Error(), "it is 404") {
		t.Errorf("told of %v", err)
	}
	a.set(http.StatusUnauthorized, 0)
	r.Add(app, start(1))
	until(t, "the token is refused", func() bool { return strings.Contains(r.Status().Error, "401") })
	a.set(0, 64)
	until(t, "the start is told", func() bool { return r.Status().Told == 1 })
}

// A reporter that cannot be is an error, and none does nothing.
func TestNew(t *testing.T) {
	for server, want := range map[string]string{"streaming.example.com": "want the URL", "http://streaming.example.com": "want https", "ftp://x": "want the URL", "https://user@x": "want the URL"} {
		if _, err := New(Options{Server: server, TokenFile: "/token", IDFile: filepath.Join(t.TempDir(), "id")}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want %q", server, err, want)
		}
	}
	for _, server := range []string{"http://127.0.0.1:8080", "http://localhost", "https://streaming.example.com/base"} {
		if err := CheckServer(server, true); err != nil {
			t.Error(err)
		}
	}
	if _, err := New(Options{Server: "https://x", IDFile: filepath.Join(t.TempDir(), "none", "id")}); err == nil {
		t.Error("a number that cannot be kept is no error")
	}
	var none *Reporter
	none.Add(app, start(1))
	if none.Status() != nil {
		t.Error("none has a status")
	}
}

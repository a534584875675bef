// Package kubeapitest stands in for an API server, which needs etcd and minutes to build, in tests that make test runs. What the real one makes of the same requests is tested in integration (TestKubernetes...).
package kubeapitest

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"
)

// Server answers what a test has put there, to who has its token, and keeps what is posted or patched where something was put.
type Server struct {
	*httptest.Server
	Kubeconfig string // of a client with the token

	mu      sync.Mutex
	objects map[string]string // by path and query; a number is a status
	asked   []string
	posted  [][]byte
}

// Start runs a Server until the test ends.
func Start(t *testing.T) *Server {
	t.Helper()
	s := &Server{objects: map[string]string{}, Kubeconfig: filepath.Join(t.TempDir(), "kubeconfig")}
	s.Server = httptest.NewTLSServer(s)
	t.Cleanup(s.Close)
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, insecure-skip-tls-verify: true}}]
users: [{name: u, user: {token: one}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, s.URL)
	if err := os.WriteFile(s.Kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return // the client has gone
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, req.URL.Path)
	answer, ok := s.objects[req.URL.RequestURI()]
	status := http.StatusOK
	switch {
	case req.Header.Get("Authorization") != "Bearer one":
		status = http.StatusUnauthorized
	case !ok:
		status = http.StatusNotFound
	case len(answer) == 3:
		fmt.Sscan(answer, &status)
	case req.Method == http.MethodPost, req.Method == http.MethodPatch:
		s.posted = append(s.posted, body)
		status = http.StatusCreated
	}
	w.WriteHeader(status)
	if status/100 != 2 {
		fmt.Fprintf(w, `{"kind":"Status","message":"it is %d"}`, status)
		return
	}
	w.Write([]byte(answer))
}

// Put has path, below the core group and with its query, answered with an object or, by its number, a status.
func (s *Server) Put(path, answer string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.objects["/api/v1/"+path] = answer
}

// Requests returns the paths that were asked for since the last time, sorted: several things are at once.
func (s *Server) Requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := s.asked
	s.asked = nil
	slices.Sort(list)
	return list
}

// Posted returns what was posted or patched since the last time.
func (s *Server) Posted() [][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := s.posted
	s.posted = nil
	return list
}

// Await is Posted, once that is something.
func (s *Server) Await(t *testing.T) [][]byte {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if list := s.Posted(); len(list) > 0 {
			return list
		}
		if time.Now().After(deadline) {
			t.Fatal("nothing was posted")
		}
	}
}

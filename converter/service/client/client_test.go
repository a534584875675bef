package client

import (
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

// The client against the service itself is tested in package rest.

const id = "8f4ba2c5-0c1e-4c0c-9d7b-0f3f3c1d2e4f"

func newClient(t *testing.T, c Config) *Client {
	t.Helper()
	cl, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return cl
}

func TestConfig(t *testing.T) {
	for _, server := range []string{"", "streaming.example.com", "ftp://example.com", "https://", "https://user:secret@example.com", "https://example.com?x", "https://example.com#x"} {
		if _, err := New(Config{Server: server}); err == nil {
			t.Errorf("server %q is taken", server)
		}
	}
	empty := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{empty, empty + ".not"} {
		if _, err := New(Config{Server: "https://example.com", CAFile: file}); err == nil || !strings.Contains(err.Error(), file) {
			t.Errorf("certificates of %s: %v", file, err)
		}
	}
}

// TestToken: it is asked for each time, sent to this computer or over TLS, and nowhere else.
func TestToken(t *testing.T) {
	var mu sync.Mutex
	var sent []string
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		sent = append(sent, r.Header.Get("Authorization")+" "+r.URL.Path)
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"registries":[]}`)
	})
	s := httptest.NewServer(h)
	defer s.Close()
	n := 0
	token := func() (string, error) { n++; return fmt.Sprint("t", n), nil }
	c := newClient(t, Config{Server: s.URL + "/below/", Token: token})
	for range 2 {
		if _, err := c.Registries(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	mu.Lock()
	if got := fmt.Sprint(sent); got != "[Bearer t1 /below/v1/registries Bearer t2 /below/v1/registries]" {
		t.Errorf("sent %s", got)
	}
	mu.Unlock()
	c = newClient(t, Config{Server: "http://streaming.invalid", Token: token})
	if _, err := c.Registries(t.Context()); err == nil || !strings.Contains(err.Error(), "use https") {
		t.Errorf("token in clear: %v", err)
	}
	broken := errors.New("no such file")
	c = newClient(t, Config{Server: s.URL, Token: func() (string, error) { return "", broken }})
	if _, err := c.Follow(t.Context(), id, nil); !errors.Is(err, broken) {
		t.Errorf("no token to be had: %v", err)
	}
}

func TestTLS(t *testing.T) {
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"registries":[{"name":"a"}]}`)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // that the client leaves
	s.StartTLS()
	defer s.Close()
	if _, err := newClient(t, Config{Server: s.URL}).Registries(t.Context()); err == nil || errors.Is(err, service.ErrUnavailable) {
		t.Errorf("a certificate that nobody trusts: %v", err)
	}
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	list, err := newClient(t, Config{Server: s.URL, CAFile: file}).Registries(t.Context())
	if err != nil || len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
}

// TestIntermediaries: what a proxy answers is not taken for the service's word.
func TestIntermediaries(t *testing.T) {
	for name, c := range map[string]struct {
		answer    http.HandlerFunc
		want      string
		temporary bool
	}{
		"bad gateway": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			w.WriteHeader(502)
			fmt.Fprint(w, "<html>no upstream")
		}, "502 Bad Gateway", true},
		"a page": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			fmt.Fprint(w, "<html>welcome")
		}, "is not the conversion service", false},
		"its 404": {func(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) }, "404", false},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://streaming.example.com/", http.StatusMovedPermanently)
		}, "redirects to https://streaming.example.com/: give that", false},
		"half an answer": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, `{"id":`)
		}, "the answer of", true},
	} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewServer(c.answer)
			defer s.Close()
			_, err := newClient(t, Config{Server: s.URL}).Operation(t.Context(), id)
			if err == nil || !strings.Contains(err.Error(), c.want) || errors.Is(err, service.ErrUnavailable) != c.temporary || errors.Is(err, service.ErrNotFound) {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestErrorCodes: an answer's code is what converter.CodeOf finds.
func TestErrorCodes(t *testing.T) {
	for _, code := range []converter.Code{converter.ResourceNotFound, converter.NoSupportedPlatformFound, converter.ImageNotRunnable, converter.Unknown} {
		err := fmt.Errorf("create: %w", &Error{Status: 409, Code: string(code), Message: "m"})
		if got := converter.CodeOf(err); got != code {
			t.Errorf("%s is %s", code, got)
		}
	}
	if !errors.Is(&Error{Status: 404, Code: string(converter.ResourceNotFound)}, service.ErrNotFound) {
		t.Error("RESOURCE_NOT_FOUND is not ErrNotFound")
	}
}

// TestUnreachable: a server that is not there or does not answer is unavailable, and Follow gives up on it when its patience ends.
func TestUnreachable(t *testing.T) {
	s := httptest.NewServer(http.NotFoundHandler())
	s.Close()
	c := newClient(t, Config{Server: s.URL, Patience: time.Nanosecond})
	if _, err := c.Operation(t.Context(), id); !errors.Is(err, service.ErrUnavailable) {
		t.Errorf("nobody there: %v", err)
	}
	if _, err := c.Follow(t.Context(), id, nil); !errors.Is(err, service.ErrUnavailable) || !strings.Contains(err.Error(), id) {
		t.Errorf("nobody there to follow: %v", err)
	}
	left := make(chan struct{})
	s = httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-left }))
	defer s.Close()
	defer close(left)
	c = newClient(t, Config{Server: s.URL, Timeout: time.Millisecond})
	if _, err := c.Operation(t.Context(), id); !errors.Is(err, service.ErrUnavailable) || !strings.Contains(err.Error(), "within 1ms") {
		t.Errorf("no answer: %v", err)
	}
}

// TestFollowStreams: Follow takes up a stream that broke, says nothing twice, and ends with what is final.
func TestFollowStreams(t *testing.T) {
	at := func(percent int, state service.State) string {
		return fmt.Sprintf("event: operation\ndata: {\"id\":%q,\"status\":%q,\"progress\":{\"percent\":%d}}\n\n", id, state, percent)
	}
	answers := []string{
		":\n\n" + at(1, service.Running) + ":\n\n" + at(2, service.Running) + "event: opera",
		"",
		"502",
		"event: error\ndata: {\"errors\":[{\"code\":\"UNAVAILABLE\",\"message\":\"about to end\"}]}\n\n",
		"retry: 1\nevent: news\ndata: x\n\n" + at(2, service.Running) + at(3, service.Running),
		at(100, service.Succeeded) + at(1, service.Failed),
	}
	var mu sync.Mutex
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if len(answers) == 0 {
			http.NotFound(w, r)
			return
		}
		next := answers[0]
		answers = answers[1:]
		if next == "502" {
			w.WriteHeader(502)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprint(w, next)
	}))
	defer s.Close()
	var seen []int
	op, err := newClient(t, Config{Server: s.URL}).Follow(t.Context(), id, func(o service.Operation) { seen = append(seen, o.Progress.Percent) })
	mu.Lock()
	defer mu.Unlock()
	if err != nil || op.State != service.Succeeded || fmt.Sprint(seen) != "[1 2 3 100]" || len(answers) != 0 {
		t.Errorf("%+v, %v, saw %v, %d answers left", op, err, seen, len(answers))
	}
}

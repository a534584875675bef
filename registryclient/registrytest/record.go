package registrytest

import (
	"net/http"
	"strings"
	"sync"
	"time"
)

// Request is one request and what became of it.
type Request struct {
	Server        string // "registry" or "store"
	Method        string
	Path          string
	Query         string
	Range         string
	Authorization string
	Header        http.Header
	Status        int       // sent; 0 if the connection was broken before
	Bytes         int64     // of the body sent
	Begin, End    time.Time // End is zero while it is being answered
}

// Requests returns the requests since the start or the last Reset, in the order they came. What is being answered is among them, with what it has been sent so far.
func (r *Registry) Requests() []Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]Request, len(r.requests))
	for i, q := range r.requests {
		all[i] = *q
	}
	return all
}

// Count returns how many of the Requests satisfy all of the predicates, and the bytes they were sent.
func (r *Registry) Count(match ...func(Request) bool) (requests int, bytes int64) {
	for _, q := range r.Requests() {
		if all(match, q) {
			requests++
			bytes += q.Bytes
		}
	}
	return requests, bytes
}

func all(match []func(Request) bool, q Request) bool {
	for _, m := range match {
		if !m(q) {
			return false
		}
	}
	return true
}

// OfBlobs is for Count: requests for blobs, at the registry or the store.
func OfBlobs(q Request) bool { return strings.Contains(q.Path, "/blobs/sha") }

// Reset forgets the Requests.
func (r *Registry) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests = nil
}

// recorded records what goes through h, and lets the faults have it first. What a client has seen has been recorded before.
func (r *Registry) recorded(server string, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		q := &Request{Server: server, Method: req.Method, Path: req.URL.Path, Query: req.URL.RawQuery, Range: req.Header.Get("Range"),
			Authorization: req.Header.Get("Authorization"), Header: req.Header.Clone(), Begin: time.Now()}
		r.mu.Lock()
		r.requests = append(r.requests, q)
		r.mu.Unlock()
		handler := h
		if fault := r.fault(req); fault != nil {
			handler = fault(r, h)
		}
		defer func() {
			r.mu.Lock()
			defer r.mu.Unlock()
			q.End = time.Now()
		}()
		handler.ServeHTTP(&recorder{ResponseWriter: w, mu: &r.mu, q: q}, req)
	})
}

// recorder notes status and bytes.
type recorder struct {
	http.ResponseWriter
	mu *sync.Mutex // guards q
	q  *Request
}

func (w *recorder) WriteHeader(status int) {
	w.note(status, 0)
	w.ResponseWriter.WriteHeader(status)
}

func (w *recorder) Write(p []byte) (int, error) {
	w.note(http.StatusOK, len(p))
	n, err := w.ResponseWriter.Write(p)
	w.note(http.StatusOK, n-len(p))
	return n, err
}

func (w *recorder) note(status, bytes int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.q.Status == 0 {
		w.q.Status = status
	}
	w.q.Bytes += int64(bytes)
}

// Unwrap is for http.ResponseController.
func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// breakOff ends the connection without a word.
func breakOff(w http.ResponseWriter) {
	c := http.NewResponseController(w)
	c.Flush() // what was written is to arrive, or the test would not know what did
	conn, _, err := c.Hijack()
	if err != nil { // HTTP/2
		panic(http.ErrAbortHandler)
	}
	conn.Close()
}

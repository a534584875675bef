package registrytest

import (
	"cmp"
	"net/http"
	"strings"
	"time"
)

// Fault makes a handler that fails out of one that works.
type Fault func(r *Registry, next http.Handler) http.Handler

// injection is a fault where and as often as it is to happen.
type injection struct {
	match func(*http.Request) bool
	left  int // -1 is always
	fault Fault
}

// Inject lets the next times requests that match fail; times < 0 is all. The first injection that matches takes a request. remove ends it.
func (r *Registry) Inject(match func(*http.Request) bool, times int, f Fault) (remove func()) {
	i := &injection{match, times, f}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = append(r.faults, i)
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		i.left = 0
	}
}

func (r *Registry) fault(req *http.Request) Fault {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, i := range r.faults {
		if i.left != 0 && i.match(req) {
			if i.left > 0 {
				i.left--
			}
			return i.fault
		}
	}
	return nil
}

// Predicates for Inject.

// Any matches every request.
func Any(*http.Request) bool { return true }

// Blobs matches downloads and HEADs of blobs at the registry, not uploads.
func Blobs(req *http.Request) bool {
	return strings.HasPrefix(req.URL.Path, "/v2/") && strings.Contains(req.URL.Path, "/blobs/") && !strings.Contains(req.URL.Path, "/blobs/uploads")
}

// Stored matches requests to the store, where blobs are redirected to.
func Stored(req *http.Request) bool { return strings.HasPrefix(req.URL.Path, storePrefix) }

// Manifests matches requests for manifests.
func Manifests(req *http.Request) bool { return strings.Contains(req.URL.Path, "/manifests/") }

// Referrers matches requests to the referrers API.
func Referrers(req *http.Request) bool { return strings.Contains(req.URL.Path, "/referrers/") }

// Tokens matches requests to the token server.
func Tokens(req *http.Request) bool { return req.URL.Path == tokenPath }

// Faults.

// Status answers with a status and headers, given as key, value, key, value.
func Status(code int, header ...string) Fault {
	return func(*Registry, http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			for i := 0; i+1 < len(header); i += 2 {
				w.Header().Set(header[i], header[i+1])
			}
			w.WriteHeader(code)
		})
	}
}

// Answer answers 200 with a body of a type.
func Answer(contentType, body string) Fault {
	return func(*Registry, http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", contentType)
			w.Write([]byte(body))
		})
	}
}

// IgnoreRange sends the whole blob whatever range is asked for.
func IgnoreRange() Fault {
	return func(_ *Registry, next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			req.Header.Del("Range")
			next.ServeHTTP(w, req)
		})
	}
}

// AnswerHeader replaces a header of the answer; with the value "" it goes.
func AnswerHeader(key, value string) Fault {
	return func(_ *Registry, next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			next.ServeHTTP(&filter{ResponseWriter: w, header: func(h http.Header) {
				if h.Set(key, value); value == "" {
					h.Del(key)
				}
			}}, req)
		})
	}
}

// AnswerStatus replaces the status of the answer.
func AnswerStatus(code int) Fault {
	return func(_ *Registry, next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			next.ServeHTTP(&filter{ResponseWriter: w, status: code}, req)
		})
	}
}

// Delay waits before it answers.
func Delay(d time.Duration) Fault {
	return func(r *Registry, next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			t := time.NewTimer(d)
			defer t.Stop()
			select {
			case <-t.C:
				next.ServeHTTP(w, req)
			case <-req.Context().Done():
			case <-r.closed:
			}
		})
	}
}

// Throttle sends the body a piece at a time, and waits before each.
func Throttle(piece int, wait time.Duration) Fault {
	return body(func(r *Registry, w http.ResponseWriter, req *http.Request, _ int64, p []byte) (n int, err error) {
		t := time.NewTicker(wait)
		defer t.Stop()
		for n < len(p) {
			select {
			case <-t.C:
			case <-req.Context().Done():
				return n, http.ErrAbortHandler
			case <-r.closed:
				return n, http.ErrAbortHandler
			}
			k, err := w.Write(p[n:min(n+piece, len(p))])
			if n += k; err != nil {
				return n, err
			}
			http.NewResponseController(w).Flush()
		}
		return n, nil
	})
}

// Flip inverts the lowest bit of the body's byte at off.
func Flip(off int64) Fault {
	return body(func(_ *Registry, w http.ResponseWriter, _ *http.Request, at int64, p []byte) (int, error) {
		if off >= at && off < at+int64(len(p)) {
			p = append([]byte(nil), p...)
			p[off-at] ^= 1
		}
		return w.Write(p)
	})
}

// Reset breaks the connection after n bytes of the body; before the header if n < 0.
func Reset(n int64) Fault {
	if n < 0 {
		return func(*Registry, http.Handler) http.Handler {
			return http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
		}
	}
	return after(n, func(_ *Registry, w http.ResponseWriter, _ *http.Request) { breakOff(w) })
}

// Truncate ends the answer after n bytes of the body as if that were all, whatever Content-Length says.
func Truncate(n int64) Fault {
	return func(_ *Registry, next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			f := &filter{ResponseWriter: w, header: func(h http.Header) { h.Del("Content-Length") }} // so it becomes a chunked body, well ended
			f.body = func(at int64, p []byte) (int, error) {
				if at == 0 {
					http.NewResponseController(w).Flush() // or a short body is given its length after all
				}
				if at < n {
					w.Write(p[:min(int64(len(p)), n-at)])
				}
				return len(p), nil
			}
			next.ServeHTTP(f, req)
		})
	}
}

// Stall sends n bytes of the body and then nothing, until the client leaves or the registry is closed; not even a header if n < 0.
func Stall(n int64) Fault {
	wait := func(r *Registry, req *http.Request) {
		select {
		case <-req.Context().Done():
		case <-r.closed:
		}
	}
	if n < 0 {
		return func(r *Registry, _ http.Handler) http.Handler {
			return http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) { wait(r, req) })
		}
	}
	return after(n, func(r *Registry, w http.ResponseWriter, req *http.Request) {
		http.NewResponseController(w).Flush()
		wait(r, req)
	})
}

// after lets n bytes of the body through and then calls end, once; the rest is dropped.
func after(n int64, end func(*Registry, http.ResponseWriter, *http.Request)) Fault {
	return body(func(r *Registry, w http.ResponseWriter, req *http.Request, at int64, p []byte) (int, error) {
		if at+int64(len(p)) < n {
			return w.Write(p)
		}
		if at <= n {
			w.Write(p[:n-at])
			end(r, w, req)
		}
		return 0, http.ErrAbortHandler
	})
}

// body makes a fault of a function that writes the body's bytes p, which are at offset at of it.
func body(write func(r *Registry, w http.ResponseWriter, req *http.Request, at int64, p []byte) (int, error)) Fault {
	return func(r *Registry, next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			next.ServeHTTP(&filter{ResponseWriter: w, body: func(at int64, p []byte) (int, error) { return write(r, w, req, at, p) }}, req)
		})
	}
}

// filter changes header and body of an answer on their way.
type filter struct {
	http.ResponseWriter
	status int // 0 is the answer's
	header func(http.Header)
	body   func(at int64, p []byte) (int, error)
	at     int64
	begun  bool
}

func (f *filter) WriteHeader(status int) {
	if !f.begun && f.header != nil {
		f.header(f.Header())
	}
	f.begun = true
	f.ResponseWriter.WriteHeader(cmp.Or(f.status, status))
}

func (f *filter) Write(p []byte) (int, error) {
	if !f.begun {
		f.WriteHeader(http.StatusOK)
	}
	if f.body == nil {
		return f.ResponseWriter.Write(p)
	}
	n, err := f.body(f.at, p)
	f.at += int64(len(p))
	return n, err
}

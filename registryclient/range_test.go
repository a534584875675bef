package registryclient

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

func TestReadRange(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{Dir: t.TempDir()})
	data := noise(100_000)
	blob := r.PutBlob("team/app", data)
	c := newClient(t, Options{})
	for _, tc := range []struct{ off, n int64 }{{0, 1}, {0, 100_000}, {99_999, 1}, {12_345, 54_321}} {
		r.Reset()
		b, err := readRange(t.Context(), c, repoOf(r), blob, tc.off, tc.n, 0)
		if err != nil || !bytes.Equal(b, data[tc.off:tc.off+tc.n]) {
			t.Errorf("%d bytes at %d: got %d, %v", tc.n, tc.off, len(b), err)
		}
		wantRequests(t, r, 1)
		if _, sent := r.Count(); sent != tc.n {
			t.Errorf("%d bytes at %d: the registry sent %d", tc.n, tc.off, sent)
		}
		if got, want := r.Requests()[0].Range, fmt.Sprintf("bytes=%d-%d", tc.off, tc.off+tc.n-1); got != want {
			t.Errorf("got Range %q, want %q", got, want)
		}
	}
	r.Reset()
	if b, err := readRange(t.Context(), c, repoOf(r), blob, 5, 0, 0); err != nil || len(b) > 0 {
		t.Errorf("nothing at 5: got %d bytes, %v", len(b), err)
	}
	for _, tc := range []struct {
		off, n int64
		try    int
	}{{-1, 5, 0}, {5, -1, 0}, {1 << 62, 1 << 62, 0}, {0, 1, -1}} {
		if _, err := c.ReadRange(t.Context(), repoOf(r), blob, tc.off, tc.n, tc.try); err == nil {
			t.Errorf("%+v: no error", tc)
		}
	}
	wantRequests(t, r, 0)
	if _, err := readRange(t.Context(), c, repoOf(r), blob, 99_999, 2, 0); err == nil {
		t.Error("a range past the end: no error")
	}
	wantRequests(t, r, 1)
}

func TestReadRangeFaults(t *testing.T) {
	const size, off, n = 3 << 20, 2 << 20, 1000
	data := noise(size)
	inRange := func(last int) string { return fmt.Sprintf("bytes=%d-%d", last, off+n-1) }
	for name, tc := range map[string]struct {
		fault registrytest.Fault
		times int
		err   error    // nil is success, io.EOF is any
		asked []string // ranges
	}{
		"another range":             {registrytest.AnswerHeader("Content-Range", "bytes 0-999/3145728"), maxMistakes - 1, nil, slices.Repeat([]string{inRange(off)}, maxMistakes)},
		"another range, for good":   {registrytest.AnswerHeader("Content-Range", "bytes 0-999/3145728"), -1, io.EOF, slices.Repeat([]string{inRange(off)}, maxMistakes)},
		"no range told":             {registrytest.AnswerHeader("Content-Range", ""), maxMistakes - 1, nil, slices.Repeat([]string{inRange(off)}, maxMistakes)},
		"no range told, for good":   {registrytest.AnswerHeader("Content-Range", ""), -1, io.EOF, slices.Repeat([]string{inRange(off)}, maxMistakes)},
		"ignored, far in":           {registrytest.IgnoreRange(), maxMistakes - 1, nil, slices.Repeat([]string{inRange(off)}, maxMistakes)},
		"ignored, far in, for good": {registrytest.IgnoreRange(), -1, ErrNoRanges, slices.Repeat([]string{inRange(off)}, maxMistakes)},
		"a range told as all":       {registrytest.AnswerStatus(200), -1, nil, []string{inRange(off)}},
		"416":                       {registrytest.Status(416), 1, io.EOF, []string{inRange(off)}},
		"204":                       {registrytest.Status(204), maxMistakes - 1, nil, slices.Repeat([]string{inRange(off)}, maxMistakes)},
		"204, for good":             {registrytest.Status(204), -1, io.EOF, slices.Repeat([]string{inRange(off)}, maxMistakes)},
		"404":                       {registrytest.Status(404), 1, ErrNotFound, []string{inRange(off)}},
		"503":                       {registrytest.Status(503), 1, nil, []string{inRange(off), inRange(off)}},
		"recoded":                   {registrytest.AnswerHeader("Content-Encoding", "zstd"), 1, io.EOF, []string{inRange(off)}},
		"breaks off":                {registrytest.Reset(400), 1, nil, []string{inRange(off), inRange(off + 400)}},
		"breaks off twice":          {registrytest.Reset(400), 2, nil, []string{inRange(off), inRange(off + 400), inRange(off + 800)}},
		"ends early":                {registrytest.Truncate(10), 1, nil, []string{inRange(off), inRange(off + 10)}},
		"stalls":                    {registrytest.Stall(999), 1, nil, []string{inRange(off), inRange(off + 999)}},
		"never gives anything":      {registrytest.Truncate(0), -1, io.ErrUnexpectedEOF, nil},
		"always stalls":             {registrytest.Stall(0), -1, errSilent, nil},
	} {
		for _, tls := range []bool{false, true} { // HTTP/2, too
			t.Run(fmt.Sprintf("%s, tls %v", name, tls), func(t *testing.T) {
				t.Parallel()
				r := registrytest.Start(t, registrytest.Options{TLS: tls})
				blob := r.PutBlob("team/app", data)
				r.Inject(registrytest.Blobs, tc.times, tc.fault)
				budget := 4 * time.Second
				if tc.asked == nil { // it will be used up
					budget = 600 * time.Millisecond
				}
				c := newClient(t, Options{Budget: budget, HostsDir: hostsDir(t, r.Host(), serverTOML(t, r, ""))})
				b, err := readRange(t.Context(), c, repoOf(r), blob, off, n, 0)
				switch {
				case tc.err == nil && (err != nil || !bytes.Equal(b, data[off:off+n])):
					t.Errorf("got %d bytes, %v", len(b), err)
				case tc.err == io.EOF && err == nil:
					t.Error("got no error")
				case tc.err != nil && tc.err != io.EOF && !errors.Is(err, tc.err):
					t.Errorf("got error %v, want %v", err, tc.err)
				}
				if tc.asked == nil {
					return
				}
				var asked []string
				for _, q := range r.Requests() {
					asked = append(asked, q.Range)
				}
				if got, want := strings.Join(asked, " "), strings.Join(tc.asked, " "); got != want {
					t.Errorf("got ranges %s, want %s", got, want)
				}
			})
		}
	}
}

// Whoever makes progress is given time: this read takes several budgets.
func TestReadRangeProgressRenewsBudget(t *testing.T) {
	t.Parallel()
	r := registrytest.Start(t, registrytest.Options{})
	data := noise(12 * renewBytes)
	blob := r.PutBlob("team/app", data)
	r.Inject(registrytest.Blobs, -1, registrytest.Reset(renewBytes))
	c := newClient(t, Options{Budget: 800 * time.Millisecond})
	b, err := readRange(t.Context(), c, repoOf(r), blob, 0, int64(len(data)), 0)
	if err != nil || !bytes.Equal(b, data) {
		t.Errorf("got %d bytes, %v", len(b), err)
	}
	wantRequests(t, r, 12)
}

// And whoever drips is not: each answer gives a byte, or one answer gives a byte now and then.
func TestReadRangeDrip(t *testing.T) {
	for name, fault := range map[string]registrytest.Fault{
		"many answers": registrytest.Reset(1), "one answer": registrytest.Throttle(1, 20*time.Millisecond),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := registrytest.Start(t, registrytest.Options{})
			blob := r.PutBlob("team/app", noise(renewBytes))
			r.Inject(registrytest.Blobs, -1, fault)
			c := newClient(t, Options{Budget: 500 * time.Millisecond})
			start := time.Now()
			if b, err := readRange(t.Context(), c, repoOf(r), blob, 0, renewBytes, 0); err == nil || len(b) == 0 {
				t.Errorf("got %d bytes, %v", len(b), err)
			}
			if d := time.Since(start); d > 5*time.Second {
				t.Errorf("went on for %v with a budget of 0.5 s", d)
			}
			if n, _ := r.Count(); n > 10 {
				t.Errorf("asked %d times within the budget", n)
			}
		})
	}
}

// A slow body is no broken one.
func TestReadRangeSlow(t *testing.T) {
	t.Parallel()
	r := registrytest.Start(t, registrytest.Options{})
	data := noise(8 * renewBytes)
	blob := r.PutBlob("team/app", data)
	r.Inject(registrytest.Blobs, -1, registrytest.Throttle(renewBytes, 100*time.Millisecond))
	c := newClient(t, Options{Budget: time.Second, Stall: time.Second})
	if b, err := readRange(t.Context(), c, repoOf(r), blob, 0, int64(len(data)), 0); err != nil || !bytes.Equal(b, data) {
		t.Errorf("got %d bytes, %v", len(b), err)
	}
	wantRequests(t, r, 1)
}

// A body that stalls is given up when its reader is: promptly, and without leaving anything running.
func TestReadRangeInterrupted(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	blob := r.PutBlob("team/app", noise(1000))
	c := newClient(t, Options{Budget: time.Hour, Stall: time.Hour})
	before := runtime.NumGoroutine()
	r.Inject(registrytest.Blobs, -1, registrytest.Stall(10))

	ctx, cancel := context.WithCancel(t.Context())
	rc, err := c.ReadRange(ctx, repoOf(r), blob, 0, 1000, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(rc, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() {
		_, err := rc.Read(make([]byte, 10))
		read <- err
	}()
	cancel()
	select {
	case err := <-read:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want context.Canceled", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the read goes on after its context has ended")
	}
	rc.Close()

	rc, err = c.ReadRange(t.Context(), repoOf(r), blob, 0, 1000, 0)
	if err != nil {
		t.Fatal(err)
	}
	rc.Close() // before the end
	if _, err := rc.Read(make([]byte, 1)); err == nil {
		t.Error("read after Close: no error")
	}

	c.Close()
	deadline := time.Now().Add(5 * time.Second)
	for runtime.NumGoroutine() > before {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines before, %d after:\n%s", before, runtime.NumGoroutine(), buf[:runtime.Stack(buf, true)])
		}
		runtime.Gosched()
	}
}

func TestReadRangeParallel(t *testing.T) {
	for _, tls := range []bool{false, true} {
		r := registrytest.Start(t, registrytest.Options{TLS: tls})
		data := noise(200_000)
		blob := r.PutBlob("team/app", data)
		c := newClient(t, Options{HostsDir: hostsDir(t, r.Host(), serverTOML(t, r, "")), Budget: time.Minute, Stall: 20 * time.Second})
		var wg sync.WaitGroup
		for i := range 150 {
			wg.Go(func() {
				off := int64(i) * 1000
				b, err := readRange(t.Context(), c, repoOf(r), blob, off, 2000, 0)
				if err != nil || !bytes.Equal(b, data[off:off+2000]) {
					t.Errorf("tls %v: got %d bytes at %d, %v", tls, len(b), off, err)
				}
			})
		}
		wg.Wait()
		wantRequests(t, r, 150)
	}
}

func TestRedirects(t *testing.T) {
	for _, o := range []registrytest.Options{{RedirectBlobs: true}, {RedirectBlobs: true, TLS: true}} {
		t.Run(fmt.Sprintf("tls %v", o.TLS), func(t *testing.T) {
			r := registrytest.Start(t, o)
			r.RequireToken(registrytest.TokenOptions{User: "u", Password: "hush"})
			data := noise(10_000)
			blob := r.PutBlob("team/app", data)
			c := newClient(t, Options{HostsDir: hostsDir(t, r.Host(), serverTOML(t, r, "[header]\nx-key = \"hush\"")), Credentials: fixed("u", "hush")})
			read := func(try int) {
				t.Helper()
				r.Reset()
				b, err := readRange(t.Context(), c, repoOf(r), blob, 100, 200, try)
				if err != nil || !bytes.Equal(b, data[100:300]) {
					t.Fatalf("got %d bytes, %v", len(b), err)
				}
				for _, q := range r.Requests() {
					if key := q.Header.Get("X-Key"); (q.Server == "store") != (key == "") || (q.Server == "store" && q.Authorization != "") {
						t.Errorf("%s got Authorization %q and the registry's own header %q", q.Server, q.Authorization, key)
					}
				}
			}
			read(0) // 401, token, redirect, store
			wantRequests(t, r, 4)
			read(0)
			wantRequests(t, r, 1)
			r.ExpireRedirects()
			read(0) // 403, redirect, store
			wantRequests(t, r, 3)
			read(1) // a second opinion begins at the registry
			wantRequests(t, r, 2)
			r.Inject(registrytest.Stored, 1, registrytest.Status(404)) // some stores say so of an expired address
			read(0)
			wantRequests(t, r, 3)
			r.Inject(registrytest.Stored, 1, registrytest.Status(500))
			read(0)
			wantRequests(t, r, 3)
			r.Inject(registrytest.Stored, 1, registrytest.Reset(50))
			read(0)
			wantRequests(t, r, 3)
		})
	}
}

// What a redirect's address holds gives access, so no error shows it.
func TestErrorsHideSignatures(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{RedirectBlobs: true})
	blob := r.PutBlob("team/app", noise(100))
	for name, fault := range map[string]registrytest.Fault{
		"status": registrytest.Status(403), "connection": registrytest.Reset(-1), "range": registrytest.AnswerHeader("Content-Range", "x"),
		"encoding": registrytest.AnswerHeader("Content-Encoding", "br"), "loop": registrytest.Status(302, "Location", "/x?sig=hush"),
	} {
		remove := r.Inject(registrytest.Stored, -1, fault)
		_, err := readRange(t.Context(), newClient(t, Options{Budget: 300 * time.Millisecond}), repoOf(r), blob, 0, 10, 0)
		remove()
		if err == nil || strings.Contains(err.Error(), "sig") || strings.Contains(err.Error(), "/store/") {
			t.Errorf("%s: got error %v", name, err)
		}
		if name != "range" && !strings.Contains(err.Error(), r.StoreHost()) {
			t.Errorf("%s: error does not name the host that failed: %v", name, err)
		}
	}
}

func TestRedirectsRefused(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{TLS: true})
	blob := r.PutBlob("team/app", noise(100))
	var asked bool
	plain := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked = true }))
	defer plain.Close()
	c := newClient(t, Options{HostsDir: hostsDir(t, r.Host(), serverTOML(t, r, ""))})
	for _, location := range []string{plain.URL + "/x", "file:///etc/passwd", "", "https://", "%zz", "gopher://x/y", "/" + strings.Repeat("x", maxAddress)} {
		r.Reset()
		remove := r.Inject(registrytest.Blobs, -1, registrytest.Status(307, "Location", location))
		if _, err := readRange(t.Context(), c, repoOf(r), blob, 0, 10, 0); err == nil {
			t.Errorf("redirect to %q: no error", location)
		}
		remove()
		wantRequests(t, r, 1)
	}
	if asked {
		t.Error("went from https to http")
	}
	// To oneself for ever.
	r.Reset()
	r.Inject(registrytest.Blobs, -1, registrytest.Status(307, "Location", "?again"))
	if _, err := readRange(t.Context(), c, repoOf(r), blob, 0, 10, 0); err == nil {
		t.Error("a loop: no error")
	}
	wantRequests(t, r, maxHops+1)
}

func FuzzParseContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-0/1", "bytes 5-9/*", "bytes */10", "bytes 9-5/10", "bytes 0-10/10", "bytes 0-9223372036854775807/*", "items 1-2/3", "bytes 1-2", "bytes -1-2/5", "bytes +1-2/5"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		first, last, err := parseContentRange(s)
		if err == nil && (first < 0 || last < first || !strings.HasPrefix(s, "bytes ")) {
			t.Errorf("%q: got %d-%d", s, first, last)
		}
	})
}

func BenchmarkReadRange(b *testing.B) {
	r := registrytest.Start(b, registrytest.Options{Dir: b.TempDir()})
	const size = 64 << 20
	blob := r.PutBlob("team/app", noise(size))
	c := newClient(b, Options{Budget: time.Minute, Stall: time.Minute})
	for _, n := range []int64{4 << 10, 128 << 10, 4 << 20} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.SetBytes(n)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				rc, err := c.ReadRange(b.Context(), repoOf(r), blob, int64(i)*n%size, n, 0)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, rc); err != nil {
					b.Fatal(err)
				}
				rc.Close()
			}
		})
	}
}

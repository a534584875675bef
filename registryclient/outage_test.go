package registryclient

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// Reads outlast an outage that all else has given up in.
func TestReadsWait(t *testing.T) {
	t.Parallel()
	for name, outage := range map[string]registrytest.Fault{
		"reset": registrytest.Reset(-1),
		"503":   registrytest.Status(http.StatusServiceUnavailable),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := registrytest.Start(t, registrytest.Options{})
			data := noise(1000)
			blob := r.PutBlob("team/app", data)
			back := r.Inject(registrytest.Any, -1, outage)
			c := newClient(t, Options{Budget: 300 * time.Millisecond, Wait: time.Minute})
			got := make(chan []byte, 1)
			go func() {
				b, err := readRange(t.Context(), c, repoOf(r), blob, 10, 500, 0)
				if err != nil {
					t.Error(err)
				}
				got <- b
			}()
			for range 2 {
				if _, err := c.Blob(t.Context(), repoOf(r), blob, 1000); err == nil || errors.Is(err, ErrNotFound) {
					t.Errorf("a lookup during the outage: %v", err)
				}
			}
			select {
			case <-got:
				t.Error("the read ended before the outage")
			default:
				back()
				if !bytes.Equal(<-got, data[10:510]) {
					t.Error("wrong bytes")
				}
			}
		})
	}
}

// While a host is away, many readers ask it one at a time, however many wait; when it is back they all go on. The going and the coming back are told
// once each.
func TestOneProbeAtATime(t *testing.T) {
	t.Parallel()
	r := registrytest.Start(t, registrytest.Options{})
	data := noise(100_000)
	blob := r.PutBlob("team/app", data)
	var mu sync.Mutex
	var told []HostStatus
	c := newClient(t, Options{Wait: time.Minute, OnHost: func(s HostStatus) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, s)
	}})
	back := r.Inject(registrytest.Any, -1, registrytest.Status(http.StatusServiceUnavailable))
	if _, err := c.Blob(ctxOf(t, 700*time.Millisecond), repoOf(r), blob, 1); err == nil {
		t.Fatal("got a blob")
	}
	if h := c.Hosts(); len(h) != 1 || !h[0].Away || h[0].Host != r.Host() || h[0].Error == "" {
		t.Fatalf("got hosts %+v, want one that is away", h)
	}
	r.Reset()
	const readers = 100
	var all sync.WaitGroup
	for i := range int64(readers) {
		all.Go(func() {
			b, err := readRange(t.Context(), c, repoOf(r), blob, i*1000, 1000, 0)
			if err != nil || !bytes.Equal(b, data[i*1000:(i+1)*1000]) {
				t.Errorf("reader %d: %d bytes, %v", i, len(b), err)
			}
		})
	}
	for n := 0; n < 3; n, _ = r.Count() { // probes
		time.Sleep(10 * time.Millisecond)
	}
	failed, _ := r.Count()
	back()
	all.Wait()
	if n, _ := r.Count(); failed > 8 || n > readers+failed+5 {
		t.Errorf("%d requests while it was away, %d with those of %d readers after it", failed, n, readers)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(told) != 2 || !told[0].Away || told[1].Away {
		t.Errorf("got events %+v, want one away and one back", told)
	}
}

func ctxOf(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// A reader that is killed while its host is away and others probe it comes back at once.
func TestKilledWhileAway(t *testing.T) {
	t.Parallel()
	r := registrytest.Start(t, registrytest.Options{})
	blob := r.PutBlob("team/app", noise(10))
	r.Inject(registrytest.Any, -1, registrytest.Reset(-1))
	c := newClient(t, Options{Wait: time.Hour})
	ctx, kill := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if _, err := readRange(ctx, c, repoOf(r), blob, 0, 10, 0); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v, want the context's error", err)
			}
		})
	}
	for n := 0; n < 5; n, _ = r.Count() {
		time.Sleep(10 * time.Millisecond)
	}
	kill()
	all.Wait()
	for _, registry := range c.registries {
		for _, h := range registry.hosts {
			if h.inFlight != 0 {
				t.Errorf("%d requests in flight are left", h.inFlight)
			}
		}
	}
}

func wrong(body io.ReadCloser, off, n int64) { body.(interface{ Wrong(off, n int64) }).Wrong(off, n) }

// Of a range that several hosts have served, the one whose bytes are wrong is told.
func TestWrongBytesOfOneHost(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		off, n        int64 // that are wrong
		mirror, other bool  // is told
	}{
		"the first's": {off: 100, n: 200, mirror: true},
		"the last's":  {off: 300, n: 200, other: true},
		"either's":    {off: 299, n: 2},
	} {
		t.Run(name, func(t *testing.T) {
			mirror, r := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
			data := noise(1000)
			mirror.PutBlob("team/app", data)
			r.PutBlob("team/app", data)
			mirror.Inject(registrytest.Any, -1, registrytest.Reset(200))
			toml := fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\"]\n", r.URL(), mirror.URL())
			c1 := newClient(t, Options{HostsDir: hostsDir(t, r.Host(), toml)})
			body, err := c1.ReadRange(t.Context(), repoOf(r), digest.FromBytes(data), 100, 900, 0)
			if err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(body); err != nil || !bytes.Equal(b, data[100:]) {
				t.Fatalf("read %d bytes, %v", len(b), err)
			}
			body.Close()
			wrong(body, c.off, c.n)
			for _, h := range c1.Hosts() {
				want := h.Host == mirror.Host() && c.mirror || h.Host == r.Host() && c.other
				if got := h.Wrong.After(time.Now()); got != want {
					t.Errorf("%+v: told: %v, want %v", h, got, want)
				}
			}
		})
	}
}

// A mirror that gave wrong bytes is asked after the others for a while, for other blobs too.
func TestWrongMirrorIsAskedLess(t *testing.T) {
	t.Parallel()
	mirror, r := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
	data := noise(1000)
	other := noise(500)
	for _, x := range []*registrytest.Registry{mirror, r} {
		x.PutBlob("team/app", data)
		x.PutBlob("team/app", other)
	}
	mirror.Inject(registrytest.Any, -1, registrytest.Flip(5))
	told := make(chan HostStatus, 10)
	toml := fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\"]\n", r.URL(), mirror.URL())
	c := newClient(t, Options{HostsDir: hostsDir(t, r.Host(), toml), OnHost: func(s HostStatus) { told <- s }})
	body, err := c.ReadRange(t.Context(), repoOf(r), digest.FromBytes(data), 0, 1000, 0)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(body)
	if err != nil || bytes.Equal(b, data) {
		t.Fatalf("the mirror gave %d right bytes, %v", len(b), err)
	}
	body.Close()
	wrong(body, 0, 1000)
	wrong(body, 5, 1)
	mirror.Reset()
	if b, err := readRange(t.Context(), c, repoOf(r), digest.FromBytes(other), 0, 500, 0); err != nil || !bytes.Equal(b, other) {
		t.Errorf("got %d bytes, %v", len(b), err)
	}
	wantRequests(t, mirror, 0)
	if s := <-told; s.Host != mirror.Host() || !s.Wrong.After(time.Now()) || len(told) > 0 {
		t.Errorf("got event %+v and %d more, want one of the mirror", s, len(told))
	}
	// When the others are away, it is better than none: whoever reads verifies.
	r.Inject(registrytest.Any, -1, registrytest.Reset(-1))
	if _, err := readRange(t.Context(), c, repoOf(r), digest.FromBytes(other), 0, 500, 0); err != nil {
		t.Error(err)
	}
}

// Bytes that prove wrong are asked for again, from the other hosts first, from a single one after pauses, until these add up to the budget.
func TestWrongBytesAreAskedForAgain(t *testing.T) {
	t.Parallel()
	data := noise(1000)
	read := func(t *testing.T, c *Client, repo Repository, try int) (right bool) {
		t.Helper()
		body, err := c.ReadRange(t.Context(), repo, digest.FromBytes(data), 0, 1000, try)
		if err != nil {
			t.Fatalf("try %d: %v", try, err)
		}
		defer body.Close()
		b, err := io.ReadAll(body)
		if err != nil {
			t.Fatalf("try %d: %v", try, err)
		}
		if right = bytes.Equal(b, data); !right {
			wrong(body, 0, 1000)
		}
		return right
	}
	t.Run("one host", func(t *testing.T) {
		r := registrytest.Start(t, registrytest.Options{})
		r.PutBlob("team/app", data)
		r.Inject(registrytest.Blobs, 4, registrytest.Flip(5))
		c := newClient(t, Options{Budget: 2 * time.Second})
		begin := time.Now()
		for try := range 4 {
			if read(t, c, repoOf(r), try) {
				t.Errorf("try %d is right", try)
			}
		}
		if !read(t, c, repoOf(r), 4) {
			t.Error("try 4 is wrong, too")
		}
		if took := time.Since(begin); took < firstPause+2*firstPause+4*firstPause {
			t.Errorf("five tries without pauses: %v", took)
		}
		if _, err := c.ReadRange(t.Context(), repoOf(r), digest.FromBytes(data), 0, 1000, 6); err == nil { // 0.1, 0.2, 0.4, 0.8, 1.6 s
			t.Error("the pauses up to try 6 are longer than the budget, and there is no error")
		}
		wantRequests(t, r, 5)
	})
	t.Run("two hosts", func(t *testing.T) {
		mirror, r := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
		for _, x := range []*registrytest.Registry{mirror, r} {
			x.PutBlob("team/app", data)
		}
		mirror.Inject(registrytest.Any, -1, registrytest.Flip(5))
		r.Inject(registrytest.Any, 1, registrytest.Flip(5))
		toml := fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\"]\n", r.URL(), mirror.URL())
		c := newClient(t, Options{HostsDir: hostsDir(t, r.Host(), toml)})
		right := 0
		for try := range 4 { // the mirror, the registry, and again
			if read(t, c, repoOf(r), try) {
				right++
			}
		}
		wantRequests(t, mirror, 2)
		wantRequests(t, r, 2)
		if right != 1 {
			t.Errorf("%d answers were right, want the registry's second", right)
		}
	})
}

package registryclient

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// A host that ignores Range is good enough for what lies at the beginning, and no more of the blob than that is taken from it.
func TestReadRangeIgnored(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	data := noise(8 << 20)
	blob := r.PutBlob("team/app", data)
	r.Inject(registrytest.Blobs, -1, registrytest.IgnoreRange())
	c := newClient(t, Options{})
	b, err := readRange(t.Context(), c, repoOf(r), blob, 1000, 5000, 0)
	if err != nil || !bytes.Equal(b, data[1000:6000]) {
		t.Errorf("got %d bytes, %v", len(b), err)
	}
	wantRequests(t, r, 1)
	if got := c.Stats().Bytes; got != 6000 {
		t.Errorf("read %d bytes of the answer, want 6000", got)
	}
}

// Who has read from the start goes on from such a host, too, after the connection broke.
func TestReadRangeIgnoredGoesOn(t *testing.T) {
	t.Parallel()
	r := registrytest.Start(t, registrytest.Options{})
	data := noise(8 << 20)
	blob := r.PutBlob("team/app", data)
	r.Inject(func(q *http.Request) bool {
		return q.Header.Get("Range") != "" && q.Header.Get("Range") != "bytes=0-8388607"
	}, -1, registrytest.IgnoreRange())
	r.Inject(registrytest.Blobs, 1, registrytest.Reset(5<<20))
	c := newClient(t, Options{})
	b, err := readRange(t.Context(), c, repoOf(r), blob, 0, int64(len(data)), 0)
	if err != nil || !bytes.Equal(b, data) {
		t.Errorf("got %d bytes, %v", len(b), err)
	}
	wantRequests(t, r, 2)
}

// What is skipped is no progress: a host that breaks off before it comes to what was asked for uses up the budget.
func TestReadRangeSkippedForEver(t *testing.T) {
	t.Parallel()
	r := registrytest.Start(t, registrytest.Options{})
	blob := r.PutBlob("team/app", noise(maxSkip))
	fault := func(r *registrytest.Registry, next http.Handler) http.Handler {
		return registrytest.IgnoreRange()(r, registrytest.Reset(4*renewBytes)(r, next))
	}
	r.Inject(registrytest.Blobs, -1, fault)
	c := newClient(t, Options{Budget: 600 * time.Millisecond})
	if b, err := readRange(ctxOf(t, 30*time.Second), c, repoOf(r), blob, 5*renewBytes, 10, 0); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %d bytes, %v", len(b), err)
	}
}

// breakOffLater ignores ranges and breaks off, each time step bytes after the time before.
func breakOffLater(step int64) registrytest.Fault {
	var times atomic.Int64
	return func(r *registrytest.Registry, next http.Handler) http.Handler {
		return registrytest.IgnoreRange()(r, registrytest.Reset(step*times.Add(1))(r, next))
	}
}

// A host that ignores Range and breaks off again and again sends the square of what is wanted: that has an end, and another host is not affected.
func TestReadRangeIgnoredAndBreaksOff(t *testing.T) {
	t.Parallel()
	bad, good := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
	data := noise(12 << 20)
	size := int64(len(data))
	blob := bad.PutBlob("team/app", data)
	good.PutBlob("team/app", data)
	remove := bad.Inject(registrytest.Blobs, -1, breakOffLater(512<<10))
	c := newClient(t, Options{})
	b, err := readRange(t.Context(), c, repoOf(bad), blob, 0, size, 0)
	if !errors.Is(err, ErrNoRanges) || !bytes.Equal(b, data[:len(b)]) {
		t.Errorf("got %d bytes, %v, want an error", len(b), err)
	}
	if got, most := c.Stats().Bytes, maxResend*(maxSkip+size)+size; got > most {
		t.Errorf("took %d bytes for a blob of %d, want at most %d", got, size, most)
	}

	remove()
	bad.Inject(registrytest.Blobs, -1, breakOffLater(512<<10))
	toml := fmt.Sprintf("server = %q\n[host.%q]\n", good.URL(), bad.URL())
	c = newClient(t, Options{HostsDir: hostsDir(t, domain, toml)})
	b, err = readRange(t.Context(), c, domain+"/team/app", blob, 0, size, 0)
	if err != nil || !bytes.Equal(b, data) {
		t.Errorf("with another host: got %d bytes, %v", len(b), err)
	}
	if got := c.Stats().Bytes; got > size+maxSkip {
		t.Errorf("with another host: took %d bytes for %d", got, size)
	}
}

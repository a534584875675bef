package registryclient

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// A mirror that was quick and then answers nothing does not keep the reader waiting: the registry is asked too. That is no failure of the
// mirror, and costs one request in twenty at most.
func TestHedge(t *testing.T) {
	t.Parallel()
	mirror, r := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
	data := noise(100_000)
	blob := r.PutBlob("team/app", data)
	mirror.PutBlob("team/app", data)
	toml := fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\"]\n", r.URL(), mirror.URL())
	// So patient that without a second request the test would run into go test's own limit.
	const patience = 1 << 42
	c := newClient(t, Options{HostsDir: hostsDir(t, r.Host(), toml), Budget: patience, Wait: patience, Stall: patience})
	read := func(i int64) {
		t.Helper()
		b, err := readRange(t.Context(), c, repoOf(r), blob, i*100, 100, 0)
		if err != nil || !bytes.Equal(b, data[i*100:i*100+100]) {
			t.Errorf("read %d: %d bytes, %v", i, len(b), err)
		}
	}
	const before = 100
	for i := range int64(before) {
		read(i)
	}
	usual, _ := r.Count() // of hiccups
	if usual > before/hedgeShare {
		t.Errorf("%d second requests for %d reads of a mirror that is quick", usual, before)
	}
	c.hedges = hedgeBurst * hedgeShare // as after more reads
	r.Reset()
	silent := mirror.Inject(registrytest.Any, -1, registrytest.Stall(-1))
	for i := range int64(5) {
		read(i)
	}
	wantRequests(t, r, 5)
	silent()
	mirror.Reset()
	read(7)
	if n, _ := mirror.Count(); n == 0 {
		t.Error("the mirror was not asked again")
	}
	for _, h := range c.Hosts() {
		if h.Away {
			t.Errorf("%+v is away", h)
		}
	}
	for _, registry := range c.registries {
		for _, h := range registry.hosts {
			if h.inFlight != 0 {
				t.Errorf("%s has %d requests in flight", h.Host, h.inFlight)
			}
		}
	}
}

// Second requests stay within their share, however slow a host is.
func TestHedgeShare(t *testing.T) {
	c := newClient(t, Options{})
	sent := 0
	for range 10_000 {
		c.earnHedge()
		if c.spendHedge() {
			sent++
		}
	}
	if sent != 10_000/hedgeShare {
		t.Errorf("%d second requests for 10000 reads", sent)
	}
	for range 10_000 {
		c.earnHedge()
	}
	for sent = 0; c.spendHedge(); sent++ {
	}
	if sent != hedgeBurst {
		t.Errorf("%d second requests at once, want %d", sent, hedgeBurst)
	}
}

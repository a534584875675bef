package lagproxy

import (
	"bytes"
	"net/http"
	"testing"
	"time"
)

// send returns when the last of n bytes has left a sender that always has some, over a link without a limit.
func send(w *window, now time.Time, n int64) time.Time {
	for n > 0 {
		room, until := w.room(now)
		if room <= 0 {
			now = until
			continue
		}
		sent := min(room, n, segmentSize)
		w.sent(now, now, sent)
		n -= sent
	}
	return now
}

func TestWindow(t *testing.T) {
	const rtt = 20 * time.Millisecond
	start := time.Unix(1e9, 0)
	for _, c := range []struct {
		size  int64
		waits time.Duration // for acknowledgements: 14,600 bytes, then twice as many in each
	}{{10_000, 0}, {14_600, 0}, {20_000, 1}, {64 << 10, 2}, {256 << 10, 4}, {1 << 20, 6}, {4 << 20, 8}} {
		w := newWindow(Link{RTT: rtt, SlowStart: true})
		if got := send(w, start, c.size).Sub(start); got != c.waits*rtt {
			t.Errorf("%d bytes have left after %v, want %v", c.size, got, c.waits*rtt)
		}
	}
	if got := send(newWindow(Link{RTT: rtt}), start, 4<<20); got != start {
		t.Errorf("without slow start 4 MiB have left after %v", got.Sub(start))
	}
}

// A connection that was used keeps its window for a while, and one that had little to send does not widen it.
func TestWindowWhenIdle(t *testing.T) {
	const rtt, size = 20 * time.Millisecond, 256 << 10
	for _, c := range []struct {
		idle  time.Duration
		waits time.Duration
	}{{2 * rtt, 1}, {2*(rtt+leastTimeout) + rtt, 2}, {10 * time.Second, 4}} {
		w := newWindow(Link{RTT: rtt, SlowStart: true})
		now := send(w, time.Unix(1e9, 0), size).Add(c.idle)
		if got := send(w, now, size).Sub(now); got != c.waits*rtt {
			t.Errorf("%v after 256 KiB, the same again has left after %v, want %v", c.idle, got, c.waits*rtt)
		}
	}
	w := newWindow(Link{RTT: rtt, SlowStart: true})
	now := time.Unix(1e9, 0)
	for range 100 {
		now = send(w, now, 1000).Add(rtt)
	}
	if got := send(w, now, size).Sub(now); got != 4*rtt {
		t.Errorf("after small requests 256 KiB have left after %v, want %v", got, 4*rtt)
	}
}

func TestSlowStart(t *testing.T) {
	const rtt = 20 * time.Millisecond
	body := bytes.Repeat([]byte("x"), 256<<10)
	p, c := serve(t, func(w http.ResponseWriter, r *http.Request) { w.Write(body) }, Link{RTT: rtt, SlowStart: true})
	start := time.Now()
	if got := get(t, c, "http://"+p.Addr()); !bytes.Equal(got, body) {
		t.Error("the body was changed")
	}
	if got, want := time.Since(start), 6*rtt; got < want { // the connection's, the request's, and four waits
		t.Errorf("256 KiB over a new connection took %v, want at least %v", got, want)
	}
}

func TestBandwidthOfAConnection(t *testing.T) {
	const size, rate = 256 << 10, 2 << 20
	body := bytes.Repeat([]byte("x"), size)
	p, c := serve(t, func(w http.ResponseWriter, r *http.Request) { w.Write(body) }, Link{Bandwidth: 100 * rate, Connection: rate})
	start := time.Now()
	get(t, c, "http://"+p.Addr())
	if got, want := time.Since(start), time.Duration(size)*time.Second/rate-burst; got < want {
		t.Errorf("one connection took %v, want at least %v", got, want)
	}
}

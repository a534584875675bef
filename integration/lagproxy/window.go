package lagproxy

import "time"

const (
	// initialWindow is what a connection may send at first: ten segments of an Ethernet (RFC 6928).
	initialWindow = 10 * 1460
	maxWindow     = inFlight * segmentSize
	// leastTimeout is the least of Linux's retransmission timeout less the round trip (TCP_RTO_MIN). A connection that has sent nothing for that
	// long has its window halved, and so on for each further timeout (tcp_slow_start_after_idle).
	leastTimeout = 200 * time.Millisecond
)

// window is TCP's congestion window of one direction of a connection, in slow start, which without loss never ends: what is acknowledged comes on top, as
// long as the window was what bounded the sender.
type window struct {
	off    bool
	rtt    time.Duration
	size   int64 // bytes that may be on their way
	flying int64 // bytes that are
	acks   []ack // by time
	full   int   // of them, what was on its way when there was no room for more
	last   time.Time
}

type ack struct {
	due time.Time
	n   int64
}

func newWindow(l Link) *window {
	return &window{off: !l.SlowStart, rtt: l.RTT, size: initialWindow}
}

// room returns how many bytes may be sent now; if none, when to ask again.
func (w *window) room(now time.Time) (n int64, until time.Time) {
	if w.off {
		return segmentSize, now
	}
	for len(w.acks) > 0 && !w.acks[0].due.After(now) {
		a := w.acks[0]
		w.acks = w.acks[1:]
		w.flying -= a.n
		if w.full > 0 {
			w.full--
			w.size = min(w.size+a.n, maxWindow)
		}
	}
	if w.flying >= w.size {
		w.full = len(w.acks)
		return 0, w.acks[0].due
	}
	return w.size - w.flying, now
}

// sent notes that n bytes were given to the link now, the last of which has left at left.
func (w *window) sent(now, left time.Time, n int64) {
	if w.off {
		return
	}
	w.room(now) // it may have been idle since
	if timeout := w.rtt + leastTimeout; !w.last.IsZero() && w.flying == 0 {
		for idle := now.Sub(w.last) - timeout; idle > 0 && w.size > initialWindow; idle -= timeout {
			w.size = max(w.size/2, initialWindow)
		}
	}
	w.flying += n
	w.acks = append(w.acks, ack{left.Add(w.rtt), n})
	w.last = left
}

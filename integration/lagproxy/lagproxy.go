// Package lagproxy is a TCP proxy that makes a loopback connection behave like a link to a far registry: latency, a
// bandwidth that all connections share, one that each has for itself, TCP's slow start, and counters of what crossed it.
//
// Each direction is one pipe that all connections share: a segment occupies it for size/bandwidth, in the order of arrival, and reaches the other
// side half a round trip after it has left. A connection costs one round trip more, for TCP's handshake. What the two sides say in TLS crosses the
// link as everything does. There is no loss and no congestion by others, so that a figure measured through it flatters nobody but is a little better than the real link.
package lagproxy

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// Link describes the link. Zero values are no delay and no limit.
type Link struct {
	RTT        time.Duration
	Bandwidth  int64 // bytes per second in each direction
	Connection int64 // bytes per second of one connection in each direction
	SlowStart  bool  // a connection begins with ten segments each round trip, and doubles
}

// Count is what has crossed the link since the proxy began.
type Count struct {
	Requests    int64 // HTTP/1 requests; zero for what is not HTTP
	Down, Up    int64 // bytes from the target and to it
	Connections int64 // accepted
}

// Sub returns c - o.
func (c Count) Sub(o Count) Count {
	return Count{c.Requests - o.Requests, c.Down - o.Down, c.Up - o.Up, c.Connections - o.Connections}
}

// Proxy forwards connections to one target.
type Proxy struct {
	link     Link
	network  string
	target   string
	listener net.Listener
	ctx      context.Context // ends with Close; for the connections, which have no other owner
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	down, up pipe

	requests, connections atomic.Int64
}

// Listen starts a proxy on a free port of 127.0.0.1 for target (network is "tcp" or "unix"). Close ends it.
func Listen(network, target string, link Link) (*Proxy, error) {
	return ListenOn("127.0.0.1:0", network, target, link)
}

// ListenOn is Listen on an address: that of a closed proxy, whose target is to be there again.
func ListenOn(address, network, target string, link Link) (*Proxy, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	p := &Proxy{link: link, network: network, target: target, listener: l}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.down.bandwidth, p.up.bandwidth = link.Bandwidth, link.Bandwidth
	p.wg.Go(p.accept)
	return p, nil
}

// Addr is the proxy's address, "127.0.0.1:port".
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Count returns the counters.
func (p *Proxy) Count() Count {
	return Count{p.requests.Load(), p.down.bytes.Load(), p.up.bytes.Load(), p.connections.Load()}
}

// Close ends all connections and waits for them.
func (p *Proxy) Close() error {
	p.cancel()
	err := p.listener.Close()
	p.wg.Wait()
	return err
}

func (p *Proxy) accept() {
	for {
		c, err := p.listener.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue
		}
		p.connections.Add(1)
		p.wg.Go(func() { p.serve(c) })
	}
}

// serve carries one connection until both directions have ended.
func (p *Proxy) serve(client net.Conn) {
	defer client.Close()
	server, err := net.Dial(p.network, p.target)
	if err != nil {
		return
	}
	defer server.Close()
	stop := context.AfterFunc(p.ctx, func() { client.Close(); server.Close() })
	defer stop()
	if !wait(p.ctx, time.Now().Add(p.link.RTT)) {
		return
	}

	seen, feed := io.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() { p.countRequests(seen) })
	wg.Go(func() {
		p.carry(&p.up, server, io.TeeReader(client, followed{feed}))
		feed.Close()
		closeWrite(server)
	})
	wg.Go(func() {
		p.carry(&p.down, client, server)
		closeWrite(client)
	})
	wg.Wait()
}

// closeWrite passes the end of one direction on; the other may still carry an answer.
func closeWrite(c net.Conn) {
	if h, ok := c.(interface{ CloseWrite() error }); ok {
		h.CloseWrite()
	}
}

// followed is a pipe whose Write returns when the reader wants more: it has counted what was written.
type followed struct{ *io.PipeWriter }

func (f followed) Write(b []byte) (int, error) {
	n, err := f.PipeWriter.Write(b)
	if err == nil {
		_, err = f.PipeWriter.Write(nil) // is read by the next Read
	}
	return n, err
}

// countRequests follows the client's half of a connection as HTTP/1, as far as it is that.
func (p *Proxy) countRequests(r io.Reader) {
	b := bufio.NewReader(r)
	for {
		q, err := http.ReadRequest(b)
		if err != nil {
			break
		}
		p.requests.Add(1)
		if _, err := io.Copy(io.Discard, q.Body); err != nil {
			break
		}
	}
	io.Copy(io.Discard, b)
}

// segment is a run of bytes under way, due at the other side at a time.
type segment struct {
	due time.Time
	b   []byte
}

const (
	segmentSize = 16 << 10
	// inFlight bounds the segments of a connection that have left and not arrived: 4 MiB, more than any bandwidth-delay product of interest.
	inFlight = 256
)

// carry moves one direction of a connection through its pipe until either side ends.
func (p *Proxy) carry(line *pipe, dst io.Writer, src io.Reader) {
	under := make(chan segment, inFlight)
	var failed atomic.Bool
	done := make(chan struct{})
	go func() {
		defer close(done)
		for s := range under {
			if failed.Load() {
				continue // drain, so that the reading half never blocks
			}
			if !wait(p.ctx, s.due) {
				failed.Store(true)
			} else if _, err := dst.Write(s.b); err != nil {
				failed.Store(true)
			}
		}
	}()
	own := pipe{bandwidth: p.link.Connection}
	congestion := newWindow(p.link)
	at := time.Now() // in the link's time, which a busy machine does not delay: see onTime
	for !failed.Load() {
		room, until := congestion.room(time.Now())
		if room <= 0 {
			if !wait(p.ctx, until) {
				break
			}
			at = until
			continue
		}
		b := make([]byte, min(segmentSize, room))
		begin := time.Now()
		n, err := src.Read(b)
		if n > 0 {
			at = onTime(at, begin, time.Now())
			left := later(line.occupy(at, n), own.occupy(at, n))
			congestion.sent(at, left, int64(n))
			under <- segment{left.Add(p.link.RTT / 2), b[:n]}
			if !wait(p.ctx, left) {
				break
			}
			at = left
		}
		if err != nil {
			break
		}
	}
	close(under)
	<-done
}

const (
	// burst is how far the link may catch up after the proxy was not scheduled in time: without it a busy machine would be a slower link.
	burst = 20 * time.Millisecond
	// prompt is how long a read takes at most that found its data waiting.
	prompt = 500 * time.Microsecond
)

// onTime returns when, in the link's time, the data came that a read has brought. The sender was last busy until at. Data that was waiting follows upon that,
// however late the proxy comes to read it; an idle link has no time to make up for.
func onTime(at, begin, end time.Time) time.Time {
	if end.Sub(begin) > prompt {
		return end
	}
	return later(at, end.Add(-burst))
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// pipe is one direction of the link, shared by all connections.
type pipe struct {
	bandwidth int64
	bytes     atomic.Int64

	mu   sync.Mutex
	free time.Time // when the last byte accepted so far has left
}

// occupy takes the pipe for n bytes that are there at a time, and returns when the last of them has left.
func (l *pipe) occupy(at time.Time, n int) time.Time {
	l.bytes.Add(int64(n))
	if l.bandwidth <= 0 {
		return at
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.free = later(l.free, at).Add(time.Duration(int64(n) * int64(time.Second) / l.bandwidth))
	return l.free
}

// wait sleeps until t; false means that ctx ended first.
func wait(ctx context.Context, t time.Time) bool {
	d := time.Until(t)
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

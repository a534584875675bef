package lagproxy

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func serve(t *testing.T, h http.HandlerFunc, l Link) (*Proxy, *http.Client) {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	p, err := Listen("tcp", s.Listener.Addr().String(), l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	c := &http.Client{Transport: &http.Transport{}}
	t.Cleanup(c.CloseIdleConnections)
	return p, c
}

func get(t *testing.T, c *http.Client, url string) []byte {
	t.Helper()
	r, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Bounds below are lower bounds only, because a busy machine makes everything slower but nothing faster.
func TestLatency(t *testing.T) {
	const rtt = 40 * time.Millisecond
	p, c := serve(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello") }, Link{RTT: rtt, Bandwidth: 1 << 30, Connection: 1 << 30, SlowStart: true})
	for i, want := range []time.Duration{2 * rtt, rtt, rtt} { // the first one connects too
		start := time.Now()
		if got := string(get(t, c, "http://"+p.Addr())); got != "hello" {
			t.Fatalf("got %q", got)
		}
		if got := time.Since(start); got < want {
			t.Errorf("request %d took %v, want at least %v", i, got, want)
		}
	}
	if got, want := p.Count().Connections, int64(1); got != want {
		t.Errorf("connections = %d, want %d", got, want)
	}
}

func TestBandwidthIsShared(t *testing.T) {
	const size, rate = 256 << 10, 4 << 20
	body := bytes.Repeat([]byte("x"), size)
	p, c := serve(t, func(w http.ResponseWriter, r *http.Request) { w.Write(body) }, Link{Bandwidth: rate})
	start := time.Now()
	done := make(chan []byte)
	for range 4 {
		go func() { done <- get(t, c, "http://"+p.Addr()) }()
	}
	for range 4 {
		if got := <-done; !bytes.Equal(got, body) {
			t.Error("the body was changed")
		}
	}
	if got, want := time.Since(start), time.Duration(4*size)*time.Second/rate-burst; got < want {
		t.Errorf("four bodies took %v, want at least %v", got, want)
	}
}

func TestCount(t *testing.T) {
	p, c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		w.Write(b)
	}, Link{})
	for range 3 {
		get(t, c, "http://"+p.Addr())
	}
	before := p.Count()
	if before.Requests != 3 {
		t.Errorf("requests = %d, want 3", before.Requests)
	}
	r, err := c.Post("http://"+p.Addr(), "text/plain", strings.NewReader(strings.Repeat("y", 10_000)))
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, r.Body)
	r.Body.Close()
	got := p.Count().Sub(before)
	if got.Requests != 1 || got.Up < 10_000 || got.Down < 10_000 || got.Up > 11_000 || got.Down > 11_000 {
		t.Errorf("a post of 10,000 bytes that echoes counted as %+v", got)
	}
}

func TestNotHTTP(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		io.Copy(c, c) // until the client ends its half
		c.Close()
	}()
	p, err := Listen("tcp", l.Addr().String(), Link{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	c, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	want := bytes.Repeat([]byte{0, 1, 2, '\n'}, 10_000)
	go func() {
		c.Write(want)
		c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("got %d bytes, %v; want %d", len(got), err, len(want))
	}
	if n := p.Count().Requests; n != 0 {
		t.Errorf("requests = %d, want 0", n)
	}
}

func TestCloseEndsConnections(t *testing.T) {
	stall := make(chan struct{})
	p, c := serve(t, func(w http.ResponseWriter, r *http.Request) { <-stall }, Link{})
	defer close(stall)
	failed := make(chan error)
	go func() {
		_, err := c.Get("http://" + p.Addr())
		failed <- err
	}()
	for p.Count().Requests == 0 {
		time.Sleep(time.Millisecond)
	}
	p.Close()
	if err := <-failed; err == nil {
		t.Error("a request over a closed proxy was answered")
	}
}

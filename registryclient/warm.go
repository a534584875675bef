package registryclient

import (
	"context"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"sync"
	"time"
)

const (
	// spareConns is how many connections are dialled beside the first one to a place that was not asked lately, when a pull begins. A pull asks for
	// its manifests two at a time and then for all indexes at once: those of most images then find a connection, which would otherwise cost them two
	// round trips. More would cost registries handshakes that are of no use.
	spareConns = 6
	maxPlaces  = 64
)

// place is where requests of a host go, itself or a blob store, as far as connections to it are concerned.
type place struct {
	asked    time.Time
	together bool // it speaks HTTP/2: one connection carries all
}

// contact notes that to is about to be asked. It reports whether connections for more requests are worth dialling.
func (h *host) contact(to *url.URL) (cold bool) {
	key := to.Scheme + "://" + to.Host
	now := time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.places[key]
	if p == nil {
		if h.places == nil || len(h.places) == maxPlaces {
			h.places = map[string]*place{}
		}
		p = new(place)
		h.places[key] = p
	}
	cold = now.Sub(p.asked) > idleTimeout && !p.together
	p.asked = now
	return cold
}

// answeredBy notes how resp, an answer from to, has come.
func (h *host) answeredBy(to *url.URL, resp *http.Response) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p := h.places[to.Scheme+"://"+to.Host]; p != nil {
		p.together = resp.ProtoMajor == 2
	}
}

// dialSpares begins to dial connections to where to is, and does not wait for them; running gets what goes on. net/http dials for a request and
// goes on when the request is cancelled meanwhile, since the next one may use the connection: so it gets requests that are, when all of them are
// about to dial and before one does. None is ever sent: what gets a connection that another request has left idle just now, closes it.
func (h *host) dialSpares(ctx context.Context, running *sync.WaitGroup, to *url.URL) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var begun sync.WaitGroup
	begun.Add(spareConns)
	for range spareConns {
		running.Go(func() {
			begin := sync.OnceFunc(begun.Done)
			defer begin()
			ctx := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
				DNSStart: func(httptrace.DNSStartInfo) { begin() },
				ConnectStart: func(string, string) {
					begin()
					<-ctx.Done()
				},
				GotConn: func(c httptrace.GotConnInfo) { c.Conn.Close() },
			})
			u := &url.URL{Scheme: to.Scheme, Host: to.Host, Path: "/"}
			req := (&http.Request{Method: http.MethodHead, URL: u, Host: u.Host, Header: http.Header{}}).WithContext(ctx)
			if resp, err := h.Client.Transport.RoundTrip(req); err == nil {
				resp.Body.Close()
			}
		})
	}
	begun.Wait()
}

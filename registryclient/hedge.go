package registryclient

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"time"
)

const (
	hedgeSamples = 64                    // of a host's times to the first byte that are remembered
	hedgeMin     = 16                    // and how many it takes to know the usual time
	hedgeFloor   = 10 * time.Millisecond // a usual time below it counts as this
	hedgeShare   = 20                    // one request in so many may be a second one
	hedgeBurst   = 8                     // second ones in a row, after a time without
)

// delays are a host's last times to the first byte of a range.
type delays struct {
	ring [hedgeSamples]time.Duration
	n    int // ever noted
}

func (d *delays) note(took time.Duration) {
	d.ring[d.n%hedgeSamples] = took
	d.n++
}

// usual returns the 95th percentile, or 0 if too little is known.
func (d *delays) usual() time.Duration {
	if d.n < hedgeMin {
		return 0
	}
	s := slices.Clone(d.ring[:min(d.n, hedgeSamples)])
	slices.Sort(s)
	return max(s[len(s)*95/100], hedgeFloor)
}

func (h *host) noteDelay(took time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.delays.note(took)
}

func (h *host) usualDelay() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.delays.usual()
}

// earnHedge and spendHedge keep account of second requests: each first one earns a part of one.
func (c *Client) earnHedge() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hedges = min(c.hedges+1, hedgeBurst*hedgeShare)
}

func (c *Client) spendHedge() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.hedges < hedgeShare {
		return false
	}
	c.hedges -= hedgeShare
	return true
}

// spare returns a healthy host of the call besides h, or nil.
func (k *call) spare(h *host) *candidate {
	now := time.Now()
	for _, c := range k.asked {
		down, hold := c.state(now)
		poll, _ := c.busy(now)
		if c.host != h && !c.out && !now.Before(c.next) && !down && hold == 0 && poll == 0 {
			return c
		}
	}
	return nil
}

// first sends q to h, and when that takes longer than usual to another host too, if there is one. The first good answer counts, and from is whose
// it is; the error is h's.
func (k *call) first(h *host, q question) (from *candidate, resp *http.Response, err error) {
	k.c.earnHedge()
	usual, spare := h.usualDelay(), k.spare(h)
	if usual == 0 || spare == nil {
		start := time.Now()
		resp, err := k.get(h, q)
		if err == nil {
			h.noteDelay(time.Since(start))
		}
		return nil, resp, err
	}
	type answer struct {
		from *candidate // nil is h
		resp *http.Response
		err  error
	}
	start, left := time.Now(), k.left
	defer func() { k.left -= time.Since(start) }()
	answers := make(chan answer, 2)
	send := func(h *host, from *candidate) context.CancelFunc {
		ctx, cancel := context.WithCancel(k.ctx)
		k.sending.Go(func() {
			begin := time.Now()
			resp, err := k.send(ctx, h, q, left)
			if err == nil {
				h.noteDelay(time.Since(begin))
			}
			answers <- answer{from, resp, err}
		})
		return cancel
	}
	cancels := []context.CancelFunc{send(h, nil)}
	wait := time.NewTimer(usual)
	defer wait.Stop()
	for running := 1; running > 0; {
		select {
		case <-wait.C:
			if k.c.spendHedge() {
				cancels = append(cancels, send(spare.host, spare))
				running++
			}
			continue
		case a := <-answers:
			running--
			if a.err == nil && running > 0 { // the other's is not needed any more
				for i, cancel := range cancels {
					if (i == 0) != (a.from == nil) {
						cancel()
					}
				}
				k.sending.Go(func() {
					if a := <-answers; a.err == nil {
						a.resp.Body.Close()
					}
				})
			}
			switch {
			case a.err == nil:
				return a.from, a.resp, nil
			case a.from == nil:
				err = a.err
			case !errors.Is(a.err, errBusy) && k.ctx.Err() == nil:
				k.failed(spare, a.err)
			}
		}
	}
	return nil, nil, err
}

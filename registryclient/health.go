package registryclient

import (
	"cmp"
	"errors"
	"math/rand/v2"
	"slices"
	"time"
)

const (
	awayAfter  = 3                // failures in a row, without a success between, after which a host is away
	maxProbe   = 3 * time.Second  // between two probes of a host that is away, at most
	maxWindow  = 64               // requests at a time with which a host that came back is as good as new
	wrongLasts = 10 * time.Minute // so long a host that gave wrong answers is asked last
	minPoll    = 20 * time.Millisecond
	maxPoll    = 500 * time.Millisecond
)

// HostStatus is what a Client knows of a host that it has asked.
type HostStatus struct {
	Registry string // whose hosts.toml names it
	Host     string
	Away     bool      // it fails, and is asked by one request at a time
	Since    time.Time // of Away
	Error    string    // why it is away; in OnHost also what else is wrong with it. With neither it is back
	Wrong    time.Time // until then it is asked after the others, because it gave wrong answers; may be past

	// Accepted are the sources of the credentials that it has let in, "anonymous" if it gave a token without any; nil if it asks for none. Not told in OnHost.
	Accepted []string
}

// Hosts returns the hosts that were asked since New, in order.
func (c *Client) Hosts() (list []HostStatus) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.registries {
		for _, h := range r.hosts {
			h.mu.Lock()
			s := h.status()
			h.mu.Unlock()
			s.Accepted = h.auth.sources()
			list = append(list, s)
		}
	}
	slices.SortStableFunc(list, func(a, b HostStatus) int { return cmp.Compare(a.Registry, b.Registry) })
	return list
}

// errBusy: the host is away and another request probes it, or it came back and has as many requests as it may get for now. It was not asked.
var errBusy = errors.New("host is away")

// health is how a host does, over all calls. A host that failed awayAfter times running is away: one request at a time is let through, after
// pauses that grow. When one succeeds, the host is back, and the readers that waited come to it by and by: each success lets one more
// in, so that their number doubles with each round trip, and no more than that.
type health struct {
	away     bool
	since    time.Time
	err      error // why it is away
	probes   int   // failed ones
	probeAt  time.Time
	window   int // requests at a time; 0 is any number
	inFlight int

	wrongUntil time.Time
}

// enter lets one more request to the host through, or not. Each that was let through leaves.
func (h *host) enter(now time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.isBusy(now) {
		return false
	}
	h.inFlight++
	return true
}

func (h *host) leave() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.inFlight--
}

func (h *host) isBusy(now time.Time) bool {
	return h.window > 0 && h.inFlight >= h.window || h.away && now.Before(h.probeAt)
}

// busy returns how long to wait before asking again whether the host can be asked, and why it is away; 0 is not at all.
func (h *host) busy(now time.Time) (poll time.Duration, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.isBusy(now) {
		return 0, nil
	}
	poll = minPoll
	if h.away {
		poll = min(max(now.Sub(h.since)/8, minPoll), maxPoll)
	}
	return poll + rand.N(poll), h.err
}

// fail notes a failure. The caller holds mu. It reports whether the host is away since now.
func (h *host) fail(now time.Time, err error) bool {
	h.window /= 2
	if h.fails >= awayAfter || h.away {
		h.window = 1
	}
	switch {
	case h.away && now.Before(h.probeAt), h.fails < awayAfter: // sent before it was away
		return false
	case !h.away:
		h.away, h.since, h.probes = true, now, 0
	}
	pause := min(firstPause<<min(h.probes, 10), maxProbe)
	h.probeAt = now.Add(pause + rand.N(pause/4+1))
	h.probes++
	h.err = err
	return h.probes == 1
}

// succeed notes a success. The caller holds mu. It reports whether the host is back since now.
func (h *host) succeed() bool {
	if h.window > 0 {
		if h.window++; h.window > maxWindow {
			h.window = 0
		}
	}
	wasAway := h.away
	h.away, h.err = false, nil
	return wasAway
}

// wrong notes that the host answers, and not what it was asked; why says how.
func (h *host) wrong(why string) {
	h.mu.Lock()
	now := time.Now()
	first := !now.Before(h.wrongUntil)
	h.wrongUntil = now.Add(wrongLasts)
	s := h.status()
	s.Error = why
	h.mu.Unlock()
	if first {
		h.tell(s)
	}
}

// status returns what the host is like. The caller holds mu.
func (h *host) status() HostStatus {
	s := HostStatus{Registry: h.registry, Host: h.Host, Away: h.away, Wrong: h.wrongUntil}
	if h.away {
		s.Since, s.Error = h.since, h.err.Error()
	}
	return s
}

func (h *host) tell(s HostStatus) {
	if h.onChange != nil {
		h.onChange(s)
	}
}

package registryclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
)

const (
	firstPause = 100 * time.Millisecond // between two questions to one host; doubles
	maxPause   = 3 * time.Second
	maxRefused = 5                // times that a read asks again when it is denied, after 1, 2, 4, ... s
	maxHold    = 20 * time.Second // a Retry-After beyond this is cut: registries ask for minutes
	renewBytes = 64 << 10         // so much progress makes the budget whole again; less would let a host that drips keep us for ever
)

// call is one operation: the hosts it may ask and what is left of its budget. It belongs to one goroutine.
type call struct {
	c       *Client
	ctx     context.Context
	cancel  context.CancelFunc
	repo    Repository
	name    string       // of the repository below the registry
	asked   []*candidate // in order of preference
	turn    int          // who of them is the first this time
	budget  time.Duration
	left    time.Duration
	sending sync.WaitGroup // requests of first

	reads    bool  // ranges of a blob
	gained   int64 // bytes since the budget was last whole
	skipping bool  // what comes is no gain
}

// candidate is a host and how it has done in this call.
type candidate struct {
	*host
	err      error // the last one
	out      bool  // not to be asked again
	fails    int
	mistakes int       // in a row
	refused  int       // times that it denied access
	next     time.Time // not before
}

// question is a GET below a repository.
type question struct {
	path   string // "manifests/latest"
	query  string
	accept string
	rng    string          // Range
	blob   digest.Digest   // set if it is for a blob: then the place it is redirected to is remembered
	reads  bool            // of its call
	spares *sync.WaitGroup // set if more questions will follow: see warm.go
}

func (c *Client) newCall(ctx context.Context, repo Repository, need docker.HostCapabilities) (*call, error) {
	hosts, name, err := c.hostsOf(repo, need)
	if err != nil {
		return nil, err
	}
	k := &call{c: c, repo: repo, name: name}
	k.allow(c.o.Budget)
	for _, h := range hosts {
		k.asked = append(k.asked, &candidate{host: h})
	}
	k.ctx, k.cancel = context.WithCancel(ctx)
	return k, nil
}

// allow gives the call a budget.
func (k *call) allow(d time.Duration) { k.budget, k.left = d, d }

// end frees what the call holds. Bodies it gave out fail from then on.
func (k *call) end() {
	k.cancel()
	k.sending.Wait()
}

// ask puts a question to the hosts until one answers it: f returns nil. A host that fails for good is asked once, one that fails in a
// way that may pass is asked again, after the others and after a pause. What the last host of the list, which is the registry itself, has
// not, nobody has. The error is ErrNotFound if that is the answer, the context's if it ended, and else the most telling host's.
func (k *call) ask(f func(*host) error) error {
	authority := k.asked[len(k.asked)-1]
	for {
		for _, c := range k.round() {
			err := f(c.host)
			if k.ctx.Err() != nil {
				return k.ended()
			}
			if err == nil {
				return nil
			}
			if errors.Is(err, errBusy) {
				continue
			}
			k.failed(c, err)
			if c == authority && errors.Is(err, ErrNotFound) {
				return k.verdict()
			}
			if k.left <= 0 {
				return k.gaveUp()
			}
		}
		next, ok := k.next()
		if !ok {
			return k.verdict()
		}
		if d := time.Until(next); d >= k.left {
			return k.gaveUp()
		} else if err := k.pause(d); err != nil {
			return err
		}
	}
}

// failed notes a failure for this call and, if it says something of the host's health, for all.
func (k *call) failed(c *candidate, err error) {
	c.err = err
	c.fails++
	var mistake *mistakenError
	if errors.As(err, &mistake) {
		c.worked() // an answer all the same
		c.wrong(mistake.Error())
		c.mistakes++
		c.out = c.mistakes == maxMistakes
		c.next = time.Now().Add(c.pause())
		return
	}
	c.mistakes = 0
	var denied *exhaustedError
	if errors.As(err, &denied) && denied.sources && k.reads {
		c.next = time.Now().Add(c.pause()) // a container waits: its image could be read, and will be when that source is well
		return
	}
	// So it does for a password that was changed at the registry and will be in a moment where the sources have it, and for what else may make a host deny access to
	// what it gave before. Few tries: some registries lock an account that has failed often.
	var status *StatusError
	errors.As(err, &status)
	if errors.Is(err, ErrDenied) && k.reads && c.refused < maxRefused {
		if status != nil {
			c.worked()
		}
		pause := deniedPause(c.refused)
		c.refused++
		c.next = time.Now().Add(pause + rand.N(pause/4+1))
		return
	}
	if !temporary(err) {
		c.out = true
		c.worked()
		return
	}
	// A name that never had an address is most likely misspelt; one that had is missed for the moment. Blobs are read from where something
	// was found, maybe in a former life of the process.
	var dns *net.DNSError
	if errors.As(err, &dns) && dns.IsNotFound && !k.reads && !c.hasWorked() {
		c.out = true
		return
	}
	pause := c.pause()
	var hold time.Duration
	if status != nil {
		hold = min(status.retryAfter, maxHold)
	}
	c.next = time.Now().Add(max(pause, hold))
	c.host.failed(err, hold)
}

// pause is how long not to ask after the last failure.
func (c *candidate) pause() time.Duration {
	pause := failPause(c.fails)
	return pause + rand.N(pause/4+1) // so that a node's readers do not come back all at once
}

// round returns who may be asked now: healthy hosts first, each in order.
func (k *call) round() []*candidate {
	var up, down []*candidate
	now := time.Now()
	for _, c := range slices.Concat(k.asked[k.turn:], k.asked[:k.turn]) {
		isDown, hold := c.state(now)
		if poll, _ := c.busy(now); poll > hold {
			hold = poll
		}
		switch {
		case c.out || hold > 0 || now.Before(c.next):
		case isDown:
			down = append(down, c)
		default:
			up = append(up, c)
		}
	}
	return append(up, down...)
}

// next returns when somebody may be asked again; false if nobody is left.
func (k *call) next() (t time.Time, ok bool) {
	now := time.Now()
	for _, c := range k.asked {
		if c.out {
			continue
		}
		at := now
		_, hold := c.state(now)
		poll, err := c.busy(now)
		if c.err == nil {
			c.err = err
		}
		if hold = max(hold, poll); hold > 0 {
			at = now.Add(hold)
		}
		if c.next.After(at) {
			at = c.next
		}
		if !ok || at.Before(t) {
			t, ok = at, true
		}
	}
	return t, ok
}

func (k *call) pause(d time.Duration) error {
	t := time.NewTimer(max(d, 0))
	defer t.Stop()
	k.left -= d
	select {
	case <-t.C:
		return nil
	case <-k.ctx.Done():
		return k.ended()
	}
}

// ended is the context's error, with what the hosts said until its deadline: whoever gave it wants to know why it was not enough.
func (k *call) ended() error {
	err := k.ctx.Err()
	if err == context.DeadlineExceeded && slices.ContainsFunc(k.asked, func(c *candidate) bool { return c.err != nil }) {
		if told := k.verdict(); !errors.Is(told, ErrNotFound) {
			return fmt.Errorf("%w: %w", err, told)
		}
	}
	return err
}

func (k *call) gaveUp() error {
	return fmt.Errorf("gave up after %v: %w", k.budget, k.verdict())
}

// verdict makes one error of the hosts'. It wraps one of them: the last host's that failed otherwise than by not having it.
func (k *call) verdict() error {
	var told error
	var others []string
	for _, c := range k.asked {
		if c.err != nil && (told == nil || !errors.Is(c.err, ErrNotFound)) {
			told = c.err
		}
	}
	if authority := k.asked[len(k.asked)-1]; errors.Is(authority.err, ErrNotFound) {
		told = authority.err
	}
	for _, c := range k.asked {
		if c.err != nil && c.err != told {
			others = append(others, c.err.Error())
		}
	}
	switch {
	case told == nil: // all were on hold
		told = fmt.Errorf("the hosts of %s asked to wait for longer", k.repo)
	case len(others) > 0:
		told = fmt.Errorf("%w (before: %s)", told, strings.Join(others, "; "))
	}
	return hostsError{told}
}

// get sends q to h. The caller closes the body.
func (k *call) get(h *host, q question) (*http.Response, error) {
	start := time.Now()
	resp, err := k.send(k.ctx, h, q, k.left)
	k.left -= time.Since(start)
	return resp, err
}

// send sends q to h and waits for the answer, at most for left. Several may be sent at a time.
func (k *call) send(ctx context.Context, h *host, q question, left time.Duration) (*http.Response, error) {
	if !h.enter(time.Now()) {
		return nil, errBusy
	}
	a := &attempt{k: k, host: h, leave: sync.OnceFunc(h.leave)}
	a.ctx, a.cancel = context.WithCancelCause(ctx)
	a.timer = time.AfterFunc(left, func() { a.cancel(errSilent) })
	q.reads = k.reads
	resp, err := h.do(a.ctx, k.c, k.name, q)
	a.timer.Stop()
	if err != nil {
		err = a.explain(err)
		a.cancel(nil)
		a.leave()
		return nil, err
	}
	a.body = resp.Body
	resp.Body = a
	return resp, nil
}

// read sends q to h and reads the whole answer, of at most max bytes.
func (k *call) read(h *host, q question, max int64) (http.Header, []byte, error) {
	q.spares = &k.sending // manifests, referrers, configs: the beginning of a pull
	resp, err := k.get(h, q)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, nil, refused("host %s: status %d in answer to a plain GET", h.Host, resp.StatusCode)
	}
	if resp.ContentLength > max {
		return nil, nil, refused("host %s: %d bytes are more than the limit of %d", h.Host, resp.ContentLength, max)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, max+1))
	if err != nil {
		return nil, nil, fmt.Errorf("host %s: read %s: %w", h.Host, q.path, err)
	}
	if int64(len(b)) > max {
		return nil, nil, refused("host %s: more than the limit of %d bytes", h.Host, max)
	}
	h.worked()
	return resp.Header, b, nil
}

// attempt is the body of one answer, read within the limits of its call: no read is silent for longer than Stall, and all that time counts
// against the budget. Time between reads is the caller's own. The timer is set for each read, so that watching costs no goroutine.
type attempt struct {
	k      *call
	host   *host
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
	body   io.ReadCloser
	leave  func()
}

func (a *attempt) Read(p []byte) (int, error) {
	k := a.k
	start := time.Now()
	a.timer.Reset(max(min(k.c.o.Stall, k.left), 0))
	n, err := a.body.Read(p)
	a.timer.Stop()
	k.left -= time.Since(start)
	if !k.skipping {
		k.gained += int64(n)
	}
	if k.gained >= renewBytes {
		k.gained, k.left = 0, k.budget
		a.host.worked()
		for _, c := range k.asked {
			c.fails = 0
		}
	}
	if err != nil && err != io.EOF {
		err = a.explain(err)
	}
	return n, err
}

func (a *attempt) Close() error {
	a.timer.Stop()
	a.cancel(nil)
	a.leave()
	return a.body.Close()
}

// explain returns why a request of this attempt failed, where the cause is ours and not the connection's.
func (a *attempt) explain(err error) error {
	if context.Cause(a.ctx) == errSilent {
		return errSilent
	}
	return err
}

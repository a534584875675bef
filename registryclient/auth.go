package registryclient

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
)

const (
	maxChallenge = 4 << 10 // bytes; containerd's parser takes the square of it
	maxOffers    = 16      // credentials of one source that one request tries: sources are few, and whoever fills one does not keep another from being tried
	// renewAgain is how long a token that has taken the place of one that a 403 met is not replaced for another: within it, a 403 is most likely about something else.
	renewAgain = 30 * time.Second
)

// Credential is what a source offers to be let in with. Without User, Secret is an identity token (OAuth2 refresh token); without both it is anonymous access.
type Credential struct {
	Source string // as users know it: "docker config"
	User   string
	Secret string
}

// String is the source's name, without anything secret.
func (c Credential) String() string {
	if c.Secret == "" {
		return "anonymous"
	}
	return c.Source
}

// Place is where a credential is to be used.
type Place struct {
	Image Repository // as in the image's reference
	// Names are what the repository is called there, most exact first: Image for the registry itself, and, where hosts.toml gives it another address,
	// that too; for a mirror only the mirror's own, "mirror.example.com:5000/library/busybox".
	Names []Repository
	Last  string // the Source that was accepted there last, to be asked first; "" is none
	// Refused is what was offered just now and not accepted: a source that keeps what it has found looks again. The list is not to be changed.
	Refused []Credential
}

// Credentials offers credentials for a place, one after the other until one is accepted; the sequence is not read on then, so what is expensive to
// get comes late. An error is a source's that could not say, and the next is tried; it is told if none is accepted. It is called whenever a token
// has to be had, maybe by many goroutines at once, and ends with ctx. Anonymous access comes last by itself, or where it is offered.
type Credentials func(ctx context.Context, p Place) iter.Seq2[Credential, error]

// authorizer keeps what one host wants to see in Authorization, for each repository: the answer to its first challenge, renewed when it
// has run out or is refused.
//
// Credentials are tried in the order they are offered, the one accepted last before others of its source. One is refused if the token server says so, or the host does with the
// token or password in hand: 401 or 403, and as long as it has not been let in to the repository 404 too, which is how some registries hide what is not for
// everybody. After a 404 anonymous access is not tried: whoever has an account sees what everybody does. When all are refused the answer is the first
// refusal, or the first 404.
//
// The parts (challenges, token requests) are containerd's; its own authorizer is made for a pull and not for a daemon's life: it keeps a failed
// token request as the answer for ever, keeps a token of untold life for ever, and asks for the credentials once.
type authorizer struct {
	h      *host
	c      *Client
	client *http.Client

	mu      sync.Mutex
	grants  map[string]*grant
	served  map[string]Credential // accepted last
	denials map[string]*denial
}

// grant is the right to read one repository, until it turns out to be none. Whoever finds done open waits for it; the fields are set before it is closed and
// not after.
type grant struct {
	done       chan struct{}
	challenge  auth.Challenge
	credential Credential
	value      string    // of the Authorization header
	expires    time.Time // zero is never
	err        error

	late    []Credential // to be tried after others
	sources bool         // as in exhaustedError
	hidden  bool         // one of tried was told 404

	// Guarded by authorizer.mu when done is closed.
	tried    []Credential // and refused, before this one
	notes    []string     // why
	keep     *grant       // what comes back if this comes to nothing; nil is nothing
	accepted bool         // let in at least once
	renewed  time.Time    // when it took the place of one that a 403 met; zero if it did not
}

// header is what to send. nil sends nothing.
func (g *grant) header() string {
	if g == nil {
		return ""
	}
	return g.value
}

// exhaustedError: no credential is accepted.
type exhaustedError struct {
	notes   []string
	sources bool // one could not say, and may the next time
}

func (e *exhaustedError) Error() string {
	if len(e.notes) == 0 {
		return "no credential was found"
	}
	return "no credential is accepted (" + strings.Join(e.notes, "; ") + ")"
}

func (e *exhaustedError) Is(target error) bool { return target == ErrDenied }

func newAuthorizer(h *host, c *Client) *authorizer {
	a := &authorizer{h: h, c: c, grants: map[string]*grant{}, served: map[string]Credential{}, denials: map[string]*denial{}}
	a.client = &http.Client{
		Transport: &metered{base: h.RegistryHost.Client.Transport, m: &c.meter, max: maxTokenBody},
		// A token request carries the secret in its body or its header, so it goes nowhere else.
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if from := via[0].URL; len(via) > maxHops || req.URL.Host != from.Host || (from.Scheme == "https" && req.URL.Scheme != "https") {
				return refused("token server redirects to %s", redact(req.URL))
			}
			return nil
		},
	}
	return a
}

// known returns what to send before anything was asked: nil is nothing. It renews what has run out. reads is that a recent refusal will do for an answer.
func (a *authorizer) known(ctx context.Context, name string, reads bool) (*grant, error) {
	return a.grant(ctx, name, nil, nil, reads)
}

// letIn notes that the host has answered a request with g.
func (a *authorizer) letIn(name string, g *grant) {
	if g == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if !g.accepted {
		g.accepted = true
		g.tried, g.notes, g.keep = nil, nil, nil // of no use any more, and keep would be a chain of all there were
		a.served[name] = g.credential
		delete(a.denials, name)
	}
}

// isRefusal reports whether a status may be the credential's fault: 404 is how some registries hide what is not for everybody.
func isRefusal(status int) bool {
	return status == http.StatusUnauthorized || status == http.StatusForbidden || status == http.StatusNotFound
}

// final reports whether another credential, or a new token, would not change a refusal of a request with g; again as in refusal.
func (a *authorizer) final(g *grant, status int, again bool) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case status == http.StatusUnauthorized:
		return false
	case g == nil:
		return true
	case status == http.StatusForbidden && g.challenge.Scheme == auth.BasicAuth: // ECR says so when the password has run out
		return false
	case status == http.StatusForbidden && g.accepted: // and some when a token has: another one is tried, and then the other credentials
		return !again && time.Since(g.renewed) < renewAgain
	}
	return g.accepted
}

// refusal is a host's answer to a request with g, nil being without anything, that was not final.
type refusal struct {
	g      *grant
	status int
	header http.Header
	again  bool // g is itself what a refused one was replaced by in this request
}

// challenge returns what the host asks for; nil if it does not say.
func (r *refusal) challenge() *auth.Challenge {
	const key = "Www-Authenticate"
	short := slices.DeleteFunc(slices.Clone(r.header[key]), func(s string) bool { return len(s) > maxChallenge })
	for _, c := range auth.ParseAuthHeader(http.Header{key: short}) { // bearer first
		if c.Scheme == auth.BearerAuth || c.Scheme == auth.BasicAuth {
			return &c
		}
	}
	return nil
}

// better returns what to send after r. nil is that there is nothing better, an exhaustedError that everything was tried, or was a moment ago for reads.
func (a *authorizer) better(ctx context.Context, name string, r *refusal, reads bool) (*grant, error) {
	return a.grant(ctx, name, r, r.challenge(), reads)
}

// grant returns the current grant, unless it is the refused one or has run out: then one caller gets a new one and the others wait.
func (a *authorizer) grant(ctx context.Context, name string, r *refusal, challenge *auth.Challenge, reads bool) (*grant, error) {
	a.mu.Lock()
	old := a.grants[name]
	var of *grant // that was refused
	if r != nil {
		of = r.g
	}
	if old != nil {
		select {
		case <-old.done:
		default:
			a.mu.Unlock()
			return a.wait(ctx, name, old, r, challenge, reads)
		}
		if old != of && (old.expires.IsZero() || time.Now().Before(old.expires)) {
			a.mu.Unlock()
			return old, nil
		}
	}
	if challenge == nil {
		if of == nil {
			of = old
		}
		if of == nil {
			a.mu.Unlock()
			return nil, nil
		}
		challenge = &of.challenge
	}
	d := a.denials[name]
	if reads && d.holds(r) {
		a.mu.Unlock()
		return nil, d.err
	}
	g := &grant{done: make(chan struct{}), challenge: *challenge}
	if d != nil {
		g.late = d.tried
	}
	if r != nil && r.g != nil {
		g.follow(r)
	}
	a.grants[name] = g
	last, known := a.served[name]
	a.mu.Unlock()

	a.fill(ctx, name, g, last, known)
	a.mu.Lock()
	var all *exhaustedError
	if errors.As(g.err, &all) && !g.hidden {
		a.deny(name, g, all)
	}
	switch {
	case g.err == nil && !g.renewed.IsZero() && g.credential == g.keep.credential:
		g.accepted, g.keep = true, nil
	case g.err == nil:
		g.renewed = time.Time{}
	case g.keep != nil:
		a.grants[name] = g.keep
		if all != nil { // so this is as good as it gets
			g.keep.accepted = true
			a.served[name] = g.keep.credential
		}
	default:
		delete(a.grants, name) // the next request is sent without and learns the challenge anew
	}
	a.mu.Unlock()
	close(g.done)
	if g.err != nil {
		return nil, g.err
	}
	return g, nil
}

// follow takes over what is known from the refusal of r.g. The caller holds mu.
func (g *grant) follow(r *refusal) {
	was := r.g
	if was.accepted {
		if g.challenge.Scheme == auth.BearerAuth || r.status != http.StatusUnauthorized { // a password that is refused is sent no more: that is a wrong login each time
			g.keep = was
		}
		if g.challenge.Scheme == auth.BearerAuth && !r.again {
			if r.status == http.StatusForbidden {
				g.renewed = time.Now()
			}
			return // the token has run out before its time, and what it was got with will do for another
		}
	} else {
		g.keep, g.hidden = was.keep, was.hidden
		g.tried, g.notes = slices.Clone(was.tried), slices.Clone(was.notes)
	}
	if r.status == http.StatusNotFound && !g.hidden {
		g.keep, g.hidden = was, true
	}
	g.refuse(was.credential, fmt.Errorf("status %d", r.status))
}

func (g *grant) refuse(c Credential, why error) {
	g.tried = append(g.tried, c)
	g.notes = append(g.notes, fmt.Sprintf("%s: %v", c, why))
}

// full reports whether as much of a source was tried as may be.
func (g *grant) full(source string) bool {
	n := 0
	for _, c := range g.tried {
		if c.Source == source {
			n++
		}
	}
	return n >= maxOffers
}

func (a *authorizer) wait(ctx context.Context, name string, g *grant, r *refusal, challenge *auth.Challenge, reads bool) (*grant, error) {
	select {
	case <-g.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if errors.Is(g.err, context.Canceled) || errors.Is(g.err, context.DeadlineExceeded) || errors.Is(g.err, errSilent) {
		return a.grant(ctx, name, r, challenge, reads) // whoever asked has gone; we have not
	}
	if g.err != nil {
		return nil, g.err
	}
	return g, nil
}

// fill makes of g the answer to its challenge, with the first credential that is accepted and was not refused before.
func (a *authorizer) fill(ctx context.Context, name string, g *grant, last Credential, known bool) {
	before := len(g.tried)
	if a.try(ctx, name, g, last, known) {
		return
	}
	// What was refused now may be what a source has kept for too long.
	named := func(c Credential) bool { return c.Secret != "" }
	if !g.hidden && slices.ContainsFunc(g.tried[before:], named) && a.try(ctx, name, g, last, known) {
		return
	}
	g.err = &exhaustedError{g.notes, g.sources}
}

// try goes through what there is once, and reports whether g is what it will be.
func (a *authorizer) try(ctx context.Context, name string, g *grant, last Credential, known bool) bool {
	p := a.place(name, last.Source)
	if !g.hidden {
		p.Refused = slices.Clone(g.tried)
	}
	for c, err := range behind(a.offers(ctx, p, last, known), g.late) {
		if g.err = ctx.Err(); g.err != nil {
			return true
		}
		if err != nil {
			g.sources = true
			if s := err.Error(); !slices.Contains(g.notes, s) {
				g.notes = append(g.notes, s)
			}
			continue
		}
		if c.Secret == "" {
			c = Credential{} // whoever offers it
		}
		if slices.Contains(g.tried, c) || (c == Credential{} && g.hidden) || g.full(c.Source) {
			continue
		}
		g.value, g.expires, err = a.fetch(ctx, name, g.challenge, c)
		var no *notAcceptedError
		switch {
		case errors.As(err, &no):
			g.refuse(c, err)
		case err != nil:
			g.err = err
			return true
		case g.value != "":
			g.credential = c
			return true
		}
	}
	g.err = ctx.Err()
	return g.err != nil
}

// offers returns the credentials there are, the last one accepted before others of its source, and anonymous access at the end.
func (a *authorizer) offers(ctx context.Context, p Place, last Credential, known bool) iter.Seq2[Credential, error] {
	return func(yield func(Credential, error) bool) {
		var held []Credential // of last's source, until it is clear whether last is among them
		flush := func() bool {
			known = false
			for _, c := range held {
				if !yield(c, nil) {
					return false
				}
			}
			held = nil
			return true
		}
		if a.c.o.Credentials != nil {
			for c, err := range a.c.o.Credentials(ctx, p) {
				if known && err == nil && c.Source == last.Source && c != last {
					held = append(held, c)
					continue
				}
				if known && c == last && err == nil {
					if !yield(c, nil) || !flush() {
						return
					}
					continue
				}
				if len(held) > 0 && !flush() || !yield(c, err) {
					return
				}
			}
		}
		if flush() {
			yield(Credential{}, nil)
		}
	}
}

// place is what repository name is called at this host.
func (a *authorizer) place(name, last string) Place {
	h := a.h
	p := Place{Image: Repository(h.registry + "/" + name), Last: last}
	if h.ns == "" || h.server {
		p.Names = append(p.Names, p.Image)
	}
	if h.ns != "" {
		below := strings.Trim(strings.TrimPrefix(h.Path, "/v2"), "/") // override_path
		p.Names = append(p.Names, Repository(strings.Join(slices.DeleteFunc([]string{h.Host, below, name}, func(s string) bool { return s == "" }), "/")))
	}
	return p
}

// sources names what the host has accepted for its repositories.
func (a *authorizer) sources() (list []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.served {
		list = append(list, c.String())
	}
	slices.Sort(list)
	return slices.Compact(list)
}

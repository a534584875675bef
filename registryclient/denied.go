package registryclient

import (
	"iter"
	"net/http"
	"slices"
	"time"
)

const (
	inARow   = time.Minute // between two refusals that belong together, at most
	maxTried = 1024        // refused credentials that are remembered
)

// denial is the last time that no credential was accepted for a repository. Reads that wait share it: were each to ask by itself, a container with many of them
// would fail to log in hundreds of times for one wrong password, and some registries lock an account that has failed often.
type denial struct {
	err   *exhaustedError
	n     int       // of those in a row before it
	until time.Time // no read asks before
	kept  bool      // what was let in before is sent on, as it may do for other requests
	tried []Credential
}

// deniedPause is how long after a refusal, and n in a row before it, a read asks again: about 1, 2, 4, 8 and 16 s. It grows no more, so that one that has just begun
// asks at least once.
func deniedPause(n int) time.Duration { return time.Second << min(n, maxRefused-1) }

// failPause is the same after the n-th failure.
func failPause(n int) time.Duration { return min(firstPause<<min(n-1, 10), maxPause) }

// holds reports whether a read takes d for the answer after r, nil being before it has asked. A 404 it does not explain.
func (d *denial) holds(r *refusal) bool {
	switch {
	case d == nil || !time.Now().Before(d.until):
		return false
	case r == nil:
		return !d.kept
	}
	return r.status != http.StatusNotFound
}

// deny notes that g, which is to be no grant, has found nothing. The caller holds mu.
func (a *authorizer) deny(name string, g *grant, err *exhaustedError) {
	d := &denial{err: err, kept: g.keep != nil}
	old := a.denials[name]
	if old != nil && time.Since(old.until) < inARow {
		d.n = old.n + 1
	}
	pause := deniedPause(d.n)
	if err.sources {
		pause = failPause(d.n + 1)
	}
	d.until = time.Now().Add(pause)
	// Of a source that has more than are tried, others come first the next time, until all had their turn.
	if slices.ContainsFunc(g.tried, func(c Credential) bool { return g.full(c.Source) }) {
		d.tried = g.tried
		if old != nil && len(old.tried) < maxTried && slices.ContainsFunc(g.tried, func(c Credential) bool { return !slices.Contains(old.tried, c) }) {
			d.tried = slices.Concat(old.tried, g.tried)
		}
	}
	a.denials[name] = d
}

// behind puts those of list after all others.
func behind(offers iter.Seq2[Credential, error], list []Credential) iter.Seq2[Credential, error] {
	return func(yield func(Credential, error) bool) {
		var late []Credential
		for c, err := range offers {
			if err == nil && slices.Contains(list, c) {
				late = append(late, c)
			} else if !yield(c, err) {
				return
			}
		}
		for _, c := range late {
			if !yield(c, nil) {
				return
			}
		}
	}
}

// Package credentials knows where a node's registry credentials are, since containerd passes none to a snapshotter.
//
// A Source is one such place. Chain puts several in an order, and a registryclient.Client tries what they offer, one after the other, until the registry accepts
// one; anonymous access comes last. The Client keeps what it sends, a token as long as it lives, a password until it is refused. Then the
// sources are asked again, the one that served first: what was withdrawn from a source is not used any more, and each source keeps by itself what has to
// outlive a pull. A source that fails, or says nothing for a while, does not hinder those after it.
//
// The package never sends a credential anywhere but to the programs that are configured to look after it, and its errors hold none.
package credentials

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

// Login is what a source has for a place. Without User, Secret is an identity token (OAuth2 refresh token).
type Login struct{ User, Secret string }

// Source is one place where credentials are found. It is safe for concurrent use.
type Source interface {
	// Name is what users know it by: "docker config". The names of a Chain's sources differ.
	Name() string
	// Lookup returns what there is for a place, best first; nothing is no error. It ends with ctx. A mirror is asked for with its own name only
	// (registryclient.Place): a source that offers it what is the registry's trusts the mirror with that.
	Lookup(ctx context.Context, p registryclient.Place) ([]Login, error)
}

// patience is how long Chain waits for a source as long as there are others to ask, anonymous access included.
const patience = 5 * time.Second

// Chain returns the credentials of all sources in order. The source that was accepted last comes first. One that has not answered after a few
// seconds is come back to when the others, and anonymous access, have been tried.
func Chain(sources ...Source) registryclient.Credentials {
	return func(ctx context.Context, p registryclient.Place) iter.Seq2[registryclient.Credential, error] {
		return func(yield func(registryclient.Credential, error) bool) {
			ctx, cancel := context.WithCancel(ctx) // of lookups that nobody waits for
			defer cancel()
			var late []*lookup
			for _, s := range order(sources, p.Last) {
				l := look(ctx, s, p)
				t := time.NewTimer(patience)
				select {
				case <-l.done:
				case <-t.C:
					late = append(late, l)
					continue
				}
				t.Stop()
				if !l.offer(yield) {
					return
				}
			}
			if len(late) > 0 && !yield(registryclient.Credential{}, nil) {
				return
			}
			for _, l := range late {
				<-l.done
				if !l.offer(yield) {
					return
				}
			}
		}
	}
}

// order returns sources with the one of a name in front.
func order(sources []Source, first string) []Source {
	i := slices.IndexFunc(sources, func(s Source) bool { return s.Name() == first })
	if i < 1 {
		return sources
	}
	return slices.Concat(sources[i:i+1], sources[:i], sources[i+1:])
}

// lookup is a question to a source. The fields below done are set when it is closed.
type lookup struct {
	name string
	done chan struct{}

	logins []Login
	err    error
}

func look(ctx context.Context, s Source, p registryclient.Place) *lookup {
	l := &lookup{name: s.Name(), done: make(chan struct{})}
	go func() {
		defer close(l.done)
		l.logins, l.err = s.Lookup(ctx, p)
	}()
	return l
}

func (l *lookup) offer(yield func(registryclient.Credential, error) bool) bool {
	for _, g := range l.logins {
		if !yield(registryclient.Credential{Source: l.name, User: g.User, Secret: g.Secret}, nil) {
			return false
		}
	}
	return l.err == nil || yield(registryclient.Credential{}, fmt.Errorf("%s: %s", l.name, strings.ReplaceAll(l.err.Error(), "\n", "; "))) // joined errors have lines
}

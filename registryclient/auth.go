package registryclient

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
)

const (
	maxTokenBody = 1 << 20
	maxChallenge = 4 << 10 // bytes; containerd's parser takes the square of it
	// A token whose life is not told lives 60 seconds, says the token specification.
	defaultTokenLife = 60 * time.Second
	clientID         = "streaming-snapshotter"
)

// authorizer keeps what one host wants to see in Authorization, for each repository: the answer to its first challenge, renewed when it
// has run out or is refused.
//
// The parts (challenges, token requests) are containerd's; its own authorizer is made for a pull and not for a daemon's life: it keeps a failed
// token request as the answer for ever, keeps a token of untold life for ever, and asks for the credentials once.
type authorizer struct {
	h      *host
	c      *Client
	client *http.Client

	mu     sync.Mutex
	grants map[string]*grant
}

// grant is the right to read one repository. Whoever finds done open waits for it; the fields are set before it is closed and not after.
type grant struct {
	done      chan struct{}
	challenge auth.Challenge
	value     string    // of the Authorization header; "" is anonymous
	expires   time.Time // zero is never
	err       error
}

func newAuthorizer(h *host, c *Client) *authorizer {
	a := &authorizer{h: h, c: c, grants: map[string]*grant{}}
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

// known returns what to send before anything was asked: "" is nothing. It renews what has run out.
func (a *authorizer) known(ctx context.Context, name string) (string, error) {
	return a.grant(ctx, name, nil, "")
}

// renew returns what to send after the host has refused value, "" being nothing, with the challenge in header if there is one there. There
// is nothing better if it returns "" or value.
func (a *authorizer) renew(ctx context.Context, name, value string, header http.Header) (string, error) {
	const key = "Www-Authenticate"
	short := slices.DeleteFunc(slices.Clone(header[key]), func(s string) bool { return len(s) > maxChallenge })
	for _, c := range auth.ParseAuthHeader(http.Header{key: short}) { // bearer first
		if c.Scheme == auth.BearerAuth || c.Scheme == auth.BasicAuth {
			return a.grant(ctx, name, &c, value)
		}
	}
	return a.grant(ctx, name, nil, value)
}

// grant returns the current grant's value, unless it is the refused one or has run out: then one caller gets a new one and the others wait.
func (a *authorizer) grant(ctx context.Context, name string, challenge *auth.Challenge, refusedValue string) (string, error) {
	a.mu.Lock()
	old := a.grants[name]
	if old == nil && challenge == nil {
		a.mu.Unlock()
		return "", nil
	}
	if old != nil {
		select {
		case <-old.done:
		default:
			a.mu.Unlock()
			return a.wait(ctx, name, old, challenge, refusedValue)
		}
		fresh := old.err == nil && (old.expires.IsZero() || time.Now().Before(old.expires))
		if fresh && (refusedValue == "" || old.value != refusedValue) {
			a.mu.Unlock()
			return old.value, nil
		}
		if challenge == nil {
			challenge = &old.challenge
		}
	}
	g := &grant{done: make(chan struct{}), challenge: *challenge}
	a.grants[name] = g
	a.mu.Unlock()

	g.value, g.expires, g.err = a.fetch(ctx, name, *challenge)
	a.mu.Lock()
	if g.err != nil || g.value == "" {
		delete(a.grants, name) // the next request is sent without and learns the challenge anew
	}
	a.mu.Unlock()
	close(g.done)
	return g.value, g.err
}

func (a *authorizer) wait(ctx context.Context, name string, g *grant, challenge *auth.Challenge, refusedValue string) (string, error) {
	select {
	case <-g.done:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	if errors.Is(g.err, context.Canceled) || errors.Is(g.err, context.DeadlineExceeded) || errors.Is(g.err, errSilent) {
		return a.grant(ctx, name, challenge, refusedValue) // whoever asked has gone; we have not
	}
	return g.value, g.err
}

// fetch answers a challenge, with the credentials as they are now.
func (a *authorizer) fetch(ctx context.Context, name string, c auth.Challenge) (value string, expires time.Time, err error) {
	var user, secret string
	if a.c.o.Credentials != nil {
		if user, secret, err = a.c.o.Credentials(ctx, a.h.Host); err != nil {
			return "", time.Time{}, fmt.Errorf("credentials for %s: %w", a.h.Host, err)
		}
	}
	if c.Scheme == auth.BasicAuth {
		if user == "" || secret == "" {
			return "", time.Time{}, nil
		}
		return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+secret)), time.Time{}, nil
	}
	to, err := auth.GenerateTokenOptions(ctx, a.h.Host, user, secret, c)
	if err != nil {
		return "", time.Time{}, refused("host %s: %v", a.h.Host, err)
	}
	if len(to.Scopes) == 0 {
		to.Scopes = []string{"repository:" + name + ":pull"}
	}
	realm, err := url.Parse(to.Realm)
	if err != nil || (realm.Scheme != "https" && realm.Scheme != "http") || realm.Host == "" {
		return "", time.Time{}, refused("host %s: token server's address is malformed", a.h.Host)
	}
	if (secret != "" || len(a.h.Header) > 0) && a.h.Scheme == "https" && realm.Scheme != "https" {
		return "", time.Time{}, refused("host %s: its token server %s is not https, and credentials would be readable on the way", a.h.Host, redact(realm))
	}
	fetching, cancel := context.WithTimeout(ctx, a.c.o.Stall) // or a token server that is silent would use up the time of other hosts
	defer cancel()
	token, life, err := a.token(fetching, to)
	if err != nil && fetching.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("no token within %v", a.c.o.Stall)
	}
	if err != nil {
		return "", time.Time{}, tokenError(realm, err)
	}
	// Renewed a little early, so that a token does not run out on the way.
	return "Bearer " + token, time.Now().Add(life * 9 / 10), nil
}

// token asks the token server: with POST if there is a secret, which keeps it out of logs, and with GET where POST is not known or there is none.
func (a *authorizer) token(ctx context.Context, to auth.TokenOptions) (string, time.Duration, error) {
	header := a.h.Header.Clone() // as containerd does: the token server is the registry's
	if header == nil {
		header = http.Header{}
	}
	if header.Get("User-Agent") == "" {
		header.Set("User-Agent", a.c.o.UserAgent)
	}
	if to.Secret != "" {
		r, err := auth.FetchTokenWithOAuth(ctx, a.client, header, clientID, to)
		if err == nil {
			return r.AccessToken, tokenLife(r.ExpiresInSeconds), nil
		}
		// These are what servers without POST have been seen to answer (containerd's list).
		var status remoteerrors.ErrUnexpectedStatus
		if !errors.As(err, &status) || to.Username == "" {
			return "", 0, err
		}
		switch status.StatusCode {
		case http.StatusBadRequest, http.StatusUnauthorized, http.StatusNotFound, http.StatusMethodNotAllowed:
		default:
			return "", 0, err
		}
	}
	r, err := auth.FetchToken(ctx, a.client, header, to)
	if err != nil {
		return "", 0, err
	}
	return r.Token, tokenLife(r.ExpiresInSeconds), nil
}

func tokenLife(seconds int) time.Duration {
	if seconds <= 0 {
		return defaultTokenLife
	}
	return min(time.Duration(seconds), 1<<30) * time.Second
}

// tokenError makes an error of ours from one of containerd's token requests, whose texts show the whole URL.
func tokenError(realm *url.URL, err error) error {
	var status remoteerrors.ErrUnexpectedStatus
	if errors.As(err, &status) {
		// Not a StatusError of the registry: a 404 of the token server says nothing of the repository.
		e := &StatusError{StatusCode: status.StatusCode, Host: realm.Host, URL: redact(realm)}
		if e.Temporary() {
			return fmt.Errorf("get token from %s: status %d", redact(realm), status.StatusCode)
		}
		return refused("get token from %s: status %d", redact(realm), status.StatusCode)
	}
	return fmt.Errorf("get token from %s: %w", redact(realm), withoutURL(err))
}

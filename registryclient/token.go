package registryclient

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
)

const (
	maxTokenBody = 1 << 20
	// A token whose life is not told lives 60 seconds, says the token specification.
	defaultTokenLife = 60 * time.Second
	clientID         = "streaming-snapshotter"
)

// notAcceptedError: a token server gives no token for this credential.
type notAcceptedError struct{ error }

// fetch answers a challenge with a credential; "" is that it cannot.
func (a *authorizer) fetch(ctx context.Context, name string, c auth.Challenge, with Credential) (value string, expires time.Time, err error) {
	user, secret := with.User, with.Secret
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
		return &notAcceptedError{fmt.Errorf("get token from %s: status %d", redact(realm), status.StatusCode)}
	}
	return fmt.Errorf("get token from %s: %w", redact(realm), withoutURL(err))
}

package access

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
)

// Verifier checks JSON Web Tokens of an OpenID Connect issuer: signature by one of the issuer's keys and an asymmetric algorithm, issuer,
// audience, expiry. It is safe for concurrent use.
type Verifier struct {
	audiences []string
	issuer    *discovery
}

// NewVerifier returns a Verifier of tokens that are for at least one of the audiences. The client may be nil. What the issuer says of
// itself is read when it is first needed.
func NewVerifier(issuer string, audiences []string, client *http.Client) (*Verifier, error) {
	if err := checkIssuer(issuer); err != nil {
		return nil, err
	}
	if len(audiences) == 0 || slices.Contains(audiences, "") {
		return nil, errors.New("OIDC must have a client ID or audiences: tokens for others must not be valid here")
	}
	if client == nil {
		client = &http.Client{}
	}
	return &Verifier{audiences, &discovery{
		issuer: issuer, client: client, tries: rate.NewLimiter(rate.Every(issuerInterval), issuerBurst),
	}}, nil
}

// Verify returns the claims of a valid token. The error says only that it is not valid, or that the issuer does not answer (ErrIssuer):
// who sent the token learns no more.
func (v *Verifier) Verify(ctx context.Context, raw string) (*Claims, error) {
	if len(raw) > maxToken {
		return nil, errRefused
	}
	p, err := v.issuer.provider(ctx)
	if err != nil {
		return nil, err
	}
	t, err := p.verifier.Verify(ctx, raw)
	var expired *oidc.TokenExpiredError
	switch {
	case err != nil && v.issuer.down.Load() && !errors.As(err, &expired):
		return nil, ErrIssuer // perhaps it is signed by a key that cannot be read now
	case err != nil:
		return nil, errRefused
	case t.Subject == "" || !slices.ContainsFunc(t.Audience, func(a string) bool { return slices.Contains(v.audiences, a) }):
		return nil, errRefused
	}
	c := &Claims{Subject: t.Subject, nonce: t.Nonce}
	if err := t.Claims(&c.all); err != nil {
		return nil, errRefused
	}
	return c, nil
}

// Claims are what a token says.
type Claims struct {
	Subject string
	nonce   string
	all     map[string]any
}

// Strings returns the strings of a claim: its own, or those of its list. A name with dots is looked for as it is, then as a path through
// objects. The claim email has none unless the issuer has verified it.
func (c *Claims) Strings(name string) []string {
	if name == "email" && c.all["email_verified"] != true && c.all["email_verified"] != "true" {
		return nil
	}
	switch v := lookup(c.all, name).(type) {
	case string:
		return []string{v}
	case []any:
		var s []string
		for _, e := range v {
			if e, ok := e.(string); ok {
				s = append(s, e)
			}
		}
		return s
	}
	return nil
}

func lookup(object map[string]any, name string) any {
	if v, ok := object[name]; ok {
		return v
	}
	first, rest, more := strings.Cut(name, ".")
	if inner, ok := object[first].(map[string]any); ok && more {
		return lookup(inner, rest)
	}
	return nil
}

// Bounds of what is asked of an issuer.
const (
	issuerTimeout  = 10 * time.Second
	issuerInterval = 5 * time.Second // between requests for its discovery document, and for keys: forged tokens name keys that nobody has
	issuerBurst    = 5
	maxIssuerBody  = 1 << 20 // bytes; the keys of large issuers have some tens of KB
)

// discovery is an issuer with what it says of itself, once that is known.
type discovery struct {
	issuer string
	client *http.Client
	tries  *rate.Limiter
	once   singleflight.Group
	known  atomic.Pointer[provider]
	down   atomic.Bool // the last request for keys failed, or was not made
}

type provider struct {
	*oidc.Provider
	verifier *oidc.IDTokenVerifier // of any audience
	post     bool                  // clients send their secret in the body, since the issuer does not know basic authentication
}

func (d *discovery) provider(ctx context.Context) (*provider, error) {
	if p := d.known.Load(); p != nil {
		return p, nil
	}
	found := d.once.DoChan("", func() (any, error) {
		if p := d.known.Load(); p != nil {
			return p, nil
		}
		if !d.tries.Allow() {
			return nil, ErrIssuer
		}
		// Not with the request's context: others wait for the answer, too, and the client has a timeout.
		p, err := oidc.NewProvider(d.with(context.Background(), nil, nil), d.issuer)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrIssuer, err)
		}
		var document struct {
			Methods []string `json:"token_endpoint_auth_methods_supported"` // none is client_secret_basic
		}
		if err := p.Claims(&document); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrIssuer, err)
		}
		post := len(document.Methods) > 0 && !slices.Contains(document.Methods, "client_secret_basic")
		keys := d.with(context.Background(), rate.NewLimiter(rate.Every(issuerInterval), issuerBurst), &d.down)
		d.known.Store(&provider{p, p.VerifierContext(keys, &oidc.Config{SkipClientIDCheck: true}), post})
		return d.known.Load(), nil
	})
	select {
	case r := <-found:
		if r.Err != nil {
			return nil, r.Err
		}
		return r.Val.(*provider), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// with returns a context by which go-oidc and oauth2 ask the issuer within our bounds.
func (d *discovery) with(ctx context.Context, requests *rate.Limiter, down *atomic.Bool) context.Context {
	c := *d.client
	c.Timeout = issuerTimeout
	c.Transport = &bounded{d.client.Transport, requests, down}
	return oidc.ClientContext(ctx, &c)
}

// bounded is a transport of requests to an issuer. requests and down may be nil, both.
type bounded struct {
	next     http.RoundTripper
	requests *rate.Limiter
	down     *atomic.Bool
}

func (b *bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	if b.requests != nil && !b.requests.Allow() {
		b.down.Store(true) // a token by a new key is not invalid for that: whoever forges many cannot make it so
		return nil, errors.New("the issuer's keys were asked for too often")
	}
	next := b.next
	if next == nil {
		next = http.DefaultTransport
	}
	resp, err := next.RoundTrip(r)
	if b.down != nil {
		b.down.Store(err != nil || resp.StatusCode != http.StatusOK)
	}
	if err != nil {
		return nil, err
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(resp.Body, maxIssuerBody), resp.Body}
	return resp, nil
}

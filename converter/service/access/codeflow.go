package access

import (
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"net/http"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"
)

// callbackPath is where the issuer sends browsers back to: its client must be configured with it.
const callbackPath = "/login/callback"

func (b *browser) oauth(p *provider) *oauth2.Config {
	endpoint := p.Endpoint()
	endpoint.AuthStyle = oauth2.AuthStyleInHeader
	if p.post || b.oidc.ClientSecret == "" {
		endpoint.AuthStyle = oauth2.AuthStyleInParams
	}
	return &oauth2.Config{
		ClientID: b.oidc.ClientID, ClientSecret: b.oidc.ClientSecret, Endpoint: endpoint,
		RedirectURL: b.url.String() + callbackPath, Scopes: append([]string{oidc.ScopeOpenID}, b.oidc.Scopes...),
	}
}

// leave sends the browser to the issuer (OpenID Connect Core, 3.1.2.1), with PKCE (RFC 7636). A form cannot lead there, by form-action
// of the policy: this is a link, which changes nothing here.
func (b *browser) leave(w http.ResponseWriter, r *http.Request) {
	next := inside(r.URL.Query().Get("next"))
	p, err := b.oidc.console.issuer.provider(r.Context())
	if err != nil {
		b.log.WarnContext(r.Context(), "OpenID Connect issuer", "error", err, "request", RequestID(r.Context()))
		b.page(w, r, http.StatusServiceUnavailable, next, "Your organisation's login does not answer. Try again later.")
		return
	}
	f := flow{
		Expires: b.now().Add(flowTime).Unix(), State: rand.Text(), Nonce: rand.Text(), Verifier: oauth2.GenerateVerifier(), Next: next,
	}
	// Lax, since the issuer's redirect brings it back.
	if err := b.setCookie(w, r, flowCookie, f, flowTime, http.SameSiteLaxMode); err != nil {
		b.page(w, r, http.StatusBadRequest, "/", "The login did not work: "+err.Error()+".")
		return
	}
	to := b.oauth(p).AuthCodeURL(f.State, oidc.Nonce(f.Nonce), oauth2.S256ChallengeOption(f.Verifier))
	http.Redirect(w, r, to, http.StatusSeeOther)
}

// callback is where the issuer sends the browser with a code.
func (b *browser) callback(w http.ResponseWriter, r *http.Request) {
	var f flow
	q := r.URL.Query()
	if !b.cookie(r, flowCookie, &f) || b.now().Unix() >= f.Expires || subtle.ConstantTimeCompare([]byte(q.Get("state")), []byte(f.State)) != 1 {
		b.page(w, r, http.StatusBadRequest, "/", "The login took too long, or began in another browser. Try again.")
		return
	}
	b.setCookie(w, r, flowCookie, nil, 0, http.SameSiteLaxMode)
	id, s, err := b.exchange(r, f)
	if err != nil {
		b.denied(r, "login", err.Error())
		status := http.StatusForbidden
		if errors.Is(err, ErrIssuer) {
			status = http.StatusServiceUnavailable
		}
		b.page(w, r, status, f.Next, "The login did not work: "+err.Error()+".")
		return
	}
	if b.welcome(w, r, id, s, f.Next) {
		onward(w, f.Next)
	}
}

var (
	errCode    = errors.New("the issuer did not accept the code")
	errIDToken = errors.New("the issuer's ID token is not valid here")
)

// exchange gets the ID token for the code, and checks it (OpenID Connect Core, 3.1.3.7).
func (b *browser) exchange(r *http.Request, f flow) (*Identity, session, error) {
	q := r.URL.Query()
	if iss := q.Get("iss"); iss != "" && iss != b.oidc.Issuer {
		return nil, session{}, errors.New("the answer is another issuer's") // RFC 9207
	}
	if e := q.Get("error"); e != "" {
		return nil, session{}, errors.New("the issuer says " + Printable(e, 64))
	}
	p, err := b.oidc.console.issuer.provider(r.Context())
	if err != nil {
		return nil, session{}, ErrIssuer
	}
	ctx := b.oidc.console.issuer.with(r.Context(), nil, nil)
	tokens, err := b.oauth(p).Exchange(ctx, q.Get("code"), oauth2.VerifierOption(f.Verifier))
	if err != nil {
		var answer *oauth2.RetrieveError
		if errors.As(err, &answer) {
			return nil, session{}, errCode
		}
		return nil, session{}, ErrIssuer
	}
	raw, _ := tokens.Extra("id_token").(string)
	claims, err := b.oidc.console.Verify(ctx, raw)
	if errors.Is(err, ErrIssuer) {
		return nil, session{}, err
	}
	if err != nil || subtle.ConstantTimeCompare([]byte(claims.nonce), []byte(f.Nonce)) != 1 {
		return nil, session{}, errIDToken
	}
	if azp := claims.Strings("azp"); len(azp) > 0 && azp[0] != b.oidc.ClientID {
		return nil, session{}, errIDToken
	}
	known := b.oidc.facts(claims)
	id, err := b.oidc.identity(known)
	return id, session{Facts: &known}, err
}

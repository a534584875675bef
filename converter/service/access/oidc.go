package access

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"

	"github.com/coreos/go-oidc/v3/oidc"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

// OIDC is an OpenID Connect issuer, and what its claims mean here.
type OIDC struct {
	Issuer       string       // https://...
	ClientID     string       // of the console at the issuer; "" is no login to the console by it
	ClientSecret string       // "" for a public client: PKCE is used in any case
	Scopes       []string     // to ask for beside openid; nil is profile and email
	Audiences    []string     // of bearer tokens for the API; nil is ClientID
	NameClaim    string       // whose value is the identity's name; "" is preferred_username, else a verified email, else sub
	Rules        []Rule       // whoever no rule gives a role is refused
	Client       *http.Client // for requests to the issuer; nil is one with a timeout
}

// Rule gives roles to who has a claim.
type Rule struct {
	Claim  string // "groups", "sub", "realm_access.roles": a name, or names from the outermost object on. "email" counts when verified only
	Value  string // a pattern of service.Match for the claim's string, or for one of its strings
	Grants []Grant
}

// issuer is OIDC, ready for use.
type issuer struct {
	OIDC
	bearer  *Verifier // of tokens for the API
	console *Verifier // of ID tokens that a login of the console ends with
}

func newIssuer(o OIDC) (*issuer, error) {
	if o.Audiences == nil && o.ClientID != "" {
		o.Audiences = []string{o.ClientID}
	}
	bearer, err := NewVerifier(o.Issuer, o.Audiences, o.Client)
	if err != nil {
		return nil, err
	}
	if len(o.Rules) == 0 {
		return nil, errors.New("OIDC has no rules: nobody would have a role")
	}
	for _, r := range o.Rules {
		if r.Claim == "" || r.Value == "" {
			return nil, fmt.Errorf("rule of OIDC: claim %q and value %q must not be empty", r.Claim, r.Value)
		}
		if err := checkGrants(r.Grants); err != nil {
			return nil, fmt.Errorf("rule of OIDC for %s %q: %w", r.Claim, r.Value, err)
		}
	}
	if o.Scopes == nil {
		o.Scopes = []string{oidc.ScopeProfile, oidc.ScopeEmail}
	}
	console := *bearer // the same keys
	console.audiences = []string{o.ClientID}
	return &issuer{o, bearer, &console}, nil
}

// checkIssuer refuses an issuer whose keys anybody on the way could replace.
func checkIssuer(s string) error {
	u, err := url.Parse(s)
	if err != nil {
		return fmt.Errorf("OIDC issuer: %w", err)
	}
	addr, _ := netip.ParseAddr(u.Hostname())
	if u.Host == "" || u.Scheme != "https" && (u.Scheme != "http" || !addr.IsLoopback()) {
		return fmt.Errorf("OIDC issuer %q: must be an https URL", s)
	}
	return nil
}

// facts are what of a token counts here: enough to find its roles again as long as a session lasts, with the rules of that time.
type facts struct {
	Name    string  `json:"n"`
	Subject string  `json:"s"`
	Claims  []claim `json:"c"` // that a rule has asked for and found
}

type claim struct {
	Name  string `json:"n"`
	Value string `json:"v"`
}

func (o *issuer) facts(c *Claims) facts {
	f := facts{Subject: c.Subject}
	for _, r := range o.Rules {
		for _, v := range c.Strings(r.Claim) {
			if have := (claim{r.Claim, v}); service.Match(r.Value, v) && !slices.Contains(f.Claims, have) {
				f.Claims = append(f.Claims, have)
			}
		}
	}
	names := []string{o.NameClaim}
	if o.NameClaim == "" {
		names = []string{"preferred_username", "email"}
	}
	for _, name := range append(names, "sub") {
		if v := c.Strings(name); len(v) > 0 && v[0] != "" {
			f.Name = Printable(v[0], 128)
			break
		}
	}
	return f
}

func (o *issuer) identity(f facts) (*Identity, error) {
	id := &Identity{Name: f.Name, Kind: KindOIDC, Subject: f.Subject}
	for _, r := range o.Rules {
		if slices.ContainsFunc(f.Claims, func(c claim) bool { return c.Name == r.Claim && service.Match(r.Value, c.Value) }) {
			id.Grants = append(id.Grants, r.Grants...)
		}
	}
	if len(id.Grants) == 0 {
		return nil, fmt.Errorf("%w: %s", errNoRole, Printable(f.Name, 128))
	}
	return id, nil
}

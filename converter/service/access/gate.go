package access

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Limits of what a visitor sends.
const (
	minToken = 20      // characters of a bearer token: shorter ones can be guessed
	maxToken = 8 << 10 // bytes; JWTs with many groups have a few thousand
	maxBody  = 1 << 20 // bytes of a request
)

// Token is a bearer token that the configuration knows: by its hash, or by a file that it is in, which only the service can read.
type Token struct {
	Name   string // who has it
	SHA256 string // of the token, in hex
	File   string // with the token, instead; read again when it changes, and while it is not there the token is nobody's
	Grants []Grant
}

// Config says who may come in.
type Config struct {
	Tokens []Token
	OIDC   *OIDC

	// Loopback is service without authentication: everybody is owner. Requests must then name a loopback host, so that no web page can
	// make a browser ask under a name of its own (DNS rebinding), and no proxy may have forwarded them.
	Loopback bool

	// URL is what browsers reach the console by, "https://convert.example.com": the issuer sends them back below it, and https makes
	// cookies Secure and answers have Strict-Transport-Security. "" is what each request says, and no login by OIDC.
	URL string

	Proxies []netip.Prefix // whose X-Forwarded-For and X-Request-Id are believed
	Key     []byte         // 32 secret bytes or more that seal cookies, the same in each replica; nil is random: sessions end with the process
	Session time.Duration  // how long a login lasts; 0 is 8 h
	Audit   io.Writer      // gets a line of JSON for each action, in one Write; nil is none
	Log     *slog.Logger   // nil is none
}

// Gate lets requests in. It is safe for concurrent use.
type Gate struct {
	tokens    []knownToken
	oidc      *issuer // nil: none
	everybody *Identity
	url       *url.URL // nil: as requests say
	proxies   []netip.Prefix
	session   time.Duration
	seal      *sealer
	cross     *http.CrossOriginProtection
	log       *slog.Logger
	now       func() time.Time

	failures attempts // of bearer tokens
	logins   attempts // by the console's form

	auditMu sync.Mutex // a line at a time
	audit   io.Writer

	revoked revoked
	twins   atomic.Value // string: the names of tokens that are the same, as the log has said last
}

type knownToken struct {
	sum  [sha256.Size]byte
	file *tokenFile // that has the token now; nil if the configuration has sum
	id   *Identity
}

// current returns the hash of the token that counts now, or false if there is none.
func (t *knownToken) current() ([sha256.Size]byte, bool) {
	if t.file == nil {
		return t.sum, true
	}
	sum, err := t.file.sum()
	return sum, err == nil
}

// New checks the configuration and reads tokens' files. It asks no network: an issuer may be down when the service starts.
func New(c Config) (*Gate, error) {
	g := &Gate{
		proxies: c.Proxies, session: c.Session, audit: c.Audit, log: c.Log, now: time.Now,
		cross: http.NewCrossOriginProtection(),
	}
	if g.session == 0 {
		g.session = 8 * time.Hour
	}
	if g.log == nil {
		g.log = slog.New(slog.DiscardHandler)
	}
	configured := len(c.Tokens) > 0 || c.OIDC != nil
	switch {
	case c.Loopback && configured:
		return nil, errors.New("access without authentication is configured beside tokens or OIDC: it must be one or the other")
	case !c.Loopback && !configured:
		return nil, errors.New("access: neither tokens nor OIDC are configured")
	case c.Loopback:
		g.everybody = &Identity{Name: KindLoopback, Kind: KindLoopback, Grants: []Grant{{Role: Owner}}}
	}
	if err := g.takeURL(c.URL); err != nil {
		return nil, err
	}
	if err := g.takeTokens(c.Tokens); err != nil {
		return nil, err
	}
	purpose := ""
	if c.OIDC != nil {
		var err error
		if g.oidc, err = newIssuer(*c.OIDC); err != nil {
			return nil, err
		}
		if c.OIDC.ClientID != "" && g.url == nil {
			return nil, errors.New("OIDC for the console needs the URL that browsers reach it by")
		}
		purpose = c.OIDC.Issuer
	}
	var err error
	g.seal, err = newSealer(c.Key, purpose)
	return g, err
}

func (g *Gate) takeURL(s string) error {
	if s == "" {
		return nil
	}
	u, err := url.Parse(s)
	if err != nil {
		return fmt.Errorf("URL of the console: %w", err)
	}
	if u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return fmt.Errorf("URL of the console %q: must be https://host or https://host:port", s)
	}
	g.url = &url.URL{Scheme: u.Scheme, Host: u.Host}
	return g.cross.AddTrustedOrigin(g.url.String())
}

func (g *Gate) takeTokens(tokens []Token) error {
	names := map[string]bool{}
	sums := map[[sha256.Size]byte]string{}
	for _, t := range tokens {
		k, err := t.known(g.log)
		if err != nil {
			return fmt.Errorf("token %q: %w", t.Name, err)
		}
		switch {
		case t.Name == "" || t.Name != Printable(t.Name, 128):
			return fmt.Errorf("token %q: must have a name of 1 to 128 printable bytes", t.Name)
		case names[t.Name]:
			return fmt.Errorf("token %q: there are two of the name", t.Name)
		case sums[k.sum] != "":
			return fmt.Errorf("tokens %q and %q are the same", sums[k.sum], t.Name)
		}
		if err := checkGrants(t.Grants); err != nil {
			return fmt.Errorf("token %q: %w", t.Name, err)
		}
		names[t.Name], sums[k.sum] = true, t.Name
		g.tokens = append(g.tokens, k)
	}
	return nil
}

func (t Token) known(log *slog.Logger) (k knownToken, err error) {
	k.id = &Identity{Name: t.Name, Kind: KindToken, Grants: t.Grants}
	switch {
	case (t.SHA256 == "") == (t.File == ""):
		return k, errors.New("must have either its SHA-256 or a file")
	case t.File != "":
		k.file = &tokenFile{name: t.File, of: t.Name, log: log}
		k.sum, err = k.file.sum()
		return k, err
	}
	b, err := hex.DecodeString(t.SHA256)
	if err != nil || len(b) != len(k.sum) {
		return k, fmt.Errorf("SHA-256 must be %d hexadecimal digits", 2*len(k.sum))
	}
	k.sum = [sha256.Size]byte(b)
	return k, nil
}

func checkGrants(grants []Grant) error {
	if len(grants) == 0 {
		return errors.New("has no role")
	}
	for _, g := range grants {
		if err := g.check(); err != nil {
			return err
		}
	}
	return nil
}

// Authenticated says whether who asks is found out at all.
func (g *Gate) Authenticated() bool { return g.everybody == nil }

// ErrIssuer is temporary: whether a token is valid cannot be said without the issuer's keys.
var ErrIssuer = errors.New("the OpenID Connect issuer does not answer; try again")

// Why a request is nobody's.
var (
	errNoToken = errors.New("authentication required: send a bearer token")
	errRefused = errors.New("the token is not valid here")
	errNoRole  = errors.New("no rule gives a role to this identity")
)

// known returns the identity and the hash of a token of the configuration, or nil. It takes as long for every token of a length.
func (g *Gate) known(token string) (*Identity, []byte) {
	if len(token) < minToken || len(token) > maxToken {
		return nil, nil
	}
	sum := sha256.Sum256([]byte(token))
	return g.ofSum(sum[:]), sum[:]
}

// ofSum returns whose token has a hash. One that is two identities', since a file was replaced, is nobody's.
func (g *Gate) ofSum(sum []byte) (id *Identity) {
	var names []string
	for i := range g.tokens {
		if now, ok := g.tokens[i].current(); ok && subtle.ConstantTimeCompare(now[:], sum) == 1 {
			id = g.tokens[i].id
			names = append(names, id.Name)
		}
	}
	if len(names) < 2 {
		return id
	}
	if said := strings.Join(names, ", "); g.twins.Swap(said) != said {
		g.log.Warn("tokens are the same, and not valid until they differ", "tokens", said)
	}
	return nil
}

// identify returns who a bearer token is.
func (g *Gate) identify(ctx context.Context, token string) (*Identity, error) {
	if id, _ := g.known(token); id != nil {
		return id, nil
	}
	if g.oidc == nil || len(token) > maxToken || strings.Count(token, ".") != 2 {
		return nil, errRefused
	}
	claims, err := g.oidc.bearer.Verify(ctx, token)
	if err != nil {
		return nil, err
	}
	return g.oidc.identity(g.oidc.facts(claims))
}

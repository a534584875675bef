package access

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"sync"
	"time"
)

// session is what the console's cookie holds. It has no roles: those are looked up at each request, so that a token that was removed,
// or a rule, ends them.
type session struct {
	ID      string `json:"i"`
	Expires int64  `json:"e"`           // seconds since 1970
	Token   []byte `json:"t,omitempty"` // the hash of the token that logged in, or:
	Facts   *facts `json:"f,omitempty"` // what the issuer said
}

// flow is a login by OIDC on its way, in a cookie of its own.
type flow struct {
	Expires  int64  `json:"e"`
	State    string `json:"s"`
	Nonce    string `json:"n"`
	Verifier string `json:"v"` // of PKCE
	Next     string `json:"x"`
}

const (
	sessionCookie = "streaming-session"
	flowCookie    = "streaming-login"
	flowTime      = 10 * time.Minute
	maxCookie     = 3800 // bytes: browsers keep 4096 with name and attributes
	maxRevoked    = 10000
)

// sealer encrypts and authenticates cookies.
type sealer struct {
	aead    cipher.AEAD
	purpose string
}

func newSealer(key []byte, purpose string) (*sealer, error) {
	if key == nil {
		key = make([]byte, 32)
		rand.Read(key)
	}
	if len(key) < 32 {
		return nil, fmt.Errorf("the key that seals cookies has %d bytes: must have 32 or more", len(key))
	}
	derived, err := hkdf.Key(sha256.New, key, nil, "streaming-snapshotter console cookies", 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(derived)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	return &sealer{aead, purpose}, err
}

// close returns the cookie's value. Cookies of one name are not valid under another, nor those of another issuer.
func (s *sealer) close(name string, v any) (string, error) {
	plain, err := json.Marshal(v)
	if err != nil {
		return "", err
	}
	sealed := base64.RawURLEncoding.EncodeToString(s.aead.Seal(nil, nil, plain, []byte(name+" "+s.purpose)))
	if len(sealed) > maxCookie {
		return "", errors.New("too many of the identity's claims have rules: they do not fit into a cookie")
	}
	return sealed, nil
}

func (s *sealer) open(name, value string, v any) bool {
	if len(value) > maxCookie {
		return false
	}
	sealed, err := base64.RawURLEncoding.DecodeString(value)
	if err != nil {
		return false
	}
	plain, err := s.aead.Open(nil, nil, sealed, []byte(name+" "+s.purpose))
	return err == nil && json.Unmarshal(plain, v) == nil
}

// cookieName returns the name in r's scheme. With __Host- no other host and no page without TLS can set it.
func (g *Gate) cookieName(r *http.Request, name string) string {
	if g.https(r) {
		return "__Host-" + name
	}
	return name
}

func (g *Gate) https(r *http.Request) bool {
	if g.url != nil {
		return g.url.Scheme == "https"
	}
	return r.TLS != nil
}

// setCookie seals v into a cookie; one without value deletes it.
func (g *Gate) setCookie(w http.ResponseWriter, r *http.Request, name string, v any, lasts time.Duration, same http.SameSite) error {
	c := &http.Cookie{
		Name: g.cookieName(r, name), Path: "/", MaxAge: int(lasts / time.Second), HttpOnly: true, Secure: g.https(r), SameSite: same,
	}
	if v == nil {
		c.MaxAge = -1
	} else {
		var err error
		if c.Value, err = g.seal.close(name, v); err != nil {
			return err
		}
	}
	http.SetCookie(w, c)
	return nil
}

// cookie opens the first cookie of the name that is ours: on a host that others share, theirs may come before.
func (g *Gate) cookie(r *http.Request, name string, v any) bool {
	for i, c := range r.CookiesNamed(g.cookieName(r, name)) {
		if i < 4 && g.seal.open(name, c.Value, v) {
			return true
		}
	}
	return false
}

// admit begins a session.
func (g *Gate) admit(w http.ResponseWriter, r *http.Request, s session) error {
	s.ID, s.Expires = rand.Text(), g.now().Add(g.session).Unix()
	return g.setCookie(w, r, sessionCookie, s, g.session, http.SameSiteStrictMode)
}

// visitor returns whose session r is of, or nil.
func (g *Gate) visitor(r *http.Request) (*Identity, *session) {
	var s session
	if !g.cookie(r, sessionCookie, &s) || g.now().Unix() >= s.Expires || g.revoked.has(s.ID) {
		return nil, nil
	}
	if s.Facts == nil {
		return g.ofSum(s.Token), &s
	}
	if g.oidc == nil {
		return nil, nil
	}
	id, err := g.oidc.identity(*s.Facts)
	if err != nil {
		return nil, nil
	}
	return id, &s
}

// revoked are sessions that ended before their time, in this process: another replica believes a copy of a cookie that somebody logged
// out until it expires.
type revoked struct {
	mu    sync.Mutex
	until map[string]int64 // session to its expiry, seconds since 1970
}

func (x *revoked) has(id string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	_, ok := x.until[id]
	return ok
}

// add makes room for one more where there is none: it forgets those that have expired, or else the one that will first.
func (x *revoked) add(s *session, now time.Time) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.until) >= maxRevoked {
		first, soonest := "", int64(math.MaxInt64)
		for id, until := range x.until {
			if until <= now.Unix() {
				delete(x.until, id)
			} else if until < soonest {
				first, soonest = id, until
			}
		}
		if len(x.until) >= maxRevoked {
			delete(x.until, first)
		}
	}
	if x.until == nil {
		x.until = map[string]int64{}
	}
	x.until[s.ID] = s.Expires
}

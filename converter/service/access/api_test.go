package access

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access/oidctest"
)

func gate(t *testing.T, c Config) *Gate {
	t.Helper()
	g, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// who answers with who asks.
var who = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	id := From(r.Context())
	fmt.Fprintf(w, "%s %s %v", id.Kind, id.Name, id.Grants)
})

// call asks a handler; the headers are pairs.
func call(h http.Handler, method, target string, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, nil)
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "Host" {
			r.Host = headers[i+1]
		} else if headers[i] == "Remote" {
			r.RemoteAddr = headers[i+1]
		} else {
			r.Header.Add(headers[i], headers[i+1])
		}
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func bearer(token string) []string { return []string{"Authorization", "Bearer " + token} }

// message returns the error's code and message.
func message(t *testing.T, w *httptest.ResponseRecorder) string {
	t.Helper()
	var body struct {
		Errors []struct{ Code, Message string }
	}
	if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil || len(body.Errors) != 1 {
		t.Fatalf("%d %q is no error: %v", w.Code, w.Body, err)
	}
	return body.Errors[0].Code + " " + body.Errors[0].Message
}

func TestTokens(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("file-0123456789abcdef0123456789\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h := gate(t, Config{Tokens: append(tokens(), Token{Name: "file", File: file, Grants: []Grant{{Role: Writer}}})}).API(who)
	basic := func(password string) []string {
		return []string{"Authorization", "Basic " + base64.StdEncoding.EncodeToString([]byte("00000000:"+password))}
	}
	for n, c := range []struct {
		name    string
		headers []string
		want    string // the body, or the error's code
	}{
		{"a hash", bearer(tokenOfOwner), "token root [{owner  }]"},
		{"another", bearer(tokenOfReader), "token ci [{reader a.example.com team/*}]"},
		{"a file", bearer("file-0123456789abcdef0123456789"), "token file [{writer  }]"},
		{"lower case", []string{"Authorization", "bearer " + tokenOfOwner}, "token root [{owner  }]"},
		{"basic", basic(tokenOfOwner), "token root [{owner  }]"},
		{"basic, wrong", basic("x" + tokenOfOwner), "UNAUTHORIZED"},
		{"none", nil, "UNAUTHORIZED"},
		{"empty", bearer(""), "UNAUTHORIZED"},
		{"a hash as a token", bearer(sum(tokenOfOwner)), "UNAUTHORIZED"},
		{"longer", bearer(tokenOfOwner + "x"), "UNAUTHORIZED"},
		{"shorter", bearer(tokenOfOwner[1:]), "UNAUTHORIZED"},
		{"other case", bearer(strings.ToUpper(tokenOfOwner)), "UNAUTHORIZED"},
		{"very long", bearer(strings.Repeat("x", maxToken+1)), "UNAUTHORIZED"},
		{"another scheme", []string{"Authorization", "Token " + tokenOfOwner}, "UNAUTHORIZED"},
		{"two headers", append(bearer(tokenOfOwner), bearer(tokenOfReader)...), "UNAUTHORIZED"},
		{"a cookie", []string{"Cookie", "streaming-session=" + tokenOfOwner}, "UNAUTHORIZED"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := call(h, "GET", "/v1/x", append(c.headers, "Remote", fmt.Sprintf("192.0.2.%d:1", n))...)
			got := w.Body.String()
			if w.Code == 401 {
				got, _, _ = strings.Cut(message(t, w), " ")
			}
			if got != c.want {
				t.Errorf("%d %q, want %q", w.Code, got, c.want)
			}
			if w.Code == 401 && w.Header().Get("WWW-Authenticate") != `Bearer realm="streaming"` {
				t.Errorf("WWW-Authenticate: %q", w.Header().Get("WWW-Authenticate"))
			}
			for _, name := range []string{"X-Request-Id", "X-Ms-Correlation-Request-Id"} {
				if len(w.Header().Get(name)) < 16 {
					t.Errorf("%s: %q", name, w.Header().Get(name))
				}
			}
			for name, want := range map[string]string{
				"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
			} {
				if got := w.Header().Get(name); got != want {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			}
		})
	}
}

// What fails costs little and fills no log, and refuses nobody else.
func TestFailuresAreCounted(t *testing.T) {
	var log bytes.Buffer
	g := gate(t, Config{Tokens: tokens(), Audit: &log})
	now := time.Now()
	g.now = func() time.Time { return now }
	h := g.API(who)
	wrong, here := append(bearer("wrong-0123456789abcdef"), "Remote", "192.0.2.1:1"), []string{"Remote", "192.0.2.1:2"}
	for i := range attemptBurst + 3 {
		want := 401
		if i >= attemptBurst {
			want = 429
		}
		if w := call(h, "GET", "/v1/x", wrong...); w.Code != want || want == 429 && w.Header().Get("Retry-After") == "" {
			t.Fatalf("attempt %d: %d %v, want %d", i, w.Code, w.Header(), want)
		}
	}
	if n := strings.Count(log.String(), "\n"); n != attemptBurst {
		t.Errorf("%d lines, want %d", n, attemptBurst)
	}
	if w := call(h, "GET", "/v1/x", append(bearer(tokenOfOwner), here...)...); w.Code != 200 {
		t.Errorf("a valid token from the address: %d", w.Code)
	}
	if w := call(h, "GET", "/v1/x", here...); w.Code != 401 {
		t.Errorf("no token from the address: %d", w.Code)
	}
	if w := call(h, "GET", "/v1/x", append(wrong[:2:2], "Remote", "192.0.2.2:1")...); w.Code != 401 {
		t.Errorf("another address: %d", w.Code)
	}
	now = now.Add(attemptInterval)
	if w := call(h, "GET", "/v1/x", wrong...); w.Code != 401 {
		t.Errorf("later: %d", w.Code)
	}
}

func TestAttemptsAreBounded(t *testing.T) {
	var a attempts
	now := time.Now()
	for i := range 5 * maxAddresses {
		a.allow(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), now)
	}
	if n := len(a.young) + len(a.old); n > 2*maxAddresses {
		t.Errorf("%d addresses are remembered", n)
	}
	// The hosts of an IPv6 network are as many as somebody likes.
	for i := range attemptBurst + 1 {
		if got := a.allow(netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", i+1)), now); got != (i < attemptBurst) {
			t.Errorf("attempt %d of the network: %v", i, got)
		}
	}
	// One that goes on is not forgotten by the change of generations.
	for i := range maxAddresses {
		a.allow(netip.AddrFrom4([4]byte{11, 0, byte(i >> 8), byte(i)}), now)
	}
	if a.allow(netip.MustParseAddr("2001:db8::ffff"), now) {
		t.Error("the network is forgotten")
	}
}

func issuerConfig(i *oidctest.Issuer) *OIDC {
	return &OIDC{
		Issuer: i.URL, Audiences: []string{"streaming", "other-name"},
		Rules: []Rule{
			{"groups", "admins", []Grant{{Role: Owner}}},
			{"realm_access.roles", "see-*", []Grant{{Role: Reader, Repository: "seen/*"}}},
			{"email", "*@example.com", []Grant{{Role: Writer}}},
			{"sub", "system:serviceaccount:ci:*", []Grant{{Role: Writer, Repository: "ci/*"}}},
		},
	}
}

func TestOIDCBearer(t *testing.T) {
	i := oidctest.Start(t)
	h := gate(t, Config{Tokens: tokens(), OIDC: issuerConfig(i)}).API(who)
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	with := func(changes ...any) map[string]any {
		c := map[string]any{"sub": "42", "aud": "streaming", "groups": []string{"users", "admins"}, "preferred_username": "ada"}
		for i := 0; i < len(changes); i += 2 {
			c[changes[i].(string)] = changes[i+1]
		}
		return c
	}
	es256 := map[string]any{"alg": "ES256"}
	const owner = "oidc ada [{owner  }]"
	for n, c := range []struct {
		name, token string
		status      int
		want        string // of the body
	}{
		{"valid", i.Token(with()), 200, owner},
		{"of several audiences", i.Token(with("aud", []string{"x", "other-name"})), 200, owner},
		{"one group, as a string", i.Token(with("groups", "admins")), 200, owner},
		{"nested", i.Token(with("groups", nil, "realm_access", map[string]any{"roles": []any{1, "see-all"}})), 200, "oidc ada [{reader  seen/*}]"},
		{"a service account", i.Token(with("groups", nil, "preferred_username", nil, "sub", "system:serviceaccount:ci:x")), 200,
			"oidc system:serviceaccount:ci:x [{writer  ci/*}]"},
		{"a verified email", i.Token(with("groups", nil, "preferred_username", nil, "email", "ada@example.com", "email_verified", true)), 200,
			"oidc ada@example.com [{writer  }]"},
		{"several rules", i.Token(with("email", "ada@example.com", "email_verified", "true")), 200, "oidc ada [{owner  } {writer  }]"},
		{"an email that is not verified", i.Token(with("groups", nil, "email", "ada@example.com", "email_verified", false)), 403, "no rule"},
		{"an email of which nothing is said", i.Token(with("groups", nil, "email", "ada@example.com")), 403, "no rule"},
		{"no rule", i.Token(with("groups", []string{"admin", "adminss"})), 403, "no rule"},
		{"groups that are no strings", i.Token(with("groups", map[string]any{"admins": true})), 403, "no rule"},
		{"expired", i.Token(with("exp", time.Now().Add(-time.Minute).Unix())), 401, "not valid"},
		{"without expiry", i.Token(with("exp", nil)), 401, "not valid"},
		{"not yet valid", i.Token(with("nbf", time.Now().Add(time.Hour).Unix())), 401, "not valid"},
		{"another audience", i.Token(with("aud", "somebody-else")), 401, "not valid"},
		{"a part of the audience", i.Token(with("aud", "stream")), 401, "not valid"},
		{"no audience", i.Token(with("aud", nil)), 401, "not valid"},
		{"another issuer", i.Token(with("iss", "https://issuer.example.com")), 401, "not valid"},
		{"no issuer", i.Token(with("iss", nil)), 401, "not valid"},
		{"no subject", i.Token(with("sub", nil)), 401, "not valid"},
		{"alg none", i.Signed(map[string]any{"alg": "none"}, with(), func(string) []byte { return nil }), 401, "not valid"},
		{"alg None", i.Signed(map[string]any{"alg": "None"}, with(), i.Sign), 401, "not valid"},
		{"no alg", i.Signed(map[string]any{}, with(), i.Sign), 401, "not valid"},
		{"the public key as a secret", i.Signed(map[string]any{"alg": "HS256"}, with(), func(s string) []byte {
			m := hmac.New(sha256.New, i.PublicKey())
			m.Write([]byte(s))
			return m.Sum(nil)
		}), 401, "not valid"},
		{"another's signature", i.Signed(es256, with(), func(s string) []byte { return oidctest.Sign(t, stranger, s) }), 401, "not valid"},
		{"another's key, named in it", i.Signed(map[string]any{"alg": "ES256", "kid": "mine", "jku": "https://example.com/keys"}, with(),
			func(s string) []byte { return oidctest.Sign(t, stranger, s) }), 401, "not valid"},
		{"no signature", i.Signed(es256, with(), func(string) []byte { return nil }), 401, "not valid"},
		{"other claims below the signature", swap(i.Token(with("groups", nil)), i.Token(with())), 401, "not valid"},
		{"nothing in it", "..", 401, "not valid"},
		{"no base64", "a.b!.c", 401, "not valid"},
		{"too long", i.Token(with("x", strings.Repeat("x", maxToken))), 401, "not valid"},
		{"a token of the configuration", tokenOfOwner, 200, "token root [{owner  }]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := call(h, "GET", "/v1/x", append(bearer(c.token), "Remote", fmt.Sprintf("192.0.2.%d:1", n))...)
			if w.Code != c.status || !strings.Contains(w.Body.String(), c.want) {
				t.Errorf("%d %s, want %d %q", w.Code, w.Body, c.status, c.want)
			}
		})
	}
	if n := i.Asked("/.well-known/openid-configuration"); n != 1 {
		t.Errorf("the discovery document was read %d times", n)
	}
}

// However many tokens name keys that nobody has, the issuer is not asked for its keys for each.
func TestForgedTokensAreNoLoad(t *testing.T) {
	i := oidctest.Start(t)
	h := gate(t, Config{OIDC: issuerConfig(i)}).API(who)
	begin := time.Now()
	for n := range 10 * issuerBurst {
		forged := i.Signed(map[string]any{"alg": "ES256", "kid": fmt.Sprint(n)}, map[string]any{"sub": "1", "aud": "streaming", "groups": "admins"}, i.Sign)
		if w := call(h, "GET", "/", bearer(forged)...); w.Code != 401 && w.Code != 429 && w.Code != 503 {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
	}
	if n, most := i.Asked("/keys"), issuerBurst+1+int(time.Since(begin)/issuerInterval); n > most {
		t.Errorf("the keys were read %d times, want %d at most", n, most)
	}
}

// While forged tokens use up what the issuer is asked, a token by a new key is not called invalid: its sender asks again.
func TestRotationWhileTokensAreForged(t *testing.T) {
	i := oidctest.Start(t)
	h := gate(t, Config{OIDC: issuerConfig(i)}).API(who)
	for n := range 2 * issuerBurst {
		forged := i.Signed(map[string]any{"alg": "ES256", "kid": fmt.Sprint(n)}, map[string]any{"sub": "1", "aud": "streaming", "groups": "admins"}, i.Sign)
		call(h, "GET", "/", append(bearer(forged), "Remote", "192.0.2.1:1")...)
	}
	i.Rotate()
	w := call(h, "GET", "/", append(bearer(i.Token(map[string]any{"sub": "42", "aud": "streaming", "groups": "admins"})), "Remote", "192.0.2.2:1")...)
	if w.Code != 200 && (w.Code != 503 || w.Header().Get("Retry-After") == "") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

// swap returns the second token with the first one's signature.
func swap(signed, other string) string {
	return other[:strings.LastIndex(other, ".")] + signed[strings.LastIndex(signed, "."):]
}

func TestKeyRotation(t *testing.T) {
	i := oidctest.Start(t)
	h := gate(t, Config{OIDC: issuerConfig(i)}).API(who)
	claims := map[string]any{"sub": "42", "aud": "streaming", "groups": "admins"}
	old := i.Token(claims)
	for range 3 {
		if w := call(h, "GET", "/", bearer(old)...); w.Code != 200 {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
	}
	if n := i.Asked("/keys"); n != 1 {
		t.Errorf("the keys were read %d times", n)
	}
	i.Rotate()
	until(t, h, i.Token(claims), 200)
	until(t, h, old, 401)
}

// until asks until the answer is the wanted one: a request that came while keys were being read is answered by those, and they are the
// known ones a moment later.
func until(t *testing.T, h http.Handler, token string, want int) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; {
		w := call(h, "GET", "/", bearer(token)...)
		if w.Code == want {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d %s, want %d", w.Code, w.Body, want)
		}
	}
}

// An issuer that is down keeps nobody out who does not need it, and is asked again.
func TestIssuerDown(t *testing.T) {
	i := oidctest.Start(t)
	up := false
	var mu sync.Mutex
	o := issuerConfig(i)
	o.Client = &http.Client{Transport: transport(func(r *http.Request) (*http.Response, error) {
		mu.Lock()
		defer mu.Unlock()
		if !up {
			return nil, io.ErrUnexpectedEOF
		}
		return http.DefaultTransport.RoundTrip(r)
	})}
	set := func(v bool) {
		mu.Lock()
		defer mu.Unlock()
		up = v
	}
	var log bytes.Buffer
	h := gate(t, Config{Tokens: tokens(), OIDC: o, Audit: &log}).API(who)
	claims := map[string]any{"sub": "42", "aud": "streaming", "groups": "admins"}
	w := call(h, "GET", "/", bearer(i.Token(claims))...)
	if w.Code != 503 || w.Header().Get("Retry-After") == "" || message(t, w) != "UNAVAILABLE "+ErrIssuer.Error() {
		t.Errorf("no discovery document: %d %s", w.Code, w.Body)
	}
	if w := call(h, "GET", "/", bearer(tokenOfOwner)...); w.Code != 200 {
		t.Errorf("a token of the configuration: %d", w.Code)
	}
	set(true)
	if w := call(h, "GET", "/", bearer(i.Token(claims))...); w.Code != 200 {
		t.Errorf("up again: %d %s", w.Code, w.Body)
	}
	set(false)
	if w := call(h, "GET", "/", bearer(i.Token(claims))...); w.Code != 200 {
		t.Errorf("down, the key being known: %d %s", w.Code, w.Body)
	}
	if log.Len() > 0 {
		t.Errorf("nobody was refused: %s", &log)
	}
	i.Rotate()
	until(t, h, i.Token(claims), 503)
}

type transport func(*http.Request) (*http.Response, error)

func (f transport) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// Without authentication, web pages and proxies are kept out.
func TestLoopback(t *testing.T) {
	g := gate(t, Config{Loopback: true})
	if g.Authenticated() {
		t.Error("is authenticated")
	}
	good := []string{"Host", "127.0.0.1:8080", "Remote", "127.0.0.1:999"}
	for _, c := range []struct {
		name, method string
		headers      []string
		want         int
	}{
		{"127.0.0.1", "GET", good, 200},
		{"a POST by curl", "POST", good, 200},
		{"localhost", "GET", []string{"Host", "LocalHost:8080", "Remote", "127.0.0.1:999"}, 200},
		{"without port", "GET", []string{"Host", "localhost", "Remote", "127.0.0.1:999"}, 200},
		{"IPv6", "GET", []string{"Host", "[::1]:8080", "Remote", "[::1]:999"}, 200},
		{"a name that means 127.0.0.1", "GET", []string{"Host", "evil.example.com:8080", "Remote", "127.0.0.1:999"}, 403},
		{"one that begins like it", "GET", []string{"Host", "127.0.0.1.example.com", "Remote", "127.0.0.1:999"}, 403},
		{"no name", "GET", []string{"Host", "", "Remote", "127.0.0.1:999"}, 403},
		{"from elsewhere", "GET", []string{"Host", "127.0.0.1:8080", "Remote", "192.0.2.1:999"}, 403},
		{"a proxy", "GET", append(good[:4:4], "X-Forwarded-For", "192.0.2.1"), 403},
		{"another proxy", "GET", append(good[:4:4], "Forwarded", "for=192.0.2.1"), 403},
		{"another site's form", "POST", append(good[:4:4], "Sec-Fetch-Site", "cross-site"), 403},
		{"an old browser's", "POST", append(good[:4:4], "Origin", "https://evil.example.com"), 403},
		{"another port's page", "POST", append(good[:4:4], "Sec-Fetch-Site", "same-site", "Origin", "http://127.0.0.1:9090"), 403},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := call(g.API(who), c.method, "/v1/x", c.headers...)
			if w.Code != c.want || w.Code == 200 && w.Body.String() != "loopback loopback [{owner  }]" {
				t.Errorf("the API answers %d %s, want %d", w.Code, w.Body, c.want)
			}
			if c.name == "a POST by curl" {
				return // no browser
			}
			if w := call(g.Browser(who, nil), c.method, "/", c.headers...); w.Code != c.want {
				t.Errorf("the console answers %d %s, want %d", w.Code, w.Body, c.want)
			}
		})
	}
	if w := call(g.Browser(who, nil), "GET", "/login", good...); w.Code != 303 || w.Header().Get("Location") != "/" {
		t.Errorf("/login: %d %s", w.Code, w.Header().Get("Location"))
	}
}

func TestRemoteAddress(t *testing.T) {
	var log bytes.Buffer
	g := gate(t, Config{Tokens: tokens(), Audit: &log, Proxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}})
	h := g.API(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { g.Audit(r.Context(), Entry{Action: "x"}) }))
	for _, c := range []struct{ name, peer, forwarded, id, want, wantID string }{
		{"direct", "192.0.2.1:1", "", "", "192.0.2.1", ""},
		{"not believed", "192.0.2.1:1", "198.51.100.1", "mine", "192.0.2.1", ""},
		{"a proxy", "10.0.0.1:1", "198.51.100.1", "mine-1", "198.51.100.1", "mine-1"},
		{"two proxies", "10.0.0.1:1", "198.51.100.1, 10.0.0.2", "", "198.51.100.1", ""},
		{"what the client wrote", "10.0.0.1:1", "203.0.113.9, 198.51.100.1", "", "198.51.100.1", ""},
		{"no address", "10.0.0.1:1", "198.51.100.1, unknown", "", "10.0.0.1", ""},
		{"no forwarding", "10.0.0.1:1", "", "a b", "10.0.0.1", ""},
		{"with a port", "10.0.0.1:1", "198.51.100.1:4711", "", "198.51.100.1", ""},
		{"IPv6 with a port", "10.0.0.1:1", "[2001:db8::1]:4711", "", "2001:db8::1", ""},
		{"IPv6", "[fd00::1]:1", "2001:db8::1", strings.Repeat("x", 65), "2001:db8::1", ""},
		{"IPv4 in IPv6", "[::ffff:10.0.0.1]:1", "::ffff:198.51.100.1", "", "198.51.100.1", ""},
		{"a socket", "@", "198.51.100.1", "", "", ""},
	} {
		log.Reset()
		w := call(h, "GET", "/", append(bearer(tokenOfOwner), "Remote", c.peer, "X-Forwarded-For", c.forwarded, "X-Request-Id", c.id)...)
		var line record
		if err := json.Unmarshal(log.Bytes(), &line); err != nil {
			t.Fatal(err)
		}
		if line.Remote != c.want {
			t.Errorf("%s: %q, want %q", c.name, line.Remote, c.want)
		}
		if id := w.Header().Get("X-Request-Id"); id != line.Request || id == "" || (id == c.id) != (c.wantID != "") {
			t.Errorf("%s: request ID %q, logged %q", c.name, id, line.Request)
		}
	}
}

func TestAudit(t *testing.T) {
	var log bytes.Buffer
	g := gate(t, Config{Tokens: tokens(), Audit: &log})
	now := time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)
	g.now = func() time.Time { return now }
	h := g.API(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.Audit(r.Context(), Entry{Action: "delete", Registry: "a", Repository: "team/app", Target: "sha256:x", Outcome: OutcomeFailed, Detail: "a\nb\x1b[31m" + strings.Repeat("ä", maxField)})
	}))
	call(h, "GET", "/v1/x", append(bearer(tokenOfReader), "Remote", "192.0.2.1:1")...)
	call(h, "GET", "/v1/x?token="+tokenOfOwner, append(bearer("wrong-"+tokenOfOwner), "Remote", "192.0.2.1:1")...)
	lines := strings.Split(strings.TrimSuffix(log.String(), "\n"), "\n")
	if len(lines) != 2 {
		t.Fatalf("lines %q", lines)
	}
	var got []record
	for _, l := range lines {
		var r record
		if err := json.Unmarshal([]byte(l), &r); err != nil {
			t.Fatal(err)
		}
		if r.Request == "" {
			t.Errorf("no request ID: %s", l)
		}
		if len(r.Detail) > 3*maxField {
			t.Errorf("a detail of %d bytes", len(r.Detail))
		}
		r.Request, r.Detail = "", r.Detail[:min(8, len(r.Detail))]
		got = append(got, r)
	}
	want := []record{
		{Time: now, Who: "ci", Kind: "token", Action: "delete", Registry: "a", Repository: "team/app", Target: "sha256:x", Outcome: "failed", Detail: "a\uFFFDb\uFFFD"[:8], Remote: "192.0.2.1"},
		{Time: now, Kind: "nobody", Action: "authenticate", Target: "/v1/x", Outcome: "denied", Detail: "the toke", Remote: "192.0.2.1"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	for _, secret := range []string{tokenOfOwner, tokenOfReader, "\x1b"} {
		if strings.Contains(log.String(), secret) {
			t.Errorf("%q is in the log: %s", secret, &log)
		}
	}
}

// A body has a bound, whoever sends it.
func TestBodiesAreBounded(t *testing.T) {
	var read int64
	h := gate(t, Config{Tokens: tokens()}).API(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		read, _ = io.Copy(io.Discard, r.Body)
	}))
	r := httptest.NewRequest("POST", "/v1/x", strings.NewReader(strings.Repeat("x", 2*maxBody)))
	r.Header.Set("Authorization", "Bearer "+tokenOfOwner)
	h.ServeHTTP(httptest.NewRecorder(), r)
	if read != maxBody {
		t.Errorf("%d bytes were read", read)
	}
}

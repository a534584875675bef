package access

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access/oidctest"
)

// site is a console on a server of its own, and a browser that does not follow redirects by itself.
type site struct {
	*httptest.Server
	t      *testing.T
	gate   *Gate
	client *http.Client
}

// start runs the console of config, whose URL becomes the server's when it is "self".
func start(t *testing.T, tls bool, config func(url string) Config) *site {
	t.Helper()
	var h http.Handler
	s := &site{t: t, Server: httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { h.ServeHTTP(w, r) }))}
	if tls {
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(s.Close)
	s.gate = gate(t, config(s.URL))
	h = s.gate.Browser(who, nil)
	s.forget()
	return s
}

// forget makes it a browser without cookies.
func (s *site) forget() {
	jar, err := cookiejar.New(nil)
	if err != nil {
		s.t.Fatal(err)
	}
	s.client = &http.Client{Transport: s.Client().Transport, Jar: jar, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

func (s *site) get(target string, headers ...string) (*http.Response, string) {
	return s.do("GET", target, nil, headers...)
}

// post sends a form as the console's own page does.
func (s *site) post(path string, form url.Values) (*http.Response, string) {
	return s.do("POST", path, form, "Origin", s.URL, "Sec-Fetch-Site", "same-origin")
}

func (s *site) do(method, target string, form url.Values, headers ...string) (*http.Response, string) {
	s.t.Helper()
	if strings.HasPrefix(target, "/") {
		target = s.URL + target
	}
	r, err := http.NewRequest(method, target, strings.NewReader(form.Encode()))
	if err != nil {
		s.t.Fatal(err)
	}
	if form != nil {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := s.client.Do(r)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp, string(body)
}

func (s *site) login(token string) *http.Response {
	s.t.Helper()
	resp, body := s.post("/login", url.Values{"token": {token}, "next": {"/images?q=1"}})
	if resp.StatusCode != 303 || resp.Header.Get("Location") != "/images?q=1" {
		s.t.Fatalf("login: %d %v %s", resp.StatusCode, resp.Header, body)
	}
	return resp
}

// is checks who the console takes the browser for; "" is nobody.
func (s *site) is(want string) {
	s.t.Helper()
	resp, body := s.get("/x")
	if want == "" && (resp.StatusCode != 303 || resp.Header.Get("Location") != "/login?next=%2Fx") || want != "" && body != want {
		s.t.Errorf("is %d %q, want %q", resp.StatusCode, body, want)
	}
}

const isCI = "token ci [{reader a.example.com team/*}]"

func TestLoginByToken(t *testing.T) {
	for _, tls := range []bool{false, true} {
		t.Run(fmt.Sprintf("tls=%v", tls), func(t *testing.T) {
			s := start(t, tls, func(string) Config { return Config{Tokens: tokens()} })
			s.is("")
			if resp, body := s.get("/login?next=/images"); resp.StatusCode != 200 || !strings.Contains(body, `value="/images"`) || strings.Contains(body, "alert") {
				t.Errorf("login page: %d %s", resp.StatusCode, body)
			}
			if resp, body := s.post("/login", url.Values{"token": {tokenOfReader + "x"}}); resp.StatusCode != 401 || !strings.Contains(body, "not known") || len(resp.Cookies()) > 0 {
				t.Errorf("wrong token: %d %s", resp.StatusCode, body)
			}
			cookies := s.login(" " + tokenOfReader + "\n").Cookies()
			want := map[bool]string{true: "__Host-streaming-session", false: "streaming-session"}[tls]
			if len(cookies) != 1 || cookies[0].Name != want || cookies[0].Secure != tls || !cookies[0].HttpOnly || cookies[0].SameSite != http.SameSiteStrictMode ||
				cookies[0].Path != "/" || cookies[0].Domain != "" || cookies[0].MaxAge != 8*60*60 {
				t.Errorf("cookies %v", cookies)
			}
			if strings.Contains(cookies[0].Value, tokenOfReader) {
				t.Error("the cookie has the token")
			}
			s.is(isCI)
			if resp, _ := s.get("/login?next=/images"); resp.StatusCode != 303 || resp.Header.Get("Location") != "/images" {
				t.Errorf("logged in already: %d %v", resp.StatusCode, resp.Header)
			}
		})
	}
}

// Sessions survive the process and end with their time, their token, and a logout.
// A token is renewed by replacing its file, and taken away by removing it: for who asks with it, and who has logged in with it.
func TestTokenFiles(t *testing.T) {
	const first, second, twin = "first-0123456789abcdef", "other-0123456789abcdef", "twin-0123456789abcdef"
	file := filepath.Join(t.TempDir(), "token")
	write := func(token string) {
		t.Helper()
		if err := os.WriteFile(file+".new", []byte(token+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	write(first)
	s := start(t, false, func(string) Config {
		return Config{Tokens: []Token{
			{Name: "ci", File: file, Grants: []Grant{{Role: Writer}}},
			{Name: "other", SHA256: sum(twin), Grants: []Grant{{Role: Reader}}},
		}}
	})
	api := s.gate.API(who)
	asks := func(token string, want int) {
		t.Helper()
		if w := call(api, "GET", "/", bearer(token)...); w.Code != want {
			t.Errorf("%s: %d, want %d", token, w.Code, want)
		}
	}
	asks(first, 200)
	s.login(first)
	s.is("token ci [{writer  }]")
	write(second)
	asks(first, 401)
	asks(second, 200)
	s.is("")
	s.login(second)
	write("short")
	asks("short", 401)
	asks(twin, 200)
	write(twin) // whose it is cannot be said
	asks(twin, 401)
	write(second)
	asks(twin, 200)
	s.is("token ci [{writer  }]")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	asks(second, 401)
	s.is("")
}

func TestSessions(t *testing.T) {
	key := bytes.Repeat([]byte{7}, 32)
	config := Config{Tokens: tokens(), Key: key, Session: time.Hour}
	s := start(t, false, func(string) Config { return config })
	cookie := s.login(tokenOfReader).Cookies()[0]
	// at says who a gate of the configuration takes the cookie's bearer for, after a time.
	at := func(g *Gate, after time.Duration, value string) string {
		g.now = func() time.Time { return time.Now().Add(after) }
		w := call(g.Browser(who, nil), "GET", "/x", "Cookie", "streaming-session=other; streaming-session="+value)
		if w.Code == 303 {
			return ""
		}
		return w.Body.String()
	}
	without := config
	without.Tokens = config.Tokens[:1]
	renewed := config
	renewed.Tokens = []Token{config.Tokens[0], {Name: "ci", SHA256: sum("another token of ci's"), Grants: config.Tokens[1].Grants}}
	more := config
	more.Tokens = []Token{config.Tokens[0], {Name: "ci", SHA256: sum(tokenOfReader), Grants: []Grant{{Role: Writer}}}}
	otherKey, random := config, config
	otherKey.Key, random.Key = bytes.Repeat([]byte{8}, 32), nil
	flipped := []byte(cookie.Value)
	flipped[len(flipped)/2] ^= 1
	flow, err := s.gate.seal.close(flowCookie, session{ID: "x", Expires: time.Now().Add(time.Hour).Unix(), Token: s.gate.tokens[0].sum[:]})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		config Config
		after  time.Duration
		value  string
		want   string
	}{
		{"another process", config, 0, cookie.Value, isCI},
		{"just before its end", config, 59 * time.Minute, cookie.Value, isCI},
		{"at its end", config, 61 * time.Minute, cookie.Value, ""},
		{"its token is gone", without, 0, cookie.Value, ""},
		{"its token was renewed", renewed, 0, cookie.Value, ""},
		{"its role was changed", more, 0, cookie.Value, "token ci [{writer  }]"},
		{"another key", otherKey, 0, cookie.Value, ""},
		{"a random key", random, 0, cookie.Value, ""},
		{"a flipped bit", config, 0, string(flipped), ""},
		{"shortened", config, 0, cookie.Value[:len(cookie.Value)-4], ""},
		{"very long", config, 0, cookie.Value + strings.Repeat("A", maxCookie), ""},
		{"empty", config, 0, "", ""},
		{"another of our cookies", config, 0, flow, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := at(gate(t, c.config), c.after, c.value); got != c.want {
				t.Errorf("is %q, want %q", got, c.want)
			}
		})
	}
	if resp, _ := s.get("/logout"); resp.StatusCode != 200 {
		t.Errorf("GET /logout is the console's: %d", resp.StatusCode)
	}
	s.is(isCI)
	if resp, _ := s.post("/logout", nil); resp.StatusCode != 303 || len(resp.Cookies()) != 1 || resp.Cookies()[0].MaxAge >= 0 {
		t.Errorf("logout: %d %v", resp.StatusCode, resp.Cookies())
	}
	s.is("")
	if got := at(s.gate, 0, cookie.Value); got != "" {
		t.Errorf("a copy of the cookie that was logged out is still %q", got)
	}
}

func TestRevokedAreBounded(t *testing.T) {
	var x revoked
	now := time.Unix(1000, 0)
	for i := range maxRevoked + 10 {
		x.add(&session{ID: fmt.Sprint(i), Expires: 2000 + int64(i)}, now)
	}
	if len(x.until) != maxRevoked || x.has("0") || !x.has(fmt.Sprint(maxRevoked+9)) {
		t.Errorf("%d are remembered, the first: %v", len(x.until), x.has("0"))
	}
	x.add(&session{ID: "late", Expires: 1e9}, time.Unix(1e8, 0))
	if len(x.until) != 1 {
		t.Errorf("%d are remembered of those that have expired", len(x.until))
	}
}

func TestLoginAttemptsAreBounded(t *testing.T) {
	s := start(t, false, func(string) Config { return Config{Tokens: tokens()} })
	now := time.Now()
	s.gate.now = func() time.Time { return now }
	for range attemptBurst {
		if resp, _ := s.post("/login", url.Values{"token": {"wrong-0123456789abcdef"}}); resp.StatusCode != 401 {
			t.Fatal(resp.Status)
		}
	}
	if resp, body := s.post("/login", url.Values{"token": {"wrong-0123456789abcdef"}}); resp.StatusCode != 429 || !strings.Contains(body, "too many attempts") || len(resp.Cookies()) > 0 {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	s.login(tokenOfReader) // whoever else has this address
	s.is(isCI)
}

// Another site's page cannot make a browser do anything, in whose session it may be.
func TestForgedRequests(t *testing.T) {
	s := start(t, false, func(string) Config { return Config{Tokens: tokens()} })
	s.login(tokenOfOwner)
	const isRoot = "token root [{owner  }]"
	for _, c := range []struct {
		name    string
		headers []string
		want    int
	}{
		{"its own page", []string{"Sec-Fetch-Site", "same-origin"}, 200},
		{"its own page in an old browser", []string{"Origin", s.URL}, 200},
		{"another site's", []string{"Sec-Fetch-Site", "cross-site", "Origin", "https://evil.example.com"}, 403},
		{"another site's in an old browser", []string{"Origin", "https://evil.example.com"}, 403},
		{"another host of the domain", []string{"Sec-Fetch-Site", "same-site", "Origin", "http://other." + strings.TrimPrefix(s.URL, "http://")}, 403},
		{"another port", []string{"Origin", "http://127.0.0.1:1"}, 403},
		{"a sandboxed frame", []string{"Origin", "null"}, 403},
		{"no browser", nil, 403},
	} {
		for _, method := range []string{"POST", "PUT", "PATCH", "DELETE"} {
			for _, path := range []string{"/x", "/login", "/logout", "/static/x"} {
				resp, body := s.do(method, path, url.Values{"a": {"b"}}, c.headers...)
				if c.want == 403 && resp.StatusCode != 403 || path == "/x" && resp.StatusCode != c.want || c.want == 403 && strings.Contains(body, isRoot) {
					t.Errorf("%s: %s %s: %d %s, want %d", c.name, method, path, resp.StatusCode, body, c.want)
				}
			}
			if c.want == 403 {
				s.is(isRoot)
			} else if method == "POST" {
				s.login(tokenOfOwner) // its own page's /logout has worked
			}
		}
	}
}

// Behind a proxy that gives the service another host name, the URL of the configuration is its own.
func TestOriginBehindAProxy(t *testing.T) {
	g := gate(t, Config{Tokens: tokens(), URL: "https://convert.example.com"})
	for origin, want := range map[string]int{"https://convert.example.com": 401, "https://evil.example.com": 403, "http://convert.example.com": 403} {
		if w := call(g.Browser(who, nil), "POST", "/x", "Host", "10.0.0.1:8080", "Origin", origin); w.Code != want {
			t.Errorf("%s: %d, want %d", origin, w.Code, want)
		}
	}
}

// Every answer has the headers that keep pages and scripts of others out.
func TestHeaders(t *testing.T) {
	g := gate(t, Config{Tokens: tokens(), URL: "https://convert.example.com"})
	b := g.Browser(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, StaticPrefix) {
			w.Header().Set("Cache-Control", "max-age=3600")
		}
	}), nil)
	for _, c := range []struct {
		method, path string
		status       int
	}{
		{"GET", "/", 303}, {"GET", "/login", 200}, {"GET", "/static/app.css", 200}, {"POST", "/x", 403}, {"GET", "/login/oidc", 303},
		{"GET", "/static/../x", 307},
	} {
		w := call(b, c.method, c.path)
		if w.Code != c.status && !(c.status == 307 && w.Code == 301) {
			t.Errorf("%s %s: %d, want %d", c.method, c.path, w.Code, c.status)
		}
		cache := "no-store"
		if c.path == "/static/app.css" {
			cache = "max-age=3600"
		}
		for name, want := range map[string]string{
			"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "same-origin",
			"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": cache,
			"Strict-Transport-Security": "max-age=31536000",
		} {
			if got := w.Header().Get(name); got != want {
				t.Errorf("%s %s: %s: %q, want %q", c.method, c.path, name, got, want)
			}
		}
	}
	if strings.Contains(policy, "unsafe") || strings.Contains(policy, "*") || strings.Contains(policy, "data:") || !strings.HasPrefix(policy, "default-src 'none'") {
		t.Errorf("policy %q", policy)
	}
	if w := call(gate(t, Config{Tokens: tokens()}).Browser(who, nil), "GET", "/login"); w.Header().Get("Strict-Transport-Security") != "" {
		t.Error("HSTS of a service whose URL is not known")
	}
}

func TestWithoutSession(t *testing.T) {
	h := gate(t, Config{Tokens: tokens()}).Browser(who, nil)
	for _, c := range []struct {
		name, method string
		headers      []string
		status       int
		want         string // in Location or body
	}{
		{"a navigation", "GET", []string{"Sec-Fetch-Mode", "navigate", "Sec-Fetch-Site", "none"}, 303, "/login?next=%2Fimages%3Fq%3D1"},
		{"an old browser's", "GET", nil, 303, "/login?next=%2Fimages%3Fq%3D1"},
		// The cookie may be there, but is not sent when another site's link leads here.
		{"another site's link", "GET", []string{"Sec-Fetch-Mode", "navigate", "Sec-Fetch-Site", "cross-site"}, 200, `content="0; url=/images?q=1"`},
		{"a fetch", "GET", []string{"Sec-Fetch-Mode", "cors", "Sec-Fetch-Site", "same-origin"}, 401, "Log in"},
		{"a form", "POST", []string{"Sec-Fetch-Mode", "navigate", "Sec-Fetch-Site", "same-origin"}, 401, "Log in"},
	} {
		w := call(h, c.method, "/images?q=1", c.headers...)
		if w.Code != c.status || !strings.Contains(w.Header().Get("Location")+w.Body.String(), c.want) {
			t.Errorf("%s: %d %v %s, want %d %q", c.name, w.Code, w.Header(), w.Body, c.status, c.want)
		}
	}
	if w := call(h, "GET", "/static/app.css"); w.Body.String() != "  []" {
		t.Errorf("static files are served to %q", w.Body)
	}
}

func TestNextStaysInside(t *testing.T) {
	for next, want := range map[string]string{
		"/": "/", "/images?q=a%2Fb&x=1": "/images?q=a%2Fb&x=1", "/a//b": "/a//b", "": "/", "images": "/", "//evil.example.com": "/", "///evil.example.com": "/",
		`/\evil.example.com`: "/", `\\evil.example.com`: "/", "https://evil.example.com/": "/", "javascript:alert(1)": "/", "/a\nb": "/", "/\t/evil.example.com": "/",
		`/"><script>`: "/", "/'": "/", "/login": "/", "/login/oidc?next=/": "/", "/logout": "/", "/loginx": "/loginx", "/" + strings.Repeat("x", 1024): "/",
	} {
		if got := inside(next); got != want {
			t.Errorf("inside(%q) = %q, want %q", next, got, want)
		}
	}
}

func TestLoginByOIDC(t *testing.T) {
	i := oidctest.Start(t)
	user := map[string]any{"sub": "42", "preferred_username": "ada", "groups": []string{"admins", "users"}}
	o := issuerConfig(i)
	o.ClientID, o.ClientSecret = oidctest.ClientID, oidctest.Secret
	s := start(t, false, func(url string) Config {
		i.Redirect = url + "/login/callback"
		return Config{OIDC: o, URL: url, Key: bytes.Repeat([]byte{7}, 32)}
	})
	const isAda = "oidc ada [{owner  }]"
	// come returns what a browser gets that goes to the issuer and comes back.
	come := func(change func(back *url.URL)) (*http.Response, string) {
		t.Helper()
		s.forget()
		resp, body := s.get("/login/oidc?next=/images")
		if resp.StatusCode != 303 {
			t.Fatalf("%d %s", resp.StatusCode, body)
		}
		c := resp.Cookies()
		if len(c) != 1 || !c[0].HttpOnly || c[0].SameSite != http.SameSiteLaxMode || c[0].MaxAge != 600 {
			t.Errorf("cookies %v", c)
		}
		resp, body = s.get(resp.Header.Get("Location"))
		if resp.StatusCode != 302 {
			t.Fatalf("the issuer: %d %s", resp.StatusCode, body)
		}
		back, err := resp.Location()
		if err != nil {
			t.Fatal(err)
		}
		if change != nil {
			change(back)
		}
		return s.get(back.String())
	}
	i.User = user
	resp, body := come(nil)
	if resp.StatusCode != 200 || !strings.Contains(body, `content="0; url=/images"`) {
		t.Fatalf("%d %s", resp.StatusCode, body)
	}
	if !slices.ContainsFunc(resp.Cookies(), func(c *http.Cookie) bool {
		return c.Name == "streaming-session" && c.SameSite == http.SameSiteStrictMode && c.HttpOnly
	}) {
		t.Errorf("cookies %v", resp.Cookies())
	}
	s.is(isAda)
	session := resp.Cookies()[slices.IndexFunc(resp.Cookies(), func(c *http.Cookie) bool { return c.Name == "streaming-session" })]

	query := func(name, value string) func(*url.URL) {
		return func(u *url.URL) {
			q := u.Query()
			q.Set(name, value)
			u.RawQuery = q.Encode()
		}
	}
	var used string
	for _, c := range []struct {
		name   string
		user   map[string]any
		mint   func(nonce string) string
		change func(*url.URL)
		status int
		want   string
	}{
		{"the user refuses", nil, nil, nil, 403, "access_denied"},
		{"another state", user, nil, query("state", "x"), 400, "took too long"},
		{"no state", user, nil, query("state", ""), 400, "took too long"},
		{"another code", user, nil, query("code", "x"), 403, "did not accept the code"},
		{"another issuer's answer", user, nil, query("iss", "https://evil.example.com"), 403, "another issuer"},
		{"another browser", user, nil, func(*url.URL) { s.forget() }, 400, "another browser"},
		{"another login's PKCE verifier", user, nil, func(u *url.URL) {
			used = u.Query().Get("code")
			resp, _ := s.get("/login/oidc") // begins another one, with cookie and state of its own
			to, err := resp.Location()
			if err != nil {
				t.Fatal(err)
			}
			query("state", to.Query().Get("state"))(u)
		}, 403, "did not accept the code"},
		{"a code a second time", user, nil, func(u *url.URL) { query("code", used)(u) }, 403, "did not accept the code"},
		{"another nonce", nil, func(string) string {
			return i.Token(map[string]any{"sub": "42", "aud": oidctest.ClientID, "groups": "admins", "nonce": "x"})
		}, nil, 403, "ID token is not valid"},
		{"no nonce", nil, func(string) string {
			return i.Token(map[string]any{"sub": "42", "aud": oidctest.ClientID, "groups": "admins"})
		}, nil, 403, "ID token is not valid"},
		{"a token for the API", nil, func(nonce string) string {
			return i.Token(map[string]any{"sub": "42", "aud": "streaming", "groups": "admins", "nonce": nonce})
		}, nil, 403, "ID token is not valid"},
		{"authorized for another party", nil, func(nonce string) string {
			return i.Token(map[string]any{"sub": "42", "aud": []string{oidctest.ClientID, "x"}, "azp": "x", "groups": "admins", "nonce": nonce})
		}, nil, 403, "ID token is not valid"},
		{"not signed", nil, func(nonce string) string {
			return i.Signed(map[string]any{"alg": "none"}, map[string]any{"sub": "42", "aud": oidctest.ClientID, "groups": "admins", "nonce": nonce}, func(string) []byte { return nil })
		}, nil, 403, "ID token is not valid"},
		{"expired", nil, func(nonce string) string {
			return i.Token(map[string]any{"sub": "42", "aud": oidctest.ClientID, "groups": "admins", "nonce": nonce, "exp": time.Now().Add(-time.Minute).Unix()})
		}, nil, 403, "ID token is not valid"},
		{"no ID token", nil, func(string) string { return "" }, nil, 403, "ID token is not valid"},
		{"no role", map[string]any{"sub": "43", "groups": "users"}, nil, nil, 403, "no rule"},
		{"more groups than a cookie holds", map[string]any{"sub": "43", "realm_access": map[string]any{"roles": many("see-", 400)}}, nil, nil, 403, "do not fit"},
	} {
		t.Run(c.name, func(t *testing.T) {
			i.User, i.Mint = c.user, c.mint
			resp, body := come(c.change)
			if resp.StatusCode != c.status || !strings.Contains(body, c.want) {
				t.Errorf("%d %s, want %d %q", resp.StatusCode, body, c.status, c.want)
			}
			s.is("")
		})
	}

	// The rules of today count, not those of the login.
	changed := *o
	changed.Rules = []Rule{{"groups", "admins", []Grant{{Role: Reader}}}}
	gone := *o
	gone.Rules = []Rule{{"groups", "users", []Grant{{Role: Reader}}}}
	for _, c := range []struct {
		oidc *OIDC
		want string
	}{{o, isAda}, {&changed, "oidc ada [{reader  }]"}, {&gone, ""}} {
		g := gate(t, Config{OIDC: c.oidc, URL: s.URL, Key: bytes.Repeat([]byte{7}, 32)})
		w := call(g.Browser(who, nil), "GET", "/x", "Cookie", session.Name+"="+session.Value)
		if got := w.Body.String(); w.Code == 200 && got != c.want || w.Code != 200 && c.want != "" {
			t.Errorf("with rules %v: %d %s, want %q", c.oidc.Rules, w.Code, got, c.want)
		}
	}
}

// Clients authenticate at the issuer as it wants it.
func TestClientsOfIssuers(t *testing.T) {
	for method, secret := range map[string]string{"": oidctest.Secret, "client_secret_post": oidctest.Secret, "none": ""} {
		i := oidctest.Start(t)
		i.Method, i.User = method, map[string]any{"sub": "42", "groups": "admins"}
		o := issuerConfig(i)
		o.ClientID, o.ClientSecret = oidctest.ClientID, secret
		s := start(t, false, func(url string) Config {
			i.Redirect = url + "/login/callback"
			return Config{OIDC: o, URL: url}
		})
		target := "/login/oidc"
		for range 2 {
			resp, _ := s.get(target)
			target = resp.Header.Get("Location")
		}
		if resp, body := s.get(target); resp.StatusCode != 200 || i.Asked("/token") != 1 {
			t.Errorf("%q: %d %s after %d requests", method, resp.StatusCode, body, i.Asked("/token"))
		}
		s.is("oidc 42 [{owner  }]")
	}
}

func many(prefix string, n int) (s []string) {
	for i := range n {
		s = append(s, fmt.Sprint(prefix, i))
	}
	return s
}

// An issuer that is down says so, on the login page.
func TestLoginWhileTheIssuerIsDown(t *testing.T) {
	i := oidctest.Start(t)
	o := issuerConfig(i)
	o.ClientID = oidctest.ClientID
	s := start(t, false, func(url string) Config { return Config{Tokens: tokens(), OIDC: o, URL: url} })
	i.Close()
	if resp, body := s.get("/login/oidc"); resp.StatusCode != 503 || !strings.Contains(body, "does not answer") || !strings.Contains(body, "name=\"token\"") {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	s.login(tokenOfReader)
	s.is(isCI)
}

// Package oidctest is an OpenID Connect issuer for tests: a real HTTP server with a discovery document, keys that it changes, tokens of
// any claims, and the authorization code flow with PKCE, of which it refuses what an issuer must refuse.
package oidctest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"
)

// The console's client at the issuer.
const (
	ClientID = "console"
	Secret   = "secret of the console's client"
)

// Issuer is the server. Its fields are set before requests are made.
type Issuer struct {
	*httptest.Server
	Redirect string                    // the only redirect URI that the client may name
	User     map[string]any            // claims of who logs in; nil: the user refuses
	Mint     func(nonce string) string // makes the ID token instead
	Method   string                    // how the client authenticates: "" is client_secret_basic, or client_secret_post, or none

	t     testing.TB
	mu    sync.Mutex
	key   *ecdsa.PrivateKey
	kid   string
	codes map[string]url.Values // the authorization requests that they answer
	asked map[string]int
}

// Start runs an issuer until the test ends.
func Start(t testing.TB) *Issuer {
	t.Helper()
	i := &Issuer{t: t, codes: map[string]url.Values{}, asked: map[string]int{}}
	i.Rotate()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", i.discovery)
	mux.HandleFunc("GET /keys", i.keys)
	mux.HandleFunc("GET /authorize", i.authorize)
	mux.HandleFunc("POST /token", i.token)
	i.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i.mu.Lock()
		i.asked[r.URL.Path]++
		i.mu.Unlock()
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(i.Close)
	return i
}

// Asked says how often a path was asked for.
func (i *Issuer) Asked(path string) int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.asked[path]
}

// Rotate replaces the key.
func (i *Issuer) Rotate() {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		i.t.Fatal(err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.key, i.kid = key, rand.Text()
}

// Token returns a signed token. The claims iss, iat and exp are those of a token of now, valid for an hour, where the given ones have
// none; those that are nil are left out.
func (i *Issuer) Token(claims map[string]any) string {
	return i.Signed(map[string]any{"alg": "ES256", "typ": "JWT"}, claims, i.Sign)
}

// Signed returns a token of any header and signature. The header has the key's ID unless it has one.
func (i *Issuer) Signed(header, claims map[string]any, sign func(input string) []byte) string {
	now := time.Now()
	all := map[string]any{"iss": i.URL, "iat": now.Unix(), "exp": now.Add(time.Hour).Unix()}
	maps.Copy(all, claims)
	maps.DeleteFunc(all, func(_ string, v any) bool { return v == nil })
	i.mu.Lock()
	head := map[string]any{"kid": i.kid}
	i.mu.Unlock()
	maps.Copy(head, header)
	input := i.segment(head) + "." + i.segment(all)
	return input + "." + base64.RawURLEncoding.EncodeToString(sign(input))
}

func (i *Issuer) segment(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		i.t.Fatal(err)
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

// Sign is the signature of ES256 by the issuer's key.
func (i *Issuer) Sign(input string) []byte {
	i.mu.Lock()
	defer i.mu.Unlock()
	return Sign(i.t, i.key, input)
}

// Sign is the signature of ES256 by any key.
func Sign(t testing.TB, key *ecdsa.PrivateKey, input string) []byte {
	sum := sha256.Sum256([]byte(input))
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
}

// PublicKey is the key's, as an uncompressed point.
func (i *Issuer) PublicKey() []byte {
	i.mu.Lock()
	defer i.mu.Unlock()
	b, err := i.key.PublicKey.Bytes()
	if err != nil {
		i.t.Fatal(err)
	}
	return b
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

// discovery promises algorithms that no client may accept, too.
func (i *Issuer) discovery(w http.ResponseWriter, _ *http.Request) {
	document := map[string]any{
		"issuer": i.URL, "authorization_endpoint": i.URL + "/authorize", "token_endpoint": i.URL + "/token", "jwks_uri": i.URL + "/keys",
		"response_types_supported": []string{"code"}, "subject_types_supported": []string{"public"},
		"id_token_signing_alg_values_supported": []string{"ES256", "HS256", "none"},
	}
	if i.Method != "" {
		document["token_endpoint_auth_methods_supported"] = []string{i.Method}
	}
	answer(w, document)
}

func (i *Issuer) keys(w http.ResponseWriter, _ *http.Request) {
	point := i.PublicKey()
	i.mu.Lock()
	kid := i.kid
	i.mu.Unlock()
	answer(w, map[string]any{"keys": []any{map[string]any{
		"kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": kid,
		"x": base64.RawURLEncoding.EncodeToString(point[1:33]), "y": base64.RawURLEncoding.EncodeToString(point[33:]),
	}}})
}

// authorize is where a user would log in.
func (i *Issuer) authorize(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	if q.Get("client_id") != ClientID || q.Get("redirect_uri") != i.Redirect || q.Get("response_type") != "code" ||
		q.Get("code_challenge_method") != "S256" || q.Get("code_challenge") == "" || q.Get("nonce") == "" || q.Get("state") == "" ||
		!strings.Contains(" "+q.Get("scope")+" ", " openid ") {
		http.Error(w, "bad request "+r.URL.RawQuery, http.StatusBadRequest)
		return
	}
	back := url.Values{"state": {q.Get("state")}, "iss": {i.URL}}
	if i.User == nil && i.Mint == nil {
		back.Set("error", "access_denied")
	} else {
		code := rand.Text()
		i.mu.Lock()
		i.codes[code] = q
		i.mu.Unlock()
		back.Set("code", code)
	}
	http.Redirect(w, r, i.Redirect+"?"+back.Encode(), http.StatusFound)
}

// token changes a code, once, for the tokens.
func (i *Issuer) token(w http.ResponseWriter, r *http.Request) {
	id, secret, basic := r.BasicAuth()
	id, _ = url.QueryUnescape(id)
	secret, _ = url.QueryUnescape(secret)
	if i.Method != "" {
		id, secret = r.PostFormValue("client_id"), r.PostFormValue("client_secret")
	}
	if id != ClientID || basic != (i.Method == "") || secret != map[bool]string{true: "", false: Secret}[i.Method == "none"] {
		http.Error(w, `{"error":"invalid_client"}`, http.StatusUnauthorized)
		return
	}
	code := r.PostFormValue("code")
	i.mu.Lock()
	asked := i.codes[code]
	delete(i.codes, code)
	i.mu.Unlock()
	challenge := sha256.Sum256([]byte(r.PostFormValue("code_verifier")))
	if asked == nil || r.PostFormValue("redirect_uri") != asked.Get("redirect_uri") || r.PostFormValue("grant_type") != "authorization_code" ||
		base64.RawURLEncoding.EncodeToString(challenge[:]) != asked.Get("code_challenge") {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusBadRequest)
		w.Write([]byte(`{"error":"invalid_grant"}`))
		return
	}
	claims := map[string]any{"aud": ClientID, "nonce": asked.Get("nonce")}
	maps.Copy(claims, i.User)
	token := ""
	if i.Mint != nil {
		token = i.Mint(asked.Get("nonce"))
	} else {
		token = i.Token(claims)
	}
	answer(w, map[string]any{"access_token": rand.Text(), "token_type": "Bearer", "expires_in": 3600, "id_token": token})
}

package registrytest

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"time"
)

const tokenPath = "/token"

// authentication is what the registry asks for. The zero value lets everybody in.
type authentication struct {
	basic, bearer bool
	o             TokenOptions
	tokens        map[string]grant
}

type grant struct {
	scope string
	till  time.Time
	other bool // than who is let in
}

// TokenOptions describe the token server.
type TokenOptions struct {
	User, Password string        // "" lets anonymous clients have tokens
	Identity       string        // identity (refresh) token that is as good as user and password; "" is none
	Lifetime       time.Duration // of a token; 0 is an hour
	HideLifetime   bool          // the client is not told, and its refused token is not called invalid
	Realm          string        // "https://HOST" of the token server, as its clients reach it; "" is what they called the registry
	NoPost         bool          // only GET, as on old token servers
	Refusal        int           // status; not 0: everybody, anonymous or wrong, is given a token, and this with it unless it is the right user's
}

// RequireBasic asks for user and password from now on.
func (r *Registry) RequireBasic(user, password string) {
	r.authMu.Lock()
	defer r.authMu.Unlock()
	r.auth = authentication{basic: true, o: TokenOptions{User: user, Password: password}}
}

// RequireToken asks for tokens from now on, which the registry itself gives under /token.
func (r *Registry) RequireToken(o TokenOptions) {
	if o.Lifetime == 0 {
		o.Lifetime = time.Hour
	}
	r.authMu.Lock()
	defer r.authMu.Unlock()
	r.auth = authentication{bearer: true, o: o, tokens: map[string]grant{}}
}

// ExpireTokens makes all tokens invalid that were given so far.
func (r *Registry) ExpireTokens() {
	r.authMu.Lock()
	defer r.authMu.Unlock()
	clear(r.auth.tokens)
}

// authorized lets the request pass or answers it with a challenge.
func (r *Registry) authorized(w http.ResponseWriter, req *http.Request) bool {
	r.authMu.Lock()
	defer r.authMu.Unlock()
	a := &r.auth
	switch {
	case a.basic:
		if user, password, ok := req.BasicAuth(); ok && user == a.o.User && password == a.o.Password {
			return true
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="registrytest"`)
	case a.bearer:
		scope := "repository:" + repositoryOf(req.URL.Path) + ":pull"
		if req.URL.Path == catalogPath {
			scope = "registry:catalog:*"
		}
		sent := req.Header.Get("Authorization")
		if g, ok := a.tokens[sent]; ok && g.scope == scope && time.Now().Before(g.till) {
			if g.other {
				w.WriteHeader(a.o.Refusal)
			}
			return !g.other
		}
		realm := a.o.Realm
		if realm == "" {
			realm = "http://" + req.Host
			if req.TLS != nil {
				realm = "https://" + req.Host
			}
		}
		challenge := fmt.Sprintf(`Bearer realm="%s%s",service="registrytest",scope="%s"`, realm, tokenPath, scope)
		if sent != "" && !a.o.HideLifetime {
			challenge += `,error="invalid_token"`
		}
		w.Header().Set("WWW-Authenticate", challenge)
	default:
		return true
	}
	w.WriteHeader(http.StatusUnauthorized)
	return false
}

// serveToken is the token server (distribution's token specification; POST is its OAuth2 variant).
func (r *Registry) serveToken(w http.ResponseWriter, req *http.Request) {
	r.authMu.Lock()
	defer r.authMu.Unlock()
	a := &r.auth
	if !a.bearer {
		http.NotFound(w, req)
		return
	}
	user, password, _ := req.BasicAuth()
	identity := ""
	if req.Method == http.MethodPost {
		if a.o.NoPost {
			http.NotFound(w, req)
			return
		}
		user, password, identity = req.PostFormValue("username"), req.PostFormValue("password"), req.PostFormValue("refresh_token")
	}
	anonymous := a.o.User == "" && a.o.Identity == ""
	named := a.o.User != "" && user == a.o.User && password == a.o.Password
	other := !anonymous && !named && (a.o.Identity == "" || identity != a.o.Identity)
	if other && a.o.Refusal == 0 {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	token := rand.Text()
	a.tokens["Bearer "+token] = grant{req.FormValue("scope"), time.Now().Add(a.o.Lifetime), other}
	answer := map[string]any{"token": token, "access_token": token}
	if !a.o.HideLifetime {
		answer["expires_in"] = int(a.o.Lifetime / time.Second)
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(answer)
}

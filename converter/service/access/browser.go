package access

import (
	"errors"
	"fmt"
	"html"
	"html/template"
	"net/http"
	"net/url"
	"strings"
)

// StaticPrefix is where the console's style sheets, scripts and icons are: they are served without a session, for the login page.
const StaticPrefix = "/static/"

// Login is what a login page shows. By a token: a form that posts token and next to /login. By OIDC: a link to /login/oidc?next=.
type Login struct {
	Token bool   // there are tokens to log in with
	OIDC  bool   // there is an issuer to log in with
	Next  string // the path to go on to
	Error string // why the last attempt failed: a sentence, or ""
}

// policy is the console's Content-Security-Policy: everything comes from this service's files, nothing from within a page.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; " +
	"manifest-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"

// Browser returns a handler for browsers: it serves logging in and out itself, and everything else to who has a session. The function
// login writes the login page; nil is a plain one. A next that has a method Refuse(w, r, status, why) writes the page for what is refused.
func (g *Gate) Browser(next http.Handler, login func(http.ResponseWriter, *http.Request, Login)) http.Handler {
	if login == nil {
		login = plainLogin
	}
	b := &browser{g, next, login}
	mux := http.NewServeMux()
	mux.HandleFunc("/", b.serve)
	mux.Handle("GET "+StaticPrefix, next)
	if g.Authenticated() {
		mux.HandleFunc("GET /login", b.form)
		mux.HandleFunc("POST /login", b.token)
		mux.HandleFunc("POST /logout", b.logout)
		if g.oidc != nil && g.oidc.ClientID != "" {
			mux.HandleFunc("GET /login/oidc", b.leave)
			mux.HandleFunc("GET "+callbackPath, b.callback)
		}
	} else {
		mux.Handle("GET /login", http.RedirectHandler("/", http.StatusSeeOther))
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r = g.arrive(w, r)
		h := w.Header()
		h.Set("Content-Security-Policy", policy)
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "same-origin") // with no-referrer browsers would send "Origin: null" with forms
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Permissions-Policy", "camera=(), geolocation=(), microphone=(), payment=(), usb=()")
		if err := g.sameOrigin(r); err != nil {
			g.denied(r, "request", err.Error())
			b.forbid(w, r, "This request came from another site: "+err.Error()+".")
			return
		}
		if !g.Authenticated() {
			if err := local(r); err != nil {
				b.forbid(w, r, err.Error())
				return
			}
		}
		mux.ServeHTTP(w, r)
	})
}

var errNoOrigin = errors.New("it says neither Sec-Fetch-Site nor Origin, as every browser does")

// sameOrigin refuses what another site's page makes a browser send. That is all of the protection against forged requests: a token in
// each form would show the same again. The session's cookie is SameSite=Strict besides.
func (g *Gate) sameOrigin(r *http.Request) error {
	if r.Method == http.MethodGet || r.Method == http.MethodHead || r.Method == http.MethodOptions {
		return nil
	}
	if r.Header.Get("Sec-Fetch-Site") == "" && r.Header.Get("Origin") == "" {
		return errNoOrigin
	}
	return g.cross.Check(r)
}

type browser struct {
	*Gate
	next  http.Handler
	login func(http.ResponseWriter, *http.Request, Login)
}

// forbid answers with a page of the console's, if it has one.
func (b *browser) forbid(w http.ResponseWriter, r *http.Request, why string) {
	if next, ok := b.next.(interface {
		Refuse(w http.ResponseWriter, r *http.Request, status int, why string)
	}); ok {
		next.Refuse(w, r, http.StatusForbidden, why)
		return
	}
	http.Error(w, why, http.StatusForbidden)
}

func (b *browser) serve(w http.ResponseWriter, r *http.Request) {
	id := b.everybody
	if id == nil {
		if id, _ = b.visitor(r); id == nil {
			b.ask(w, r)
			return
		}
	}
	b.next.ServeHTTP(w, r.WithContext(With(r.Context(), id)))
}

// ask sends a navigation without a session to the login page, and answers 401 to everything else.
func (b *browser) ask(w http.ResponseWriter, r *http.Request) {
	mode := r.Header.Get("Sec-Fetch-Mode")
	switch {
	case r.Method != http.MethodGet && r.Method != http.MethodHead || mode != "" && mode != "navigate":
		http.Error(w, "Log in first.", http.StatusUnauthorized)
	case r.Header.Get("Sec-Fetch-Site") == "cross-site" || r.Header.Get("Sec-Fetch-Site") == "same-site":
		onward(w, r.URL.RequestURI())
	default:
		http.Redirect(w, r, "/login?next="+url.QueryEscape(inside(r.URL.RequestURI())), http.StatusSeeOther)
	}
}

// onward makes the browser go to a path on our own page's behalf: when another site's link or the issuer led here, it has not sent the
// session's cookie, which is SameSite=Strict, and would not with a redirect.
func onward(w http.ResponseWriter, path string) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	path = html.EscapeString(inside(path))
	fmt.Fprintf(w, "<!DOCTYPE html>\n<html lang=\"en\"><head><title>One moment</title><meta http-equiv=\"refresh\" content=\"0; url=%s\"></head>"+
		"<body><p><a href=\"%s\">Go on</a></p></body></html>\n", path, path)
}

// inside returns next if it is a path of this service, or else "/": a login must not lead to another site.
func inside(next string) string {
	u, err := url.Parse(next)
	if err != nil || len(next) > 1024 || u.Scheme != "" || u.Host != "" || u.Opaque != "" || u.User != nil ||
		!strings.HasPrefix(next, "/") || strings.HasPrefix(next, "//") || strings.ContainsAny(next, "\\\"'<>") {
		return "/"
	}
	if u.Path == "/login" || strings.HasPrefix(u.Path, "/login/") || u.Path == "/logout" {
		return "/"
	}
	return next
}

// page writes the login page.
func (b *browser) page(w http.ResponseWriter, r *http.Request, status int, next, problem string) {
	l := Login{Token: len(b.tokens) > 0, OIDC: b.oidc != nil && b.oidc.ClientID != "", Next: inside(next), Error: problem}
	if status == http.StatusOK {
		b.login(w, r, l)
		return
	}
	b.login(&withStatus{w, status}, r, l)
}

// withStatus is a ResponseWriter for a page that does not know that it is about a failure.
type withStatus struct {
	http.ResponseWriter
	status int
}

func (w *withStatus) WriteHeader(int) {
	if w.status != 0 {
		w.ResponseWriter.WriteHeader(w.status)
		w.status = 0
	}
}

func (w *withStatus) Write(p []byte) (int, error) {
	w.WriteHeader(0)
	return w.ResponseWriter.Write(p)
}

func (b *browser) form(w http.ResponseWriter, r *http.Request) {
	next := r.URL.Query().Get("next")
	if id, _ := b.visitor(r); id != nil {
		http.Redirect(w, r, inside(next), http.StatusSeeOther)
		return
	}
	b.page(w, r, http.StatusOK, next, "")
}

// token logs in with a token. Only failures count, as in refuse: behind a proxy everybody may have one address.
func (b *browser) token(w http.ResponseWriter, r *http.Request) {
	next := r.PostFormValue("next")
	id, sum := b.known(strings.TrimSpace(r.PostFormValue("token")))
	if id == nil && !b.logins.allow(requestOf(r.Context()).remote, b.now()) {
		w.Header().Set("Retry-After", "60")
		b.page(w, r, http.StatusTooManyRequests, next, "There were too many attempts from this address. Try again in a minute.")
		return
	}
	if id == nil {
		b.denied(r, "login", "unknown token")
		b.page(w, r, http.StatusUnauthorized, next, "This token is not known here.")
		return
	}
	if b.welcome(w, r, id, session{Token: sum}, next) {
		http.Redirect(w, r, inside(next), http.StatusSeeOther)
	}
}

// welcome begins the session of id, or writes the login page again.
func (b *browser) welcome(w http.ResponseWriter, r *http.Request, id *Identity, s session, next string) bool {
	ctx := With(r.Context(), id)
	if err := b.admit(w, r, s); err != nil {
		b.Audit(ctx, Entry{Action: "login", Outcome: OutcomeFailed, Detail: err.Error()})
		b.page(w, r, http.StatusForbidden, next, "The login did not work: "+err.Error()+".")
		return false
	}
	b.Audit(ctx, Entry{Action: "login", Outcome: OutcomeOK})
	return true
}

func (b *browser) logout(w http.ResponseWriter, r *http.Request) {
	if id, s := b.visitor(r); id != nil {
		b.revoked.add(s, b.now())
		b.Audit(With(r.Context(), id), Entry{Action: "logout", Outcome: OutcomeOK})
	}
	b.setCookie(w, r, sessionCookie, nil, 0, http.SameSiteStrictMode)
	http.Redirect(w, r, "/login", http.StatusSeeOther)
}

var plainPage = template.Must(template.New("login").Parse(`<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Log in</title></head><body><main><h1>Log in</h1>
{{with .Error}}<p role="alert">{{.}}</p>{{end}}
{{if .OIDC}}<p><a href="/login/oidc?next={{.Next}}">Log in with your organisation's account</a></p>{{end}}
{{if .Token}}<form method="post" action="/login"><input type="hidden" name="next" value="{{.Next}}">
<label>Token <input type="password" name="token" autocomplete="current-password" required></label> <button>Log in</button></form>{{end}}
</main></body></html>
`))

func plainLogin(w http.ResponseWriter, _ *http.Request, l Login) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	plainPage.Execute(w, l)
}

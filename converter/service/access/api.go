package access

import (
	"errors"
	"net/http"
	"strings"
)

// API returns a handler that finds out who asks, and answers itself who is nobody. A token is expected as a bearer token, or, for
// clients that know user names and passwords only, as the password of basic authentication. Cookies count for nothing here.
func (g *Gate) API(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r = g.arrive(w, r)
		w.Header().Set("X-Ms-Correlation-Request-Id", RequestID(r.Context()))
		w.Header().Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		// Without authentication any page in a browser here could ask; with it, no page's request has a token.
		if err := g.cross.Check(r); err != nil {
			WriteError(w, http.StatusForbidden, "DENIED", err.Error())
			return
		}
		id, err := g.caller(r)
		if err != nil {
			g.refuse(w, r, err)
			return
		}
		next.ServeHTTP(w, r.WithContext(With(r.Context(), id)))
	})
}

func (g *Gate) caller(r *http.Request) (*Identity, error) {
	if g.everybody != nil {
		return g.everybody, local(r)
	}
	headers := r.Header.Values("Authorization")
	if len(headers) == 0 {
		return nil, errNoToken
	}
	scheme, token, _ := strings.Cut(headers[0], " ")
	if _, password, ok := r.BasicAuth(); ok {
		token = password
	} else if !strings.EqualFold(scheme, "Bearer") {
		return nil, errNoToken
	}
	if len(headers) > 1 {
		return nil, errRefused
	}
	return g.identify(r.Context(), strings.TrimSpace(token))
}

// refuse answers whoever is nobody. A valid token is never refused for what others at its address did: only refusals are counted, so
// that they cost little and the audit log stays short.
func (g *Gate) refuse(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil {
		return // nobody waits for the answer, and nothing is wrong with the token
	}
	status, code := http.StatusUnauthorized, "UNAUTHORIZED"
	switch {
	case errors.Is(err, errNotLocal):
		status, code = http.StatusForbidden, "DENIED"
	case errors.Is(err, ErrIssuer):
		w.Header().Set("Retry-After", "5")
		status, code = http.StatusServiceUnavailable, "UNAVAILABLE"
		if g.failures.allow(requestOf(r.Context()).remote, g.now()) { // forged tokens come here, too: they must not fill the log
			g.log.WarnContext(r.Context(), "OpenID Connect issuer", "error", err, "request", RequestID(r.Context()))
		}
		err = ErrIssuer // which of its addresses does not answer is nobody's business
	case errors.Is(err, errNoToken):
	case !g.denied(r, "authenticate", err.Error()):
		w.Header().Set("Retry-After", "60")
		status, code = http.StatusTooManyRequests, "TOOMANYREQUESTS"
		err = errors.New("too many tokens from this address were not valid")
	default:
		if errors.Is(err, errNoRole) {
			status, code = http.StatusForbidden, "DENIED"
		}
	}
	if status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", `Bearer realm="streaming"`)
	}
	WriteError(w, status, code, err.Error())
}

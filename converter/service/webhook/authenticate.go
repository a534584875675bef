package webhook

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
)

var errRefused = errors.New("the delivery's authentication is wrong")

// authenticate returns errRefused for who is not the source. Only HMAC needs the body.
func (k *hook) authenticate(r *http.Request, body []byte) error {
	ok := false
	switch {
	case k.HMAC != "":
		sent, err := hex.DecodeString(strings.TrimPrefix(only(r.Header[http.CanonicalHeaderKey(k.HMAC)]), "sha256="))
		mac := hmac.New(sha256.New, k.Secret)
		mac.Write(body)
		ok = err == nil && hmac.Equal(sent, mac.Sum(nil))
	case k.Header != "":
		sent := only(r.Header[http.CanonicalHeaderKey(k.Header)])
		if bearer, ok := cutBearer(sent); ok {
			sent = bearer
		}
		ok = k.isSecret(sent)
	case k.Query != "":
		ok = k.isSecret(only(r.URL.Query()[k.Query]))
	case k.Username != "":
		user, password, sent := r.BasicAuth()
		// Both are compared, so that how long it takes does not say which one was wrong.
		ok = k.isSecret(password) && sent
		ok = same([]byte(user), []byte(k.Username)) && ok
	default:
		return k.verify(r)
	}
	if !ok {
		return errRefused
	}
	return nil
}

func (k *hook) verify(r *http.Request) error {
	token, ok := cutBearer(only(r.Header["Authorization"]))
	if !ok {
		return errRefused
	}
	claims, err := k.verifier.Verify(r.Context(), token)
	if errors.Is(err, access.ErrIssuer) {
		return err
	}
	if err != nil {
		return errRefused
	}
	for name, value := range k.Claims {
		if !slices.Contains(claims.Strings(name), value) {
			return errRefused
		}
	}
	return nil
}

// only returns the value that there is exactly one of, or "".
func only(values []string) string {
	if len(values) != 1 {
		return ""
	}
	return values[0]
}

func cutBearer(s string) (string, bool) {
	scheme, token, ok := strings.Cut(s, " ")
	return token, ok && strings.EqualFold(scheme, "Bearer")
}

// isSecret compares in a time that says nothing of the secret, its length included.
func (k *hook) isSecret(sent string) bool { return same([]byte(sent), k.Secret) }

func same(a, b []byte) bool {
	x, y := sha256.Sum256(a), sha256.Sum256(b)
	return hmac.Equal(x[:], y[:])
}

// Of the handshake of CloudEvents' web hooks.
const (
	eventGridOrigin = "eventgrid.azure.net"
	allowedRate     = 6000 // deliveries in a minute
)

var origin = regexp.MustCompile(`^[A-Za-z0-9.-]{1,253}$`)

// consent answers the handshake by which Event Grid makes sure that deliveries are wanted here (HTTP 1.1 Web Hooks for Event Delivery,
// version 1.0.2, 4). It lets nobody in: each delivery is authenticated. Where the URL has the secret, this request has it, too.
func (s *Server) consent(w http.ResponseWriter, r *http.Request) {
	k := s.hooks[r.PathValue("name")]
	if k == nil || k.Kind != "eventgrid" {
		w.Header().Set("Allow", "POST")
		access.WriteError(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "this webhook has no handshake")
		return
	}
	if k.Query != "" && k.authenticate(r, nil) != nil {
		access.WriteError(w, http.StatusUnauthorized, "UNAUTHORIZED", errRefused.Error())
		return
	}
	from := only(r.Header["Webhook-Request-Origin"])
	if !origin.MatchString(from) || from != eventGridOrigin && !strings.HasSuffix(from, "."+eventGridOrigin) {
		access.WriteError(w, http.StatusForbidden, "DENIED", "deliveries are expected from "+eventGridOrigin+" only")
		return
	}
	allowed := allowedRate
	if asked, err := strconv.Atoi(only(r.Header["Webhook-Request-Rate"])); err == nil && asked > 0 {
		allowed = min(asked, allowed)
	}
	w.Header().Set("Allow", "POST")
	w.Header().Set("WebHook-Allowed-Origin", from)
	w.Header().Set("WebHook-Allowed-Rate", strconv.Itoa(allowed))
}

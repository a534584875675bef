package access

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// request is what is known of a request beside who asks.
type request struct {
	id     string
	remote netip.Addr // zero when it has none
}

func (r request) from() string {
	if !r.remote.IsValid() {
		return ""
	}
	return r.remote.String()
}

func requestOf(ctx context.Context) request {
	r, _ := ctx.Value(requestKey).(request)
	return r
}

// RequestID returns the name that a request has in logs and answers: "" outside of the middleware.
func RequestID(ctx context.Context) string { return requestOf(ctx).id }

var requestID = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

// arrive notes what is known of a request, and bounds its body.
func (g *Gate) arrive(w http.ResponseWriter, r *http.Request) *http.Request {
	peer, _ := netip.ParseAddrPort(r.RemoteAddr)
	req := request{remote: peer.Addr().Unmap()}
	if g.isProxy(req.remote) {
		req.remote = g.forwarded(r, req.remote)
		if id := r.Header.Get("X-Request-Id"); requestID.MatchString(id) {
			req.id = id
		}
	}
	if req.id == "" {
		req.id = rand.Text()
	}
	w.Header().Set("X-Request-Id", req.id)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	if g.url != nil && g.url.Scheme == "https" {
		w.Header().Set("Strict-Transport-Security", "max-age=31536000")
	}
	r = r.WithContext(context.WithValue(With(r.Context(), nobody), requestKey, req))
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	return r
}

func (g *Gate) isProxy(a netip.Addr) bool {
	return slices.ContainsFunc(g.proxies, func(p netip.Prefix) bool { return p.Contains(a) })
}

// forwarded returns the last address of X-Forwarded-For that is not a proxy's: those before it could be anybody's words.
func (g *Gate) forwarded(r *http.Request, addr netip.Addr) netip.Addr {
	hops := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for _, hop := range slices.Backward(hops) {
		hop = strings.TrimSpace(hop)
		next, err := netip.ParseAddr(hop)
		if err != nil {
			with, err := netip.ParseAddrPort(hop) // as Azure's Application Gateway has it
			if err != nil {
				break
			}
			next = with.Addr()
		}
		if addr = next.Unmap().WithZone(""); !g.isProxy(addr) {
			break
		}
	}
	return addr
}

var errNotLocal = errors.New("this service has no authentication")

// local returns an error for a request to a service without authentication that may not come from this machine's user: a web page
// whose name was made to mean 127.0.0.1, or whoever a proxy serves.
func local(r *http.Request) error {
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	addr, _ := netip.ParseAddr(strings.Trim(host, "[]"))
	if !addr.Unmap().IsLoopback() && !strings.EqualFold(host, "localhost") {
		return fmt.Errorf("%w, so it answers to localhost and loopback addresses only, not to %q", errNotLocal, Printable(host, 128))
	}
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err == nil && !peer.Addr().Unmap().IsLoopback() {
		return fmt.Errorf("%w, so it answers to this machine only", errNotLocal)
	}
	for _, h := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-Ip"} {
		if r.Header.Get(h) != "" {
			return fmt.Errorf("%w, so it answers to no proxy (the request has %s)", errNotLocal, h)
		}
	}
	return nil
}

// WriteError answers with an error as registries do: {"errors":[{"code":...,"message":...}]}.
func WriteError(w http.ResponseWriter, status int, code, message string) {
	type one struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(map[string][]one{"errors": {{code, message}}})
}

package registryclient

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
)

func TestWhose(t *testing.T) {
	for addr, refused := range map[string]bool{
		"127.0.0.1": true, "127.8.9.1": true, "::1": true, "::": true, "0.0.0.0": true, "0.1.2.3": true,
		"169.254.169.254": true, "169.254.1.1": true, "fe80::1": true, "fe80::1%eth0": true,
		"168.63.129.16": true, "100.100.100.200": true, "192.0.0.192": true, "fd00:ec2::254": true, "fd00:ec2::23": true, "fd00:c1::a9fe:a9fe": true, "fd00:42::42": true, "fd20:ce::254": true,
		"224.0.0.1": true, "ff02::1": true, "255.255.255.255": true,
		"::ffff:169.254.169.254": true, "::ffff:127.0.0.1": true, "64:ff9b::a9fe:a9fe": true, "64:ff9b:1::169.254.169.254": true,
		"2002:a9fe:a9fe::1": true, "::169.254.169.254": true, "::127.0.0.1": true,
		"10.0.0.1": false, "192.168.1.1": false, "172.16.0.1": false, "100.64.0.1": false, "93.184.216.34": false,
		"fd00::1": false, "fd00:42::1": false, "2001:db8::1": false, "64:ff9b::5db8:d822": false, "2002:5db8:d822::1": false, "::ffff:10.0.0.1": false,
	} {
		a := netip.MustParseAddr(addr)
		if got := whose(a, false); (got != "") != refused {
			t.Errorf("%s: %q", addr, got)
		}
		if got := whose(a, true); a.Unmap().IsLoopback() && got != "" {
			t.Errorf("%s, where this machine is allowed: %q", addr, got)
		}
	}
}

// Where a host leads that is not on this machine, nothing of this machine is dialled: by address or by name, by a redirect or as a token server's address.
func TestLeadsNotHere(t *testing.T) {
	var connections atomic.Int64
	inner := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte(`{"token":"t"}`)) }))
	inner.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			connections.Add(1)
		}
	}
	inner.Start()
	defer inner.Close()
	_, port, err := net.SplitHostPort(inner.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	const registry = "registry.example:443"
	c := newClient(t, Options{})
	for _, name := range []string{"127.0.0.1", "localhost", "LOCALHOST.", "[::ffff:127.0.0.1]", "a.localhost"} {
		to := "http://" + name + ":" + port + "/x"
		// As the registry's host would answer: a name of it that cannot be asked here.
		answer := func(status int, key, value string) http.RoundTripper {
			return roundTrip(func(req *http.Request) (*http.Response, error) {
				if req.URL.Host != registry {
					return http.DefaultTransport.RoundTrip(req)
				}
				w := httptest.NewRecorder()
				w.Header().Set(key, value)
				w.WriteHeader(status)
				return w.Result(), nil
			})
		}
		for what, rt := range map[string]http.RoundTripper{
			"redirect":     answer(http.StatusTemporaryRedirect, "Location", to),
			"token server": answer(http.StatusUnauthorized, "WWW-Authenticate", `Bearer realm="`+to+`",service="s"`),
		} {
			r, err := c.registry(strings.Replace(registry, "443", "1", 1))
			if err != nil {
				t.Fatal(err)
			}
			h := r.hosts[0]
			h.Scheme, h.Host = "http", registry
			h.auth = newAuthorizer(h, c)
			g := h.Client.Transport.(*guarded)
			g.own = map[string]bool{registry: true}
			own := g.base
			g.base = roundTrip(func(req *http.Request) (*http.Response, error) {
				if req.URL.Host == registry {
					return rt.RoundTrip(req)
				}
				return own.RoundTrip(req)
			})
			_, err = h.do(t.Context(), c, "team/app", question{path: "manifests/v1"})
			if !errors.Is(err, ErrBadAnswer) || !strings.Contains(err.Error(), "it leads to ") {
				t.Errorf("%s to %s: %v", what, name, err)
			}
			c = newClient(t, Options{})
		}
	}
	if n := connections.Load(); n != 0 {
		t.Errorf("%d connections", n)
	}
}

// A registry of this machine may lead to another place of it.
func TestLeadsHereFromHere(t *testing.T) {
	inner := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("bytes")) }))
	defer inner.Close()
	outer := httptest.NewServer(http.RedirectHandler(inner.URL, http.StatusTemporaryRedirect))
	defer outer.Close()
	c := newClient(t, Options{})
	r, err := c.registry(strings.TrimPrefix(outer.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := r.hosts[0].do(t.Context(), c, "team/app", question{path: "manifests/v1"})
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
}

// A registry that is not said to be on this machine may not lead here because its name does: the name may be anybody's to answer for. Nor may what is no registry, which may be here itself.
func TestLeadsHereByName(t *testing.T) {
	var asked atomic.Int64
	inner := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer inner.Close()
	outer := httptest.NewServer(http.RedirectHandler(inner.URL, http.StatusTemporaryRedirect))
	defer outer.Close()
	c := newClient(t, Options{})
	r, err := c.registry("registry.example:1")
	if err != nil {
		t.Fatal(err)
	}
	h := r.hosts[0]
	h.Scheme = "http"
	g := h.Client.Transport.(*guarded)
	tr := g.base.(*http.Transport)
	guard := guardDial(func(ctx context.Context, network, _ string) (net.Conn, error) { // as its name resolves
		return (&net.Dialer{}).DialContext(ctx, network, outer.Listener.Addr().String())
	})
	tr.DialContext = guard
	if _, err := h.do(t.Context(), c, "team/app", question{path: "manifests/v1"}); !errors.Is(err, ErrBadAnswer) || !strings.Contains(err.Error(), "it leads to ") {
		t.Errorf("by name: %v", err)
	}
	if resp, err := Guarded().Get(outer.URL); err == nil || !strings.Contains(err.Error(), "it leads to ") {
		t.Errorf("what is no registry: %v, %v", resp, err)
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("%d requests came", n)
	}
	resp, err := Guarded().Get(inner.URL)
	if err != nil || asked.Load() != 1 {
		t.Errorf("where nobody leads: %v", err)
	} else {
		resp.Body.Close()
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

package registryclient

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"time"
)

// A registry sends a node on: by redirects, and to its token server. Whoever holds it must not so reach what answers to this machine only: its own services, and
// the cloud's metadata, which gives out the machine's credentials. What somebody has configured is not looked at: it is where they want to go.

// forbidden are the addresses that a host may lead nobody to, beside those that netip.Addr knows.
var forbidden = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),          // this machine
	netip.MustParsePrefix("255.255.255.255/32"), // everybody
	netip.MustParsePrefix("168.63.129.16/32"),   // Azure's
	netip.MustParsePrefix("100.100.100.200/32"), // Alibaba Cloud's
	netip.MustParsePrefix("192.0.0.192/32"),     // Oracle Cloud's, of old
	netip.MustParsePrefix("fd00:ec2::/32"),      // AWS's: metadata, time, the credentials of pods
	netip.MustParsePrefix("fd00:c1::/32"),       // Oracle Cloud's
	netip.MustParsePrefix("fd00:42::42/128"),    // Scaleway's
	netip.MustParsePrefix("fd20:ce::254/128"),   // Google Cloud's
}

// Prefixes of IPv6 addresses with one of IPv4 inside, and where that begins.
var embedding = []struct {
	prefix netip.Prefix
	at     int
}{
	{netip.MustParsePrefix("64:ff9b::/96"), 12},   // NAT64
	{netip.MustParsePrefix("64:ff9b:1::/48"), 12}, // NAT64 of a network's own, as with /96
	{netip.MustParsePrefix("2002::/16"), 2},       // 6to4
	{netip.MustParsePrefix("::/96"), 12},          // IPv4-compatible
}

// whose says whose address it is if a host may not lead there; "" if it may. loopback is whether it may lead to this machine.
func whose(a netip.Addr, loopback bool) string {
	a = a.Unmap().WithZone("")
	for _, e := range embedding {
		if b := a.As16(); a.Is6() && !a.IsLoopback() && !a.IsUnspecified() && e.prefix.Contains(a) {
			a = netip.AddrFrom4([4]byte(b[e.at : e.at+4]))
		}
	}
	switch {
	case a.IsLoopback() && loopback:
		return ""
	case a.IsLoopback() || a.IsUnspecified():
		return "of this machine"
	case a.IsLinkLocalUnicast():
		return "link-local"
	case a.IsMulticast():
		return "of many"
	}
	for _, p := range forbidden {
		if p.Contains(a) {
			return "of a metadata service or of this machine"
		}
	}
	return ""
}

// guarded sends a host's requests, and those that it leads to only where they may go.
type guarded struct {
	base     http.RoundTripper
	own      map[string]bool // host:port of the registry's hosts; nil: all but where others lead
	loopback bool            // one of them is said to be on this machine itself, and so are maybe its blob store and its token server
}

// isHere reports whether host, with or without a port, is this machine by what is written there. What a name resolves to says nothing: whoever answers for it may change that.
func isHere(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	name := strings.ToLower(strings.TrimSuffix(strings.Trim(host, "[]"), "."))
	if a, err := netip.ParseAddr(name); err == nil {
		return a.Unmap().IsLoopback()
	}
	return name == "localhost" || strings.HasSuffix(name, ".localhost")
}

// Guarded returns a client for servers that are no registry. Where they lead, by redirects, is guarded as with a registry that is not on this machine.
func Guarded() *http.Client {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.DialContext = guardDial(t.DialContext)
	return &http.Client{Transport: &guarded{base: t}}
}

type guardKey struct{}

func (g *guarded) RoundTrip(req *http.Request) (*http.Response, error) {
	proxy, err := http.ProxyFromEnvironment(req)
	if err != nil {
		return nil, err
	}
	own := g.own[req.URL.Host] || g.own == nil && req.Response == nil
	if !own {
		// A proxy resolves names and dials, so that all there is to look at is this.
		a, err := netip.ParseAddr(strings.TrimSuffix(req.URL.Hostname(), "."))
		if err == nil {
			err = g.check(a)
		} else if err = nil; !g.loopback && isHere(req.URL.Hostname()) {
			err = refused("it leads to this machine")
		}
		if err != nil {
			return nil, err
		}
	}
	if proxy == nil {
		req = req.WithContext(context.WithValue(req.Context(), guardKey{}, dialling{g, own}))
	}
	return g.base.RoundTrip(req)
}

func (g *guarded) check(a netip.Addr) error {
	if w := whose(a, g.loopback); w != "" {
		return refused("it leads to %s, an address %s", a, w)
	}
	return nil
}

// dialling is what a connection is dialled for.
type dialling struct {
	*guarded
	own bool
}

// guardDial makes of what dials for the hosts of a registry what also dials for where they lead: after names are resolved, and before anything is sent.
func guardDial(dial func(ctx context.Context, network, addr string) (net.Conn, error)) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		d, ok := ctx.Value(guardKey{}).(dialling)
		if ok && !d.own {
			return (&net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second, Control: func(_, addr string, _ syscall.RawConn) error {
				to, err := netip.ParseAddrPort(addr)
				if err != nil {
					return fmt.Errorf("address %q: %w", addr, err)
				}
				return d.check(to.Addr())
			}}).DialContext(ctx, network, addr)
		}
		return dial(ctx, network, addr)
	}
}

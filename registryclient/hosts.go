package registryclient

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
)

const (
	canPull      = docker.HostCapabilityPull
	canResolve   = docker.HostCapabilityResolve
	canReferrers = docker.HostCapabilityReferrers
)

const (
	dialTimeout     = 10 * time.Second // hosts.toml's dial_timeout overrides it
	handshake       = 10 * time.Second
	idleTimeout     = 90 * time.Second
	idleConns       = 16               // kept per host: about what a node's reads have in flight (twelve, measured)
	maxIdleConns    = 256              // kept of a host and all places that it redirects to
	maxConns        = 128              // per host and HTTP/1: a pull of 120 layers asks for 120 indexes at once, in one round trip
	maxHeader       = 64 << 10         // bytes of response header
	hostsCheckEvery = 5 * time.Second  // a changed certs.d is seen after this
	maxDown         = 30 * time.Second // a host that failed is asked last for at most this
)

// registry is the hosts of one registry, as hosts.toml gave them.
type registry struct {
	hosts      []*host
	transports []*http.Transport

	// Guarded by Client.mu.
	stamp   string // of the directory they were read from
	checked time.Time
}

func (r *registry) closeIdle() {
	for _, t := range r.transports {
		t.CloseIdleConnections()
	}
}

// host is one endpoint of a registry and what we know about it.
type host struct {
	docker.RegistryHost
	transport http.RoundTripper // not a client: that follows redirects, or stumbles over them
	ns        string            // registry that a mirror is asked for (the ns parameter of containerd); "" for the registry itself
	server    bool              // the last of its registry's: the registry itself, whatever its address
	auth      *authorizer
	registry  string
	onChange  func(HostStatus)

	mu        sync.Mutex
	answered  bool // ever
	fails     int
	downUntil time.Time // asked after the others until then
	holdUntil time.Time // not asked at all until then: it said so (Retry-After)
	noAPI     map[string]time.Time
	delays    delays
	places    map[string]*place // by scheme and host
	health
}

// hostsOf returns the hosts of repo that have the capability, in order.
func (c *Client) hostsOf(repo Repository, need docker.HostCapabilities) (hosts []*host, name string, err error) {
	domain, name, err := repo.split()
	if err != nil {
		return nil, "", err
	}
	r, err := c.registry(domain)
	if err != nil {
		return nil, "", fmt.Errorf("read hosts of %s: %w", domain, err)
	}
	for _, h := range r.hosts {
		if h.Capabilities.Has(need) {
			hosts = append(hosts, h)
		}
	}
	if len(hosts) == 0 && need == canReferrers { // as containerd does
		return c.hostsOf(repo, canResolve)
	}
	if len(hosts) == 0 {
		return nil, "", fmt.Errorf("registry %s: %w: its hosts.toml lets no host do that", domain, ErrNotFound)
	}
	return hosts, name, nil
}

func (c *Client) registry(domain string) (*registry, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.registries[domain]
	if old != nil && time.Since(old.checked) < hostsCheckEvery {
		return old, nil
	}
	stamp, err := c.hostsStamp(domain)
	if err != nil {
		return nil, err
	}
	if old != nil && old.stamp == stamp {
		old.checked = time.Now()
		return old, nil
	}
	r, err := c.readHosts(domain)
	if err != nil {
		return nil, err
	}
	r.stamp, r.checked = stamp, time.Now()
	c.registries[domain] = r
	if old != nil {
		old.closeIdle()
	}
	return r, nil
}

// hostDir returns the directory of domain's hosts.toml; "" is none.
func (c *Client) hostDir(domain string) (string, error) {
	if c.o.HostsDir == "" {
		return "", nil
	}
	dir, err := config.HostDirFromRoot(c.o.HostsDir)(domain)
	if errdefs.IsNotFound(err) {
		return "", nil
	}
	return dir, err
}

// hostsStamp changes when the directory that configures domain does. Certificates kept elsewhere are read again only then.
func (c *Client) hostsStamp(domain string) (string, error) {
	dir, err := c.hostDir(domain)
	if err != nil || dir == "" {
		return "", err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString(dir)
	for _, e := range entries {
		if fi, err := os.Stat(dir + "/" + e.Name()); err == nil {
			fmt.Fprintf(&b, "\n%s %d %d", e.Name(), fi.Size(), fi.ModTime().UnixNano())
		}
	}
	return b.String(), nil
}

// readHosts reads the hosts of domain. containerd's reader makes new connection pools each time, so its answer is kept.
func (c *Client) readHosts(domain string) (*registry, error) {
	r := &registry{}
	o := config.HostOptions{
		HostDir: c.hostDir,
		UpdateClient: func(client *http.Client) error {
			t, ok := client.Transport.(*http.Transport)
			if !ok {
				return errors.New("unexpected transport of containerd's hosts")
			}
			tune(t, c.o.Stall, len(r.transports) == 0)
			r.transports = append(r.transports, t)
			return nil
		},
	}
	if local, err := docker.MatchLocalhost(domain); err == nil && local {
		o.DefaultScheme = "http"
	}
	// The context only carries a logger.
	found, err := config.ConfigureHosts(context.Background(), o)(domain)
	if err != nil {
		return nil, err
	}
	itself := len(found) - 1 // the registry itself, without what hosts.toml says of it where it is one of the hosts, too: a CA, for instance. Then it is one host, not two.
	for i := range itself {
		if f, last := &found[i], found[itself]; f.Scheme == last.Scheme && f.Host == last.Host && f.Path == last.Path {
			f.Capabilities |= last.Capabilities
			found, itself = found[:itself], i
			break
		}
	}
	own, here := map[string]bool{}, isHere(domain)
	for _, f := range found {
		own[f.Host] = true
		here = here || isHere(f.Host)
	}
	for i, f := range found {
		f.Authorizer = nil
		f.Client = &http.Client{Transport: &guarded{base: f.Client.Transport, own: own, loopback: here}}
		h := &host{RegistryHost: f, registry: domain, server: i == itself, onChange: c.o.OnHost, noAPI: map[string]time.Time{}}
		h.transport = &metered{base: f.Client.Transport, m: &c.meter}
		h.auth = newAuthorizer(h, c)
		if f.Host != domain && !(domain == "docker.io" && f.Host == "registry-1.docker.io") {
			h.ns = domain
		}
		r.hosts = append(r.hosts, h)
	}
	return r, nil
}

// tune sets what containerd's default transport leaves or sets for pulls. The first transport is the one that the others of a registry are
// cloned from; later ones may already have their host's dial_timeout.
func tune(t *http.Transport, stall time.Duration, first bool) {
	if first {
		t.DialContext = (&net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second}).DialContext
	}
	t.DialContext = guardDial(t.DialContext)
	t.TLSHandshakeTimeout = handshake
	t.ResponseHeaderTimeout = stall
	t.IdleConnTimeout = idleTimeout
	t.MaxIdleConns = maxIdleConns
	t.MaxIdleConnsPerHost = idleConns
	t.MaxConnsPerHost = maxConns
	t.MaxResponseHeaderBytes = maxHeader
	t.DisableCompression = true // a layer that arrives recoded has other offsets
	t.ForceAttemptHTTP2 = true
	t.HTTP2 = &http.HTTP2Config{SendPingTimeout: stall, PingTimeout: stall} // or a dead connection takes all its streams along for minutes
}

// failed notes that the host failed in a way that may pass, and how long it asked to be left alone.
func (h *host) failed(err error, hold time.Duration) {
	h.mu.Lock()
	now := time.Now()
	h.fails++
	h.downUntil = now.Add(min(time.Second<<min(h.fails-1, 10), maxDown))
	if hold > 0 {
		h.holdUntil = now.Add(hold)
	}
	changed, s := h.fail(now, err), h.status()
	h.mu.Unlock()
	if changed {
		h.tell(s)
	}
}

func (h *host) worked() {
	h.mu.Lock()
	h.fails, h.downUntil, h.answered = 0, time.Time{}, true
	changed, s := h.succeed(), h.status()
	h.mu.Unlock()
	if changed {
		h.tell(s)
	}
}

func (h *host) hasWorked() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.answered
}

// state says whether the host is to be asked after the others, and for how long it is not to be asked at all.
func (h *host) state(now time.Time) (down bool, hold time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return now.Before(h.downUntil) || now.Before(h.wrongUntil), max(h.holdUntil.Sub(now), 0)
}

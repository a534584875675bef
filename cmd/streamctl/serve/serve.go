// Package serve is `streamctl serve`: the conversion service's configuration, and its parts plugged together in one process.
//
// The parts know each other by small interfaces alone: package service does the work, access says who may ask for it, rest, webhook and
// console are the ways to ask. What is here listens, and orders the start and the end: it says that it lives before there is anything that it
// could do, waits for NATS, and works; and when the process is to end, it says so, stops listening, hands its conversions back to the other
// processes, and lets go of NATS last.
package serve

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/webhook"
)

// Options are what the configuration does not say.
type Options struct {
	Version string
	Stdout  io.Writer    // where the audit log goes that is to go to standard output
	Log     *slog.Logger // structured, of everything else
	// Ready, if not nil, is called once requests are answered, with the address.
	Ready func(addr net.Addr)

	drained <-chan struct{} // ends the time to drain sooner: for tests, which know when they are through
}

// Run serves until ctx ends, and returns when all work was handed back.
func Run(ctx context.Context, c Config, o Options) (err error) {
	if len(c.Registries) == 0 {
		return errors.New("no registry is configured: name those to look after in [[registry]] (`streamctl serve --print-config` has an example)")
	}
	audit, err := openAudit(c.AuditLog, o.Stdout)
	if err != nil {
		return err
	}
	defer audit.Close()
	p := &process{c: c, o: o, health: &health{version: o.Version}, closing: make(chan struct{}), closeNATS: func() error { return nil }}
	if p.gate, err = newGate(c, audit, o.Log); err != nil {
		return err
	}
	if p.hooks, err = sources(c); err != nil {
		return err
	}
	if err := p.c.Limits.settle(c.Temp); err != nil {
		return err
	}
	if p.service, err = serviceConfig(p.c, o); err != nil {
		return err
	}
	p.service.Audit = deeds(p.gate)
	if p.service.Convert.Signer, err = c.Signing.signer(ctx, o.Version); err != nil {
		return err
	}
	p.service.Convert.SigningOptional = !c.Signing.Required
	if c.BehindProxy && len(c.Proxies) == 0 {
		o.Log.Warn("behind_proxy without trusted_proxies: everybody has the proxy's address, in the audit log and where failed logins are counted")
	}
	return p.run(ctx)
}

// deeds writes what the service does by itself into the audit log.
func deeds(g *access.Gate) func(service.Deed) {
	who := access.With(context.Background(), &access.Identity{Name: "streamctl", Kind: "service"})
	return func(d service.Deed) {
		g.Audit(who, access.Entry{
			Action: d.Action, Registry: d.Registry, Repository: d.Repository, Target: d.Digest.String(), Outcome: access.OutcomeOK, Detail: d.Target + ": " + d.Detail,
		})
	}
}

// process is the service from its start to its end.
type process struct {
	c       Config
	o       Options
	gate    *access.Gate
	hooks   []webhook.Source
	service service.Config
	health  *health
	front   front
	closing chan struct{} // closed when streams of events are to end

	closeNATS func() error
}

// run answers from the start, so that whoever asks for its health hears that it waits for NATS, and works until ctx ends or a part fails.
func (p *process) run(ctx context.Context) error {
	l, err := listen(p.c, p.gate.Authenticated())
	if err != nil {
		return err
	}
	listeners := []net.Listener{l}
	defer func() {
		for _, l := range listeners {
			l.Close() // the server has closed it, if there was one
		}
	}()
	mux := http.NewServeMux()
	mux.Handle("/", &p.front)
	for _, path := range []string{"/healthz", "/readyz"} {
		mux.Handle(path, p.health.public(false))
	}
	servers := []*http.Server{newServer(mux, p.o.Log)}
	if p.c.Metrics != "" {
		m, err := net.Listen("tcp", p.c.Metrics)
		if err != nil {
			return err
		}
		servers, listeners = append(servers, newServer(p.health.public(true), p.o.Log)), append(listeners, m)
	}
	working, stop := context.WithCancel(context.WithoutCancel(ctx)) // longer than ctx, by the time to drain
	defer stop()
	g, working := errgroup.WithContext(working)
	for i, s := range servers {
		g.Go(func() error {
			if err := s.Serve(listeners[i]); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve %s: %w", listeners[i].Addr(), err)
			}
			return nil
		})
	}
	g.Go(func() error {
		select {
		case <-ctx.Done():
			p.drain(working)
		case <-working.Done():
		}
		p.health.stopping.Store(true)
		p.o.Log.Info("stopping: conversions are handed back")
		close(p.closing) // ends streams of events, which would go on
		stop()
		hurry, cancel := context.WithTimeout(context.WithoutCancel(ctx), p.c.Times.Shutdown.D)
		defer cancel()
		for _, s := range servers {
			if s.Shutdown(hurry) != nil {
				s.Close()
			}
		}
		return nil
	})
	g.Go(func() error {
		err := p.work(working, l.Addr())
		if err != nil && ctx.Err() != nil && p.health.svc.Load() == nil {
			return nil // it was not there yet when it was to end
		}
		return err
	})
	return errors.Join(g.Wait(), p.closeNATS())
}

// drain waits until load balancers have seen that this process stops, which answers as before meanwhile.
func (p *process) drain(working context.Context) {
	p.health.stopping.Store(true)
	p.tell("STOPPING=1")
	if p.health.svc.Load() == nil || p.c.Times.Drain.D == 0 {
		return
	}
	p.o.Log.Info("stopping: requests are answered until load balancers know", "drain", p.c.Times.Drain.D)
	select {
	case <-time.After(p.c.Times.Drain.D):
	case <-p.o.drained:
	case <-working.Done():
	}
}

// work connects to NATS and does the service's work, until ctx ends.
func (p *process) work(ctx context.Context, addr net.Addr) error {
	conn, err := connect(ctx, p.c, p.o.Log, p.waiting)
	if err != nil {
		return err
	}
	p.closeNATS, p.service.Conn = conn.close, conn.Conn
	svc, err := p.newService(ctx)
	if err != nil {
		return err
	}
	handler, hooks, err := p.handler(svc)
	if err != nil {
		return err
	}
	p.health.open(svc, hooks)
	p.front.open(handler)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return svc.Run(ctx) })
	g.Go(func() error { return p.whenReady(ctx, svc, addr) })
	g.Go(func() error {
		select {
		case <-conn.closed:
			return conn.refused()
		case <-ctx.Done():
			return nil
		}
	})
	err = g.Wait()
	if err != nil && conn.IsClosed() {
		return conn.refused() // what the service says of it is no more than that it is closed
	}
	return err
}

// waiting tells who waits for the start that there is nothing to be done until NATS is there.
func (p *process) waiting() { p.tell("READY=1\nSTATUS=waiting for NATS") }

// tell tells systemd, if there is one that wants to know.
func (p *process) tell(state string) {
	if err := notify(state); err != nil {
		p.o.Log.Warn("systemd could not be told how it is", "state", state, "error", err)
	}
}

// refuseTime is how long NATS may refuse the service's streams until that is an error, and how often it is then said again.
const refuseTime = time.Minute

// Codes of JetStream's errors, which it has for every server that is configured as this one is: waiting is in vain.
var neverTaken = []jetstream.ErrorCode{
	10074, // "replicas > 1 not supported in non-clustered mode"
	10065, // "subjects overlap with an existing stream"
	10052, // the stream is there, and cannot become what it is to be
	jetstream.JSErrCodeJetStreamNotEnabled, jetstream.JSErrCodeJetStreamNotEnabledForAccount,
}

// newService makes the service's streams and buckets. A cluster that starts, too, cannot do it yet: it is waited for. Who waits for the start does so meanwhile, since
// what NATS answers may be what it answers for ever.
func (p *process) newService(ctx context.Context) (*service.Service, error) {
	if p.service.Replicas == 0 && p.service.Conn.ConnectedClusterName() != "" {
		p.service.Replicas = 3
	}
	said, complain := "", time.Now().Add(refuseTime)
	for {
		svc, err := service.New(ctx, p.service)
		if err == nil || ctx.Err() != nil || p.c.NATS.URL == "" || !errors.Is(err, service.ErrUnavailable) {
			return svc, err
		}
		var refused *jetstream.APIError
		if errors.As(err, &refused) && slices.Contains(neverTaken, refused.ErrorCode) || p.service.Conn.IsClosed() {
			return nil, fmt.Errorf("NATS at %s, nats.replicas %d: %w", p.c.NATS.URL, p.service.Replicas, err)
		}
		level := slog.LevelWarn
		if time.Now().After(complain) {
			level, said, complain = slog.LevelError, "", time.Now().Add(refuseTime)
		}
		if err.Error() != said {
			said = err.Error()
			p.tell("STATUS=NATS does not take the service's streams: " + said)
			p.o.Log.Log(ctx, level, "NATS does not take the service's streams, and is asked again", "url", p.c.NATS.URL, "nats.replicas", p.service.Replicas, "error", err)
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// whenReady tells who waits for the start that it has succeeded.
func (p *process) whenReady(ctx context.Context, svc *service.Service, addr net.Addr) error {
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	for svc.Ready(ctx) != nil {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
	var names []string
	for _, r := range p.c.Registries {
		names = append(names, r.Name)
	}
	p.o.Log.Info("serving", "address", addr.String(), "tls", p.c.TLS.Certificate != "", "registries", names, "version", p.o.Version,
		"memory", int64(p.c.Limits.Memory), "disk", int64(p.c.Limits.Disk))
	scheme := "http"
	if p.c.TLS.Certificate != "" {
		scheme = "https"
	}
	p.tell("READY=1\nSTATUS=serving at " + scheme + "://" + addr.String())
	if p.o.Ready != nil {
		p.o.Ready(addr)
	}
	return nil
}

// serviceConfig is what the service needs to know, but for the connection to NATS.
func serviceConfig(c Config, o Options) (service.Config, error) {
	sc := service.Config{
		Replicas: c.NATS.Replicas, Sole: c.NATS.URL == "",
		Convert: converter.Options{Encode: artifact.EncodeOptions{ChunkSize: int(c.Convert.ChunkSize)}, Jobs: c.Convert.Jobs, TempDir: c.Temp},
		Static:  c.Convert.Profile == "static",
		Limits:  service.Limits{Conversions: c.Limits.Conversions, Memory: int64(c.Limits.Memory), Disk: int64(c.Limits.Disk)},
		Lease:   c.Times.Lease.D, Retention: c.Times.Retention.D, Reconcile: c.Times.Reconcile.D,
		Log: o.Log,
	}
	for _, r := range c.Registries {
		ro, err := r.options(o.Version)
		if err != nil {
			return sc, fmt.Errorf("registry %s: %w", r.Name, err)
		}
		made := service.NewRegistry(r.Name, ro, r.Requests)
		made.PullOnly = r.PullOnly
		sc.Registries = append(sc.Registries, made)
	}
	return sc, nil
}

// newGate makes who may come in of the configuration.
func newGate(c Config, audit io.Writer, log *slog.Logger) (*access.Gate, error) {
	ac := access.Config{URL: c.URL, Session: c.Times.Session.D, Audit: audit, Log: log}
	for _, t := range c.Tokens {
		ac.Tokens = append(ac.Tokens, access.Token{Name: t.Name, File: t.File, SHA256: t.SHA256, Grants: grants(t.Grants)})
	}
	for _, p := range c.Proxies {
		ac.Proxies = append(ac.Proxies, netip.MustParsePrefix(p)) // validated
	}
	var err error
	if ac.OIDC, err = c.OIDC.options(); err != nil {
		return nil, fmt.Errorf("oidc: %w", err)
	}
	ac.Loopback = len(ac.Tokens) == 0 && ac.OIDC == nil
	if ac.Key, err = sessionKey(c); err != nil {
		return nil, fmt.Errorf("key of sessions: %w", err)
	}
	return access.New(ac)
}

func grants(list []grant) (g []access.Grant) {
	for _, x := range list {
		g = append(g, access.Grant{Role: x.Role, Registry: x.Registry, Repository: x.Repository})
	}
	return g
}

func (o *oidc) options() (*access.OIDC, error) {
	if o == nil {
		return nil, nil
	}
	a := &access.OIDC{Issuer: o.Issuer, ClientID: o.ClientID, Scopes: o.Scopes, Audiences: o.Audiences, NameClaim: o.NameClaim}
	for _, r := range o.Rules {
		a.Rules = append(a.Rules, access.Rule{Claim: r.Claim, Value: r.Value, Grants: grants(r.Grants)})
	}
	if o.ClientSecretFile != "" {
		b, err := os.ReadFile(o.ClientSecretFile)
		if err != nil {
			return nil, err
		}
		a.ClientSecret = strings.TrimSpace(string(b))
	}
	if o.CA != "" {
		t, err := trusting(o.CA)
		if err != nil {
			return nil, err
		}
		a.Client = &http.Client{Transport: t, Timeout: 30 * time.Second}
	}
	return a, nil
}

// sessionKey reads the key that seals sessions, and makes it at the first start if it is this process's own.
func sessionKey(c Config) ([]byte, error) {
	if c.SessionKey != "" {
		return os.ReadFile(c.SessionKey)
	}
	name := filepath.Join(c.Data, "session.key")
	key, err := os.ReadFile(name)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if err := os.MkdirAll(c.Data, 0o700); err != nil {
		return nil, err
	}
	key = make([]byte, 32)
	rand.Read(key) // never fails
	return key, os.WriteFile(name, key, 0o600)
}

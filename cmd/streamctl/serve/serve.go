// Package serve is `streamctl serve`: the conversion service's configuration, and its parts plugged together in one process.
//
// The parts know each other by small interfaces alone: package service does the work, access says who may ask for it, rest, webhook and
// console are the ways to ask. What is here listens, and orders the start and the end: work is taken once clients are answered, and when the
// process is to end, it stops listening, hands its conversions back to the other processes, and lets go of NATS last.
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
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
)

// Options are what the configuration does not say.
type Options struct {
	Version string
	Stdout  io.Writer    // where the audit log goes that is to go to standard output
	Log     *slog.Logger // structured, of everything else
	// Ready, if not nil, is called once requests are answered, with the address.
	Ready func(addr net.Addr)
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
	gate, err := newGate(c, audit, o.Log)
	if err != nil {
		return err
	}
	l, err := listen(c, gate.Authenticated())
	if err != nil {
		return err
	}
	defer l.Close() // the server has closed it, if there was one
	conn, closeNATS, err := connect(ctx, c, o.Log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeNATS()) }()
	sc, err := serviceConfig(c, o)
	if err != nil {
		return err
	}
	sc.Conn = conn
	svc, err := service.New(ctx, sc)
	if err != nil {
		return err
	}
	return serve(ctx, c, o, gate, svc, l)
}

// serve answers on l and works until ctx ends or one of both fails.
func serve(ctx context.Context, c Config, o Options, gate *access.Gate, svc *service.Service, l net.Listener) error {
	h := &health{svc: svc, version: o.Version}
	closing := make(chan struct{})
	handler, err := newHandler(c, gate, svc, h, closing, o)
	if err != nil {
		return err
	}
	servers := []*http.Server{newServer(handler, o.Log)}
	listeners := []net.Listener{l}
	if c.Metrics != "" {
		m, err := net.Listen("tcp", c.Metrics)
		if err != nil {
			return err
		}
		defer m.Close()
		servers, listeners = append(servers, newServer(h.public(true), o.Log)), append(listeners, m)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return svc.Run(ctx) })
	for i, s := range servers {
		g.Go(func() error {
			if err := s.Serve(listeners[i]); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve %s: %w", listeners[i].Addr(), err)
			}
			return nil
		})
	}
	g.Go(func() error {
		<-ctx.Done()
		h.stopping.Store(true)
		o.Log.Info("stopping: conversions are handed back")
		if err := notify("STOPPING=1"); err != nil {
			o.Log.Warn("systemd could not be told of the stop", "error", err)
		}
		close(closing) // ends streams of events, which would go on
		hurry, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.Times.Shutdown.D)
		defer cancel()
		for _, s := range servers {
			if s.Shutdown(hurry) != nil {
				s.Close()
			}
		}
		return nil
	})
	g.Go(func() error { return whenReady(ctx, svc, c, o, l.Addr()) })
	return g.Wait()
}

// whenReady tells who waits for the start that it has succeeded.
func whenReady(ctx context.Context, svc *service.Service, c Config, o Options, addr net.Addr) error {
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
	for _, r := range c.Registries {
		names = append(names, r.Name)
	}
	o.Log.Info("serving", "address", addr.String(), "tls", c.TLS.Certificate != "", "registries", names, "version", o.Version)
	scheme := "http"
	if c.TLS.Certificate != "" {
		scheme = "https"
	}
	if err := notify("READY=1\nSTATUS=serving at " + scheme + "://" + addr.String()); err != nil {
		o.Log.Warn("the start succeeded, and systemd could not be told", "error", err)
	}
	if o.Ready != nil {
		o.Ready(addr)
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
		sc.Registries = append(sc.Registries, service.NewRegistry(r.Name, ro, r.Requests))
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

// openAudit opens the audit log for lines at its end.
func openAudit(name string, stdout io.Writer) (io.WriteCloser, error) {
	switch name {
	case "":
		return nopCloser{io.Discard}, nil
	case "-":
		return nopCloser{stdout}, nil
	}
	return os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

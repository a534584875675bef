package serve

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/nats-io/nats.go"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/embedded"
)

// options say how to reach a registry.
func (r registry) options(version string) (converter.RegistryOptions, error) {
	o := converter.RegistryOptions{PlainHTTP: r.PlainHTTP, Insecure: r.Insecure, UserAgent: "streamctl/" + version}
	if r.CA != "" {
		t, err := trusting(r.CA)
		if err != nil {
			return o, err
		}
		o.Transport = t
	}
	if r.Username != "" {
		login := passwordFile{r.Username, r.PasswordFile}
		if _, err := login.Authorization(); err != nil {
			return o, err // now rather than at the first conversion
		}
		o.Keychain = login
	}
	return o, nil
}

// passwordFile is a login whose password is read whenever it is needed, because whoever renews it replaces the file.
type passwordFile struct{ username, file string }

func (p passwordFile) Resolve(authn.Resource) (authn.Authenticator, error) { return p, nil }

func (p passwordFile) Authorization() (*authn.AuthConfig, error) {
	b, err := os.ReadFile(p.file)
	if err != nil {
		return nil, err
	}
	return &authn.AuthConfig{Username: p.username, Password: strings.TrimRight(string(b), "\r\n")}, nil
}

// trusting is the transport of go-containerregistry, or of any client, that trusts the certificates in ca beside the system's.
func trusting(ca string) (*http.Transport, error) {
	b, err := os.ReadFile(ca)
	if err != nil {
		return nil, err
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, err
	}
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("%s has no certificate in PEM", ca)
	}
	t, ok := remote.DefaultTransport.(*http.Transport)
	if !ok {
		return nil, fmt.Errorf("transport %T takes no certificates", remote.DefaultTransport)
	}
	t = t.Clone()
	t.TLSClientConfig = &tls.Config{RootCAs: pool}
	return t, nil
}

// connect connects to the NATS servers of the configuration, or starts one in this process. An external one may be away: it is waited for.
func connect(ctx context.Context, c Config, log *slog.Logger) (*nats.Conn, func() error, error) {
	n := c.NATS
	if n.URL == "" {
		s, err := embedded.Start(ctx, filepath.Join(c.Data, "nats"), log)
		if err != nil {
			return nil, nil, err
		}
		return s.Conn, s.Close, nil
	}
	options := []nats.Option{
		nats.Name("streamctl serve"), nats.MaxReconnects(-1), nats.RetryOnFailedConnect(true),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				log.Warn("NATS is away: nothing is taken on, and what runs goes on until its lease ends", "error", err)
			}
		}),
		nats.ReconnectHandler(func(c *nats.Conn) { log.Info("NATS is there", "server", c.ConnectedUrlRedacted()) }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { log.Warn("NATS", "error", err) }),
	}
	if n.Credentials != "" {
		options = append(options, nats.UserCredentials(n.Credentials))
	}
	if n.CA != "" {
		options = append(options, nats.RootCAs(n.CA))
	}
	if n.Certificate != "" {
		options = append(options, nats.ClientCert(n.Certificate, n.Key))
	}
	conn, err := nats.Connect(n.URL, options...)
	if err != nil {
		return nil, nil, fmt.Errorf("NATS at %s: %w", redacted(n.URL), err)
	}
	return conn, func() error { conn.Close(); return nil }, awaitNATS(ctx, conn, n.URL, log)
}

// awaitNATS waits until conn is connected, or ctx ends: without NATS there is nothing to be done, and a cluster may start after its clients.
func awaitNATS(ctx context.Context, conn *nats.Conn, url string, log *slog.Logger) error {
	if conn.IsConnected() {
		return nil
	}
	log.Warn("NATS does not answer, and is waited for", "url", redacted(url), "error", conn.LastError())
	connected := conn.StatusChanged(nats.CONNECTED)
	for !conn.IsConnected() {
		select {
		case <-connected:
		case <-ctx.Done():
			conn.Close()
			return errors.Join(fmt.Errorf("NATS at %s does not answer", redacted(url)), conn.LastError())
		}
	}
	return nil
}

// redacted is a list of URLs without what may be a password.
func redacted(urls string) string {
	list := strings.Split(urls, ",")
	for i, u := range list {
		if scheme, rest, ok := strings.Cut(u, "://"); ok {
			if _, host, ok := strings.Cut(rest, "@"); ok {
				list[i] = scheme + "://" + host
			}
		}
	}
	return strings.Join(list, ",")
}

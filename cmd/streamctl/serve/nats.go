package serve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/nats-io/nats.go"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/embedded"
)

// natsConn is a connection to NATS, and the server if that is in this process.
type natsConn struct {
	*nats.Conn
	url    string
	closed chan struct{} // once the connection is not made again, since we are refused, or the server in this process has failed
	server *embedded.Server
	close  func() error
}

// refused is why the connection is not made again.
func (c *natsConn) refused() error {
	if c.server != nil && c.server.Err() != nil {
		return c.server.Err()
	}
	return fmt.Errorf("NATS at %s: %w", c.url, c.LastError())
}

// connect connects to the NATS servers of the configuration, or starts one in this process. An external one may be away: it is waited for,
// which waiting is told; but not where it refuses us.
func connect(ctx context.Context, c Config, log *slog.Logger, waiting func()) (*natsConn, error) {
	n := c.NATS
	made := &natsConn{url: n.URL, closed: make(chan struct{})}
	if n.URL == "" {
		s, err := embedded.Start(ctx, filepath.Join(c.Data, "nats"), log)
		if err != nil {
			return nil, err
		}
		made.Conn, made.closed, made.server, made.close = s.Conn, s.Failed, s, s.Close
		return made, nil
	}
	options, err := n.options()
	if err != nil {
		return nil, err
	}
	options = append(options,
		nats.Name("streamctl serve"), nats.MaxReconnects(-1), nats.RetryOnFailedConnect(true),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				log.Warn("NATS is away: nothing is taken on, and what runs goes on until its lease ends", "error", err)
			}
		}),
		nats.ReconnectHandler(func(c *nats.Conn) { log.Info("NATS is there", "server", c.ConnectedUrlRedacted()) }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { log.Warn("NATS", "error", err) }),
		nats.ClosedHandler(func(*nats.Conn) { close(made.closed) }),
	)
	if made.Conn, err = nats.Connect(n.URL, options...); err != nil {
		return nil, fmt.Errorf("NATS at %s: %w", n.URL, err)
	}
	made.close = func() error { made.Conn.Close(); return nil }
	return made, made.await(ctx, log, waiting)
}

// options say who we are.
func (n natsConfig) options() (options []nats.Option, err error) {
	if n.Username != "" {
		login := passwordFile{n.Username, n.PasswordFile}
		if _, err := login.password(); err != nil {
			return nil, fmt.Errorf("nats.password_file: %w", err)
		}
		options = append(options, nats.UserInfoHandler(func() (string, string) {
			password, _ := login.password() // without it we are refused, which is said
			return login.username, password
		}))
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
	return options, nil
}

// await waits until NATS is there, or ctx ends: without it there is nothing to be done, and a cluster may start after its clients.
func (c *natsConn) await(ctx context.Context, log *slog.Logger, waiting func()) error {
	connected := c.StatusChanged(nats.CONNECTED)
	defer c.RemoveStatusListener(connected)
	if c.IsConnected() {
		return nil
	}
	log.Warn("NATS does not answer, and is waited for", "url", c.url, "error", c.LastError())
	waiting()
	for !c.IsConnected() {
		select {
		case <-connected:
		case <-c.closed:
			return c.refused()
		case <-ctx.Done():
			c.Conn.Close()
			return errors.Join(fmt.Errorf("NATS at %s does not answer", c.url), c.LastError())
		}
	}
	return nil
}

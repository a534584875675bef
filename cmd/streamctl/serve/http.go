package serve

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/console"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/rest"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/webhook"
)

// Limits of the HTTP servers. An answer has none: events of an operation go on as long as it does, which ReadTimeout lets them.
const (
	headerTime = 10 * time.Second // for a request's headers
	bodyTime   = 30 * time.Second // with its body, which is small
	idleTime   = 2 * time.Minute
	maxHeaders = 64 << 10 // bytes; tokens with many groups are large
)

// handler plugs the ways to ask together.
func (p *process) handler(svc *service.Service) (http.Handler, *webhook.Server, error) {
	rc := rest.Config{Default: p.c.Default, Audit: p.gate.Audit, Closing: p.closing}
	if rc.Default == "" {
		rc.Default = p.c.Registries[0].Name
	}
	api, err := rest.New(svc, rc)
	if err != nil {
		return nil, nil, err
	}
	api = p.gate.API(api)
	mux := http.NewServeMux()
	for _, path := range []string{"/acr/v1/", "/v1/", "/openapi.json"} {
		mux.Handle(path, api)
	}
	hooks, err := webhook.New(p.hooks, svc, p.o.Log)
	if err != nil {
		return nil, nil, err
	}
	mux.Handle("/hooks/", hooks)
	pages, err := console.New(console.Config{Service: svc, Gate: p.gate, Version: p.o.Version, Closing: p.closing, Log: p.o.Log})
	if err != nil {
		return nil, nil, err
	}
	mux.Handle("/", p.gate.Browser(pages, pages.Login))
	mux.Handle("GET /metrics", p.gate.API(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !access.From(r.Context()).MaySome(access.Reader, "") {
			access.WriteError(w, http.StatusForbidden, "DENIED", "metrics are for who may read")
			return
		}
		p.health.metrics(w, r)
	})))
	return mux, hooks, nil
}

// front answers that the service is starting, until it is there.
type front struct {
	there atomic.Pointer[http.Handler]
}

func (f *front) open(h http.Handler) { f.there.Store(&h) }

func (f *front) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h := f.there.Load(); h != nil {
		(*h).ServeHTTP(w, r)
		return
	}
	w.Header().Set("Retry-After", "5")
	access.WriteError(w, http.StatusServiceUnavailable, "UNAVAILABLE", errStarting.Error())
}

func newServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler: h, ReadHeaderTimeout: headerTime, ReadTimeout: bodyTime, IdleTimeout: idleTime, MaxHeaderBytes: maxHeaders,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// listen listens where the configuration says, if it may.
func listen(c Config, authenticated bool) (net.Listener, error) {
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return nil, err
	}
	if err := access.CheckListen(l.Addr().String(), authenticated, c.TLS.Certificate != "" || c.BehindProxy); err != nil {
		l.Close()
		return nil, err
	}
	if c.TLS.Certificate == "" {
		return l, nil
	}
	pair := &certificate{files: c.TLS}
	if _, err := pair.get(nil); err != nil {
		l.Close()
		return nil, err
	}
	return tls.NewListener(l, &tls.Config{GetCertificate: pair.get, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}}), nil
}

// certificate is read again when its file has changed: whoever renews it replaces the file.
type certificate struct {
	files tlsFiles

	mu      sync.Mutex
	read    os.FileInfo // of the certificate
	current *tls.Certificate
}

func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	st, err := os.Stat(c.files.Certificate)
	if err == nil && !access.Unchanged(st, c.read) {
		var pair tls.Certificate
		if pair, err = tls.LoadX509KeyPair(c.files.Certificate, c.files.Key); err == nil {
			c.current, c.read = &pair, st
		}
	}
	if c.current != nil {
		return c.current, nil // the one before, while the files are being replaced
	}
	return nil, fmt.Errorf("tls: %w", err)
}

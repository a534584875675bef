package serve

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/metrics"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/console"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/rest"
)

// Limits of the HTTP servers. An answer has none: events of an operation go on as long as it does, which ReadTimeout lets them.
const (
	headerTime = 10 * time.Second // for a request's headers
	bodyTime   = 30 * time.Second // with its body, which is small
	idleTime   = 2 * time.Minute
	maxHeaders = 64 << 10 // bytes; tokens with many groups are large
)

// newHandler plugs the ways to ask together.
func newHandler(c Config, gate *access.Gate, svc *service.Service, h *health, closing <-chan struct{}, o Options) (http.Handler, error) {
	rc := rest.Config{Default: c.Default, Audit: gate.Audit, Closing: closing}
	if rc.Default == "" && len(c.Registries) > 0 {
		rc.Default = c.Registries[0].Name
	}
	api, err := rest.New(svc, rc)
	if err != nil {
		return nil, err
	}
	api = gate.API(api)
	mux := http.NewServeMux()
	for _, path := range []string{"/acr/v1/", "/v1/", "/openapi.json"} {
		mux.Handle(path, api)
	}
	hooks, err := newHooks(c, svc, o.Log)
	if err != nil {
		return nil, err
	}
	mux.Handle("/hooks/", hooks)
	pages, err := console.New(console.Config{Service: svc, Gate: gate, Version: o.Version, Closing: closing, Log: o.Log})
	if err != nil {
		return nil, err
	}
	mux.Handle("/", gate.Browser(pages, pages.Login))
	for _, path := range []string{"/healthz", "/readyz"} {
		mux.Handle(path, h.public(false))
	}
	mux.Handle("GET /metrics", gate.API(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !access.From(r.Context()).MaySome(access.Reader, "") {
			access.WriteError(w, http.StatusForbidden, "DENIED", "metrics are for who may read")
			return
		}
		h.metrics(w, r)
	})))
	return mux, nil
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

	mu       sync.Mutex
	modified time.Time
	current  *tls.Certificate
}

func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	st, err := os.Stat(c.files.Certificate)
	if err == nil && !st.ModTime().Equal(c.modified) {
		var pair tls.Certificate
		if pair, err = tls.LoadX509KeyPair(c.files.Certificate, c.files.Key); err == nil {
			c.current, c.modified = &pair, st.ModTime()
		}
	}
	if c.current != nil {
		return c.current, nil // the one before, while the files are being replaced
	}
	return nil, fmt.Errorf("tls: %w", err)
}

// health answers whether the process lives and works.
type health struct {
	svc      *service.Service
	version  string
	stopping atomic.Bool
}

// public serves what says nothing about images: /healthz and /readyz, and /metrics if withMetrics.
func (h *health) public(withMetrics bool) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		if err := h.ready(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		io.WriteString(w, "ok\n")
	})
	if withMetrics {
		mux.HandleFunc("GET /metrics", h.metrics)
	}
	return mux
}

// readyTime bounds the question whether NATS answers.
const readyTime = 2 * time.Second

func (h *health) ready(ctx context.Context) error {
	if h.stopping.Load() {
		return fmt.Errorf("%w: the process is stopping", service.ErrUnavailable)
	}
	ctx, cancel := context.WithTimeout(ctx, readyTime)
	defer cancel()
	return h.svc.Ready(ctx)
}

// metricPrefix is before the name of each metric.
const metricPrefix = "streaming_service_"

func (h *health) metrics(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", metrics.ContentType)
	metrics.Write(w, metricPrefix, metricsOf(h.svc.Stats(), h.ready(r.Context()) == nil, h.version)) // who has gone does not want it
}

// metricsOf are what the service counts.
func metricsOf(s service.Stats, ready bool, version string) []metrics.Metric {
	states := []service.State{service.NotStarted, service.Running, service.Succeeded, service.Failed, service.Canceled}
	ended := []uint64{s.Succeeded, s.Failed, s.Canceled}
	names := make([]string, len(states))
	for i, state := range states {
		names[i] = string(state)
	}
	return []metrics.Metric{
		{Name: "build_info", Kind: "gauge", Help: "The service's version.", Samples: []metrics.Sample{{Label: "version", Value: version, N: 1}}},
		metrics.Gauge("ready", "1 while requests are answered and NATS is there.", metrics.Flag(ready)),
		metrics.By("gauge", "operations", "Operations that are kept, by state, of all processes.", "state", names, func(i int) int64 { return int64(s.Operations[states[i]]) }),
		metrics.Gauge("queue_length", "Operations that wait, of all processes.", float64(s.Waiting)),
		metrics.Gauge("conversions_running", "Conversions of this process.", float64(s.Running)),
		metrics.Gauge("conversions_limit", "How many it does at once.", float64(s.Slots)),
		metrics.By("counter", "conversions_total", "Conversions that this process ended, by state.", "state", names[2:], func(i int) int64 { return int64(ended[i]) }),
		metrics.Counter("converted_bytes", "Bytes of compressed layers that this process converted.", s.Bytes),
		{Name: "conversion_seconds_total", Kind: "counter", Help: "Seconds that its conversions took.", Samples: []metrics.Sample{{N: s.Seconds}}},
		metrics.Gauge("temporary_bytes", "Bytes of converted layers that wait for their push.", float64(s.Disk)),
	}
}

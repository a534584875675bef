package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/net/netutil"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/metrics"
)

// adminSocket is the path of the socket on which the daemon answers of itself, over HTTP, whoever may open it: root.
func adminSocket(root string) string { return filepath.Join(root, "admin.sock") }

// admin answers of a daemon. "mount" has one, too, that knows profiles only.
//
//	/healthz     200: the process answers
//	/readyz      200: containerd is answered, and not in safe mode; 503 with the reason in its body. Paused is ready: somebody wants it so
//	/metrics     in the text format of Prometheus
//	/status      the status as JSON
//	/check       ?ref=REF&platform=PLATFORM: what `check REF` says of an image, as JSON. No secret is in it
//	/blob        ?ref=REF&digest=DIGEST&size=BYTES: a blob of an image, from its registry, with the daemon's credentials; whoever asks verifies it
//	/quarantine  the artifacts in quarantine, as JSON; POST ?clear=INDEX takes one out of it
//	/profile     ?manifest=DIGEST of a platform manifest: the record of the image's first start, as JSON
//	/debug/pprof profiles of the Go runtime
//
// The first three are what a TCP address gives, if the configuration has one.
type admin struct {
	n     *node
	ready atomic.Bool
	safe  string                                                                // safe mode, and why; "" is none
	ask   func(age time.Duration) status                                        // files as they were no longer ago; nil for mount
	check func(ctx context.Context, ref, platform string) (*imageReport, error) // likewise
	blob  http.HandlerFunc                                                      // likewise
}

// public serves what everybody may see.
func (a *admin) public() *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		switch {
		case a.safe != "":
			http.Error(w, "safe mode: "+a.safe, http.StatusServiceUnavailable)
		case !a.ready.Load():
			http.Error(w, "containerd is not answered", http.StatusServiceUnavailable)
		default:
			io.WriteString(w, "ok\n")
		}
	})
	if a.ask != nil {
		mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", metrics.ContentType)
			writeMetrics(w, a.ask(maxAge), a.ready.Load() && a.safe == "")
		})
	}
	return mux
}

// private serves all there is.
func (a *admin) private() *http.ServeMux {
	mux := a.public()
	if a.ask != nil {
		mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
			json.NewEncoder(w).Encode(a.ask(0)) // who has gone does not want it
		})
	}
	if a.check != nil {
		mux.HandleFunc("GET /check", func(w http.ResponseWriter, r *http.Request) {
			report, err := a.check(r.Context(), r.FormValue("ref"), r.FormValue("platform"))
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			json.NewEncoder(w).Encode(report)
		})
	}
	if a.blob != nil {
		mux.HandleFunc("GET /blob", a.blob)
	}
	mux.HandleFunc("GET /quarantine", a.quarantine)
	mux.HandleFunc("POST /quarantine", a.quarantine)
	mux.HandleFunc("GET /profile", func(w http.ResponseWriter, r *http.Request) {
		if a.n.images == nil {
			http.Error(w, "the daemon is in safe mode", http.StatusServiceUnavailable)
			return
		}
		p, err := a.n.images.FirstUses(digest.Digest(r.FormValue("manifest")))
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		json.NewEncoder(w).Encode(p)
	})
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return mux
}

// serve answers on the socket in root, and at address if there is one, until stop, which waits for the end. What cannot be served is an error, and the
// rest is served all the same.
func (a *admin) serve(root, address string) (stop func(), err error) {
	var ends []func()
	start := func(l net.Listener, s *http.Server) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.Serve(l) // until Close
		}()
		ends = append(ends, func() {
			s.Close()
			<-done
		})
	}
	l, err := newSocket(adminSocket(root))
	if err == nil {
		start(l, &http.Server{Handler: a.private(), ReadHeaderTimeout: 5 * time.Second, ErrorLog: debugLog()})
	}
	if address != "" {
		l, tcpErr := listenPublic(address)
		if tcpErr == nil {
			start(l, publicServer(a.public()))
		}
		err = errors.Join(err, tcpErr)
	}
	return func() {
		for _, end := range ends {
			end()
		}
	}, err
}

// maxAge is how old in metrics may be what takes a walk over all files of the cache, because everybody may ask for them, as often as they like.
const maxAge = 10 * time.Second

// maxPublic bounds the connections at a TCP address, which is everybody's: what is more waits in the kernel.
const maxPublic = 64

func listenPublic(address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	return netutil.LimitListener(l, maxPublic), nil
}

// publicServer returns a server of short answers that nobody keeps for long.
func publicServer(h http.Handler) *http.Server {
	return &http.Server{Handler: h, ReadTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10, ErrorLog: debugLog()}
}

func debugLog() *log.Logger { return slog.NewLogLogger(slog.Default().Handler(), slog.LevelDebug) }

// getFromDaemon gets path from the process whose files are in root. The caller closes the answer.
func getFromDaemon(ctx context.Context, root, path string) (io.ReadCloser, error) {
	return fromDaemon(ctx, http.MethodGet, root, path)
}

func fromDaemon(ctx context.Context, method, root, path string) (io.ReadCloser, error) {
	c := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true, ResponseHeaderTimeout: time.Minute, // or one that hangs would hold who asks
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", adminSocket(root))
		},
	}}
	req, err := http.NewRequestWithContext(ctx, method, "http://daemon"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.Do(req)
	var dial *net.OpError
	switch {
	case errors.As(err, &dial) && dial.Op == "dial":
		return nil, fmt.Errorf("no daemon answers (it takes root, and `--config` if that is not the default's): %w", dial)
	case err != nil:
		return nil, fmt.Errorf("ask %s: %w", adminSocket(root), errors.Unwrap(err))
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // an error in an error adds nothing
		return nil, errors.New(strings.TrimSpace(string(b)))
	}
	return resp.Body, nil
}

// askDaemon gets path from the process whose files are in root, and decodes its answer into v.
func askDaemon(ctx context.Context, root, path string, v any) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	body, err := getFromDaemon(ctx, root, path)
	if err != nil {
		return err
	}
	defer body.Close()
	if err := json.NewDecoder(body).Decode(v); err != nil {
		return fmt.Errorf("ask %s: %w", adminSocket(root), err)
	}
	return nil
}

// askProfile asks the process whose files are in root for the record of an image.
func askProfile(ctx context.Context, root string, manifest digest.Digest) (b json.RawMessage, err error) {
	err = askDaemon(ctx, root, "/profile?"+url.Values{"manifest": {manifest.String()}}.Encode(), &b)
	return b, err
}

// askStatusOf asks the daemon whose files are in root.
func askStatusOf(ctx context.Context, root string) (s status, err error) {
	err = askDaemon(ctx, root, "/status", &s)
	return s, err
}

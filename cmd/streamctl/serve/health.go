package serve

import (
	"context"
	"errors"
	"io"
	"maps"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/metrics"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/webhook"
)

// health answers whether the process lives and works.
type health struct {
	version  string
	svc      atomic.Pointer[service.Service] // nil until it is there
	hooks    atomic.Pointer[webhook.Server]
	stopping atomic.Bool

	mu    sync.Mutex // while NATS is asked, too: probes that come meanwhile have the same answer
	asked time.Time
	found error
}

// What anybody may hear of why there is no service; the log has more.
var (
	errStarting = errors.New("the service is starting: it waits for NATS")
	errStopping = errors.New("the service is stopping")
	errNoNATS   = errors.New("NATS does not answer, or the operations are being read")
)

func (h *health) open(svc *service.Service, hooks *webhook.Server) {
	h.hooks.Store(hooks)
	h.svc.Store(svc)
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

const (
	readyTime = 2 * time.Second // that NATS may take to answer
	readyAge  = time.Second     // of an answer that is given again: anybody may ask
)

func (h *health) ready(ctx context.Context) error {
	svc := h.svc.Load()
	switch {
	case h.stopping.Load():
		return errStopping
	case svc == nil:
		return errStarting
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if time.Since(h.asked) < readyAge {
		return h.found
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readyTime) // who asks may go: the answer is others', too
	defer cancel()
	h.found = nil
	if svc.Ready(ctx) != nil {
		h.found = errNoNATS
	}
	h.asked = time.Now()
	return h.found
}

// metricPrefix is before the name of each metric.
const metricPrefix = "streaming_service_"

func (h *health) metrics(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", metrics.ContentType)
	var stats service.Stats
	var deliveries [len(webhook.Results)]int64
	if svc := h.svc.Load(); svc != nil {
		stats, deliveries = svc.Stats(), h.hooks.Load().Counts()
	}
	metrics.Write(w, metricPrefix, metricsOf(stats, deliveries, h.ready(r.Context()) == nil, h.version)) // who has gone does not want it
}

// metricsOf are what the service counts.
func metricsOf(s service.Stats, deliveries [len(webhook.Results)]int64, ready bool, version string) []metrics.Metric {
	states := []service.State{service.NotStarted, service.Running, service.Succeeded, service.Failed, service.Canceled}
	ended := []uint64{s.Succeeded, s.Failed, s.Canceled}
	names := make([]string, len(states))
	for i, state := range states {
		names[i] = string(state)
	}
	registries := slices.Sorted(maps.Keys(s.Auto.ReconcileFailures))
	reconciled := 0.0
	if !s.Auto.Reconciled.IsZero() {
		reconciled = float64(s.Auto.Reconciled.Unix())
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
		metrics.By("counter", "webhook_deliveries_total", "Deliveries of webhooks to this process, by what became of them.", "result", webhook.Results[:], func(i int) int64 { return deliveries[i] }),
		metrics.Counter("events", "Events of webhooks that told this process of something to look at.", int64(s.Auto.Events)),
		metrics.Gauge("tags_due", "Tags that wait to be looked at, as this process has seen it last.", float64(s.Auto.Due)),
		metrics.Counter("artifacts_deleted", "Artifacts and profiles that this process deleted by itself: their image was gone, or not one of the newest.", int64(s.Auto.Deleted)),
		metrics.Gauge("last_reconcile_timestamp_seconds", "When the registry that was not looked through for longest was, by any process; 0 if one was not yet.", reconciled),
		metrics.By("counter", "reconcile_failures_total", "Repositories that this process could not look through, by registry.", "registry", registries, func(i int) int64 { return int64(s.Auto.ReconcileFailures[registries[i]]) }),
	}
}

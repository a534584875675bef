package main

import (
	"io"
	"strconv"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/metrics"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
)

// metricPrefix is before the name of each metric.
const metricPrefix = "streaming_snapshotter_"

// metricsOf are what s says, and whether the daemon is ready.
func metricsOf(s status, ready bool) []metrics.Metric {
	c := s.Cache
	from := []struct {
		name string
		n    int64
	}{{"disk", c.Hits}, {"disk_verified", c.Verified}, {"other_layer", c.Copied}, {"on_demand", c.Misses}, {"read_ahead", c.ReadAhead}, {"profile", c.Hot}}
	sources := make([]string, len(from))
	for i, f := range from {
		sources[i] = f.name
	}
	codes := reason.All()
	reasons := make([]string, len(codes))
	for i, code := range codes {
		reasons[i] = string(code)
	}
	states := []string{"ok", "away", "wrong"}
	hosts := map[string]int64{}
	for _, h := range s.Hosts {
		hosts[h.State]++
	}
	through, direct := int64(0), int64(0)
	size, local := int64(0), int64(0)
	for _, i := range s.Images {
		through, direct = through+int64(i.Through), direct+int64(i.Direct)
		size, local = size+i.Size, local+i.Local
	}
	background := [2]int64{}
	if b := s.Background; b != nil {
		background = [2]int64{b.Done, b.Total}
	}
	reports := [2]int64{}
	if r := s.Report; r != nil {
		reports = [2]int64{r.Told, r.Dropped}
	}
	return []metrics.Metric{
		{Name: "build_info", Kind: "gauge", Help: "The daemon's version.", Samples: []metrics.Sample{{Label: "version", Value: s.Version, N: 1}}},
		metrics.Gauge("ready", "1 while containerd is answered, and not in safe mode.", metrics.Flag(ready)),
		metrics.Gauge("safe_mode", "1 in safe mode, in which nothing new is streamed.", metrics.Flag(s.SafeMode != "")),
		metrics.Gauge("paused", "1 while streaming is paused on this node.", metrics.Flag(s.Paused != "")),
		metrics.Counter("pulls_streamed", "Pulls that were streamed.", s.Streamed),
		metrics.By("counter", "pulls_normal_total", "Pulls that were not streamed, by reason.", "reason", reasons, func(i int) int64 { return s.Normal[codes[i]] }),
		s.PullTimes.metric("pull_seconds", "From a pull's first call to its snapshots, of pulls that were streamed."),
		s.StartTimes.metric("start_seconds", "From an image's first mount until nothing more was read for its container's start, of first starts."),
		metrics.By("counter", "reports_total", "Starts that the conversion service was to be told of, by what came of it.", "state", []string{"told", "dropped"}, func(i int) int64 { return reports[i] }),
		metrics.Gauge("images", "Streamed images on this node.", float64(s.StreamedCount)),
		metrics.Gauge("images_mounted", "Streamed images that are mounted.", float64(s.MountedCount)),
		metrics.Gauge("images_bytes", "Bytes of the tars of all streamed images.", float64(size)),
		metrics.Gauge("images_local_bytes", "Bytes of them that are on this node.", float64(local)),
		metrics.By("gauge", "mounts", "Where images are mounted, by who answers reads: the daemon, or local files.", "by", []string{"daemon", "files"}, func(i int) int64 { return []int64{through, direct}[i] }),
		metrics.Gauge("cache_bytes", "Bytes on disk of the chunk cache.", float64(s.CacheBytes)),
		metrics.Gauge("cache_limit_bytes", "What they may be; 0 is no limit.", float64(s.CacheLimit)),
		metrics.Gauge("cache_failing", "1 while the cache's disk fails, and reads go on without caching.", metrics.Flag(s.NotCaching)),
		metrics.By("counter", "chunks_total", "Chunks, by where they came from.", "from", sources, func(i int) int64 { return from[i].n }),
		metrics.Counter("chunk_waits", "Chunks that a read waited for, whoever brought them.", c.Waits),
		metrics.Gauge("reads_waiting", "Reads that wait now.", float64(c.Waiting)),
		metrics.Counter("reads_failed", "Reads that ended in an I/O error for a container.", s.FailedReads),
		metrics.Counter("chunks_corrupt", "Chunks from a registry that did not verify.", c.CorruptChunks),
		metrics.Counter("chunks_damaged", "Chunks on this node's disk that did not verify.", c.DamagedChunks),
		metrics.Counter("chunks_evicted", "Chunks given back to stay within the limit.", c.Evicted),
		metrics.Counter("disk_errors", "Operations on the cache's disk that failed.", c.DiskErrors),
		metrics.Counter("registry_requests", "Requests sent to registries and token servers.", s.Registry.Requests),
		metrics.Counter("registry_received_bytes", "Bytes of their answers.", s.Registry.Bytes),
		metrics.By("gauge", "registry_hosts", "Hosts of registries that were asked, by how they do.", "state", states, func(i int) int64 { return hosts[states[i]] }),
		metrics.By("gauge", "background_bytes", "Of the image that is being completed: bytes that are here, and all; 0 if there is none.", "state", []string{"done", "total"}, func(i int) int64 { return background[i] }),
		metrics.Gauge("layers_proven", "Layers that were proven, in all.", float64(s.Proofs.Proven)),
		metrics.Gauge("proofs_waiting", "Layers in use that are not proven yet.", float64(s.Proofs.Waiting)),
		metrics.Gauge("proofs_overdue", "Of them, those whose image was mounted longer ago than proof_deadline.", float64(s.Proofs.Overdue)),
		metrics.Gauge("layers_quarantined", "Layers of artifacts that lie, which are not read any more.", float64(s.Proofs.Quarantined)),
		metrics.Gauge("goroutines", "Goroutines of the daemon.", float64(s.Goroutines)),
		metrics.Gauge("heap_bytes", "Bytes of the daemon's heap that are in use.", float64(s.Heap)),
	}
}

func writeMetrics(w io.Writer, s status, ready bool) {
	metrics.Write(w, metricPrefix, metricsOf(s, ready)) // who has gone does not want it
}

// times is a histogram of seconds. The zero value is an empty one.
type times struct {
	Within [len(timesBounds)]int64 `json:"within"` // how many took no longer than the bound, for each bound of timesBounds
	Count  int64                   `json:"count"`
	Sum    float64                 `json:"sum"`
}

// timesBounds are for pulls, of which one takes a few round trips, and for starts.
var timesBounds = [...]float64{0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 120, 300}

func (t *times) add(seconds float64) {
	for i, b := range timesBounds {
		if seconds <= b {
			t.Within[i]++
		}
	}
	t.Count++
	t.Sum += seconds
}

func (t times) metric(name, help string) metrics.Metric {
	m := metrics.Metric{Name: name, Kind: "histogram", Help: help}
	for i, b := range timesBounds {
		m.Samples = append(m.Samples, metrics.Sample{Suffix: "_bucket", Label: "le", Value: strconv.FormatFloat(b, 'g', -1, 64), N: float64(t.Within[i])})
	}
	m.Samples = append(m.Samples, metrics.Sample{Suffix: "_bucket", Label: "le", Value: "+Inf", N: float64(t.Count)}, metrics.Sample{Suffix: "_sum", N: t.Sum}, metrics.Sample{Suffix: "_count", N: float64(t.Count)})
	return m
}

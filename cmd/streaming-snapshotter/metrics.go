package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
)

// metricPrefix is before the name of each metric.
const metricPrefix = "streaming_snapshotter_"

// metric is one metric in the text format of Prometheus (exposition format 0.0.4). Labels take a few values that are known here: never an image, a digest or a host.
type metric struct {
	name, kind, help string
	samples          []sample
}

type sample struct {
	suffix, label, value string // of a histogram; "" for none
	n                    float64
}

func gauge(name, help string, n float64) metric {
	return metric{name, "gauge", help, []sample{{n: n}}}
}

func counter(name, help string, n int64) metric {
	return metric{name + "_total", "counter", help, []sample{{n: float64(n)}}}
}

// by is a metric with one label.
func by(kind, name, help, label string, values []string, n func(i int) int64) metric {
	m := metric{name: name, kind: kind, help: help}
	for i, v := range values {
		m.samples = append(m.samples, sample{label: label, value: v, n: float64(n(i))})
	}
	return m
}

func flag(is bool) float64 {
	if is {
		return 1
	}
	return 0
}

// metricsOf are what s says, and whether the daemon is ready.
func metricsOf(s status, ready bool) []metric {
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
	return []metric{
		{"build_info", "gauge", "The daemon's version.", []sample{{label: "version", value: s.Version, n: 1}}},
		gauge("ready", "1 while containerd is answered, and not in safe mode.", flag(ready)),
		gauge("safe_mode", "1 in safe mode, in which nothing new is streamed.", flag(s.SafeMode != "")),
		gauge("paused", "1 while streaming is paused on this node.", flag(s.Paused != "")),
		counter("pulls_streamed", "Pulls that were streamed.", s.Streamed),
		by("counter", "pulls_normal_total", "Pulls that were not streamed, by reason.", "reason", reasons, func(i int) int64 { return s.Normal[codes[i]] }),
		s.PullTimes.metric("pull_seconds", "From a pull's first call to its snapshots, of pulls that were streamed."),
		gauge("images", "Streamed images on this node.", float64(s.StreamedCount)),
		gauge("images_mounted", "Streamed images that are mounted.", float64(s.MountedCount)),
		gauge("images_bytes", "Bytes of the tars of all streamed images.", float64(size)),
		gauge("images_local_bytes", "Bytes of them that are on this node.", float64(local)),
		by("gauge", "mounts", "Where images are mounted, by who answers reads: the daemon, or local files.", "by", []string{"daemon", "files"}, func(i int) int64 { return []int64{through, direct}[i] }),
		gauge("cache_bytes", "Bytes on disk of the chunk cache.", float64(s.CacheBytes)),
		gauge("cache_limit_bytes", "What they may be; 0 is no limit.", float64(s.CacheLimit)),
		gauge("cache_failing", "1 while the cache's disk fails, and reads go on without caching.", flag(s.NotCaching)),
		by("counter", "chunks_total", "Chunks, by where they came from.", "from", sources, func(i int) int64 { return from[i].n }),
		counter("chunk_waits", "Chunks that a read waited for, whoever brought them.", c.Waits),
		gauge("reads_waiting", "Reads that wait now.", float64(c.Waiting)),
		counter("reads_failed", "Reads that ended in an I/O error for a container.", s.FailedReads),
		counter("chunks_corrupt", "Chunks from a registry that did not verify.", c.CorruptChunks),
		counter("chunks_damaged", "Chunks on this node's disk that did not verify.", c.DamagedChunks),
		counter("chunks_evicted", "Chunks given back to stay within the limit.", c.Evicted),
		counter("disk_errors", "Operations on the cache's disk that failed.", c.DiskErrors),
		counter("registry_requests", "Requests sent to registries and token servers.", s.Registry.Requests),
		counter("registry_received_bytes", "Bytes of their answers.", s.Registry.Bytes),
		by("gauge", "registry_hosts", "Hosts of registries that were asked, by how they do.", "state", states, func(i int) int64 { return hosts[states[i]] }),
		by("gauge", "background_bytes", "Of the image that is being completed: bytes that are here, and all; 0 if there is none.", "state", []string{"done", "total"}, func(i int) int64 { return background[i] }),
		gauge("goroutines", "Goroutines of the daemon.", float64(s.Goroutines)),
		gauge("heap_bytes", "Bytes of the daemon's heap that are in use.", float64(s.Heap)),
	}
}

func writeMetrics(w io.Writer, s status, ready bool) {
	var b strings.Builder
	for _, m := range metricsOf(s, ready) {
		name := metricPrefix + m.name
		fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s %s\n", name, m.help, name, m.kind)
		for _, x := range m.samples {
			b.WriteString(name + x.suffix)
			if x.label != "" {
				fmt.Fprintf(&b, "{%s=%q}", x.label, x.value)
			}
			b.WriteString(" " + strconv.FormatFloat(x.n, 'g', -1, 64) + "\n")
		}
	}
	io.WriteString(w, b.String()) // who has gone does not want it
}

// times is a histogram of seconds. The zero value is an empty one.
type times struct {
	Within [len(timesBounds)]int64 `json:"within"` // how many took no longer than the bound, for each bound of timesBounds
	Count  int64                   `json:"count"`
	Sum    float64                 `json:"sum"`
}

// timesBounds are for pulls: one takes a few round trips.
var timesBounds = [...]float64{0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15}

func (t *times) add(seconds float64) {
	for i, b := range timesBounds {
		if seconds <= b {
			t.Within[i]++
		}
	}
	t.Count++
	t.Sum += seconds
}

func (t times) metric(name, help string) metric {
	m := metric{name: name, kind: "histogram", help: help}
	for i, b := range timesBounds {
		m.samples = append(m.samples, sample{"_bucket", "le", strconv.FormatFloat(b, 'g', -1, 64), float64(t.Within[i])})
	}
	m.samples = append(m.samples, sample{"_bucket", "le", "+Inf", float64(t.Count)}, sample{suffix: "_sum", n: t.Sum}, sample{suffix: "_count", n: float64(t.Count)})
	return m
}

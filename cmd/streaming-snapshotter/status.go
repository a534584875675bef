package main

import (
	"io/fs"
	"log/slog"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/report"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// status is what the daemon says of itself, as JSON.
type status struct {
	Version       string             `json:"version"`
	Since         string             `json:"since"`
	SafeMode      string             `json:"safe_mode,omitempty"` // why
	Paused        string             `json:"paused,omitempty"`    // since when nothing new is streamed
	MountMode     string             `json:"mount_mode,omitempty"`
	NotTaken      string             `json:"not_taken,omitempty"` // the modes before it, and why
	Stream        patterns           `json:"stream"`
	Kept          bool               `json:"kept"` // the mounts outlive the daemon
	StreamedCount int                `json:"streamed_images"`
	MountedCount  int                `json:"mounted_images"`
	Mounts        int                `json:"mounts"`                // places where these are mounted, as a whole or in part
	CacheBytes    int64              `json:"cache_bytes"`           // on disk
	CacheLimit    int64              `json:"cache_limit"`           // 0 is none
	NotCaching    bool               `json:"not_caching"`           // the cache's disk fails at the moment, for cache_error
	CacheError    string             `json:"cache_error,omitempty"` // of the cache's disk, the last one; it may work again
	Cache         cache.Stats        `json:"cache"`                 // since the start
	Background    *stream.Background `json:"background,omitempty"`  // the image that is being completed
	Proofs        stream.ProofStatus `json:"proofs"`
	Hosts         []host             `json:"hosts"`      // of registries, those that were asked
	Goroutines    int                `json:"goroutines"` // of the daemon: what leaks shows here first
	Heap          int64              `json:"heap"`       // of the daemon: bytes of what it has not freed yet
	Problems      []string           `json:"problems"`   // the last ones, the newest at the end
	pullCounts
	NotStreamed []normalPull         `json:"not_streamed"` // the last ones, the newest at the end
	Images      []imageStatus        `json:"images"`
	FailedReads int64                `json:"failed_reads"`     // that ended in an I/O error, since the start
	Registry    registryclient.Stats `json:"registry"`         // since the start
	Report      *report.Status       `json:"report,omitempty"` // to the conversion service, if there is one
}

// imageStatus is how a streamed image is.
type imageStatus struct {
	stream.ImageStatus
	Ref     string `json:"ref,omitempty"` // what it was called when it was pulled, if that was since the start
	Through int    `json:"through"`       // places where it is mounted and the daemon answers reads
	Direct  int    `json:"direct"`        // places where local files do
}

// host is how a registry's host does.
type host struct {
	Registry string `json:"registry"` // that it is a host of
	Host     string `json:"host"`
	State    string `json:"state"`           // ok, away, or wrong: it gave wrong answers, and is asked after the others
	Since    string `json:"since,omitempty"` // it is away
	Until    string `json:"until,omitempty"` // it is asked after the others
	Error    string `json:"error,omitempty"` // why it is away

	Credentials []string `json:"credentials,omitempty"` // the sources of those that it has let in
}

func (n *node) hosts() []host {
	list := []host{}
	if n.reg == nil {
		return list
	}
	for _, h := range n.reg.Hosts() {
		at := host{Registry: h.Registry, Host: h.Host, State: "ok", Error: h.Error, Credentials: h.Accepted}
		if h.Wrong.After(time.Now()) {
			at.State, at.Until = "wrong", h.Wrong.UTC().Format(time.RFC3339)
		}
		if h.Away {
			at.State, at.Since = "away", h.Since.UTC().Format(time.RFC3339)
		}
		list = append(list, at)
	}
	return list
}

func (h host) String() string {
	s := h.Host
	if h.Registry != h.Host {
		s += " (of " + h.Registry + ")"
	}
	s += ": " + h.State
	if h.Since != "" {
		s += " since " + h.Since
	}
	if h.Until != "" {
		s += ", asked after the others until " + h.Until
	}
	if h.Error != "" {
		s += ": " + h.Error
	}
	if len(h.Credentials) > 0 {
		s += "; credentials: " + strings.Join(h.Credentials, ", ")
	}
	return s
}

// walked is what it takes a walk over the node's files to know.
type walked struct {
	images     []imageStatus
	cacheBytes int64
}

// walks keeps the last walk: one is made at a time. The zero value has none.
type walks struct {
	mu   sync.Mutex
	last walked
	at   time.Time
}

// get returns what a walk over root has found that is no older than age; 0 is a new one.
func (k *walks) get(root string, n *node, pulls *pulls, age time.Duration) walked {
	k.mu.Lock()
	defer k.mu.Unlock()
	if age == 0 || time.Since(k.at) >= age {
		k.last = walked{n.imageStatus(pulls), diskUse(filepath.Join(root, "cache"))}
		k.at = time.Now()
	}
	return k.last
}

// measure fills in what changes.
func (s status) measure(root string, n *node, seen *seen, w walked) status {
	s.Cache, s.Background, s.Paused = n.stats(), n.background(), pausedSince(root)
	s.Images, s.CacheBytes = w.images, w.cacheBytes
	s.StreamedCount = len(s.Images)
	if n.mounts != nil {
		s.FailedReads = n.mounts.FailedReads()
	}
	for _, i := range s.Images {
		s.Mounts += i.Through + i.Direct
		if i.Through+i.Direct > 0 {
			s.MountedCount++
		}
	}
	if n.images != nil {
		s.Proofs = n.images.Proofs()
	}
	if n.reg != nil {
		s.Registry = n.reg.Stats()
	}
	if n.cache != nil {
		c := n.cache.Status()
		s.CacheLimit, s.NotCaching = c.Limit, c.NotCaching
		if c.Err != nil {
			s.CacheError = c.Err.Error()
		}
	}
	s.Hosts = n.hosts()
	s.Goroutines = runtime.NumGoroutine()
	heap := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(heap)
	s.Heap = int64(heap[0].Value.Uint64())
	s.Problems = seen.problems.list()
	s.pullCounts, s.NotStreamed = seen.pulls.list()
	if seen.starts != nil {
		s.Report = seen.starts.reports.Status()
	}
	return s
}

// imageStatus lists the images, with where they are mounted.
func (n *node) imageStatus(pulls *pulls) []imageStatus {
	list := []imageStatus{}
	if n.images == nil {
		return list
	}
	images, err := n.images.Status()
	if err != nil {
		slog.Debug("status of images", "error", err) // of a newer release, or damaged: who mounts it is told
	}
	mounts := n.mounts.Mounts()
	for _, i := range images {
		at := imageStatus{ImageStatus: i, Ref: pulls.ref(i.ID)}
		for _, m := range mounts {
			switch {
			case m.ID != i.ID:
			case m.Direct:
				at.Direct++
			default:
				at.Through++
			}
		}
		list = append(list, at)
	}
	return list
}

// diskUse returns the bytes on disk of the files below dir, 0 if there is none.
func diskUse(dir string) (total int64) {
	filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil // it is removed, or cannot be read: the cache says so itself
		}
		if fi, err := d.Info(); err == nil {
			if st, ok := fi.Sys().(*syscall.Stat_t); ok {
				total += st.Blocks * 512
			}
		}
		return nil
	})
	return total
}

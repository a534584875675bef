package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// status is what the daemon says of itself, as JSON, to whoever connects to its second socket, status.sock in root.
type status struct {
	Version       string             `json:"version"`
	Since         string             `json:"since"`
	SafeMode      string             `json:"safe_mode,omitempty"` // why
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
	Hosts         []host             `json:"hosts"`                 // of registries, those that were asked
	Goroutines    int                `json:"goroutines"`            // of the daemon: what leaks shows here first
	Heap          int64              `json:"heap"`                  // of the daemon: bytes of what it has not freed yet
	Problems      []string           `json:"problems"`              // the last ones, the newest at the end
	pullCounts
	NotStreamed []normalPull `json:"not_streamed"` // the last ones, the newest at the end
}

// host is how a registry's host does.
type host struct {
	Registry string `json:"registry"` // that it is a host of
	Host     string `json:"host"`
	State    string `json:"state"`           // ok, away, or wrong: it gave wrong answers, and is asked after the others
	Since    string `json:"since,omitempty"` // it is away
	Until    string `json:"until,omitempty"` // it is asked after the others
	Error    string `json:"error,omitempty"` // why it is away
}

func (n *node) hosts() []host {
	list := []host{}
	if n.reg == nil {
		return list
	}
	for _, h := range n.reg.Hosts() {
		at := host{Registry: h.Registry, Host: h.Host, State: "ok", Error: h.Error}
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
	return s
}

// measure fills in what changes.
func (s status) measure(root string, n *node, seen *seen) status {
	s.Cache, s.Background = n.stats(), n.background()
	if entries, err := os.ReadDir(filepath.Join(root, "images")); err == nil {
		for _, e := range entries {
			if e.IsDir() {
				s.StreamedCount++
			}
		}
	}
	if n.mounts != nil {
		s.MountedCount, s.Mounts = n.mounts.Count()
	}
	s.CacheBytes = diskUse(filepath.Join(root, "cache"))
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
	return s
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

// statusSocket is the path of the second socket.
func statusSocket(root string) string { return filepath.Join(root, "status.sock") }

// serveStatus answers until stop, which waits for the end.
func (n *node) serveStatus(root string, s status, seen *seen) (stop func(), err error) {
	return serveSocket(statusSocket(root), func(conn net.Conn) {
		json.NewEncoder(conn).Encode(s.measure(root, n, seen)) // who has gone does not want it
	})
}

// serveSocket answers who connects to the socket at path, one after the other, until stop, which waits for the end.
func serveSocket(path string, answer func(conn net.Conn)) (stop func(), err error) {
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) { // a dead daemon's: root is locked
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.SetDeadline(time.Now().Add(5 * time.Second))
			answer(conn)
			conn.Close()
		}
	}()
	return func() {
		l.Close()
		<-done
	}, os.Chmod(path, 0o600)
}

// askStatusOf asks the daemon whose files are in root.
func askStatusOf(root string) (s status, err error) {
	conn, err := dialDaemon(statusSocket(root))
	if err != nil {
		return s, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	if err := json.NewDecoder(conn).Decode(&s); err != nil {
		return s, fmt.Errorf("read status from %s: %w", statusSocket(root), err)
	}
	return s, nil
}

// printStatus prints how the daemon is whose files are in root.
func printStatus(root string, asJSON bool, w io.Writer) error {
	s, err := askStatusOf(root)
	if err != nil {
		return err
	}
	if asJSON {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(s)
	}
	fmt.Fprintf(w, "version: %s, since %s\n", s.Version, s.Since)
	if s.SafeMode != "" {
		fmt.Fprintf(w, "SAFE MODE, nothing new is streamed: %s\n", s.SafeMode)
	}
	fmt.Fprintf(w, "mount mode: %s\n", s.MountMode)
	if s.NotTaken != "" {
		fmt.Fprintf(w, "not taken: %s\n", s.NotTaken)
	}
	fmt.Fprintf(w, "images: %d streamed, %d of them mounted, at %d places\nstream: %s\ncache: %s\n", s.StreamedCount, s.MountedCount, s.Mounts, s.Stream, s.cache())
	for _, h := range s.Hosts {
		fmt.Fprintf(w, "host: %s\n", h)
	}
	if b := s.Background; b != nil {
		fmt.Fprintf(w, "in the background: %s, %s of %s\n", b.Image, bytesText(b.Done), bytesText(b.Total))
	}
	if len(s.NotStreamed) > 0 {
		fmt.Fprintln(w)
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "NOT STREAMED\tREASON\tWHEN")
		for _, p := range s.NotStreamed {
			fmt.Fprintf(t, "%s\t%s\t%s\n", cmp.Or(p.Image, "(unknown)"), p.Reason, p.At)
		}
		t.Flush()
		fmt.Fprintln(w)
	}
	for _, p := range s.Problems {
		fmt.Fprintf(w, "problem: %s\n", p)
	}
	return nil
}

// bytesText prints bytes as people read them.
func bytesText(n int64) string {
	f, unit := float64(n), "B"
	for _, u := range []string{"kB", "MB", "GB", "TB"} {
		if f < 999.95 {
			break
		}
		f, unit = f/1000, u
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0") + " " + unit
}

// cache says in one line how the chunk cache is.
func (s status) cache() string {
	text := bytesText(s.CacheBytes)
	if s.CacheLimit > 0 {
		text += " of " + bytesText(s.CacheLimit)
	}
	if n := s.Cache.DamagedChunks; n > 0 {
		text += fmt.Sprintf(", chunks found damaged on disk and fetched again: %d", n)
	}
	switch {
	case s.NotCaching:
		text += ", NOT CACHING: " + s.CacheError
	case s.CacheError != "":
		text += ", the disk has failed before: " + s.CacheError
	}
	return text
}

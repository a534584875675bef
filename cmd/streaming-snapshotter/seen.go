package main

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
)

// seen is what the daemon remembers for its status.
type seen struct {
	problems *problems // a log handler
	pulls    *pulls
	starts   *firstStarts
}

// newSeen returns one whose problems go on to h.
func newSeen(h slog.Handler) *seen {
	return &seen{problems: &problems{Handler: h, last: &lastLines{}}, pulls: &pulls{refs: map[string]string{}}}
}

// pulls counts pulls, and remembers those that were not streamed.
type pulls struct {
	mu     sync.Mutex
	counts pullCounts
	normal []normalPull
	refs   map[string]string // by artifact: what the image was called when it was pulled last
}

// pullCounts are numbers of pulls since the start.
type pullCounts struct {
	Streamed int64                 `json:"streamed_pulls"`
	Normal   map[reason.Code]int64 `json:"normal_pulls,omitempty"` // by reason

	PullTimes  times `json:"pull_times"`  // of those that were streamed, seconds
	StartTimes times `json:"start_times"` // of first starts of images, from the mount until nothing more was read, seconds
}

// normalPull is a pull that was not streamed.
type normalPull struct {
	Image    string      `json:"image"` // its reference; "" if containerd did not say
	Manifest string      `json:"manifest"`
	Reason   reason.Code `json:"reason"`
	Error    string      `json:"error"`
	At       string      `json:"at"`
}

// maxRefs bounds the names that are remembered: more images than a node has.
const maxRefs = 4096

// maxNormalPulls bounds what is remembered.
const maxNormalPulls = 20

// note is snapshot.New's onPull.
func (p *pulls) note(pull snapshot.Pull) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if pull.Err == nil {
		p.counts.Streamed++
		p.counts.PullTimes.add(pull.Took.Seconds())
		if len(p.refs) >= maxRefs {
			clear(p.refs)
		}
		p.refs[pull.Artifact] = pull.Image
		return
	}
	code := reason.Of(pull.Err)
	if p.counts.Normal == nil {
		p.counts.Normal = map[reason.Code]int64{}
	}
	p.counts.Normal[code]++
	p.normal = append(p.normal, normalPull{pull.Image, pull.Manifest.String(), code, pull.Err.Error(), pull.At.UTC().Format(time.RFC3339)})
	p.normal = p.normal[max(0, len(p.normal)-maxNormalPulls):]
}

// noteStart counts a first start.
func (p *pulls) noteStart(took time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.counts.StartTimes.add(took.Seconds())
}

// list returns copies of the counts and the pulls that were not streamed.
func (p *pulls) list() (pullCounts, []normalPull) {
	p.mu.Lock()
	defer p.mu.Unlock()
	counts := p.counts
	counts.Normal = maps.Clone(p.counts.Normal)
	return counts, append([]normalPull{}, p.normal...)
}

// ref returns what the image of an artifact was called when it was pulled; "" if that was in another life.
func (p *pulls) ref(artifact string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.refs[artifact]
}

// problems is a handler that remembers the last warnings and errors on their way to another one.
type problems struct {
	slog.Handler
	last *lastLines
	with []slog.Attr
}

// maxProblems bounds what is remembered.
const maxProblems = 20

type lastLines struct {
	mu    sync.Mutex
	lines []problem
}

// problem is one line, and what it is about, "" for nothing that can be well again.
type problem struct{ about, text string }

type aboutKey struct{}

// about is a context to log what happens to one thing with: a line below a warning says that it is well again, and ends the problems of before.
func about(what string) context.Context {
	return context.WithValue(context.Background(), aboutKey{}, what)
}

func (p *problems) list() []string {
	p.last.mu.Lock()
	defer p.last.mu.Unlock()
	list := []string{}
	for _, l := range p.last.lines {
		list = append(list, l.text)
	}
	return list
}

// Enabled is slog's: what ends a problem is looked at, too.
func (p *problems) Enabled(_ context.Context, l slog.Level) bool {
	return l >= slog.LevelInfo || p.Handler.Enabled(context.Background(), l)
}

// Handle is slog's.
func (p *problems) Handle(ctx context.Context, r slog.Record) error {
	what, _ := ctx.Value(aboutKey{}).(string)
	if r.Level >= slog.LevelWarn {
		var b strings.Builder
		fmt.Fprintf(&b, "%s %s: %s", r.Time.UTC().Format(time.RFC3339), r.Level, r.Message)
		add := func(a slog.Attr) bool {
			if a.Key != "stack" {
				fmt.Fprintf(&b, " %s=%q", a.Key, a.Value)
			}
			return true
		}
		for _, a := range p.with {
			add(a)
		}
		r.Attrs(add)
		p.last.mu.Lock()
		p.last.lines = append(p.last.lines, problem{what, b.String()})
		p.last.lines = p.last.lines[max(0, len(p.last.lines)-maxProblems):]
		p.last.mu.Unlock()
	} else if what != "" {
		p.last.mu.Lock()
		p.last.lines = slices.DeleteFunc(p.last.lines, func(l problem) bool { return l.about == what })
		p.last.mu.Unlock()
	}
	if !p.Handler.Enabled(ctx, r.Level) {
		return nil
	}
	return p.Handler.Handle(ctx, r)
}

// WithAttrs is slog's.
func (p *problems) WithAttrs(as []slog.Attr) slog.Handler {
	return &problems{Handler: p.Handler.WithAttrs(as), last: p.last, with: append(append([]slog.Attr{}, p.with...), as...)}
}

// WithGroup is slog's.
func (p *problems) WithGroup(name string) slog.Handler {
	return &problems{Handler: p.Handler.WithGroup(name), last: p.last, with: p.with}
}

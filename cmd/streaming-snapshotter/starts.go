package main

import (
	"cmp"
	"context"
	"log/slog"
	"math"
	"path/filepath"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/report"
	wire "github.com/streaming-snapshotter/streaming-snapshotter/converter/service/starts"
	"github.com/streaming-snapshotter/streaming-snapshotter/events"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

const (
	readyInterval = 10 * time.Second // in which the API server is asked whether pods are ready, while a start is to be told of
	readyWait     = 15 * time.Minute // from the mount on, for a pod to be ready
)

// firstStarts follows the first starts of images: how long they took is in the metrics, and told to the conversion service if one is configured.
type firstStarts struct {
	counts  *pulls
	pods    *podEvents // nil: nobody says when a pod is ready
	reports *report.Reporter
	wake    chan struct{}

	mu      sync.Mutex
	pulled  map[string]snapshot.Pull // by artifact: those whose image has not started
	waiting []startOfImage
}

// startOfImage is a start with the pull that it is of.
type startOfImage struct {
	stream.Start
	pull snapshot.Pull
}

// followStarts does so until stop. Its Reporter is nil if none is configured, or none can be.
func followStarts(c config, counts *pulls, pods *podEvents) (s *firstStarts, stop func()) {
	s = &firstStarts{counts: counts, pods: pods, wake: make(chan struct{}, 1), pulled: map[string]snapshot.Pull{}}
	if c.Report == "" {
		return s, func() {}
	}
	var err error
	s.reports, err = report.New(report.Options{
		Server: c.Report, TokenFile: c.ReportToken, CAFile: c.ReportCA, IDFile: filepath.Join(c.Root, "reporter"), Agent: "streaming-snapshotter/" + version(), OnError: logReports,
	})
	if err != nil {
		slog.Error("no starts are reported", "error", err)
		return s, func() {}
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { s.reports.Run(ctx) })
	running.Go(func() { s.run(ctx) })
	return s, func() {
		cancel()
		running.Wait()
	}
}

// logReports logs that starts cannot be reported, and that they can again.
func logReports(err error) {
	ctx := about("reports of starts")
	if err != nil {
		slog.WarnContext(ctx, "starts cannot be reported to the conversion service", "error", err)
	} else {
		slog.InfoContext(ctx, "starts are reported again")
	}
}

// note remembers a pull until its image starts.
func (s *firstStarts) note(p snapshot.Pull) {
	if p.Err != nil || s.reports == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.pulled) >= maxRefs {
		clear(s.pulled)
	}
	s.pulled[p.Artifact] = p
}

// started is stream.Store's OnStart. What was pulled in another life of the daemon is not told of: nobody knows how, and with which profile.
func (s *firstStarts) started(st stream.Start) {
	if st.Took > 0 {
		s.counts.noteStart(st.Took)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	pull, ok := s.pulled[st.Image]
	delete(s.pulled, st.Image)
	if !ok || s.reports == nil {
		return
	}
	s.waiting = append(s.waiting, startOfImage{st, pull})
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// run tells of starts, once it is known whether their pods are ready, until ctx ends.
func (s *firstStarts) run(ctx context.Context) {
	t := time.NewTicker(readyInterval)
	defer t.Stop()
	for {
		var tick <-chan time.Time
		if s.tell(ctx) > 0 {
			tick = t.C
		}
		select {
		case <-s.wake:
		case <-tick:
		case <-ctx.Done():
			return
		}
	}
}

// tell tells of what can be told of now, and returns of how many starts the pods are not ready.
func (s *firstStarts) tell(ctx context.Context) int {
	s.mu.Lock()
	list := s.waiting
	s.waiting = nil
	s.mu.Unlock()
	var pods events.Readiness
	asked := len(list) > 0 && s.pods != nil
	if asked {
		var err error
		if pods, err = s.pods.Readiness(ctx); err != nil {
			slog.Debug("are pods ready?", "error", err) // events say so, too
			asked = false
		}
	}
	var left []startOfImage
	for _, st := range list {
		ready := time.Duration(0)
		if asked {
			at, known := pods.Of(st.pull.Image, st.Mounted)
			if known && at.IsZero() && time.Since(st.Mounted) < readyWait {
				left = append(left, st)
				continue
			}
			if !at.IsZero() {
				ready = max(at.Sub(st.Mounted), time.Millisecond) // it is told to the second, and may be less than one
			}
		}
		if r := st.report(ready); r.Reads > 0 || r.Ready > 0 {
			s.reports.Add(st.Repository, r)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting = append(s.waiting, left...)
	return len(left)
}

// report is what is told of a start whose pod was ready after that time, 0 if that is not known.
func (s startOfImage) report(ready time.Duration) wire.Start {
	return wire.Start{
		Manifest: s.Manifest, Artifact: digest.NewDigestFromEncoded(digest.SHA256, s.Image), Profile: cmp.Or(s.Source, wire.None), Fetched: s.Profile,
		Pull: seconds(s.pull.Took), Wait: seconds(max(s.Mounted.Sub(s.pull.At), 0)), Reads: seconds(s.Took), Ready: seconds(ready), Bytes: s.Bytes, Missed: s.Missed, Misses: s.Misses,
	}
}

// seconds is d in seconds, of a thousandth at least unless it is 0, and an hour at most.
func seconds(d time.Duration) float64 {
	return math.Ceil(float64(min(d, wire.MaxTime).Microseconds())/1000) / 1000
}

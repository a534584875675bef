package service

import (
	"errors"
	"fmt"
	"net/http"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/starts"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// nodeID is that of a node for reports.
func nodeID(n int) string { return fmt.Sprintf("%032x", n) }

// report is one of a start of an image's artifact.
func report(node int, a Artifact, profile string, reads float64) starts.Report {
	return starts.Report{Node: nodeID(node), Starts: []starts.Start{{
		Manifest: a.Subject, Artifact: a.Digest, Profile: profile, Pull: 0.5, Reads: reads, Bytes: 4000, Missed: 1000, Misses: 3,
	}}}
}

// startsOf returns what the service shows of an image's only platform.
func (w *world) startsOf(i Image) StartsInfo {
	w.t.Helper()
	info, err := w.Image(w.t.Context(), i.Registry, i.Repository, i.Digest.String())
	if err != nil {
		w.t.Fatal(err)
	}
	if info.Platforms[0].Starts == nil {
		return StartsInfo{}
	}
	return *info.Platforms[0].Starts
}

// TestReport: what processes are told at the same time adds up, by the profile that nodes had; a new profile begins anew, and what was before is there beside it.
// It goes with the image.
func TestReport(t *testing.T) {
	w := newWorld(t)
	i := w.push("app", "v1", image(t, "amd64", 1000))
	if _, _, err := w.Submit(t.Context(), Request{Image: i, By: "bob"}); err != nil {
		t.Fatal(err)
	}
	op := w.converted(i)
	a := op.Artifacts[0]
	if got := w.startsOf(i); len(got.Variants) != 0 {
		t.Errorf("before any report: %+v", got)
	}
	other := run(t, w.config()) // another process
	const nodes = 20
	var all sync.WaitGroup
	for n := range nodes {
		all.Go(func() {
			s := []process{w.process, other}[n%2]
			if got, err := s.Report(t.Context(), w.host, "app", report(n, a, starts.None, 4)); err != nil || got != (Reported{1, 1}) {
				t.Errorf("report %d: %+v, %v", n, got, err)
			}
		})
	}
	all.Wait()
	got := w.startsOf(i)
	if len(got.Variants) != 1 || got.Nodes != nodes {
		t.Fatalf("got %+v", got)
	}
	v := got.Variants[0]
	if !v.Current || v.Starts != nodes || v.Artifact != a.Digest || v.Profile != starts.None || v.Reads.Count != nodes || v.Reads.Median < 4 || v.Reads.P90 > 5.5 || v.Ready.Count != 0 ||
		v.Bytes != 4000 || v.Missed != 1000 || v.Misses != 3 || v.First.IsZero() || v.Last.Before(v.First) {
		t.Errorf("got %+v", v)
	}

	// A profile is attached, which the registry calls recorded, whatever a node says.
	w.attachProfiles(op)
	var profile digest.Digest
	for _, d := range w.attached(i) {
		if isProfile(d) {
			profile = d.Digest
		}
	}
	fast := report(1, a, artifact.ProfileStatic, 0.7)
	fast.Starts[0].Fetched, fast.Starts[0].Ready = profile, 2
	w.fleet.referrers = memo[string, referrersAt]{} // a minute has passed
	if got, err := w.Report(t.Context(), w.host, "app", fast); err != nil || got.Counted != 1 {
		t.Fatalf("%+v, %v", got, err)
	}
	got = w.startsOf(i)
	if len(got.Variants) != 2 || got.Nodes != nodes {
		t.Fatalf("got %+v", got)
	}
	now, before := got.Variants[0], got.Variants[1]
	if !now.Current || now.Profile != artifact.ProfileRecorded || now.Fetched != profile || now.Reads.Median >= before.Reads.Median || now.Ready.Count != 1 || before.Current || before.Starts != nodes {
		t.Errorf("now %+v, before %+v", now, before)
	}

	w.deleted(i, "v1")
	w.told(Deleted, i, "")
	w.settled()
	w.later()
	w.reconciled()
	var sum starts.Summary
	if rev, err := getJSON(t.Context(), w.fleet.summaries, startsKey(repository{w.host, "app"}, a.Subject), &sum); rev != 0 || err != nil {
		t.Errorf("of the deleted image there is %+v, %v", sum, err)
	}
}

// TestReportRefused: what nobody can mean is refused; what is of no artifact that the registry has, or more than a node can have seen, does not count.
func TestReportRefused(t *testing.T) {
	w := newWorld(t)
	i := w.push("app", "v1", image(t, "amd64", 1000))
	if _, _, err := w.Submit(t.Context(), Request{Image: i, By: "bob"}); err != nil {
		t.Fatal(err)
	}
	a := w.converted(i).Artifacts[0]
	good := report(1, a, starts.None, 4)
	for name, c := range map[string]struct {
		registry, repository string
		report               starts.Report
		want                 error
	}{
		"registry":   {"elsewhere.example.com", "app", good, ErrNotFound},
		"repository": {w.host, "App", good, ErrInvalid},
		"negative":   {w.host, "app", report(1, a, starts.None, -4), ErrInvalid},
	} {
		if got, err := w.Report(t.Context(), c.registry, c.repository, c.report); !errors.Is(err, c.want) || got.Taken != 0 {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	for name, forged := range map[string]Artifact{
		"no artifact": {Subject: a.Subject, Digest: digest.FromString("forged")}, "no image": {Subject: digest.FromString("forged"), Digest: a.Digest},
		"the image": {Subject: a.Subject, Digest: i.Digest},
	} {
		if got, err := w.Report(t.Context(), w.host, "app", report(1, forged, starts.None, 4)); err != nil || got != (Reported{1, 0}) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	if got := w.startsOf(i); len(got.Variants) != 0 {
		t.Errorf("forged reports have made %+v", got)
	}
	counted := 0
	for range nodeStarts + 20 {
		got, err := w.Report(t.Context(), w.host, "app", good)
		if err != nil {
			t.Fatal(err)
		}
		counted += got.Counted
	}
	if counted < nodeStarts || counted == nodeStarts+20 {
		t.Errorf("of one node %d starts count, its limit is %d", counted, nodeStarts)
	}
	w.fleet.referrers = memo[string, referrersAt]{}
	defer w.reg.Inject(registrytest.Any, -1, registrytest.Status(http.StatusForbidden))()
	if got, err := w.Report(t.Context(), w.host, "app", report(2, a, starts.None, 4)); !errors.Is(err, ErrUnavailable) || got.Taken != 0 {
		t.Errorf("while the registry refuses: %+v, %v", got, err)
	}
	if st, err := w.fleet.summaries.Status(t.Context()); err != nil || st.TTL() != startsTTL {
		t.Errorf("what is reported is kept for %v, %v", st, err)
	}
}

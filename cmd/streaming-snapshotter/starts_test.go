package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/report"
	wire "github.com/streaming-snapshotter/streaming-snapshotter/converter/service/starts"
	"github.com/streaming-snapshotter/streaming-snapshotter/events"
	"github.com/streaming-snapshotter/streaming-snapshotter/kubeapi/kubeapitest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// A start is told of when its pod is ready, where that is known, or else when nothing more is read; and only with the pull that it is of.
func TestFirstStarts(t *testing.T) {
	api := kubeapitest.Start(t)
	const pods = "pods?fieldSelector=spec.nodeName%3Dnode-1&resourceVersion=0"
	mounted := time.Now().Add(-time.Minute)
	pod := func(status string) string {
		return fmt.Sprintf(`{"items": [{"spec": {"containers": [{"name": "c", "image": "registry.example.com/app:v1", "readinessProbe": {}}]},
			"status": {"containerStatuses": [{"name": "c", "state": {"running": {"startedAt": %q}}}], "conditions": [{"type": "Ready", "status": %q, "lastTransitionTime": %q}]}}]}`,
			mounted.Format(time.RFC3339), status, mounted.Add(7*time.Second).UTC().Format(time.RFC3339))
	}
	reports, err := report.New(report.Options{Server: "https://streaming.example.com", IDFile: filepath.Join(t.TempDir(), "id")})
	if err != nil {
		t.Fatal(err)
	}
	s := &firstStarts{counts: &pulls{refs: map[string]string{}}, reports: reports, wake: make(chan struct{}, 1), pulled: map[string]snapshot.Pull{}}
	s.pods = &podEvents{events.New(api.Kubeconfig, "node-1", func(err error) { t.Error(err) })}
	told := func() int { return reports.Status().Waiting }
	first := func(image string, took time.Duration) stream.Start {
		return stream.Start{Image: digest.FromString(image).Encoded(), Repository: "registry.example.com/app", Manifest: digest.FromString("m"), Mounted: mounted, Took: took, Bytes: 10, Misses: 1, Missed: 5}
	}
	pulled := func(image, ref string) {
		s.note(snapshot.Pull{Image: ref, Artifact: digest.FromString(image).Encoded(), At: mounted.Add(-2 * time.Second), Took: 300 * time.Millisecond})
	}

	s.started(first("of another life", time.Second))
	if s.tell(t.Context()) != 0 || told() != 0 {
		t.Error("a start without its pull was told of")
	}
	pulled("probed", "registry.example.com/app:v1")
	pulled("other", "registry.example.com/other:v1")
	pulled("endless", "registry.example.com/other:v2")
	api.Put(pods, pod("False"))
	s.started(first("probed", 2*time.Second))
	s.started(first("other", 3*time.Second))
	s.started(first("endless", 0))
	if left := s.tell(t.Context()); left != 1 || told() != 1 {
		t.Errorf("%d starts wait for a pod, and %d are told of; want one and one", left, told())
	}
	api.Put(pods, pod("True"))
	if left := s.tell(t.Context()); left != 0 || told() != 2 {
		t.Errorf("%d starts wait for a pod, and %d are told of; want none and two", left, told())
	}
	s.started(first("probed", 2*time.Second)) // again, without a pull
	if s.tell(t.Context()); told() != 2 {
		t.Error("a start without its pull was told of")
	}
	if c := s.counts.counts.StartTimes; c.Count != 4 || c.Sum != 8 {
		t.Errorf("counted are %+v", c)
	}
	// While the API server is away, what was read counts.
	pulled("probed", "registry.example.com/app:v1")
	api.Put(pods, "503")
	s.started(first("probed", 2*time.Second))
	if left := s.tell(t.Context()); left != 0 || told() != 3 {
		t.Errorf("%d starts wait for a pod, and %d are told of; want none and three", left, told())
	}

	st := startOfImage{first("x", 2500*time.Microsecond), snapshot.Pull{At: mounted.Add(-2 * time.Second), Took: 300 * time.Millisecond}}
	got := st.report(7 * time.Second)
	if got.Profile != wire.None || got.Fetched != "" || got.Pull != 0.3 || got.Wait != 2 || got.Reads != 0.003 || got.Ready != 7 || got.Artifact != digest.FromString("x") || got.Missed != 5 || got.Misses != 1 || got.Bytes != 10 {
		t.Errorf("told of %+v", got)
	}
	st.Source, st.Profile = artifact.ProfileRecorded, digest.FromString("p")
	r := wire.Report{Node: strings.Repeat("0", 32), Starts: []wire.Start{got, st.report(0), st.report(48 * time.Hour)}}
	if err := r.Check(); err != nil || r.Starts[1].Profile != artifact.ProfileRecorded || r.Starts[1].Fetched != st.Profile || r.Starts[1].Ready != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

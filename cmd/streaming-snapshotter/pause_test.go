package main

import (
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
)

// command runs the program with args, which must succeed.
func command(t *testing.T, args ...string) {
	t.Helper()
	p := start(t, args...)
	if err := p.wait(); err != nil {
		t.Fatalf("%s: %v\n%s", args, err, &p.stderr)
	}
}

// A pause is in force at the next pull, without a restart, and over one; resume ends it in the same way. What is streamed stays.
func TestPause(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	n := newReasonNode(t, "", 0)
	first, second := image(t, reg.Host()+"/team/first:v1", true), image(t, reg.Host()+"/team/second:v1", true)
	prepare := func(labels map[string]string) error {
		_, err := connect(t, n.address).Prepare(t.Context(), "extract "+labels[snapshots.LabelSnapshotRef], "", snapshots.WithLabels(labels))
		return err
	}
	if err := prepare(first); !errdefs.IsAlreadyExists(err) {
		t.Fatalf("not streamed before: %v", err)
	}
	command(t, "pause", "--config", n.config)
	command(t, "pause", "--config", n.config)
	n.pull(t, second)
	s := askStatus(t, n.config, func(s status) bool { return len(s.NotStreamed) > 0 })
	if s.Paused == "" || s.Normal[reason.Paused] != 1 || s.StreamedCount != 1 {
		t.Errorf("paused: %+v", s)
	}
	if text := statusText(t, n.config); !strings.Contains(text, "PAUSED since "+s.Paused) {
		t.Errorf("the status says\n%s", text)
	}
	n.daemon.signal(unix.SIGTERM)
	if err := n.daemon.wait(); err != nil {
		t.Fatalf("%v\n%s", err, &n.daemon.stderr)
	}
	n.daemon = serving(t, n.config, n.address)
	third := image(t, reg.Host()+"/team/third:v1", true)
	n.pull(t, third)
	if got := n.why(t); got != reason.Paused {
		t.Errorf("after a restart: %s", got)
	}
	for range 2 {
		command(t, "resume", "--config", n.config)
	}
	if err := prepare(image(t, reg.Host()+"/team/fourth:v1", true)); !errdefs.IsAlreadyExists(err) {
		t.Errorf("not streamed after resume: %v", err)
	}
	if s := askStatus(t, n.config, func(s status) bool { return s.Streamed > 0 }); s.Paused != "" {
		t.Errorf("resumed: %+v", s)
	}
}

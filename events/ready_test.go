package events

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/kubeapi/kubeapitest"
)

// When a pod was ready is the word of its probe, and of the container that has started since the image was mounted.
func TestReadiness(t *testing.T) {
	s := kubeapitest.Start(t)
	const probe = `, "readinessProbe": {"httpGet": {"path": "/", "port": 80}}`
	ready := func(at string) string {
		return fmt.Sprintf(`, "conditions": [{"type": "Initialized", "status": "True", "lastTransitionTime": "2026-11-30T06:00:00Z"}, {"type": "Ready", "status": "True", "lastTransitionTime": %q}]`, at)
	}
	const notReady = `, "conditions": [{"type": "Ready", "status": "False", "lastTransitionTime": "2026-11-30T06:00:03Z"}]`
	pod := func(image, probe, started, conditions string) string {
		return fmt.Sprintf(`{"metadata": {"namespace": "one", "name": "p", "uid": "u"}, "spec": {"containers": [{"name": "side", "image": "side"}, {"name": "c", "image": %q%s}]},
			"status": {"containerStatuses": [{"name": "c", "state": {"running": {"startedAt": %q}}}]%s}}`, image, probe, started, conditions)
	}
	s.Put(podsOfNode, `{"items": [`+strings.Join([]string{
		pod("web", probe, "2026-11-30T05:00:00Z", ready("2026-11-30T05:00:02Z")), // of before
		pod("web", probe, "2026-11-30T06:00:01Z", ready("2026-11-30T06:00:09Z")),
		pod("docker.io/library/web:latest", probe, "2026-11-30T06:00:03Z", ready("2026-11-30T06:00:07Z")),
		pod("slow", `, "startupProbe": {"exec": {"command": ["true"]}}`, "2026-11-30T06:00:01Z", notReady),
		pod("bare", "", "2026-11-30T06:00:01Z", ready("2026-11-30T06:00:01Z")),
		`{"metadata": {"name": "ended"}, "spec": {"containers": [{"name": "c", "image": "job"` + probe + `}]}, "status": {"containerStatuses": [{"name": "c", "state": {"terminated": {"exitCode": 0}}}]}}`,
		`{"metadata": {"name": "new"}, "spec": {"containers": [{"name": "c", "image": "new"` + probe + `}]}, "status": {}}`,
	}, ",")+`]}`)
	var errs []string
	r := newRecorder(t, s, &errs)
	now, err := r.Readiness(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	since := time.Date(2026, 11, 30, 6, 0, 1, 5e8, time.UTC)
	for image, want := range map[string]struct {
		at    string
		known bool
	}{
		"docker.io/library/web:latest": {"06:00:07", true}, "docker.io/library/slow:latest": {"00:00:00", true}, "docker.io/library/bare:latest": {"00:00:00", false}, "docker.io/library/job:latest": {"00:00:00", false},
		"docker.io/library/new:latest": {"00:00:00", false}, "docker.io/library/side:latest": {"00:00:00", false}, "docker.io/library/other:latest": {"00:00:00", false}, "": {"00:00:00", false},
	} {
		if at, known := now.Of(image, since); at.Format(time.TimeOnly) != want.at || known != want.known {
			t.Errorf("%q: %v %v, want %v", image, at, known, want)
		}
	}
	s.Put(podsOfNode, "403")
	if _, err := r.Readiness(t.Context()); err == nil {
		t.Error("what is forbidden is no error")
	}
}

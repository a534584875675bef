package events

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/kubeapi/kubeapitest"
)

// posted is what of an event is looked at.
type posted struct {
	InvolvedObject                struct{ Kind, Namespace, Name, UID string }
	Type, Reason, Message         string
	FirstTimestamp, LastTimestamp string
	Count                         int
}

// newRecorder returns one whose failures are appended to errs.
func newRecorder(t *testing.T, s *kubeapitest.Server, errs *[]string) *Recorder {
	t.Helper()
	r := New(s.Kubeconfig, "node-1", func(err error) { *errs = append(*errs, fmt.Sprint(err)) })
	t.Cleanup(r.api.Close)
	return r
}

// drain does what Run does with what is queued, and returns what was posted.
func drain(t *testing.T, r *Recorder, s *kubeapitest.Server) (list []posted) {
	t.Helper()
	for len(r.queue) > 0 {
		r.tell(t.Context(), <-r.queue)
	}
	for _, b := range s.Posted() {
		var p posted
		if err := json.Unmarshal(b, &p); err != nil {
			t.Fatalf("%v in %s", err, b)
		}
		list = append(list, p)
	}
	return list
}

func uids(list []posted) (u []string) {
	for _, p := range list {
		u = append(u, p.InvolvedObject.UID)
	}
	slices.Sort(u)
	return u
}

const podsOfNode = "pods?fieldSelector=spec.nodeName%3Dnode-1&resourceVersion=0"

// Without the proxy, the pods that have the image and wait for it are told; with it the pod that the pull is for.
func TestPods(t *testing.T) {
	s := kubeapitest.Start(t)
	pod := func(uid, more, image, status string) string {
		return fmt.Sprintf(`{"metadata": {"namespace": "one", "name": "p%s", "uid": %q%s}, "spec": {"containers": [{"name": "c", "image": %q}]}, "status": {%s}}`, uid, uid, more, image, status)
	}
	s.Put(podsOfNode, `{"items": [`+strings.Join([]string{
		pod("new", "", "busybox", ""),
		pod("waits", "", "docker.io/library/busybox:latest", `"containerStatuses": [{"name": "c", "state": {"waiting": {"reason": "ImagePullBackOff"}}}]`),
		pod("object", `, "annotations": {"kubernetes.io/config.mirror": "static"}`, "docker.io/busybox", `"phase": "Pending"`),
		pod("runs", "", "busybox", `"containerStatuses": [{"name": "c", "state": {"running": {"startedAt": "2026-11-30T00:00:00Z"}}}]`),
		pod("crashes", "", "busybox", `"containerStatuses": [{"name": "c", "state": {"waiting": {}}, "lastState": {"terminated": {"exitCode": 1}}}]`),
		pod("other", "", "busybox:1", ""),
		`{"metadata": {"namespace": "one", "name": "v", "uid": "volume"}, "spec": {"volumes": [{"emptyDir": {}}, {"image": {"reference": "busybox"}}]}, "status": {"phase": "Pending"}}`,
		`{"metadata": {"namespace": "one", "name": "w", "uid": "mounted"}, "spec": {"volumes": [{"image": {"reference": "busybox"}}]}, "status": {"phase": "Running"}}`,
	}, ",")+`]}`)
	s.Put("namespaces/one/events", `{}`)
	s.Put("namespaces/two/events", `{}`)
	var errs []string
	r := newRecorder(t, s, &errs)
	at := time.Date(2026, 11, 30, 6, 0, 0, 0, time.UTC)
	r.Tell("docker.io/library/busybox:latest", Event{Reason: "Streaming", Message: "It is.", At: at})
	list := drain(t, r, s)
	if got, want := uids(list), []string{"new", "static", "volume", "waits"}; !slices.Equal(got, want) {
		t.Errorf("told %q, want %q", got, want)
	}
	want := posted{Type: "Normal", Reason: "Streaming", Message: "It is.", FirstTimestamp: "2026-11-30T06:00:00Z", LastTimestamp: "2026-11-30T06:00:00Z", Count: 1}
	want.InvolvedObject.Kind, want.InvolvedObject.Namespace, want.InvolvedObject.Name, want.InvolvedObject.UID = "Pod", "one", "pnew", "new"
	if len(list) > 0 && list[0] != want {
		t.Errorf("got %+v, want %+v", list[0], want)
	}

	// With it, the pod is known, and nobody is asked for others.
	s.Requests()
	done := r.Begin("busybox", Pod{"two", "p", "proxied"})
	r.Tell("docker.io/library/busybox:latest", Event{Reason: "NotStreaming", At: at})
	if got := uids(drain(t, r, s)); !slices.Equal(got, []string{"proxied"}) {
		t.Errorf("told %q, want the pod of the pull", got)
	}
	if got := s.Requests(); len(got) != 1 {
		t.Errorf("asked for %q, want one event", got)
	}
	done()
	r.Tell("busybox:latest", Event{Reason: "NotStreaming", At: at})
	if got := uids(drain(t, r, s)); len(got) != 4 {
		t.Errorf("told %q, want those that wait", got)
	}
	r.Tell("", Event{Reason: "NotStreaming", At: at}) // containerd has not said which
	if got := uids(drain(t, r, s)); len(got) != 0 || len(errs) > 0 {
		t.Errorf("told %q, errors %q", got, errs)
	}
}

// What turns out to be bad is told to each pod that has it and is not over, running or not, as a warning.
func TestTellAll(t *testing.T) {
	s := kubeapitest.Start(t)
	pod := func(uid, spec, status string) string {
		return fmt.Sprintf(`{"metadata": {"namespace": "one", "name": "p%s", "uid": %q}, "spec": {%s}, "status": {%s}}`, uid, uid, spec, status)
	}
	bad := `"containers": [{"name": "c", "image": "r.example/a:v1"}]`
	s.Put(podsOfNode, `{"items": [`+strings.Join([]string{
		pod("runs", bad, `"phase": "Running", "containerStatuses": [{"name": "c", "state": {"running": {"startedAt": "2026-11-30T00:00:00Z"}}}]`),
		pod("waits", bad, `"phase": "Pending"`),
		pod("init", `"containers": [{"name": "c", "image": "r.example/b:v1"}], "initContainers": [{"name": "i", "image": "r.example/a@sha256:1"}]`, `"phase": "Running"`),
		pod("volume", `"containers": [{"name": "c", "image": "r.example/b:v1"}], "volumes": [{"image": {"reference": "r.example/a:v2"}}]`, `"phase": "Running"`),
		pod("over", bad, `"phase": "Succeeded"`),
		pod("failed", bad, `"phase": "Failed"`),
		pod("other", `"containers": [{"name": "c", "image": "r.example/b:v1"}]`, `"phase": "Running"`),
	}, ",")+`]}`)
	s.Put("namespaces/one/events", `{}`)
	var errs []string
	r := newRecorder(t, s, &errs)
	tell := func() []posted {
		r.TellAll("sha256:1", func(image string) bool { return strings.HasPrefix(image, "r.example/a") }, Event{Reason: "Quarantined", Message: "It lies.", At: time.Now(), Warning: true})
		return drain(t, r, s)
	}
	list := tell()
	if got, want := uids(list), []string{"init", "runs", "volume", "waits"}; !slices.Equal(got, want) {
		t.Errorf("told %q, want %q", got, want)
	}
	for _, p := range list {
		if p.Type != "Warning" || p.Reason != "Quarantined" || p.Message != "It lies." {
			t.Errorf("got %+v", p)
		}
	}
	if again := tell(); len(again) > 0 || len(errs) > 0 {
		t.Errorf("told again: %+v; errors %q", again, errs)
	}
	s.Put(podsOfNode, `{"items": []}`)
	s.Requests()
	if r.TellAll("sha256:2", func(string) bool { return true }, Event{}); len(drain(t, r, s)) > 0 || len(s.Requests()) != 1 {
		t.Error("nobody has it, and it is asked for more than once")
	}
}

// More pods of one namespace than are told of a pull keep no other's from being told.
func TestManyPodsOfOne(t *testing.T) {
	s := kubeapitest.Start(t)
	var pods []string
	for i := range 2*maxPods + 1 {
		namespace := "many"
		if i == 2*maxPods {
			namespace = "one"
		}
		pods = append(pods, fmt.Sprintf(`{"metadata": {"namespace": %q, "name": "p%03d", "uid": "%[2]d"}, "spec": {"containers": [{"name": "c", "image": "r.example/a:v1"}]}}`, namespace, i))
	}
	s.Put(podsOfNode, `{"items": [`+strings.Join(pods, ",")+`]}`)
	s.Put("namespaces/many/events", `{}`)
	s.Put("namespaces/one/events", `{}`)
	var errs []string
	r := newRecorder(t, s, &errs)
	r.Tell("r.example/a:v1", Event{Reason: "Streaming"})
	list := drain(t, r, s)
	if len(list) != maxPods || list[0].InvolvedObject.Name != "p000" || list[1].InvolvedObject.Namespace != "one" || list[2].InvolvedObject.Name != "p001" || len(errs) > 0 {
		t.Errorf("told %+v, errors %q", list, errs)
	}
}

// What comes again and again is counted, and what is another thing is told.
func TestCount(t *testing.T) {
	s := kubeapitest.Start(t)
	s.Put("namespaces/one/events", `{}`)
	var errs []string
	r := newRecorder(t, s, &errs)
	defer r.Begin("r.example/a:v1", Pod{"one", "p", "uid"})()
	begin := time.Date(2026, 11, 30, 6, 0, 0, 0, time.UTC)
	for i := range 5 {
		r.Tell("r.example/a:v1", Event{Reason: "NotStreaming", Code: "AUTH", Message: fmt.Sprint(i), At: begin.Add(time.Duration(i) * time.Minute)})
	}
	r.Tell("r.example/a:v1", Event{Reason: "NotStreaming", Code: "NO_ARTIFACT", At: begin.Add(5 * time.Minute)})
	r.Tell("r.example/a:v1", Event{Reason: "NotStreaming", Code: "AUTH", Message: "last", At: begin.Add(quiet)})
	list := drain(t, r, s)
	if len(list) != 3 {
		t.Fatalf("%d events: %+v", len(list), list)
	}
	if a, b, c := list[0], list[1], list[2]; a.Count != 1 || b.Count != 1 || c.Count != 5 || c.Message != "last" || c.FirstTimestamp != "2026-11-30T06:01:00Z" || c.LastTimestamp != "2026-11-30T06:10:00Z" {
		t.Errorf("got %+v", list)
	}
}

// What cannot be told is said once, until it works again, and keeps nobody waiting.
func TestFailures(t *testing.T) {
	s := kubeapitest.Start(t)
	s.Put(podsOfNode, "403")
	s.Put("namespaces/one/events", "403")
	var errs []string
	r := newRecorder(t, s, &errs)
	for i := range 10 * maxQueued {
		r.Tell(fmt.Sprint("r.example/a:v", i), Event{Reason: "NotStreaming"})
	}
	if got := drain(t, r, s); len(got) != 0 || len(errs) != 1 || errs[0] != "list pods of node node-1: API server: status 403: it is 403" {
		t.Errorf("got %+v, errors %q", got, errs)
	}
	if got := s.Requests(); len(got) != maxQueued {
		t.Errorf("%d requests, want %d", len(got), maxQueued)
	}
	errs = nil
	s.Put(podsOfNode, `{"items": [{"metadata": {"namespace": "one", "name": "p", "uid": "u"}, "spec": {"containers": [{"name": "c", "image": "r.example/a:v1"}]}}]}`)
	tell := func() []posted {
		r.Tell("r.example/a:v1", Event{Reason: "NotStreaming", Message: strings.Repeat("long ", 1000)})
		return drain(t, r, s)
	}
	tell() // may list, and not create
	tell()
	if want := []string{"pod one/p: API server: status 403: it is 403"}; !slices.Equal(errs, want) {
		t.Errorf("errors %q, want what fails now: %q", errs, want)
	}
	s.Put("namespaces/one/events", `{}`)
	if got := tell(); len(got) != 1 || len(got[0].Message) != maxMessage || len(errs) != 2 || errs[1] != "<nil>" {
		t.Errorf("got %+v, errors %q", got, errs)
	}
	s.Close()
	r.Tell("r.example/b:v1", Event{Reason: "Streaming"})
	if drain(t, r, s); len(errs) != 3 || !strings.Contains(errs[2], "connection refused") {
		t.Errorf("errors %q", errs)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r.Tell("r.example/b:v1", Event{Reason: "Streaming"})
	r.Run(ctx) // ends
}

// A namespace that takes no events keeps none of the others' pods from theirs, and is told once, whichever pods a pull is for.
func TestRefusedNamespace(t *testing.T) {
	s := kubeapitest.Start(t)
	s.Put("namespaces/full/events", "403")
	s.Put("namespaces/one/events", `{}`)
	var errs []string
	r := newRecorder(t, s, &errs)
	full, one := Pod{"full", "a", "1"}, Pod{"one", "b", "2"}
	told := func(image string, pods ...Pod) []string {
		r.queue <- notice{image: image, event: Event{Reason: "Streaming"}, pods: pods}
		return uids(drain(t, r, s))
	}
	for i := range 3 {
		if got := told(fmt.Sprint("r.example/both:", i), full, one); !slices.Equal(got, []string{"2"}) {
			t.Errorf("told %q, want the pod of the other namespace", got)
		}
		if got := told(fmt.Sprint("r.example/one:", i), one); len(got) != 1 {
			t.Errorf("told %q, want one", got)
		}
	}
	if want := []string{"pod full/a: API server: status 403: it is 403"}; !slices.Equal(errs, want) {
		t.Errorf("errors %q, want %q", errs, want)
	}
	errs = nil
	s.Put(podsOfNode, "403") // which it hides from nobody
	for i := range 2 {
		told(fmt.Sprint("r.example/others:", i))
		told(fmt.Sprint("r.example/full:", i), full)
	}
	if want := []string{"list pods of node node-1: API server: status 403: it is 403"}; !slices.Equal(errs, want) {
		t.Errorf("errors %q, want %q", errs, want)
	}
	s.Put(podsOfNode, `{"items": [{"metadata": {"namespace": "one", "name": "b", "uid": "2"}, "spec": {"containers": [{"name": "c", "image": "r.example/others:2"}]}}]}`)
	if told("r.example/others:2"); len(errs) != 1 {
		t.Errorf("errors %q, want no end: the namespace fails still", errs)
	}
	s.Put("namespaces/full/events", `{}`)
	if told("r.example/both:3", full, one); len(errs) != 2 || errs[1] != "<nil>" {
		t.Errorf("errors %q, want its end", errs)
	}
	s.Put("namespaces/full/events", "403")
	told("r.example/both:4", full)
	r.failing["full"] = r.failing["full"].Add(-2 * given) // and the namespace is removed
	if told("r.example/one:4", one); len(errs) != 4 || errs[3] != "<nil>" {
		t.Errorf("errors %q, want an end", errs)
	}
}

// A pod that says that its UID is another's takes nothing from that.
func TestForgedUID(t *testing.T) {
	s := kubeapitest.Start(t)
	pod := func(namespace, more string) string {
		return fmt.Sprintf(`{"metadata": {"namespace": %q, "name": "p", "uid": %q%s}, "spec": {"containers": [{"name": "c", "image": "r.example/a:v1"}]}}`, namespace, namespace, more)
	}
	s.Put(podsOfNode, `{"items": [`+pod("attacker", `, "annotations": {"kubernetes.io/config.mirror": "victim"}`)+","+pod("victim", "")+`]}`)
	s.Put("namespaces/attacker/events", `{}`)
	s.Put("namespaces/victim/events", `{}`)
	var errs []string
	r := newRecorder(t, s, &errs)
	r.Tell("r.example/a:v1", Event{Reason: "Streaming"})
	if got := drain(t, r, s); len(got) != 2 || got[1].InvolvedObject.Namespace != "victim" || len(errs) > 0 {
		t.Errorf("told %+v, errors %q, want both", got, errs)
	}
}

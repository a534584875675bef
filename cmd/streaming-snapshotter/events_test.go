package main

import (
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/kubeapi/kubeapitest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
)

// An event says what and what to do, and nothing of the error: whoever sees a pod sees it.
func TestEventText(t *testing.T) {
	s := kubeapitest.Start(t)
	s.Put("namespaces/tenant/events", `{}`)
	posted := make(chan struct{})
	inner := s.Config.Handler
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		inner.ServeHTTP(w, r)
		posted <- struct{}{}
	})
	e, stop := serveEvents(config{Events: s.Kubeconfig})
	defer stop()
	const image = "registry.example/app:v1"
	done := e.Begin(&runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: image}, SandboxConfig: &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Namespace: "tenant", Name: "p", Uid: "u"}}})
	defer done("")
	for _, code := range reason.All() {
		e.tell(snapshot.Pull{Image: image, Err: reason.New(code, errors.New("secret other-tenant/regcred: refused"))}, nil)
		<-posted
		list := s.Posted()
		if len(list) != 1 {
			t.Fatalf("%s: %d events", code, len(list))
		}
		var got struct{ Message string }
		if err := json.Unmarshal(list[0], &got); err != nil {
			t.Fatal(err)
		}
		if m := got.Message; strings.Contains(m, "other-tenant") || !strings.HasPrefix(m, string(code)+": image \""+image+"\"") || !strings.HasSuffix(m, code.Remedy()) {
			t.Errorf("%s: %q", code, m)
		}
	}
}

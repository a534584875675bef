package main

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/kubeapi/kubeapitest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// An event says what and what to do, and nothing of the error: whoever sees a pod sees it.
func TestEventText(t *testing.T) {
	s := kubeapitest.Start(t)
	s.Put("namespaces/tenant/events", `{}`)
	e, stop := serveEvents(config{Events: s.Kubeconfig})
	defer stop()
	const image = "registry.example/app:v1"
	done := e.Begin(&runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: image}, SandboxConfig: &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Namespace: "tenant", Name: "p", Uid: "u"}}})
	defer done("")
	for _, code := range reason.All() {
		e.tell(snapshot.Pull{Image: image, Err: reason.New(code, errors.New("secret other-tenant/regcred: refused"))}, nil)
		list := s.Await(t)
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

// podsOfNode is what is asked for of the pods of node-1.
const podsOfNode = "pods?fieldSelector=spec.nodeName%3Dnode-1&resourceVersion=0"

// The pods that may have an image in quarantine are told which artifact it is and who has signed it, whatever name they have for the image; those of other repositories are not, nor anybody of what is no quarantine.
func TestQuarantineEvent(t *testing.T) {
	s := kubeapitest.Start(t)
	pod := func(name, image string) string {
		return `{"metadata": {"namespace": "tenant", "name": "` + name + `", "uid": "` + name + `"}, "spec": {"containers": [{"name": "c", "image": "` + image + `"}]}, "status": {"phase": "Running"}}`
	}
	s.Put(podsOfNode, `{"items": [`+pod("other", "registry.example/other:v1")+","+pod("none", "::")+","+pod("by-tag", "registry.example/app:v1")+`]}`)
	s.Put("namespaces/tenant/events", `{}`)
	e, stop := serveEvents(config{Events: s.Kubeconfig, NodeName: "node-1"})
	(*podEvents)(nil).tellProof(stream.Proof{Kind: stream.Quarantined})
	of := digest.FromString("image")
	p := stream.Proof{ID: digest.FromString("artifact").Encoded(), Image: "registry.example/app@" + of.String(), Layer: 3}
	for _, kind := range []stream.ProofKind{stream.Proven, stream.Overdue} {
		p.Kind = kind
		e.tellProof(p)
	}
	p.Kind, p.Evidence = stream.Quarantined, &ledger.Quarantine{At: time.Now(), Signer: "CN=somebody\x1b[2J", Converter: "theirs 1.0\n", Why: "file secret differs"}
	e.tellProof(p)
	list := s.Await(t)
	stop()
	list = append(list, s.Posted()...)
	if len(list) != 1 {
		t.Fatalf("%d events: %s", len(list), list)
	}
	var got struct {
		Type, Reason, Message string
		InvolvedObject        struct{ UID string }
	}
	if err := json.Unmarshal(list[0], &got); err != nil {
		t.Fatal(err)
	}
	if got.Type != "Warning" || got.Reason != "Quarantined" || got.InvolvedObject.UID != "by-tag" || strings.Contains(got.Message, "secret") || strings.ContainsAny(got.Message, "\x1b\n") {
		t.Errorf("got %+v", got)
	}
	for _, want := range []string{"TAMPERED: layer 3 ", p.ID, p.Image, "CN=somebody", `"theirs 1.0"`, reason.Tampered.Remedy()} {
		if !strings.Contains(got.Message, want) {
			t.Errorf("no %q in %q", want, got.Message)
		}
	}
}

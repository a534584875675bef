package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/criproxy"
	"github.com/streaming-snapshotter/streaming-snapshotter/events"
	"github.com/streaming-snapshotter/streaming-snapshotter/plain"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// podEvents tells pods of their pulls. Nil tells nobody.
type podEvents struct{ *events.Recorder }

// serveEvents sends events until stop, if they are configured; nil if not.
func serveEvents(c config) (e *podEvents, stop func()) {
	if c.Events == "" {
		return nil, func() {}
	}
	e = &podEvents{events.New(c.Events, c.node(), logEvents)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		e.Run(ctx)
	}()
	return e, func() {
		cancel()
		<-done
	}
}

// logEvents logs that no events can be put on pods, and that they can again.
func logEvents(err error) {
	ctx := about("Kubernetes events")
	if err != nil {
		slog.WarnContext(ctx, "no events are put on pods: whoever events_kubeconfig names needs `create` of events in all namespaces, and `list` of pods", "error", err)
	} else {
		slog.InfoContext(ctx, "events are put on pods again")
	}
}

// tell tells the pods of a pull. n has its image.
func (e *podEvents) tell(p snapshot.Pull, n *node) {
	if e == nil {
		return
	}
	ev := events.Event{Reason: "Streaming", At: p.At}
	if p.Err != nil {
		code := reason.Of(p.Err)
		ev.Reason, ev.Code, ev.Message = "NotStreaming", string(code), normalPullText(p.Image, code)
	} else {
		ev.Message = fmt.Sprintf("Image %q is streamed, found in %v: %s, artifact sha256:%s", p.Image, p.Took.Round(time.Millisecond), bytesText(n.images.Size(p.Artifact)), p.Artifact)
	}
	e.Tell(p.Image, ev)
}

// normalPullText says that an image is not streamed to whoever may see a pod's events. The error is for those of the node: it may name the secrets of other tenants, the node's files and its proxies.
func normalPullText(image string, code reason.Code) string {
	return fmt.Sprintf("%s: image %q is pulled in the normal way; the error is in the node's log and `streaming-snapshotter status`. What to do: %s", code, image, code.Remedy())
}

// tellProof tells the pods that may have an image whose artifact was put into quarantine: those with an image of its repository, because the name by which it was pulled may be one of several, or of another life of
// the daemon. It is stream.Trust's OnProof.
func (e *podEvents) tellProof(p stream.Proof) {
	if e == nil || p.Kind != stream.Quarantined {
		return
	}
	repo, _, _ := strings.Cut(p.Image, "@")
	has := func(image string) bool {
		of, _, _, err := registryclient.ParseReference(image)
		return err == nil && string(of) == repo
	}
	e.TellAll(p.ID, has, events.Event{Reason: "Quarantined", Code: string(reason.Tampered), Message: quarantineText(p), At: p.Evidence.At, Warning: true})
}

// quarantineText says which artifact is in quarantine, and what is known of whom it came from, to whoever may see a pod's events. What differs is in the node's log.
func quarantineText(p stream.Proof) string {
	by := "signed by nobody that the node knows of"
	if p.Evidence.Signer != "" {
		by = "signed by " + plain.Cut(p.Evidence.Signer, maxOrigin)
	}
	if p.Evidence.Converter != "" {
		by += fmt.Sprintf(", made by %q as it says itself", plain.Cut(p.Evidence.Converter, maxOrigin))
	}
	return fmt.Sprintf("%s: layer %d of the streaming artifact sha256:%s, %s, is not the one that image %s lists. On this node containers that run on it get read errors. "+
		"What to do: if that is this pod, delete it: the next one has the image's own layers; %s", reason.Tampered, p.Layer, p.ID, by, p.Image, reason.Tampered.Remedy())
}

// maxOrigin is how many bytes are told of who has signed or made an artifact.
const maxOrigin = 100

// Begin is criproxy.Pulls's: the kubelet says for which pod it pulls.
func (e *podEvents) Begin(r *runtime.PullImageRequest) (done func(id string)) {
	m := r.GetSandboxConfig().GetMetadata()
	if e == nil || m.GetName() == "" {
		return nil
	}
	end := e.Recorder.Begin(r.GetImage().GetImage(), events.Pod{Namespace: m.Namespace, Name: m.Name, UID: m.Uid})
	return func(string) { end() }
}

// allPulls tells each of pulls.
type allPulls []criproxy.Pulls

func (all allPulls) Begin(r *runtime.PullImageRequest) (done func(id string)) {
	var ends []func(string)
	for _, p := range all {
		if end := p.Begin(r); end != nil {
			ends = append(ends, end)
		}
	}
	return func(id string) {
		for _, end := range ends {
			end(id)
		}
	}
}

package events

import (
	"context"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/kubeapi"
)

// Readiness is what the API server knows of this node's pods at one moment.
type Readiness struct{ pods []kubeapi.Pod }

// Readiness asks for it.
func (r *Recorder) Readiness(ctx context.Context) (Readiness, error) {
	pods, err := r.api.Pods(ctx, r.node)
	return Readiness{pods}, err
}

// Of returns when the first pod was ready that has a container of image which has started since then and has a readiness or startup probe, to the second. Known is false if there is no such pod: without
// a probe Kubernetes calls a container ready that only runs. A zero time is a pod that is not ready yet.
func (r Readiness) Of(image string, since time.Time) (at time.Time, known bool) {
	of := parse(image)
	if of == (reference{}) {
		return at, false
	}
	for i := range r.pods {
		ready, ok := r.pods[i].Ready(func(image string) bool { return parse(image) == of }, since)
		if known = known || ok; ok && !ready.IsZero() && (at.IsZero() || ready.Before(at)) {
			at = ready
		}
	}
	return at, known
}

package snapshot

import (
	"testing"
	"time"

	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// The way of a hot blob is in the trace of the pull that it was begun for, also when that is over.
func TestHotBlobSpan(t *testing.T) {
	n := newTestNode(t)
	img, _ := pushHot(n)
	n.attachProfile(img, n.hotProfile(img), artifact.ProfileRecorded, time.Unix(1e9, 0))
	recorder := tracetest.NewSpanRecorder()
	ctx, pull := trace.NewTracerProvider(trace.WithSpanProcessor(recorder)).Tracer("test").Start(testContext(), "pull")
	if _, _, err := n.images.Find(ctx, img.ref, img.manifest); err != nil {
		t.Fatal(err)
	}
	pull.End()
	spans := map[string]trace.ReadOnlySpan{}
	n.poll("span of the hot blob", func() bool {
		for _, s := range recorder.Ended() {
			spans[s.Name()] = s
		}
		return spans["hot blob"] != nil
	})
	hot, search := spans["hot blob"], spans["search"]
	if search == nil || hot.Parent().SpanID() != search.SpanContext().SpanID() || search.Parent().SpanID() != pull.SpanContext().SpanID() {
		t.Errorf("spans: %v", spans)
	}
}

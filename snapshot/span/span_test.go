package span

import (
	"context"
	"errors"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
)

// An error that is cut short is cut between characters.
func TestErrorIsText(t *testing.T) {
	spans := tracetest.NewSpanRecorder()
	ctx, root := trace.NewTracerProvider(trace.WithSpanProcessor(spans)).Tracer("").Start(t.Context(), "pull")
	defer root.End()
	_, end := Start(ctx, "search")
	end(errors.New("x" + strings.Repeat("é", MaxText)))
	want := "x" + strings.Repeat("é", (MaxText-1)/2)
	if got := spans.Ended()[0].Status().Description; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Without a trace, nothing is made.
func TestNothing(t *testing.T) {
	ctx := context.Background()
	if got := testing.AllocsPerRun(100, func() {
		in, end := Start(ctx, "search")
		Set(in, "image", "r.example/a")
		end(context.Canceled)
		if in != ctx {
			t.Error("another context")
		}
	}); got != 0 {
		t.Errorf("%v allocations", got)
	}
}

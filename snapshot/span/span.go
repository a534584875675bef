// Package span marks the parts of a pull in an OpenTelemetry trace.
//
// The principle: a span is begun below the one in the context, by that one's own provider, so it is where a trace begins that decides whether there are any. Without one, all of this is
// a look at the context. What a span says is bounded: a few keys, and errors cut short.
package span

import (
	"context"
	"strings"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

const (
	tracer = "streaming-snapshotter"

	// MaxText bounds what an attribute or an error says, bytes.
	MaxText = 256
)

// Start begins a span. It returns the context of what is part of it, and what ends it: with an error, if it has failed.
func Start(ctx context.Context, name string) (context.Context, func(error)) {
	parent := trace.SpanFromContext(ctx)
	if !parent.IsRecording() {
		return ctx, nothing
	}
	ctx, s := parent.TracerProvider().Tracer(tracer).Start(ctx, name)
	return ctx, func(err error) {
		if err != nil {
			text := err.Error()
			s.SetStatus(codes.Error, strings.ToValidUTF8(text[:min(len(text), MaxText)], "")) // of another text, protobuf sends none of the spans that go with it
		}
		s.End()
	}
}

func nothing(error) {}

// Set says something of the span in ctx. key is one of a few.
func Set(ctx context.Context, key, value string) {
	if s := trace.SpanFromContext(ctx); s.IsRecording() {
		s.SetAttributes(attribute.String(key, value))
	}
}

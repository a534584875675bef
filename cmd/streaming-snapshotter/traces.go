package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"

	nodefs "github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/span"
)

// tracesTimeout bounds the wait for the last spans to be sent when the daemon stops.
const tracesTimeout = 2 * time.Second

// startTraces returns the options with which a gRPC server begins a trace, or goes on with its client's, in each call of a pull and of a container's start; none if nobody wants them. stop sends what
// is left.
func startTraces(ctx context.Context, c config) (options []grpc.ServerOption, stop func()) {
	if !wantTraces(c) {
		return nil, func() {}
	}
	provider, err := newTraces(ctx, c)
	if err != nil {
		slog.Error("no traces are sent", "error", err)
		return nil, func() {}
	}
	var lines nodefs.LogLimit
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { // the exporter knows no other way
		lines.Log(slog.Default(), time.Now(), slog.LevelWarn, "traces are not sent", "error", err)
	}))
	handler := otelgrpc.NewServerHandler(
		otelgrpc.WithTracerProvider(provider), otelgrpc.WithPropagators(propagation.TraceContext{}),
		otelgrpc.WithFilter(func(i *stats.RPCTagInfo) bool {
			_, call, _ := strings.Cut(strings.TrimPrefix(i.FullMethodName, "/"), "/")
			return slices.Contains([]string{"Prepare", "View", "Mounts"}, call)
		}),
	)
	return []grpc.ServerOption{grpc.StatsHandler(handler)}, func() {
		ctx, cancel := context.WithTimeout(context.Background(), tracesTimeout)
		defer cancel()
		if err := provider.Shutdown(ctx); err != nil {
			slog.Warn("the last traces are not sent", "error", err)
		}
	}
}

// wantTraces reports whether the configuration or the environment has somewhere to send traces.
func wantTraces(c config) bool {
	if off, err := strconv.ParseBool(os.Getenv("OTEL_SDK_DISABLED")); err == nil && off || os.Getenv("OTEL_TRACES_EXPORTER") == "none" {
		return false
	}
	return cmp.Or(c.OTLPEndpoint, os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"), os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT")) != ""
}

func newTraces(ctx context.Context, c config) (*trace.TracerProvider, error) {
	if p := cmp.Or(os.Getenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"), os.Getenv("OTEL_EXPORTER_OTLP_PROTOCOL")); p != "" && p != "http/protobuf" {
		return nil, fmt.Errorf("OTEL_EXPORTER_OTLP_PROTOCOL is %q: only http/protobuf is spoken, which collectors have at port 4318", p)
	}
	var options []otlptracehttp.Option
	if c.OTLPEndpoint != "" {
		options = append(options, otlptracehttp.WithEndpointURL(strings.TrimSuffix(c.OTLPEndpoint, "/")+"/v1/traces"))
	}
	exporter, err := otlptracehttp.New(ctx, options...)
	if err != nil {
		return nil, err
	}
	from, err := resource.New(ctx,
		resource.WithAttributes(attribute.String("service.name", "streaming-snapshotter"), attribute.String("service.version", version()), attribute.String("host.name", c.node())),
		resource.WithTelemetrySDK(), resource.WithFromEnv())
	if err != nil {
		return nil, err
	}
	limits := trace.NewSpanLimits()
	if limits.AttributeValueLengthLimit < 0 {
		limits.AttributeValueLengthLimit = span.MaxText
	}
	return trace.NewTracerProvider(trace.WithBatcher(exporter), trace.WithResource(from), trace.WithRawSpanLimits(limits)), nil
}

package main

import (
	"context"
	"encoding/hex"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	coltracepb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/span"
)

// collector takes what an exporter sends by OTLP over HTTP.
type collector struct {
	*httptest.Server

	mu      sync.Mutex
	spans   []*tracepb.Span
	service map[string]string // the last resource's attributes
	wrong   []string
}

func newCollector(t *testing.T) *collector {
	c := &collector{}
	c.Server = httptest.NewServer(c)
	t.Cleanup(c.Close)
	return c
}

func (c *collector) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var export coltracepb.ExportTraceServiceRequest
	b, err := io.ReadAll(req.Body)
	if err == nil {
		err = proto.Unmarshal(b, &export)
	}
	if err != nil || req.Method != http.MethodPost || req.URL.Path != "/v1/traces" || req.Header.Get("Content-Type") != "application/x-protobuf" {
		c.wrong = append(c.wrong, req.Method+" "+req.URL.Path)
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	for _, r := range export.ResourceSpans {
		c.service = attributes(r.Resource.Attributes)
		for _, s := range r.ScopeSpans {
			c.spans = append(c.spans, s.Spans...)
		}
	}
	w.Header().Set("Content-Type", "application/x-protobuf")
}

func attributes(list []*commonpb.KeyValue) map[string]string {
	m := map[string]string{}
	for _, a := range list {
		m[a.Key] = a.Value.GetStringValue()
	}
	return m
}

// named returns the spans with a name, or that end in it.
func (c *collector) named(name string) (list []*tracepb.Span) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.spans {
		if s.Name == name || strings.HasSuffix(s.Name, "/"+name) {
			list = append(list, s)
		}
	}
	return list
}

// only returns the span with a name in a trace, of which there must be one.
func (c *collector) only(t *testing.T, name, trace string) *tracepb.Span {
	t.Helper()
	of := slices.DeleteFunc(c.named(name), func(s *tracepb.Span) bool { return hex.EncodeToString(s.TraceId) != trace })
	if len(of) != 1 {
		t.Fatalf("%d spans %q in trace %s", len(of), name, trace)
	}
	return of[0]
}

// A pull is a trace, its client's if that has one, and so is a container's start.
func TestTraces(t *testing.T) {
	const (
		streamedTrace, normalTrace = "0af7651916cd43dd8448eb211c80319c", "1bf7651916cd43dd8448eb211c80319c"
		clientSpan                 = "b7ad6b7169203331"
	)
	reg := registrytest.Start(t, registrytest.Options{})
	for name, by := range map[string]func(t *testing.T, config string, c *collector){
		"configuration": func(t *testing.T, config string, c *collector) {
			t.Setenv("OTEL_SERVICE_NAME", "mine")
			addConfig(t, config, "otlp_endpoint = '"+c.URL+"'")
		},
		"environment": func(t *testing.T, _ string, c *collector) { t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", c.URL) },
	} {
		t.Run(name, func(t *testing.T) {
			c := newCollector(t)
			dir := t.TempDir()
			address := filepath.Join(dir, "s.sock")
			config := writeConfig(t, filepath.Join(dir, "root"), address)
			t.Cleanup(func() { unix.Unmount(filepath.Join(dir, "root", "devices"), unix.MNT_DETACH) })
			addConfig(t, config, "stream = ['"+reg.Host()+"/*']")
			by(t, config, c)
			p := serving(t, config, address)
			sn := connect(t, address)
			ref := reg.Host() + "/" + name
			labels := image(t, ref, true)
			in := func(trace string) context.Context {
				return metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-"+trace+"-"+clientSpan+"-01")
			}
			sn.Prepare(in(streamedTrace), ref, "", snapshots.WithLabels(labels)) // says that it is there
			root := container(t, sn, ref, "container")
			if files, err := os.ReadDir(root); err != nil || len(files) != 2 {
				t.Errorf("container: %v, %v, want two files\n%s", files, err, &p.stderr)
			}
			plain := reg.Host() + "/plain-" + name
			sn.Prepare(in(normalTrace), plain, "", snapshots.WithLabels(image(t, plain, false)))
			if _, err := sn.Stat(t.Context(), plain); err != nil { // no part of it
				t.Error(err)
			}
			p.signal(unix.SIGTERM)
			if err := p.wait(); err != nil {
				t.Fatalf("%v\n%s", err, &p.stderr)
			}

			prepare := c.only(t, "Prepare", streamedTrace)
			if got := hex.EncodeToString(prepare.ParentSpanId); got != clientSpan {
				t.Errorf("Prepare is below %s, want the client's", got)
			}
			search := c.only(t, "search", streamedTrace)
			if string(search.ParentSpanId) != string(prepare.SpanId) || search.Status.GetCode() == tracepb.Status_STATUS_CODE_ERROR {
				t.Errorf("search: %v", search)
			}
			for _, part := range []string{"referrers", "image manifest", "artifact manifest", "image config", "indexes", "tree"} {
				if s := c.only(t, part, streamedTrace); string(s.ParentSpanId) != string(search.SpanId) || s.EndTimeUnixNano < s.StartTimeUnixNano {
					t.Errorf("%s: %v", part, s)
				}
			}
			mounts := c.named("mount")
			if len(mounts) != 1 || !slices.ContainsFunc(c.named("Prepare"), func(s *tracepb.Span) bool { return string(s.SpanId) == string(mounts[0].ParentSpanId) }) {
				t.Errorf("mounts: %v", mounts)
			}
			failed := c.only(t, "search", normalTrace)
			if got := attributes(failed.Attributes); got["reason"] != string(reason.NoArtifact) || !strings.HasPrefix(got["image"], plain+"@sha256:") || failed.Status.GetCode() != tracepb.Status_STATUS_CODE_ERROR || failed.Status.Message == "" {
				t.Errorf("a normal pull: %v", failed)
			}
			if got := c.named("Stat"); len(got) > 0 || len(c.wrong) > 0 {
				t.Errorf("more than was wanted: %v, %q", got, c.wrong)
			}
			want := map[string]string{"configuration": "mine", "environment": "streaming-snapshotter"}[name]
			if c.service["service.name"] != want || c.service["service.version"] == "" || c.service["host.name"] == "" {
				t.Errorf("from %v, want %s", c.service, want)
			}
			for _, s := range c.spans {
				for k, v := range attributes(s.Attributes) {
					if len(v) > span.MaxText || len(s.Status.GetMessage()) > span.MaxText {
						t.Errorf("%s: %s is %d bytes, %v", s.Name, k, len(v), s.Status)
					}
				}
			}
		})
	}
}

// Traces that nobody takes, or that cannot be sent, cost no pull, and no end of the daemon.
func TestTracesNowhere(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	for name, set := range map[string]map[string]string{
		"away":   {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1/v1/traces"},
		"by rpc": {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
	} {
		t.Run(name, func(t *testing.T) {
			for k, v := range set {
				t.Setenv(k, v)
			}
			dir := t.TempDir()
			address := filepath.Join(dir, "s.sock")
			config := writeConfig(t, filepath.Join(dir, "root"), address)
			t.Cleanup(func() { unix.Unmount(filepath.Join(dir, "root", "devices"), unix.MNT_DETACH) })
			addConfig(t, config, "stream = ['"+reg.Host()+"/*']")
			p := serving(t, config, address)
			root, _ := streamed(t, connect(t, address), reg.Host()+"/"+strings.ReplaceAll(name, " ", "-"))
			if files, err := os.ReadDir(root); err != nil || len(files) != 2 {
				t.Errorf("container: %v, %v, want two files\n%s", files, err, &p.stderr)
			}
			p.signal(unix.SIGTERM)
			if err := p.wait(); err != nil {
				t.Fatalf("%v\n%s", err, &p.stderr)
			}
		})
	}
}

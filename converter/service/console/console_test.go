package console

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/net/html"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
)

const host = "registry.example.com:5000"

var now = time.Date(2026, 11, 30, 9, 0, 0, 0, time.UTC)

// told is a service that says what a test wants to see drawn: states that a real one is in for a moment only, names that no real registry
// takes, thousands of tags. What a real one does is tested in integration, in a browser.
type told struct {
	mu           sync.Mutex
	registries   []service.RegistryInfo
	repositories []service.RepositoryInfo
	settings     []service.Settings
	tags         []service.TagInfo
	image        service.ImageInfo
	storage      service.StorageInfo
	filled       atomic.Int64 // tags
	operations   []service.Operation
	watching     chan service.Operation
	err          error // of everything
	submitErr    error
	existed      bool

	did   []string // what was asked to change
	audit strings.Builder
}

// Write is the gate's: its audit log.
func (s *told) Write(line []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.audit.Write(line)
}

func (s *told) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.did = append(s.did, fmt.Sprintf(format, args...))
}

func (s *told) done() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.did)
}

func (s *told) Registries() []service.RegistryInfo { return s.registries }

func (s *told) Repositories(context.Context, string, string) ([]service.RepositoryInfo, error) {
	return s.repositories, s.err
}

func (s *told) Settings(_ context.Context, registry, repository string) (service.Settings, error) {
	for _, known := range s.settings {
		if service.Match(known.Repository, repository) {
			return known, s.err
		}
	}
	return service.Settings{Registry: registry, Repository: repository}, s.err
}

func (s *told) AllSettings(context.Context, string) ([]service.Settings, error) {
	return s.settings, s.err
}

func (s *told) SetSettings(_ context.Context, n service.Settings, existing bool) (service.Settings, error) {
	s.note("settings %s active=%v existing=%v rules=%+v by %s", n.Repository, n.Active, existing, n.Rules, n.By)
	return n, s.err
}

func (s *told) ForgetSettings(_ context.Context, _, repository string) error {
	s.note("forget %s", repository)
	return s.err
}

func (s *told) TagNames(context.Context, string, string) ([]service.TagInfo, error) {
	return s.tags, s.err
}

func (s *told) FillTags(_ context.Context, _, _ string, tags []service.TagInfo) ([]service.TagInfo, error) {
	s.filled.Add(int64(len(tags)))
	return tags, s.err
}

func (s *told) Image(context.Context, string, string, string) (service.ImageInfo, error) {
	return s.image, s.err
}

func (s *told) Storage(context.Context, string, string) (service.StorageInfo, error) {
	return s.storage, s.err
}

func (s *told) DeleteArtifacts(_ context.Context, i service.Image, by string) ([]digest.Digest, error) {
	s.note("delete %s by %s", i, by)
	return []digest.Digest{i.Digest}, s.err
}

func (s *told) Submit(_ context.Context, r service.Request) (service.Operation, bool, error) {
	s.note("submit %s tag=%s platforms=%v force=%v by %s", r.Image, r.Tag, r.Platforms, r.Force, r.By)
	return service.Operation{ID: id(1)}, s.existed, errors.Join(s.err, s.submitErr)
}

func (s *told) Operation(_ context.Context, id string) (service.Operation, error) {
	for _, o := range s.operations {
		if o.ID == id {
			return o, s.err
		}
	}
	return service.Operation{}, errors.Join(s.err, service.ErrNotFound)
}

func (s *told) Operations(_ context.Context, f service.Filter) (list []service.Operation, err error) {
	for _, o := range s.operations {
		if (f.May == nil || f.May(o.Registry, o.Repository)) && (len(f.States) == 0 || slices.Contains(f.States, o.State)) && (f.Registry == "" || f.Registry == o.Registry) {
			list = append(list, o)
		}
	}
	return list, s.err
}

func (s *told) Cancel(_ context.Context, id, by string) (service.Operation, error) {
	s.note("cancel %s by %s", id, by)
	for _, o := range s.operations {
		if o.ID == id && o.State.Ended() {
			return o, service.ErrNotRunning
		}
	}
	return service.Operation{}, s.err
}

func (s *told) Watch(context.Context, string) (<-chan service.Operation, error) {
	return s.watching, s.err
}

func id(n int) string { return fmt.Sprintf("00000000-0000-4000-8000-%012d", n) }

func dig(s string) digest.Digest { return digest.FromString(s) }

// example is a service with something of everything.
func example() *told {
	at := func(ago time.Duration) time.Time { return now.Add(-ago) }
	image := service.Image{Registry: host, Repository: "team/app", Digest: dig("index")}
	op := func(n int, state service.State) service.Operation {
		return service.Operation{ID: id(n), Image: image, Tag: "v1", By: "alice", State: state, Asked: at(time.Hour), Start: at(time.Hour), Attempt: 1, Worker: "one"}
	}
	running, waiting, succeeded, failed, canceled := op(1, service.Running), op(2, service.NotStarted), op(3, service.Succeeded), op(4, service.Failed), op(5, service.Canceled)
	running.Progress = service.Progress{Percent: 42, Bytes: 42e6, Total: 100e6, Platform: "linux/amd64", Layer: 3, Layers: 6}
	waiting.Position, waiting.Start, waiting.Attempt, waiting.Tag = 7, time.Time{}, 0, ""
	for _, o := range []*service.Operation{&succeeded, &failed, &canceled} {
		o.End = at(50 * time.Minute)
	}
	succeeded.Artifacts = []service.Artifact{{Platform: "linux/amd64", Subject: dig("amd64"), Digest: dig("artifact")}, {Platform: "linux/arm64", Subject: dig("arm64"), Digest: dig("artifact2"), Existed: true}}
	succeeded.Warnings = []string{"no profile was found"}
	failed.ErrorCode, failed.Message = converter.UnsupportedMediaType, converter.UnsupportedMediaType.Message()
	canceled.CancelBy = "bob"
	layer := service.LayerInfo{Digest: dig("layer"), MediaType: "application/vnd.oci.image.layer.v1.tar+gzip", Size: 79e6}
	streaming := &service.StreamingInfo{Artifact: dig("artifact"), Size: 80e6, Index: 1200e3, Profile: "static", Layers: []service.LayerMap{
		{Source: dig("layer"), Digest: dig("converted"), Size: 80e6, TarSize: 296e6, Chunks: 3021, Hot: []service.Span{{Off: 0, Len: 1e6}, {Off: 100e6, Len: 5e6}}},
		{Source: dig("layer2"), Digest: dig("converted2"), Size: 600, TarSize: 7700, Chunks: 1},
	}}
	referrer := service.ReferrerInfo{Digest: dig("artifact"), ArtifactType: "application/vnd.streaming-snapshotter.artifact.v1", MediaType: "application/vnd.oci.image.manifest.v1+json", Size: 1234,
		Annotations: map[string]string{"org.opencontainers.image.created": "2026-11-30T08:00:00Z"}}
	return &told{
		registries: []service.RegistryInfo{{Name: host}, {Name: "other.example.com", PullOnly: true}},
		repositories: []service.RepositoryInfo{
			{Registry: host, Name: "team/app", Tags: 3, Settings: service.Settings{Registry: host, Repository: "team/*", Active: true, Changed: at(50 * time.Hour), By: "alice"}},
			{Registry: host, Name: "lib/base", Tags: -1, Settings: service.Settings{Registry: host, Repository: "lib/base"}},
		},
		settings: []service.Settings{{Registry: host, Repository: "team/*", Active: true, Changed: at(50 * time.Hour), By: "alice", Rules: service.Rules{Platforms: []string{"linux/amd64"}, MinSize: 50e6, Keep: 10}}},
		tags: []service.TagInfo{
			{Name: "v1", Digest: dig("index"), Created: at(time.Minute), Streaming: true}, {Name: "v2", Digest: dig("other"), Created: at(24 * time.Hour)}, {Name: "v3"},
		},
		storage: service.StorageInfo{ImageBytes: 158e6, ArtifactBytes: 80e6},
		image: service.ImageInfo{
			Image: image, Tag: "v1", MediaType: "application/vnd.oci.image.index.v1+json", Last: &succeeded,
			Platforms: []service.PlatformInfo{
				{Platform: "linux/amd64", Digest: dig("amd64"), Size: 79e6, Layers: []service.LayerInfo{layer}, Streaming: streaming, Referrers: []service.ReferrerInfo{referrer}, Starts: &service.StartsInfo{
					Nodes: 41, Variants: []service.StartsOfOne{
						{Artifact: dig("artifact"), Profile: "static", Current: true, Starts: 40, Last: at(time.Minute), Reads: service.StartTimes{Count: 40, Median: 0.8, P90: 2}, Missed: 1e6},
						{Artifact: dig("before"), Profile: "none", Starts: 1200, Last: at(72 * time.Hour), Reads: service.StartTimes{Count: 1190, Median: 3.2, P90: 8}, Missed: 9e6},
						{Artifact: dig("first"), Profile: "none", Starts: 2, Last: at(99 * time.Hour)},
					},
				}},
				{Platform: "linux/arm64", Digest: dig("arm64"), Size: 79e6, Layers: []service.LayerInfo{layer}},
				{Platform: "windows/amd64", Digest: dig("windows"), Size: 79e6, Layers: []service.LayerInfo{layer}},
			},
		},
		operations: []service.Operation{running, waiting, succeeded, failed, canceled},
	}
}

// people have roles; they sign in with their tokens.
var people = map[string][]access.Grant{
	"olivia": {{Role: access.Owner}},
	"walter": {{Role: access.Writer, Registry: host, Repository: "team/*"}},
	"rita":   {{Role: access.Reader, Registry: host, Repository: "team/*"}},
	"nadia":  {{Role: access.Owner, Registry: host, Repository: "other/*"}},
}

func tokenOf(name string) string { return "the token of " + name + ", whole" }

// browser is somebody's, who has signed in by the form; "" has not.
type browser struct {
	*http.Client
	t    *testing.T
	base string
}

// serve runs a console behind access's real gate until the test ends.
func serve(t *testing.T, s *told) (base string, as func(name string) *browser) {
	t.Helper()
	var tokens []access.Token
	for name, grants := range people {
		sum := sha256.Sum256([]byte(tokenOf(name)))
		tokens = append(tokens, access.Token{Name: name, SHA256: hex.EncodeToString(sum[:]), Grants: grants})
	}
	gate, err := access.New(access.Config{Tokens: tokens, Audit: s})
	if err != nil {
		t.Fatal(err)
	}
	con, err := New(Config{Service: s, Gate: gate, Version: "v1.2.3", Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(gate.Browser(con, con.Login))
	t.Cleanup(server.Close)
	known := map[string]*browser{}
	return server.URL, func(name string) *browser {
		t.Helper()
		if known[name] != nil {
			return known[name]
		}
		jar, err := cookiejar.New(nil)
		if err != nil {
			t.Fatal(err)
		}
		b := &browser{&http.Client{Jar: jar, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}, t, server.URL}
		if name != "" {
			if status, _, location := b.post("/login", url.Values{"token": {tokenOf(name)}}); status != http.StatusSeeOther || location != "/" {
				t.Fatalf("signing in as %s: %d to %q", name, status, location)
			}
			known[name] = b
		}
		return b
	}
}

// get fetches a page.
func (b *browser) get(path string) (status int, page string) {
	b.t.Helper()
	status, page, _ = b.do(http.MethodGet, path, nil)
	return status, page
}

// post sends a form, as a page of the same origin does.
func (b *browser) post(path string, form url.Values) (status int, page, location string) {
	b.t.Helper()
	return b.do(http.MethodPost, path, strings.NewReader(form.Encode()))
}

func (b *browser) do(method, path string, body io.Reader) (status int, page, location string) {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.t.Context(), method, b.base+path, body)
	if err != nil {
		b.t.Fatal(err)
	}
	req.Header.Set("Sec-Fetch-Site", "same-origin")
	req.Header.Set("Sec-Fetch-Mode", "navigate")
	req.Header.Set("Sec-Fetch-Dest", "document")
	req.Header.Set("Accept", "text/html")
	if body != nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	answer, err := b.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	return answer.StatusCode, string(text), answer.Header.Get("Location")
}

// parse reads a page as a browser does.
func parse(t *testing.T, page string) *html.Node {
	t.Helper()
	root, err := html.Parse(strings.NewReader(page))
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// all are the elements of a tree with one of the names; without names, every element.
func all(root *html.Node, names ...string) (found []*html.Node) {
	for n := range root.Descendants() {
		if n.Type == html.ElementNode && (len(names) == 0 || slices.Contains(names, n.Data)) {
			found = append(found, n)
		}
	}
	return found
}

func attr(n *html.Node, key string) (value string, ok bool) {
	for _, a := range n.Attr {
		if a.Key == key {
			return a.Val, true
		}
	}
	return "", false
}

// textOf is what an element says, spaces joined.
func textOf(n *html.Node) string {
	var b strings.Builder
	for c := range n.Descendants() {
		if c.Type == html.TextNode {
			b.WriteString(c.Data + " ")
		}
	}
	return strings.Join(strings.Fields(b.String()), " ")
}

// forms are the actions of a page's forms that change something, apart from signing out.
func forms(root *html.Node) (actions []string) {
	for _, f := range all(root, "form") {
		if method, _ := attr(f, "method"); method == "post" {
			if action, _ := attr(f, "action"); action != "/logout" {
				actions = append(actions, action)
			}
		}
	}
	return actions
}

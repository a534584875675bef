package registryclient

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

const artifactType = "application/vnd.example.artifact.v1"

// newClient returns a client whose patience suits tests. Its connections are closed at the end.
func newClient(t testing.TB, o Options) *Client {
	t.Helper()
	if o.Budget == 0 {
		o.Budget = 4 * time.Second
	}
	if o.Stall == 0 {
		o.Stall = 500 * time.Millisecond
	}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func repoOf(r *registrytest.Registry) Repository { return Repository(r.Host() + "/team/app") }

// noise returns n bytes that do not repeat, so that a byte from the wrong place shows.
func noise(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(b)
	return b
}

func mustJSON(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func readRange(ctx context.Context, c *Client, repo Repository, dgst digest.Digest, off, n int64, try int) ([]byte, error) {
	rc, err := c.ReadRange(ctx, repo, dgst, off, n, try)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}

// put stores an image manifest and an artifact that refers to it, and returns the digests of both.
func put(t testing.TB, r *registrytest.Registry, kind string) (subject, artifact digest.Digest) {
	t.Helper()
	config := r.PutBlob("team/app", []byte("{}"))
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: config, Size: 2}, Layers: []ocispec.Descriptor{}}
	b := mustJSON(t, m)
	subject = r.PutManifest("team/app", "latest", m.MediaType, b)
	m.Subject = &ocispec.Descriptor{MediaType: m.MediaType, Digest: subject, Size: int64(len(b))}
	m.ArtifactType = kind
	return subject, r.PutManifest("team/app", "", m.MediaType, mustJSON(t, m))
}

func wantRequests(t testing.TB, r *registrytest.Registry, want int) {
	t.Helper()
	if got, _ := r.Count(); got != want {
		var b strings.Builder
		for _, q := range r.Requests() {
			fmt.Fprintf(&b, "\n%s %s %s?%s %s: %d, %d bytes", q.Server, q.Method, q.Path, q.Query, q.Range, q.Status, q.Bytes)
		}
		t.Errorf("got %d requests, want %d:%s", got, want, b.String())
	}
}

func TestManifestAndBlob(t *testing.T) {
	ctx := t.Context()
	r := registrytest.Start(t, registrytest.Options{})
	subject, _ := put(t, r, artifactType)
	data := noise(1000)
	blob := r.PutBlob("team/app", data)
	c := newClient(t, Options{})

	b, err := c.Manifest(ctx, repoOf(r), subject, 1<<20)
	if err != nil || digest.FromBytes(b) != subject {
		t.Fatalf("got manifest %q, %v", b, err)
	}
	if b, err := c.Blob(ctx, repoOf(r), blob, 1000); err != nil || !bytes.Equal(b, data) {
		t.Fatalf("got %d bytes of the blob, %v", len(b), err)
	}
	wantRequests(t, r, 2)
	if got, want := c.Stats(), (Stats{Requests: 2, Bytes: int64(len(b)) + 1000}); got != want {
		t.Errorf("got stats %+v, want %+v", got, want)
	}
	for _, q := range r.Requests() {
		if got := q.Header.Get("Accept-Encoding"); got != "identity" {
			t.Errorf("%s: got Accept-Encoding %q, want identity", q.Path, got)
		}
	}
	if got := r.Requests()[0].Header.Get("Accept"); got != manifestTypes {
		t.Errorf("got Accept %q for a manifest, want %q", got, manifestTypes)
	}

	r.Reset()
	if _, err := c.Blob(ctx, repoOf(r), blob, 999); err == nil || errors.Is(err, ErrNotFound) {
		t.Errorf("got %v for a blob larger than the limit", err)
	}
	wantRequests(t, r, 1)
	missing := digest.FromString("missing")
	if _, err := c.Blob(ctx, repoOf(r), missing, 999); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v for a missing blob, want ErrNotFound", err)
	}
	if _, err := c.Manifest(ctx, repoOf(r), missing, 999); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v for a missing manifest, want ErrNotFound", err)
	}
	wantRequests(t, r, 3)
	for _, bad := range []digest.Digest{"", "sha256:12", "sha256:../../../etc/passwd", "md5:d41d8cd98f00b204e9800998ecf8427e"} {
		if _, err := c.Blob(ctx, repoOf(r), bad, 999); err == nil {
			t.Errorf("digest %q was asked for", bad)
		}
	}
	wantRequests(t, r, 3)
}

func TestResolve(t *testing.T) {
	ctx := t.Context()
	r := registrytest.Start(t, registrytest.Options{})
	subject, _ := put(t, r, artifactType)
	c := newClient(t, Options{})
	for _, ref := range []string{":latest", "", "@" + subject.String(), ":gone@" + subject.String()} {
		desc, b, err := c.Resolve(ctx, string(repoOf(r))+ref)
		want := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: subject, Size: int64(len(b))}
		if err != nil || desc.Digest != want.Digest || desc.MediaType != want.MediaType || desc.Size != want.Size {
			t.Errorf("%q: got %+v, %v, want %+v", ref, desc, err, want)
		}
	}
	wantRequests(t, r, 4)
	if _, _, err := c.Resolve(ctx, string(repoOf(r))+":gone"); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v for a missing tag, want ErrNotFound", err)
	}
	if _, _, err := c.Resolve(ctx, "a/b:c:d"); err == nil {
		t.Error("a malformed reference was resolved")
	}
	r.PutManifest("team/app", "liar", ocispec.MediaTypeImageIndex, []byte(`{"mediaType":"`+ocispec.MediaTypeImageManifest+`"}`))
	if _, _, err := c.Resolve(ctx, string(repoOf(r))+":liar"); err == nil {
		t.Error("a manifest of two media types was resolved")
	}
}

// A name without an address is given up at once, unless it had one.
func TestHostWithoutAddress(t *testing.T) {
	err := fmt.Errorf("GET: %w", &net.DNSError{Err: "no such host", IsNotFound: true})
	unknown, known, read := &candidate{host: &host{}}, &candidate{host: &host{}}, &candidate{host: &host{}}
	known.worked()
	(&call{}).failed(unknown, err)
	(&call{}).failed(known, err)
	(&call{reads: true}).failed(read, err)
	if !unknown.out || known.out || read.out {
		t.Errorf("the unknown host is out: %v, the known one: %v, the one that is read from: %v", unknown.out, known.out, read.out)
	}
}

func TestParseReference(t *testing.T) {
	const d = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	for ref, want := range map[string][3]string{
		"busybox":                       {"docker.io/library/busybox", "latest", ""},
		"ghcr.io/a/b:c":                 {"ghcr.io/a/b", "c", ""},
		"localhost:5000/a":              {"localhost:5000/a", "latest", ""},
		"localhost:5000/a:t@" + d:       {"localhost:5000/a", "", d},
		"registry.example.com/x/y@" + d: {"registry.example.com/x/y", "", d},
	} {
		repo, tag, dgst, err := ParseReference(ref)
		if got := [3]string{string(repo), tag, string(dgst)}; err != nil || got != want {
			t.Errorf("%s: got %q, %v, want %q", ref, got, err, want)
		}
	}
	for _, bad := range []Repository{"", "busybox", "a/b:c", Repository("ghcr.io/a@" + d), "ghcr.io/../x", "ghcr.io/a?x=y", "http://ghcr.io/a"} {
		if d, n, err := bad.split(); err == nil {
			t.Errorf("repository %q was taken for %q, %q", bad, d, n)
		}
	}
}

// Answers that are wrong for good are asked for once; those that may get better again and again.
func TestFaultsOfWholeBodies(t *testing.T) {
	for name, tc := range map[string]struct {
		fault    registrytest.Fault
		times    int
		ok       bool
		requests int
	}{
		"flipped byte":       {registrytest.Flip(10), 1, false, 1},
		"404":                {registrytest.Status(404), 1, false, 1},
		"403":                {registrytest.Status(403), 1, false, 1},
		"gzip":               {registrytest.AnswerHeader("Content-Encoding", "gzip"), 1, false, 1},
		"503":                {registrytest.Status(503), 2, true, 3},
		"502":                {registrytest.Status(502), 1, true, 2},
		"501":                {registrytest.Status(501), 1, false, 1},
		"429":                {registrytest.Status(429), 1, true, 2},
		"broken":             {registrytest.Reset(5), 1, true, 2},
		"broken before":      {registrytest.Reset(-1), 1, true, 3}, // net/http itself asks again on a connection that was kept
		"stalled":            {registrytest.Stall(5), 1, true, 2},
		"stalled before":     {registrytest.Stall(-1), 1, true, 2},
		"truncated, in form": {registrytest.Truncate(5), 1, false, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := registrytest.Start(t, registrytest.Options{})
			data := noise(1000)
			blob := r.PutBlob("team/app", data)
			r.Inject(registrytest.Blobs, tc.times, tc.fault)
			c := newClient(t, Options{})
			b, err := c.Blob(t.Context(), repoOf(r), blob, 2000)
			if (err == nil) != tc.ok || (tc.ok && !bytes.Equal(b, data)) {
				t.Errorf("got %d bytes, %v, want success %v", len(b), err, tc.ok)
			}
			if got, _ := r.Count(); got != tc.requests && name != "broken before" {
				t.Errorf("got %d requests, want %d", got, tc.requests)
			}
		})
	}
}

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	r := registrytest.Start(t, registrytest.Options{})
	blob := r.PutBlob("team/app", []byte("x"))
	r.Inject(registrytest.Blobs, 1, registrytest.Status(http.StatusTooManyRequests, "Retry-After", "1"))
	c := newClient(t, Options{Budget: 5 * time.Second})
	start := time.Now()
	if _, err := c.Blob(t.Context(), repoOf(r), blob, 1); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(start); d < time.Second {
		t.Errorf("asked again after %v, the host wanted 1 s", d)
	}
	wantRequests(t, r, 2)

	// Longer than the budget: no use waiting.
	r.Reset()
	r.Inject(registrytest.Blobs, -1, registrytest.Status(http.StatusTooManyRequests, "Retry-After", "3600"))
	start = time.Now()
	_, err := c.Blob(t.Context(), repoOf(r), blob, 1)
	var status *StatusError
	if !errors.As(err, &status) || status.StatusCode != 429 {
		t.Errorf("got %v, want status 429", err)
	}
	if d := time.Since(start); d > 4*time.Second {
		t.Errorf("waited %v for a host that wanted an hour", d)
	}
	wantRequests(t, r, 1)
}

func TestBudgetAndContext(t *testing.T) {
	t.Parallel()
	r := registrytest.Start(t, registrytest.Options{})
	blob := r.PutBlob("team/app", []byte("x"))
	r.Inject(registrytest.Blobs, -1, registrytest.Status(http.StatusServiceUnavailable))
	c := newClient(t, Options{Budget: 600 * time.Millisecond})
	start := time.Now()
	_, err := c.Blob(t.Context(), repoOf(r), blob, 1)
	var status *StatusError
	if !errors.As(err, &status) || status.StatusCode != 503 || status.Host != r.Host() {
		t.Errorf("got %v, want status 503 of %s", err, r.Host())
	}
	if d := time.Since(start); d > 3*time.Second {
		t.Errorf("went on for %v with a budget of 0.6 s", d)
	}
	if n, _ := r.Count(); n < 2 {
		t.Errorf("asked %d times within the budget", n)
	}

	c = newClient(t, Options{Budget: time.Hour, Stall: time.Hour})
	r.Inject(registrytest.Manifests, -1, registrytest.Stall(-1))
	for name, f := range map[string]func(context.Context) error{
		"between requests": func(ctx context.Context) error { _, err := c.Blob(ctx, repoOf(r), blob, 1); return err },
		"in a request":     func(ctx context.Context) error { _, err := c.Manifest(ctx, repoOf(r), blob, 1); return err },
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		start := time.Now()
		if err := f(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: got %v, want the context's error", name, err)
		}
		if d := time.Since(start); d > 3*time.Second {
			t.Errorf("%s: came back after %v", name, d)
		}
		cancel()
	}
}

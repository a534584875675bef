package service

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// strange attaches an artifact that is of no use to an image, as a stranger may.
func (e *env) strange(i Image) {
	e.t.Helper()
	p, _, err := converter.Open(i.String(), converter.OpenOptions{})
	if err != nil {
		e.t.Fatal(err)
	}
	own := attach(e.t, e, i)
	_, raw, err := p.Manifest(e.t.Context(), own.String())
	if err != nil {
		e.t.Fatal(err)
	}
	m, err := artifact.DecodeManifest(raw)
	if err != nil {
		e.t.Fatal(err)
	}
	if err := p.Delete(e.t.Context(), own, i.Digest); err != nil {
		e.t.Fatal(err)
	}
	m.Layers[0].Source = digest.FromString("another image's layer")
	if raw, err = m.Encode(); err != nil {
		e.t.Fatal(err)
	}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: artifact.ArtifactType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	if err := p.PutManifest(e.t.Context(), d, raw, ""); err != nil {
		e.t.Fatal(err)
	}
}

// TestOwnAfterDeath: what an operation has attached is its own also if its process died right after, and a stranger's artifact is there beside it; when it is cancelled
// then, the stranger's is what is left.
func TestOwnAfterDeath(t *testing.T) {
	for name, cancel := range map[string]bool{"goes on": false, "cancelled": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // it waits for leases
			e := newEnv(t)
			i := e.push("app", image(t, "amd64", 10_000))
			e.strange(i)
			idle := e.startIdle()
			child := e.startChild()
			attached, end := make(chan struct{}), make(chan struct{})
			defer close(end)
			e.registry.Inject(attaches, 1, func(_ *registrytest.Registry, next http.Handler) http.Handler {
				return http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) { // whose answer does not come
					next.ServeHTTP(httptest.NewRecorder(), req)
					close(attached)
					<-end
				})
			})
			op := submit(t, idle.Service, i)
			<-attached
			child.Process.Kill()
			child.Wait()
			if len(e.artifacts(i)) != 2 {
				t.Fatalf("referrers %+v", e.artifacts(i))
			}
			if cancel {
				if _, err := idle.Cancel(t.Context(), op.ID, "tester"); err != nil {
					t.Fatal(err)
				}
			}
			second := e.start(func(c *Config) { c.Lease = 2 * time.Second })
			if cancel {
				await(t, second.Service, op.ID, in(Canceled))
				if len(e.artifacts(i)) != 1 {
					t.Errorf("referrers %+v", e.artifacts(i))
				}
				return
			}
			op = succeed(t, second.Service, op.ID)
			m, err := second.getMade(t.Context(), i)
			if err != nil || len(m.Artifacts) != 1 || m.Artifacts[0].Existed || op.Artifacts[0].Existed || op.Attempt != 2 {
				t.Errorf("%s\nnoted: %+v, %v", show(op), m.Artifacts, err)
			}
		})
	}
}

// TestOwnOfFailed: what an operation has attached whose processes all died over it is the service's own, so that it goes with its image.
func TestOwnOfFailed(t *testing.T) {
	e := newEnv(t)
	idle := e.startIdle()
	nothing := digest.FromString("what was about to be attached")
	r := e.dead(idle, "app", image(t, "amd64", 10_000), func(r *record) {
		r.Deaths = maxDeaths - 1
		for _, d := range []digest.Digest{attach(t, e, r.Image), nothing} {
			r.Made = append(r.Made, made{Subject: r.Image.Digest, Digest: d, Platform: "linux/amd64"})
		}
	})
	s := e.start()
	await(t, s.Service, r.ID, in(Failed))
	m, err := s.getMade(t.Context(), r.Image)
	if err != nil || len(m.Artifacts) != 1 || m.Artifacts[0].Existed || m.Artifacts[0].Digest == nothing {
		t.Errorf("noted: %+v, %v", m.Artifacts, err)
	}
}

// TestOwnFoundAgain: what the service has attached stays its own when an operation after finds it.
func TestOwnFoundAgain(t *testing.T) {
	w := newWorld(t)
	w.activate("app", true, func(s *Settings) { s.Rules.Platforms = []string{"linux/amd64"} })
	both := index(image(t, "amd64", 1000), image(t, "arm64", 2000))
	i := w.push("app", "v1", both)
	w.told(Pushed, i, "v1")
	first := w.converted(i)
	w.settled()
	w.activate("app", true)
	w.push("app", "v2", both)
	w.told(Pushed, i, "v2")
	w.until("another operation", func() bool {
		op, err := w.Last(t.Context(), i)
		return err == nil && op.ID != first.ID && op.State == Succeeded
	})
	m, err := w.getMade(t.Context(), i)
	if err != nil || len(m.Artifacts) != 2 || slices.ContainsFunc(m.Artifacts, func(a Artifact) bool { return a.Existed }) {
		t.Errorf("noted: %+v, %v", m.Artifacts, err)
	}
}

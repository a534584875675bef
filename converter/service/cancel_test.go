package service

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

// asked makes an operation without a look at the registry, for tests in which that does not answer.
func asked(t *testing.T, s *Service, i Image) Operation {
	t.Helper()
	rec := newRecord(Request{Image: i, By: "test"})
	_, rev, err := s.get(t.Context(), imageKey(i))
	if err == nil {
		_, err = s.put(t.Context(), imageKey(i), rec, rev)
	}
	if err != nil {
		t.Fatal(err)
	}
	op, err := s.begin(t.Context(), rec)
	if err != nil {
		t.Fatal(err)
	}
	return op
}

// TestCancel cancels a conversion of two platforms while the registry does not answer, in each phase. It is Canceled all the same (the
// lease is longer than the test), and nothing is attached that was not before.
func TestCancel(t *testing.T) {
	amd, arm := image(t, "amd64", 100_000), image(t, "arm64", 100_000)
	armManifest, err := arm.Digest()
	if err != nil {
		t.Fatal(err)
	}
	second := 0
	for _, phase := range []struct {
		name     string
		match    func(*http.Request) bool
		attached int // before the conversion
	}{
		{"look at the image", func(r *http.Request) bool { return r.Method == http.MethodGet && registrytest.Manifests(r) }, 0},
		{"list referrers", registrytest.Referrers, 0},
		{"read the first layer", reads(layers(t, amd)[0]), 0},
		{"push the first layer", func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/blobs/uploads") }, 0},
		{"attach the first artifact", attaches, 0},
		{"read the second platform's layer", reads(layers(t, arm)[0]), 0},
		{"read the second platform's layer, the first had its artifact", reads(layers(t, arm)[0]), 1},
		{"list the second platform's referrers", func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/referrers/"+armManifest.String()) }, 0},
		{"attach the second artifact", func(r *http.Request) bool {
			if attaches(r) {
				second++ // Inject's lock is held
			}
			return attaches(r) && second == 2
		}, 0},
	} {
		t.Run(phase.name, func(t *testing.T) {
			e := newEnv(t)
			s := e.start()
			i := e.push("app", index(amd, arm))
			if phase.attached > 0 {
				succeed(t, s.Service, submit(t, s.Service, i, func(r *Request) { r.Platforms = []string{"linux/amd64"} }).ID)
			}
			h := e.hold(phase.match)
			op := asked(t, s.Service, i)
			h.wait(t)
			if got, err := s.Cancel(t.Context(), op.ID, "tester"); err != nil || !got.Cancel && got.State != Canceled {
				t.Fatalf("Cancel: %s, %v", show(got), err)
			}
			op = await(t, s.Service, op.ID, func(op Operation) bool { return op.State.Ended() })
			if op.State != Canceled || op.CancelBy != "tester" || op.End.IsZero() || op.Progress.Percent == 100 || len(op.Warnings) > 0 {
				t.Error(show(op))
			}
			h.release()
			if list := e.artifacts(i); len(list) != phase.attached {
				t.Errorf("referrers %+v, want %d", list, phase.attached)
			}
			until(t, "the operation to be counted", func() bool { return s.Stats().Canceled == 1 })
			// It can be asked for again, and goes on from what was pushed.
			succeed(t, s.Service, submit(t, s.Service, i).ID)
			e.verify(i, 2)
		})
	}
}

// TestCancelWaiting: what waits is Canceled at once, by any process, and never begun; those behind it move up.
func TestCancelWaiting(t *testing.T) {
	e := newEnv(t)
	s := e.start(func(c *Config) { c.Limits.Conversions = 1 })
	images := make([]Image, 4)
	for n := range images {
		images[n] = e.push("app"+string(rune('a'+n)), image(t, "amd64", 10_000))
	}
	h := e.hold(func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/appa/blobs/") })
	var ops []Operation
	for n, i := range images {
		op := asked(t, s.Service, i)
		if n == 0 {
			h.wait(t)
			op = await(t, s.Service, op.ID, in(Running))
		}
		if op.Position != n {
			t.Errorf("operation %d has position %d", n, op.Position)
		}
		ops = append(ops, op)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	changes, err := s.Watch(ctx, ops[3].ID)
	if err != nil {
		t.Fatal(err)
	}
	other := e.startIdle()
	if op, err := other.Cancel(t.Context(), ops[2].ID, "tester"); err != nil || op.State != Canceled || op.Attempt != 0 || !op.Start.IsZero() {
		t.Fatalf("%s, %v", show(op), err)
	}
	for op := range changes {
		if op.Position == 2 {
			break
		}
	}
	if op, err := s.Operation(t.Context(), ops[1].ID); err != nil || op.Position != 1 {
		t.Errorf("%s, %v", show(op), err)
	}
	h.release()
	succeed(t, s.Service, ops[3].ID)
	if op, err := s.Operation(t.Context(), ops[2].ID); err != nil || op.State != Canceled || len(e.artifacts(images[2])) != 0 {
		t.Errorf("%s, %v", show(op), err)
	}
	info, err := s.queue.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if n := info.State.Msgs; n > 1 { // the last one's may be on its way out
		t.Errorf("%d messages are left", n)
	}
}

// TestCancelHandedBack: an operation that waits again after its process ended has attached something, which goes, too.
func TestCancelHandedBack(t *testing.T) {
	e := newEnv(t)
	arm := image(t, "arm64", 10_000)
	i := e.push("app", index(image(t, "amd64", 10_000), arm))
	first, idle := e.start(), e.startIdle()
	h := e.hold(reads(layers(t, arm)[0]))
	op := submit(t, first.Service, i)
	h.wait(t)
	first.stop()
	if op = await(t, idle.Service, op.ID, in(NotStarted)); op.Attempt != 1 || op.Position != 1 || len(e.artifacts(i)) != 1 {
		t.Errorf("handed back: %s", show(op))
	}
	op, err := idle.Cancel(t.Context(), op.ID, "tester")
	if err != nil || op.State != Canceled || len(e.artifacts(i)) != 0 {
		t.Errorf("%s, %v", show(op), err)
	}
	if _, err := idle.Cancel(t.Context(), op.ID, "tester"); !errors.Is(err, ErrNotRunning) {
		t.Errorf("cancelled twice: %v", err)
	}
}

// TestCancelAbandoned: what a process had that died is Canceled soon also when no process has room for it, whether it had attached something or not.
func TestCancelAbandoned(t *testing.T) {
	t.Parallel() // it waits most of the time
	e := newEnv(t)
	s := e.startIdle(func(c *Config) { c.Lease = time.Second })
	img := image(t, "amd64", 10_000)
	list := []record{e.dead(s, "nothing", img), e.dead(s, "something", img, func(r *record) {
		r.Made = []made{{Subject: r.Image.Digest, Digest: attach(t, e, r.Image)}}
	})}
	for _, r := range list {
		if op, err := s.Cancel(t.Context(), r.ID, "tester"); err != nil || op.State != Running || !op.Cancel {
			t.Errorf("%s, %v", show(op), err)
		}
	}
	for _, r := range list {
		if op := await(t, s.Service, r.ID, func(op Operation) bool { return op.State.Ended() }); op.State != Canceled || len(e.artifacts(op.Image)) != 0 {
			t.Errorf("%s, referrers %+v", show(op), e.artifacts(op.Image))
		}
	}
	info, err := s.queue.Info(t.Context())
	if err != nil || info.State.Msgs != 0 {
		t.Errorf("%+v, %v", info, err)
	}
}

// attach has the artifact of an image attached by somebody else, and returns its digest.
func attach(t *testing.T, e *env, i Image) digest.Digest {
	t.Helper()
	p, ref, err := converter.Open(i.String(), converter.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	created, err := converter.Create(t.Context(), p, ref, converter.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return created[0].Artifact.Digest
}

// TestCancelSilent: a registry that says nothing keeps no cancelled operation for ever; the operation says what may be left.
func TestCancelSilent(t *testing.T) {
	t.Parallel() // it waits most of the time
	e := newEnv(t)
	idle := e.startIdle()
	r := e.dead(idle, "app", image(t, "amd64", 10_000), func(r *record) {
		r.Made = []made{{Subject: r.Image.Digest, Digest: attach(t, e, r.Image)}}
		r.Cancel, r.Deaths = true, maxDeaths
	})
	h := e.hold(registrytest.Manifests)
	s := e.start(func(c *Config) { c.Lease = time.Second })
	op := await(t, s.Service, r.ID, func(op Operation) bool { return op.State.Ended() })
	if h.release(); op.State != Canceled || len(op.Warnings) != 1 || len(e.artifacts(r.Image)) != 1 {
		t.Errorf("%s, referrers %+v", show(op), e.artifacts(r.Image))
	}
}

// TestTakeAway: a record that names an image, whoever wrote it, has nothing deleted.
func TestTakeAway(t *testing.T) {
	e := newEnv(t)
	s := e.start()
	i := e.push("app", image(t, "amd64", 1000))
	p, err := s.open(i.Registry, i.Repository)
	if err != nil {
		t.Fatal(err)
	}
	if err := takeAway(t.Context(), p, []made{{Subject: i.Digest, Digest: i.Digest}}); err == nil {
		t.Error("no error")
	}
	if _, _, err := p.Manifest(t.Context(), i.Digest.String()); err != nil {
		t.Errorf("the image: %v", err)
	}
	// Its signatures are the image's own, too.
	subject := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: i.Digest, Size: 1}
	d, raw, err := trust.Manifest(subject, trusttest.Envelope("application/cose", []byte("envelope")), nil)
	if err != nil {
		t.Fatal(err)
	}
	e.registry.PutManifest(i.Repository, "", d.MediaType, raw)
	if err := takeAway(t.Context(), p, []made{{Subject: i.Digest, Digest: d.Digest}}); err == nil {
		t.Error("no error")
	}
	if _, _, err := p.Manifest(t.Context(), d.Digest.String()); err != nil {
		t.Errorf("the image's signature: %v", err)
	}
}

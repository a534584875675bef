package service

import (
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

// noImage is one whose config is no JSON, as whoever may push can push it.
type noImage struct {
	v1.Image
	config []byte
}

func (b noImage) RawConfigFile() ([]byte, error) { return b.config, nil }

func (b noImage) ConfigName() (v1.Hash, error) {
	h, _, err := v1.SHA256(strings.NewReader(string(b.config)))
	return h, err
}

func (b noImage) manifest() (*v1.Manifest, error) {
	m, err := b.Image.Manifest()
	if err != nil {
		return nil, err
	}
	m = m.DeepCopy()
	m.Config.Size = int64(len(b.config))
	m.Config.Digest, err = b.ConfigName()
	return m, err
}

func (b noImage) Manifest() (*v1.Manifest, error) { return b.manifest() }

func (b noImage) RawManifest() ([]byte, error) { return partial.RawManifest(b) }

func (b noImage) Digest() (v1.Hash, error) { return partial.Digest(b) }

func (b noImage) Size() (int64, error) { return partial.Size(b) }

func (b noImage) MediaType() (types.MediaType, error) { return b.Image.MediaType() }

// TestNoImage: what somebody pushes that cannot be read as an image is in no other's way: neither in that of what is pushed beside it nor, once that is so for a while,
// in that of keep.
func TestNoImage(t *testing.T) {
	w := newWorld(t)
	old, _, _ := w.kept()
	r := repository{w.host, "app"}
	good := w.push("app", "good", image(t, "amd64", 3000))
	note := func(tag string, ago time.Duration) {
		t.Helper()
		if err := w.putTag(t.Context(), r, seenTag{Tag: tag, State: stateDue, Pushed: now().Add(-ago), Source: "test"}); err != nil {
			t.Fatal(err)
		}
	}
	note("good", 0)
	for n := range 2 * visitFails {
		tag := fmt.Sprint("bad", n)
		w.push("app", tag, noImage{image(t, "amd64", int64(4000+n)), fmt.Appendf(nil, "no JSON %d", n)})
		note(tag, -time.Second) // newer
	}
	w.reconciled()
	w.converted(good)
	if got := w.attached(old); len(got) != 1 {
		t.Fatalf("at once: referrers %+v", got)
	}
	w.laterUnread()
	w.reconciled()
	if got := w.attached(old); len(got) != 0 {
		t.Errorf("referrers %+v", got)
	}
	if got := w.attached(good); len(got) != 1 {
		t.Errorf("of the newest: referrers %+v", got)
	}
}

// laterUnread makes it later by how long what cannot be read may come to be readable.
func (w *world) laterUnread() {
	w.auto.mu.Lock()
	defer w.auto.mu.Unlock()
	for _, tags := range w.auto.unread {
		for tag, since := range tags {
			tags[tag] = since.Add(-notYet)
		}
	}
}

// TestClockWasAhead: what was noted while the clock was ahead is older, all the same, than what is pushed later, and an image is gone since it was found to be.
func TestClockWasAhead(t *testing.T) {
	w := newWorld(t)
	old, _, _ := w.kept()
	r := repository{w.host, "app"}
	tags, err := w.tagsOf(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range tags {
		s.Pushed = s.Pushed.AddDate(1, 0, 0)
		if err := w.putTag(t.Context(), r, *s); err != nil {
			t.Fatal(err)
		}
	}
	w.reconciled()
	if got := w.attached(old); len(got) != 0 {
		t.Fatalf("referrers %+v", got)
	}
	newest := w.push("app", "v3", image(t, "amd64", 3000))
	w.told(Pushed, newest, "v3")
	w.converted(newest)
	w.settled()
	m, err := w.getMade(t.Context(), newest)
	if err != nil {
		t.Fatal(err)
	}
	m.Gone = now().AddDate(1, 0, 0)
	if err := w.setMade(t.Context(), &m); err != nil {
		t.Fatal(err)
	}
	w.deleted(newest, "v3")
	for range 2 {
		w.reconciled()
		w.later()
	}
	w.reconciled()
	if got := w.attached(newest); len(got) != 0 {
		t.Errorf("of the deleted image: referrers %+v", got)
	}
}

// TestNameOfAPush: who asks by a name that reads as that of a push has asked: it is not taken for one, nor are their operations unbounded.
func TestNameOfAPush(t *testing.T) {
	w := newWorld(t)
	i := w.push("app", "v1", image(t, "amd64", 1000))
	name := pushTo + "v1 by alice (harbor)"
	if _, _, err := w.Submit(t.Context(), Request{Image: i, By: name}); err != nil {
		t.Fatal(err)
	}
	op := w.converted(i)
	m, err := w.getMade(t.Context(), i)
	if err != nil || !m.Asked || strings.HasPrefix(op.By, pushTo) || !strings.Contains(op.By, name) {
		t.Errorf("%s\nasked: %v, %v", show(op), m.Asked, err)
	}
}

// TestManyDeletionsTold: of images that are told to be gone a bounded number is remembered, however often looking for them fails.
func TestManyDeletionsTold(t *testing.T) {
	w := newWorld(t)
	a, r := w.auto, repository{w.host, "app"}
	a.mu.Lock()
	a.hints[r] = &hint{running: true, after: time.Now().Add(time.Hour)} // nobody takes it meanwhile
	a.mu.Unlock()
	list := func(n int) (gone []digest.Digest) {
		for i := range maxNoted {
			gone = append(gone, digest.FromString(fmt.Sprint(n, " ", i)))
		}
		return gone
	}
	a.hint(r, hint{gone: list(1), after: time.Now().Add(time.Hour)})
	a.hintDone(r, hint{gone: list(2)}, true)
	a.mu.Lock()
	defer a.mu.Unlock()
	if n := len(a.hints[r].gone); n != maxNoted {
		t.Errorf("%d are remembered, want %d", n, maxNoted)
	}
	delete(a.hints, r)
}

// said is a log that remembers whether something was said.
type said struct {
	what string
	done atomic.Bool
}

func (s *said) Write(line []byte) (int, error) {
	if strings.Contains(string(line), s.what) {
		s.done.Store(true)
	}
	return len(line), nil
}

// TestNATSAwayAtTheBeginning: a conversion that begins while NATS does not say what is being deleted waits, and does not fail.
func TestNATSAwayAtTheBeginning(t *testing.T) {
	e := newEnv(t)
	waits := &said{what: "a conversion waits"}
	c := shortLease(e.connect(), e.registry.Host())
	c.Lease = time.Hour
	s := run(t, c, func(s *Service) { s.auto.log = slog.New(slog.NewTextHandler(waits, nil)) })
	if err := s.js.DeleteKeyValue(t.Context(), "streaming-artifacts"); err != nil {
		t.Fatal(err)
	}
	r := newRecord(Request{Image: e.push("app", image(t, "amd64", 1000)), By: "test"})
	if _, err := s.put(t.Context(), imageKey(r.Image), r, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := s.begin(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	until(t, "it waits", waits.done.Load)
	if _, err := s.bucket(t.Context(), "streaming-artifacts", 0); err != nil {
		t.Fatal(err)
	}
	succeed(t, s.Service, r.ID)
	e.verify(r.Image, 1)
}

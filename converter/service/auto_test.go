package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/nats-io/nats.go"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// world is a registry and a process of the service that looks after it, and reconciles when it is told to.
type world struct {
	process
	t    *testing.T
	host string
	reg  *registrytest.Registry // nil if it is docker-registry
	nats string
}

// onRegistries runs a test on registries with the referrers API and without.
func onRegistries(t *testing.T, f func(t *testing.T, w *world)) {
	t.Run("referrers API", func(t *testing.T) { f(t, newWorld(t)) })
	t.Run("docker-registry", func(t *testing.T) {
		f(t, startWorld(t, registrytest.StartDistribution(t, registrytest.Distribution{Deletes: true}), nil))
	})
}

// newWorld runs one with registrytest's registry.
func newWorld(t *testing.T) *world {
	t.Helper()
	reg := registrytest.Start(t, registrytest.Options{})
	return startWorld(t, reg.Host(), reg)
}

func startWorld(t *testing.T, host string, reg *registrytest.Registry) *world {
	t.Helper()
	w := &world{t: t, host: host, reg: reg, nats: startNATS(t)}
	w.process = run(t, w.config())
	w.until("its first pass, or it finds what the test does", func() bool { return !w.Stats().Auto.Reconciled.IsZero() })
	return w
}

// config is that of a process whose own reconcile finds nothing: the test makes the passes.
func (w *world) config() Config {
	w.t.Helper()
	conn, err := nats.Connect(w.nats, nats.MaxReconnects(-1))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(conn.Close)
	return Config{
		Conn: conn, Registries: []Registry{NewRegistry(w.host, converter.RegistryOptions{}, 0)},
		Convert: converter.Options{Jobs: 1}, Lease: time.Hour, Reconcile: time.Hour,
	}
}

// reconciled makes a pass over all repositories.
func (w *world) reconciled() {
	w.t.Helper()
	if _, err := w.auto.pass(w.t.Context(), w.host); err != nil {
		w.t.Fatal(err)
	}
}

// activate switches a name or pattern on or off.
func (w *world) activate(repository string, active bool, change ...func(*Settings)) {
	w.t.Helper()
	s := Settings{Registry: w.host, Repository: repository, Active: active}
	for _, f := range change {
		f(&s)
	}
	if _, err := w.SetSettings(w.t.Context(), s, false); err != nil {
		w.t.Fatal(err)
	}
	w.settled() // or what is pushed next may be found before it is told
}

// push pushes an image or index.
func (w *world) push(repository, tag string, img remote.Taggable) Image {
	w.t.Helper()
	ref, err := name.NewTag(w.host + "/" + repository + ":" + tag)
	if err != nil {
		w.t.Fatal(err)
	}
	var h v1.Hash
	switch img := img.(type) {
	case v1.Image:
		if err = remote.Write(ref, img); err == nil {
			h, err = img.Digest()
		}
	case v1.ImageIndex:
		if err = remote.WriteIndex(ref, img); err == nil {
			h, err = img.Digest()
		}
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return Image{w.host, repository, digest.Digest(h.String())}
}

// told gives the service an event of a push or deletion, twice, as webhooks do.
func (w *world) told(kind EventKind, i Image, tag string) {
	w.t.Helper()
	for range 2 {
		err := w.Handle(w.t.Context(), Event{Kind: kind, Registry: i.Registry, Repository: i.Repository, Digest: i.Digest, Tag: tag, Source: "test", By: "alice"})
		if err != nil {
			w.t.Fatal(err)
		}
	}
}

// until waits for a condition.
func (w *world) until(what string, f func() bool) {
	w.t.Helper()
	until(w.t, what, f)
}

func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.NewTimer(time.Minute)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// ended waits until an image's operation has ended, and returns it.
func (w *world) ended(i Image) (op Operation) {
	w.t.Helper()
	w.until("the end of a conversion of "+i.String(), func() (ok bool) {
		var err error
		op, err = w.Last(w.t.Context(), i)
		return err == nil && op.State.Ended()
	})
	return op
}

// converted waits until an image is converted.
func (w *world) converted(i Image) (op Operation) {
	w.t.Helper()
	w.until("a conversion of "+i.String(), func() (ok bool) {
		var err error
		op, err = w.Last(w.t.Context(), i)
		return err == nil && op.State == Succeeded
	})
	return op
}

// settled waits until nothing that was told is left to look at.
func (w *world) settled() {
	w.t.Helper()
	w.until("nothing to look at", func() bool {
		w.auto.mu.Lock()
		defer w.auto.mu.Unlock()
		return len(w.auto.hints) == 0
	})
}

// operations are the images that were asked for, of which each was once.
func (w *world) asked(want ...Image) {
	w.t.Helper()
	ops, err := w.Operations(w.t.Context(), Filter{})
	if err != nil {
		w.t.Fatal(err)
	}
	var got, wanted []string
	for _, op := range ops {
		got = append(got, op.Image.String())
	}
	for _, i := range want {
		wanted = append(wanted, i.String())
	}
	slices.Sort(got)
	slices.Sort(wanted)
	if !slices.Equal(got, wanted) {
		w.t.Errorf("asked for\n%q, want\n%q", got, wanted)
	}
}

func (w *world) place(repository string) converter.Place {
	w.t.Helper()
	_, p, err := w.reach(w.host, repository)
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

// attached lists what refers to an image and to its platforms, whether it is there or not.
func (w *world) attached(i Image, subjects ...digest.Digest) (list []ocispec.Descriptor) {
	w.t.Helper()
	for _, s := range append(subjects, i.Digest) {
		got, err := w.place(i.Repository).Referrers(w.t.Context(), s)
		if err != nil {
			w.t.Fatal(err)
		}
		list = append(list, got...)
	}
	return list
}

// deleted deletes an image in the registry.
func (w *world) deleted(i Image, tags ...string) {
	w.t.Helper()
	refs := []string{i.Digest.String()}
	if w.reg != nil {
		refs = append(tags, refs...) // go-containerregistry's keeps tags of what is deleted
	}
	for _, ref := range refs {
		req, err := http.NewRequest(http.MethodDelete, "http://"+w.host+"/v2/"+i.Repository+"/manifests/"+ref, nil)
		if err != nil {
			w.t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			w.t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusAccepted {
			w.t.Fatalf("delete %s: %s", ref, resp.Status)
		}
	}
}

// TestPushed: what is pushed to an active repository is converted, once; nothing else is: not what was there, what is pushed elsewhere, a platform of an
// index, or what the conversion itself pushes.
func TestPushed(t *testing.T) {
	onRegistries(t, func(t *testing.T, w *world) {
		before := w.push("team/app", "v0", image(t, "amd64", 1000))
		other := w.push("team/other", "v1", image(t, "amd64", 1000))
		w.told(Pushed, before, "v0") // nobody has activated it
		w.activate("team/app", true)
		amd, arm := image(t, "amd64", 2000), image(t, "arm64", 3000)
		pushed := w.push("team/app", "v1", index(amd, arm))
		platform, err := amd.Digest()
		if err != nil {
			t.Fatal(err)
		}
		w.told(Pushed, Image{w.host, "team/app", digest.Digest(platform.String())}, "")
		w.told(Pushed, pushed, "v1")
		w.told(Pushed, other, "v1")
		op := w.converted(pushed)
		if op.By != "push to v1 by alice (test)" || op.Tag != "v1" || len(op.Artifacts) != 2 {
			t.Errorf("operation %+v", op)
		}
		for _, a := range op.Artifacts {
			w.told(Pushed, Image{w.host, "team/app", a.Digest}, "")
			w.told(Pushed, Image{w.host, "team/app", a.Digest}, a.Digest.String()) // as Harbor does
			w.told(Pushed, Image{w.host, "team/app", a.Digest}, strings.Replace(a.Subject.String(), ":", "-", 1))
			// Somebody may tag an artifact.
			p := w.place("team/app")
			d, raw, err := p.Manifest(t.Context(), a.Digest.String())
			if err != nil {
				t.Fatal(err)
			}
			if err := p.PutManifest(t.Context(), d, raw, "artifact"); err != nil {
				t.Fatal(err)
			}
			w.told(Pushed, Image{w.host, "team/app", a.Digest}, "artifact")
		}
		w.settled()
		w.reconciled()
		w.told(Pushed, pushed, "v1")
		w.settled()
		w.asked(pushed)

		// Pushed again, it is no more what was there before.
		w.told(Pushed, before, "v0")
		w.converted(before)
	})
}

// TestMissed: reconcile finds what no event has told: a new tag, a tag that names another image, a new repository.
func TestMissed(t *testing.T) {
	onRegistries(t, func(t *testing.T, w *world) {
		w.activate("app", true) // which does not exist
		w.reconciled()
		first := w.push("app", "latest", image(t, "amd64", 1000))
		w.reconciled()
		w.converted(first)
		second := w.push("app", "latest", image(t, "amd64", 2000))
		w.reconciled()
		w.converted(second)
		w.reconciled()
		w.settled()
		w.asked(first, second)
	})
}

// TestExisting: what is there is converted when that is asked for, and what is pushed later, too.
func TestExisting(t *testing.T) {
	onRegistries(t, func(t *testing.T, w *world) {
		one, two := w.push("app", "v1", image(t, "amd64", 1000)), w.push("app", "v2", image(t, "amd64", 2000))
		w.activate("app", true)
		w.reconciled()
		w.settled()
		w.asked()
		if _, err := w.SetSettings(t.Context(), Settings{Registry: w.host, Repository: "app", Active: true}, true); err != nil {
			t.Fatal(err)
		}
		w.converted(one)
		w.converted(two)
		w.settled()
		w.reconciled()
		three := w.push("app", "v3", image(t, "amd64", 3000))
		w.reconciled()
		w.converted(three)
		w.asked(one, two, three)

		// What is pushed while it is off was pushed before when it is on again.
		w.activate("app", false)
		off := w.push("app", "v3", image(t, "amd64", 4000))
		w.told(Pushed, off, "v3")
		w.reconciled()
		w.activate("app", true)
		w.reconciled()
		w.settled()
		w.asked(one, two, three)
	})
}

// TestPattern: a pattern makes active what fits and comes into being, and in what is there, what is pushed from then on.
func TestPattern(t *testing.T) {
	onRegistries(t, func(t *testing.T, w *world) {
		w.push("team/old", "v1", image(t, "amd64", 1000))
		w.push("other", "v1", image(t, "amd64", 1000))
		w.activate("team/*", true)
		w.activate("team/private", false)
		w.settled()
		fresh := w.push("team/new", "v1", image(t, "amd64", 2000))
		later := w.push("team/old", "v2", image(t, "amd64", 3000))
		w.push("team/private", "v1", image(t, "amd64", 4000))
		w.push("other", "v2", image(t, "amd64", 4000))
		w.reconciled()
		w.converted(fresh)
		w.converted(later)
		w.settled()
		w.reconciled()
		w.asked(fresh, later)

		// Without settings of its own the pattern counts, from then on.
		if err := w.ForgetSettings(t.Context(), w.host, "team/private"); err != nil {
			t.Fatal(err)
		}
		private := w.push("team/private", "v2", image(t, "amd64", 5000))
		w.reconciled()
		w.converted(private)
		w.asked(fresh, later, private)
		if err := w.ForgetSettings(t.Context(), w.host, "team/private"); !errors.Is(err, ErrNotFound) {
			t.Errorf("forgotten twice: %v", err)
		}
	})
}

// TestNoCatalog: where repositories cannot be listed, a pattern takes what an event tells of, and what was in it before stays as it is.
func TestNoCatalog(t *testing.T) {
	w := newWorld(t)
	w.reg.Inject(func(req *http.Request) bool { return req.URL.Path == "/v2/_catalog" }, -1, registrytest.Status(http.StatusForbidden))
	w.push("team/app", "v1", image(t, "amd64", 1000))
	w.activate("team/*", true)
	w.activate("named", true)
	two := w.push("team/app", "v2", image(t, "amd64", 2000))
	w.told(Pushed, two, "v2")
	w.converted(two)
	three := w.push("team/app", "v3", image(t, "amd64", 3000)) // missed
	w.settled()
	w.reconciled()
	w.converted(three)
	w.asked(two, three)
	if r := w.Registries(); len(r) != 1 || !strings.Contains(r[0].NoCatalog, "403") {
		t.Errorf("registries %+v", r)
	}
	list, err := w.Repositories(t.Context(), w.host, "")
	if err != nil || len(list) != 2 || list[0].Name != "named" || list[1].Name != "team/app" || list[1].Settings.Repository != "team/*" || list[1].Tags != 3 {
		t.Errorf("repositories %+v, %v", list, err)
	}
}

// TestRules: platforms that are not wanted, and those that are too small, are not converted.
func TestRules(t *testing.T) {
	w := newWorld(t)
	w.activate("app", true, func(s *Settings) { s.Rules = Rules{Platforms: []string{"linux/amd64"}, MinSize: 5000} })
	both := w.push("app", "v1", index(image(t, "amd64", 9000), image(t, "arm64", 9000)))
	small := w.push("app", "v2", index(image(t, "amd64", 1000), image(t, "arm64", 9000)))
	w.told(Pushed, both, "v1")
	w.told(Pushed, small, "v2")
	if op := w.converted(both); len(op.Artifacts) != 1 || op.Artifacts[0].Platform != "linux/amd64" {
		t.Errorf("operation %+v", op)
	}
	w.settled()
	w.reconciled()
	w.asked(both)
}

// created returns an image that says when it was made.
func created(t *testing.T, day int, size int64) v1.Image {
	t.Helper()
	img, err := mutate.CreatedAt(image(t, "amd64", size), v1.Time{Time: time.Date(2026, 1, day, 0, 0, 0, 0, time.UTC)})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestKeep: of what is there the newest are converted; what is pushed later takes the place of the oldest, but not of what somebody asked for.
func TestKeep(t *testing.T) {
	w := newWorld(t)
	asked := w.push("app", "v0", created(t, 1, 500))
	if _, _, err := w.Submit(t.Context(), Request{Image: asked, By: "bob"}); err != nil {
		t.Fatal(err)
	}
	w.converted(asked)
	var list []Image
	for i := range 4 {
		list = append(list, w.push("app", fmt.Sprintf("v%d", 9-i), created(t, i+2, int64(1000*(i+1)))))
	}
	if _, err := w.SetSettings(t.Context(), Settings{Registry: w.host, Repository: "app", Active: true, Rules: Rules{Keep: 2}}, true); err != nil {
		t.Fatal(err)
	}
	w.converted(list[2])
	w.converted(list[3])
	w.settled()
	w.reconciled()
	w.asked(asked, list[2], list[3])

	newest := w.push("app", "v10", created(t, 1, 9000))
	w.told(Pushed, newest, "v10")
	w.converted(newest)
	w.settled()
	w.reconciled()
	for i, want := range map[Image]int{asked: 1, list[2]: 0, list[3]: 1, newest: 1} {
		if got := w.attached(i); len(got) != want {
			t.Errorf("%s has %d referrers, want %d", i, len(got), want)
		}
	}
}

// TestDeeds: what the service does without being asked is told, with its reason, and counted.
func TestDeeds(t *testing.T) {
	w := newWorld(t)
	w.stop()
	c := w.config()
	told := make(chan Deed, 100)
	c.Audit = func(d Deed) { told <- d }
	w.process = run(t, c)
	w.activate("app", true, func(s *Settings) { s.Rules.Keep = 1 })
	old := w.push("app", "v1", image(t, "amd64", 1000))
	w.told(Pushed, old, "v1")
	first := w.converted(old)
	newest := w.push("app", "v2", image(t, "amd64", 2000))
	w.told(Pushed, newest, "v2")
	second := w.converted(newest)
	w.settled()
	w.reconciled()
	w.deleted(newest, "v2")
	w.reconciled()
	w.later()
	w.reconciled()
	want := []Deed{
		{"convert", old, first.ID, "push to v1 by alice (test)"}, {"convert", newest, second.ID, "push to v2 by alice (test)"},
		{"delete", old, first.Artifacts[0].Digest.String(), "those of the 1 newest tags are kept"}, {"delete", newest, second.Artifacts[0].Digest.String(), "the image is gone since"},
	}
	for _, want := range want {
		if got := <-told; got.Action != want.Action || got.Image != want.Image || got.Target != want.Target || !strings.HasPrefix(got.Detail, want.Detail) {
			t.Errorf("told of %+v, want %+v", got, want)
		}
	}
	if st := w.Stats().Auto; st.Deleted != 2 || st.Events < 2 || st.Due != 0 || len(st.ReconcileFailures) != 1 || st.ReconcileFailures[w.host] != 0 {
		t.Errorf("%+v", st)
	}
	w.reg.Inject(registrytest.Any, -1, registrytest.Status(http.StatusForbidden))
	w.reconciled()
	if st := w.Stats().Auto; st.ReconcileFailures[w.host] == 0 {
		t.Errorf("%+v", st)
	}
}

// TestManyRepositories: a pattern that takes in very many repositories goes on where a try before has stopped.
func TestManyRepositories(t *testing.T) {
	w := newWorld(t)
	w.stop()
	c := w.config()
	const n = 200
	c.Registries[0].Catalog = func(context.Context) (names []string, err error) {
		for i := range n {
			names = append(names, fmt.Sprintf("team/app%d", i))
		}
		return names, nil
	}
	w.process = run(t, c)
	part := map[repository]base{}
	for i := range 3 {
		r := repository{w.host, fmt.Sprintf("team/app%d", i)}
		b, err := w.setBase(t.Context(), r, base{}, false)
		if err != nil {
			t.Fatal(err)
		}
		part[r] = b
	}
	if _, err := w.SetSettings(t.Context(), Settings{Registry: w.host, Repository: "team/*", Active: true}, false); err != nil {
		t.Fatal(err)
	}
	all, err := w.bases(t.Context())
	if err != nil || len(all) != n {
		t.Fatalf("%d of %d repositories, %v", len(all), n, err)
	}
	for r, b := range part {
		if now := all[r]; now.since() != b.since() {
			t.Errorf("%s was begun again", r)
		}
	}
}

// TestBoundsOfSettings: one who owns a part of a registry does not use up what all share.
func TestBoundsOfSettings(t *testing.T) {
	w := newWorld(t)
	s := Settings{Registry: w.host, Repository: "app", Rules: Rules{Platforms: slices.Repeat([]string{"linux/amd64"}, maxPlatforms+1)}}
	if _, err := w.SetSettings(t.Context(), s, false); !errors.Is(err, ErrInvalid) {
		t.Errorf("many platforms: %v", err)
	}
	list := make([]storedSettings, maxSettingsOf)
	for i := range list {
		list[i] = storedSettings{Settings: Settings{Registry: w.host, Repository: fmt.Sprintf("a/%03d", i), By: "alice"}}
	}
	raw, err := json.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.settings.Put(t.Context(), hashKey(w.host), raw); err != nil {
		t.Fatal(err)
	}
	for by, want := range map[string]error{"alice": ErrInvalid, "bob": nil} {
		if _, err := w.SetSettings(t.Context(), Settings{Registry: w.host, Repository: "b/" + by, By: by}, false); !errors.Is(err, want) {
			t.Errorf("one more of %s: %v", by, err)
		}
	}
	if _, err := w.SetSettings(t.Context(), Settings{Registry: w.host, Repository: "a/001", By: "alice"}, false); err != nil {
		t.Errorf("one that she has: %v", err)
	}
}

// TestKeepBelievesNobody: events that tell of a push that was none make no tag a newer one, and what a pass finds at once is in the order of its making.
func TestKeepBelievesNobody(t *testing.T) {
	w := newWorld(t)
	w.activate("app", true, func(s *Settings) { s.Rules.Keep = 2 })
	var list []Image
	for i, tag := range []string{"v8", "v9", "v10"} {
		list = append(list, w.push("app", tag, created(t, i+1, int64(1000*(i+1)))))
	}
	w.reconciled()
	w.converted(list[1])
	w.converted(list[2])
	w.asked(list[1], list[2])
	for _, e := range []Event{{Tag: "v8"}, {Tag: "v8", Digest: list[2].Digest}, {Tag: "v8", Digest: list[0].Digest}, {Tag: "v9"}} {
		e.Registry, e.Repository = w.host, "app"
		if err := w.Handle(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	w.settled()
	w.reconciled()
	newest := w.push("app", "v11", created(t, 1, 9000))
	w.told(Pushed, newest, "v11")
	w.converted(newest)
	w.settled()
	w.reconciled()
	w.asked(list[1], list[2], newest)
	for i, want := range map[Image]int{list[1]: 0, list[2]: 1, newest: 1} {
		if got := w.attached(i); len(got) != want {
			t.Errorf("%s has %d referrers, want %d", i, len(got), want)
		}
	}
}

// TestToldOfNothing: tags that are told of and are not there cost a bounded number of requests, and are in no real one's way, nor in that of keep.
func TestToldOfNothing(t *testing.T) {
	w := newWorld(t)
	w.activate("app", true, func(s *Settings) { s.Rules.Keep = 1 })
	r := repository{w.host, "app"}
	old := w.push("app", "v1", image(t, "amd64", 1000))
	w.told(Pushed, old, "v1")
	w.converted(old)
	w.settled()
	real := w.push("app", "v2", image(t, "amd64", 2000))
	note := func(tag string, pushed time.Time) {
		t.Helper()
		if err := w.putTag(t.Context(), r, seenTag{Tag: tag, State: stateDue, Pushed: pushed, Source: "test"}); err != nil {
			t.Fatal(err)
		}
	}
	note("v2", now())
	for i := range 2 * visitUnlisted {
		note(fmt.Sprintf("nothing%d", i), now())
	}
	w.reg.Reset()
	w.reconciled()
	if n, _ := w.reg.Count(func(q registrytest.Request) bool { return strings.Contains(q.Path, "/manifests/nothing") }); n > 2*visitUnlisted {
		t.Errorf("%d requests for tags that are not there, want %d", n, 2*visitUnlisted)
	}
	w.converted(real)
	w.reconciled()
	if got := w.attached(old); len(got) != 0 {
		t.Errorf("of the older tag there are %+v", got)
	}

	// So many that they are not noted.
	w.auto.mu.Lock()
	w.auto.hints[r] = &hint{noted: maxNoted, after: time.Now().Add(time.Hour)}
	w.auto.mu.Unlock()
	for _, e := range []Event{{Tag: "unknown"}, {Tag: "v2"}} {
		e.Registry, e.Repository = w.host, "app"
		if err := w.Handle(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	if tags, err := w.tagsOf(t.Context(), r); err != nil || tags["unknown"] != nil || tags["v2"] == nil {
		t.Errorf("noted: %+v, %v", tags["unknown"], err)
	}
}

// TestSilentRegistry: a registry that accepts requests and does not answer keeps nobody from looking after the others.
func TestSilentRegistry(t *testing.T) {
	silent := registrytest.Start(t, registrytest.Options{})
	silent.Inject(registrytest.Any, -1, registrytest.Stall(-1))
	w := newWorld(t)
	w.stop()
	c := w.config()
	c.Registries = append([]Registry{NewRegistry(silent.Host(), converter.RegistryOptions{}, 0)}, c.Registries...)
	c.Reconcile = 10 * time.Millisecond
	for _, host := range []string{w.host, silent.Host()} { // its own registry does not let it be switched on now
		raw, err := json.Marshal([]storedSettings{{Settings: Settings{Registry: host, Repository: "*", Active: true}, Catalogued: true}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.settings.Put(t.Context(), hashKey(host), raw); err != nil {
			t.Fatal(err)
		}
	}
	w.process = run(t, c)
	for i := range 2 * looks {
		if err := w.Handle(t.Context(), Event{Registry: silent.Host(), Repository: fmt.Sprintf("app%d", i), Tag: "v1"}); err != nil {
			t.Fatal(err)
		}
	}
	w.until("all looks that there are", func() bool { n, _ := silent.Count(); return n > looks })
	w.converted(w.push("found", "v1", image(t, "amd64", 1000)))
	w.stop()
	c.Reconcile = time.Hour
	w.process = run(t, c)
	told := w.push("told", "v1", image(t, "amd64", 2000))
	for i := range 2 * looks {
		if err := w.Handle(t.Context(), Event{Registry: silent.Host(), Repository: fmt.Sprintf("app%d", i), Tag: "v2"}); err != nil {
			t.Fatal(err)
		}
	}
	w.told(Pushed, told, "v1")
	w.converted(told)
}

// TestMovedMeanwhile: a tag that is pushed to again while it is looked at is looked at again.
func TestMovedMeanwhile(t *testing.T) {
	w := newWorld(t)
	w.activate("app", true)
	first := w.push("app", "latest", image(t, "amd64", 1000))
	second := image(t, "amd64", 2000)
	manifestOf := func(i Image) func(*http.Request) bool {
		return func(req *http.Request) bool {
			return req.Method == http.MethodGet && strings.HasSuffix(req.URL.Path, "/manifests/"+i.Digest.String())
		}
	}
	reached, release := make(chan struct{}), make(chan struct{})
	w.reg.Inject(manifestOf(first), 1, func(_ *registrytest.Registry, next http.Handler) http.Handler {
		return http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
			close(reached)
			<-release
			next.ServeHTTP(rw, req)
		})
	})
	w.told(Pushed, first, "latest")
	<-reached
	moved := w.push("app", "latest", second)
	w.told(Pushed, moved, "latest")
	close(release)
	w.converted(moved)
	w.settled()
	tag, err := w.getTag(t.Context(), repository{w.host, "app"}, "latest")
	if err != nil || tag.Digest != moved.Digest || tag.State != stateDone {
		t.Errorf("the tag is %+v, %v", tag, err)
	}
}

// TestNotReadableYet: an event may come before what it tells of can be read.
func TestNotReadableYet(t *testing.T) {
	w := newWorld(t)
	w.activate("app", true)
	i := w.push("app", "v1", image(t, "amd64", 1000))
	w.reg.Inject(registrytest.Manifests, 2, registrytest.Status(http.StatusNotFound)) // the HEAD and the GET
	w.told(Pushed, i, "v1")
	w.converted(i)
}

// TestLeftDue: what was noted by a process that did not get to look at it is looked at by the next.
func TestLeftDue(t *testing.T) {
	w := newWorld(t)
	w.activate("app", true)
	w.stop()
	i := w.push("app", "v1", image(t, "amd64", 1000))
	w.told(Pushed, i, "v1")
	w.process = run(t, w.config())
	w.converted(i)
	w.settled()
	w.asked(i)
}

// TestFailedIsTriedAgain: an operation that failed for a reason that may pass is asked for again, not for ever.
func TestFailedIsTriedAgain(t *testing.T) {
	w := newWorld(t)
	w.activate("app", true)
	img := image(t, "amd64", 1000)
	i := w.push("app", "v1", img)
	remove := w.reg.Inject(reads(layers(t, img)[0]), -1, registrytest.Flip(10))
	w.told(Pushed, i, "v1")
	for n := range maxTries + 2 {
		if op := w.ended(i); op.State != Failed {
			t.Fatalf("operation %+v", op)
		}
		w.settled()
		ops, err := w.Operations(t.Context(), Filter{})
		if want := min(n+1, maxTries+1); err != nil || len(ops) != want {
			t.Fatalf("%d operations, %v, want %d", len(ops), err, want)
		}
		w.reconciled()
	}
	remove()
	w.told(Pushed, w.push("app", "v2", img), "v2") // pushed again
	w.converted(i)
}

// TestUnknownEvents: events that cannot be meant are refused.
func TestUnknownEvents(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		e    Event
		want error
	}{
		{Event{Registry: "elsewhere.example.com", Repository: "app", Tag: "v1"}, ErrNotFound},
		{Event{Registry: w.host, Repository: "app:v1", Tag: "v1"}, ErrInvalid},
		{Event{Registry: w.host, Repository: "../app", Tag: "v1"}, ErrInvalid},
		{Event{Registry: w.host, Repository: "App", Tag: "v1"}, ErrInvalid},
		{Event{Registry: w.host, Repository: "app", Tag: "a b"}, ErrInvalid},
		{Event{Registry: w.host, Repository: "app", Tag: "v1", Digest: "sha256:1"}, ErrInvalid},
		{Event{Registry: w.host, Repository: "app", Tag: "v1"}, nil},
	} {
		if err := w.Handle(t.Context(), c.e); !errors.Is(err, c.want) {
			t.Errorf("%+v: %v, want %v", c.e, err, c.want)
		}
	}
}

// TestSettings: of the settings that fit, those of the name count, or else of the longest pattern.
func TestSettings(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		s    Settings
		want error
	}{
		{Settings{Registry: "elsewhere.example.com", Repository: "app"}, ErrNotFound},
		{Settings{Registry: w.host, Repository: ""}, ErrInvalid},
		{Settings{Registry: w.host, Repository: "App"}, ErrInvalid},
		{Settings{Registry: w.host, Repository: "a b*"}, ErrInvalid},
		{Settings{Registry: w.host, Repository: "app", Rules: Rules{Platforms: []string{"linux"}}}, ErrInvalid},
		{Settings{Registry: w.host, Repository: "app", Rules: Rules{Keep: -1}}, ErrInvalid},
		{Settings{Registry: w.host, Repository: "*", Active: true}, nil},
		{Settings{Registry: w.host, Repository: "team/*"}, nil},
		{Settings{Registry: w.host, Repository: "team/app", Active: true, Rules: Rules{Keep: 3}, By: "alice"}, nil},
	} {
		got, err := w.SetSettings(t.Context(), c.s, false)
		if !errors.Is(err, c.want) || err == nil && got.Changed.IsZero() {
			t.Errorf("%+v: %+v, %v, want %v", c.s, got, err, c.want)
		}
	}
	for name, want := range map[string]struct {
		by     string
		active bool
	}{"team/app": {"team/app", true}, "team/b": {"team/*", false}, "x": {"*", true}, "team/*": {"team/*", false}, "y/*": {"y/*", false}} {
		got, err := w.Settings(t.Context(), w.host, name)
		if err != nil || got.Repository != want.by || got.Active != want.active {
			t.Errorf("of %s count %+v, %v", name, got, err)
		}
	}
	all, err := w.AllSettings(t.Context(), "")
	if err != nil || len(all) != 3 || all[2].Rules.Keep != 3 || all[2].By != "alice" {
		t.Errorf("all: %+v, %v", all, err)
	}
}

// TestSettingsAtOnce: two processes set settings at the same time, and neither is lost.
func TestSettingsAtOnce(t *testing.T) {
	w := newWorld(t)
	other := run(t, w.config())
	errs := make(chan error)
	const n = 10
	for i := range n {
		s := []process{w.process, other}[i%2]
		go func() {
			_, err := s.SetSettings(t.Context(), Settings{Registry: w.host, Repository: fmt.Sprintf("app%d", i), Active: true}, false)
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if all, err := other.AllSettings(t.Context(), w.host); err != nil || len(all) != n {
		t.Errorf("%d settings of %d, %v", len(all), n, err)
	}
}

// TestOneReconciles: of two processes one makes the pass, the other none at the same time, nor right after.
func TestOneReconciles(t *testing.T) {
	w := newWorld(t)
	other := run(t, w.config())
	for _, p := range []process{w.process, other} { // the first pass of each, of which one was made
		w.until("the first pass", func() bool {
			var l lease
			rev, err := getJSON(t.Context(), p.seen, leaseKey(w.host), &l)
			return err == nil && rev > 0 && !l.Until.After(time.Now())
		})
	}
	w.activate("app", true)
	w.settled()
	w.push("app", "v1", image(t, "amd64", 1000))
	w.reg.Reset()
	lists := func() int {
		n, _ := w.reg.Count(func(q registrytest.Request) bool { return strings.HasSuffix(q.Path, "/tags/list") })
		return n
	}
	if wait, err := other.tryPass(t.Context(), w.host); err != nil || wait <= 0 || lists() != 0 {
		t.Errorf("before it is time: wait %v, %v, %d lists", wait, err, lists())
	}
	// An hour later.
	var l lease
	rev, err := getJSON(t.Context(), w.seen, leaseKey(w.host), &l)
	if err != nil {
		t.Fatal(err)
	}
	l.Began = l.Began.Add(-2 * time.Hour)
	if _, err := setJSON(t.Context(), w.seen, leaseKey(w.host), l, rev); err != nil {
		t.Fatal(err)
	}
	reached, release := make(chan struct{}), make(chan struct{})
	w.reg.Inject(func(req *http.Request) bool { return strings.HasSuffix(req.URL.Path, "/tags/list") }, 1, func(_ *registrytest.Registry, next http.Handler) http.Handler {
		return http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
			close(reached)
			<-release
			next.ServeHTTP(rw, req)
		})
	})
	done := make(chan error)
	go func() {
		_, err := w.tryPass(t.Context(), w.host)
		done <- err
	}()
	<-reached
	if wait, err := other.tryPass(t.Context(), w.host); err != nil || wait <= 0 || lists() != 1 {
		t.Errorf("while the other does it: wait %v, %v, %d lists", wait, err, lists())
	}
	close(release)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if wait, err := other.tryPass(t.Context(), w.host); err != nil || wait <= 0 || lists() != 1 {
		t.Errorf("after it: wait %v, %v, %d lists", wait, err, lists())
	}
}

// TestManyTags: what a repository with very many tags costs is bounded, and nothing in it is missed.
func TestManyTags(t *testing.T) {
	w := newWorld(t)
	const n = visitChecks + 300
	old := w.push("app", "v", image(t, "amd64", 1000))
	_, raw, err := w.place("app").Manifest(t.Context(), old.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		w.reg.PutManifest("app", fmt.Sprintf("v%05d", i), ocispec.MediaTypeImageManifest, raw)
	}
	w.reg.Reset()
	w.activate("app", true)
	w.settled()
	if got, _ := w.reg.Count(); got > 10 {
		t.Errorf("to switch it on took %d requests", got)
	}
	fresh := w.push("app", "a", image(t, "amd64", 2000))
	w.reg.Reset()
	w.reconciled()
	heads, _ := w.reg.Count(func(q registrytest.Request) bool {
		return q.Method == http.MethodHead && strings.Contains(q.Path, "/manifests/v")
	})
	if heads != visitChecks {
		t.Errorf("a pass asked for %d tags, want %d", heads, visitChecks)
	}
	w.converted(fresh)
	w.asked(fresh)

	// What was looked at a moment ago is not looked at again.
	for _, most := range []int{10, 0} {
		w.reg.Reset()
		tags, err := w.FillTags(t.Context(), w.host, "app", []TagInfo{{Name: "a"}})
		if got, _ := w.reg.Count(); err != nil || len(tags) != 1 || !tags[0].Streaming || got > most {
			t.Errorf("%+v, %v, by %d requests", tags, err, got)
		}
	}

	tags, err := w.Tags(t.Context(), w.host, "app")
	if err != nil || len(tags) != n+2 || !tags[0].Streaming || tags[0].Name != "a" {
		t.Errorf("%d tags of %d, the first %+v, %v", len(tags), n+2, tags[0], err)
	}
}

package service

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/notary"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

func listsTags(req *http.Request) bool { return strings.HasSuffix(req.URL.Path, "/tags/list") }

// kept has v1 converted because it was pushed, and then v2, which leaves no room for v1.
func (w *world) kept() (old, newest Image, op Operation) {
	w.t.Helper()
	w.activate("app", true)
	old = w.push("app", "v1", image(w.t, "amd64", 1000))
	w.told(Pushed, old, "v1")
	op = w.converted(old)
	newest = w.push("app", "v2", image(w.t, "amd64", 2000))
	w.told(Pushed, newest, "v2")
	w.converted(newest)
	w.settled()
	w.activate("app", true, func(s *Settings) { s.Rules.Keep = 1 })
	return old, newest, op
}

// TestAskedMeanwhile: what somebody asks for while a pass looks for what to delete, or deletes it already, is there in the end.
func TestAskedMeanwhile(t *testing.T) {
	t.Run("before", func(t *testing.T) {
		w := newWorld(t)
		old, _, _ := w.kept()
		h := (&env{t: t, registry: w.reg}).hold(listsTags)
		pass := make(chan error, 1)
		go func() { _, err := w.auto.pass(t.Context(), w.host); pass <- err }()
		h.wait(t) // it knows what was made
		if op, _, err := w.Submit(t.Context(), Request{Image: old, By: "bob"}); err == nil {
			t.Errorf("operation %+v", op)
		}
		h.release()
		if err := <-pass; err != nil {
			t.Error(err)
		}
		w.reconciled()
		if got := w.attached(old); len(got) != 1 {
			t.Errorf("referrers %+v", got)
		}
	})
	t.Run("while it is deleted", func(t *testing.T) {
		w := newWorld(t)
		old, _, first := w.kept()
		h := (&env{t: t, registry: w.reg}).hold(func(req *http.Request) bool { return req.Method == http.MethodDelete })
		pass := make(chan error, 1)
		go func() { _, err := w.auto.pass(t.Context(), w.host); pass <- err }()
		h.wait(t)
		w.reg.Reset()
		op, existed, err := w.Submit(t.Context(), Request{Image: old, By: "bob"})
		if err != nil || existed || op.ID == first.ID {
			t.Fatalf("%+v, %v, %v", op, existed, err)
		}
		w.until("it is begun", func() bool { // by a look at which of its manifests are another's
			op, err := w.Operation(t.Context(), op.ID)
			n, _ := w.reg.Count(func(q registrytest.Request) bool {
				return q.Method == http.MethodGet && strings.HasSuffix(q.Path, "/manifests/"+old.Digest.String())
			})
			return err == nil && op.State != NotStarted && n > 1 // of which Submit's is one
		})
		h.release()
		if err := <-pass; err != nil {
			t.Error(err)
		}
		if op = w.converted(old); op.Artifacts[0].Existed {
			t.Errorf("operation %+v", op)
		}
		w.reconciled()
		if got := w.attached(old); len(got) != 1 {
			t.Errorf("referrers %+v", got)
		}
		if m, err := w.getMade(t.Context(), old); err != nil || !m.Asked || !m.Leaving.IsZero() {
			t.Errorf("noted is %+v, %v", m, err)
		}
	})
}

// TestOthersMade: the artifact that somebody has made past the service stays when that of the service would go, and so does what was there before it.
func TestOthersMade(t *testing.T) {
	w := newWorld(t)
	old, newest, op := w.kept()
	p := w.place("app")
	_, raw, err := p.Manifest(t.Context(), op.Artifacts[0].Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	m, err := artifact.DecodeManifest(raw)
	if err != nil {
		t.Fatal(err)
	}
	theirs := w.attach(m, "another release")
	w.reconciled()
	w.reconciled()
	if got := w.attached(old); len(got) != 2 {
		t.Errorf("referrers %+v, %s among them", got, theirs)
	}
	if got := w.attached(newest); len(got) != 1 {
		t.Errorf("of the newest: %+v", got)
	}
}

// attach attaches an artifact that is as m, but for what it says of its maker.
func (w *world) attach(m *artifact.Manifest, by string) digest.Digest {
	w.t.Helper()
	m.Converter = by
	raw, err := m.Encode()
	if err != nil {
		w.t.Fatal(err)
	}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: artifact.ArtifactType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	if err := w.place("app").PutManifest(w.t.Context(), d, raw, ""); err != nil {
		w.t.Fatal(err)
	}
	return d.Digest
}

// TestListsThatLie: lists that lack tags, or all of them, or name what cannot be read, when an image is really gone, cost no other image what it needs of that one.
func TestListsThatLie(t *testing.T) {
	for name, list := range map[string]string{"no tags": `{"name":"app","tags":[]}`, "a tag less": `{"name":"app","tags":["other"]}`} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			amd, arm := image(t, "amd64", 1000), image(t, "arm64", 2000)
			w.activate("app", true, func(s *Settings) { s.Rules.MinSize = 100 << 20 }) // nothing is converted of itself
			w.push("app", "other", image(t, "amd64", 3000))
			first := w.push("app", "v1", index(amd, arm))
			second := w.push("app", "v2", index(image(t, "amd64", 4000), arm))
			w.told(Pushed, second, "v2")
			op := w.profiled(first)
			w.reconciled()
			w.settled()
			w.deleted(first, "v1")
			w.reconciled()
			w.later()
			stop := w.reg.Inject(listsTags, -1, registrytest.Answer("application/json", list))
			w.reconciled()
			of := func(i int) []ocispec.Descriptor { return w.attached(Image{w.host, "app", op.Artifacts[i].Subject}) }
			if amd, arm := of(0), of(1); len(arm) != 2 || name == "no tags" && len(amd) != 2 {
				t.Errorf("while the list lies there are %+v of amd64 and %+v of arm64", amd, arm)
			}
			stop()
			w.reconciled()
			if amd, arm := of(0), of(1); len(amd) != 0 || len(arm) != 2 {
				t.Errorf("in the end there are %+v of amd64 and %+v of arm64", amd, arm)
			}
		})
	}
	t.Run("a tag that cannot be read", func(t *testing.T) {
		w := newWorld(t)
		amd, arm := image(t, "amd64", 1000), image(t, "arm64", 2000)
		first := w.push("app", "v1", index(amd, arm))
		second := w.push("app", "v2", index(image(t, "amd64", 4000), arm))
		op := w.profiled(first)
		w.deleted(first, "v1")
		w.reconciled()
		w.later()
		back := w.reg.Inject(func(req *http.Request) bool {
			return strings.HasSuffix(req.URL.Path, "/manifests/v2") || strings.HasSuffix(req.URL.Path, "/manifests/"+second.Digest.String())
		}, -1, registrytest.Status(http.StatusNotFound))
		w.reconciled()
		if got := w.attached(first, subjects(op)...); len(got) != 4 {
			t.Errorf("referrers %+v", got)
		}
		back()
		w.reconciled()
		if got := w.attached(first, subjects(op)...); len(got) != 2 {
			t.Errorf("referrers %+v", got)
		}
	})
}

// TestDeletedAmongMany: in a repository with very many tags an image that is deleted loses its artifacts, too, but for what another one has, by a bounded number of
// requests at a time.
func TestDeletedAmongMany(t *testing.T) {
	w := newWorld(t)
	amd, arm := image(t, "amd64", 1000), image(t, "arm64", 2000)
	first := w.push("app", "gone", index(amd, arm))
	op := w.profiled(first)
	needs := w.push("app", "needs", index(image(t, "amd64", 3000), arm))
	_, raw, err := w.place("app").Manifest(t.Context(), w.push("app", "v", image(t, "amd64", 4000)).Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 * visitChecks {
		w.reg.PutManifest("app", fmt.Sprintf("v%05d", i), ocispec.MediaTypeImageManifest, raw)
	}
	w.deleted(first, "gone")
	w.reconciled()
	w.later()
	passes := 0
	of := func(i int) int { return len(w.attached(Image{w.host, "app", op.Artifacts[i].Subject})) }
	for of(0) != 0 && passes < 10 {
		w.reg.Reset()
		w.reconciled()
		if passes++; passes == 1 && of(0) != 2 {
			t.Error("deleted after a look at a part of the tags")
		}
		if n, _ := w.reg.Count(func(q registrytest.Request) bool { return strings.Contains(q.Path, "/manifests/v") }); n > visitChecks {
			t.Errorf("pass %d asked for %d tags", passes, n)
		}
	}
	if passes != 3 || of(1) != 2 {
		t.Errorf("after %d passes there are %d of amd64 and %d of arm64, which %s needs", passes, of(0), of(1), needs)
	}
	w.auto.mu.Lock()
	n := len(w.auto.scans)
	w.auto.mu.Unlock()
	if w.reconciled(); n == 0 {
		t.Error("nothing was remembered")
	}
}

// TestNoteIsNotLost: that NATS does not take which artifacts an operation has attached holds the operation up, and does not make them somebody's who asked.
func TestNoteIsNotLost(t *testing.T) {
	w := newWorld(t)
	w.activate("app", true)
	img := image(t, "amd64", 1000)
	i := w.push("app", "v1", img)
	h := (&env{t: t, registry: w.reg}).hold(reads(layers(t, img)[0]))
	w.told(Pushed, i, "v1")
	h.wait(t)
	w.settled()
	if err := w.js.DeleteKeyValue(t.Context(), "streaming-artifacts"); err != nil {
		t.Fatal(err)
	}
	h.release()
	w.until("the artifact", func() bool { return len(w.attached(i)) == 1 })
	if op, err := w.Last(t.Context(), i); err != nil || op.State != Running {
		t.Errorf("operation %+v, %v", op, err)
	}
	if _, err := w.bucket(t.Context(), "streaming-artifacts", 0); err != nil {
		t.Fatal(err)
	}
	w.converted(i)
	if m, err := w.getMade(t.Context(), i); err != nil || m.rev == 0 || m.Asked || len(m.Artifacts) != 1 {
		t.Errorf("noted is %+v, %v", m, err)
	}
}

// TestDueFalls: tags of a repository that is switched off do not wait to be looked at any more, nor do those that another process has looked at.
func TestDueFalls(t *testing.T) {
	w := newWorld(t)
	due := func() int {
		t.Helper()
		if _, err := w.tryPass(t.Context(), w.host); err != nil {
			t.Fatal(err)
		}
		return w.Stats().Auto.Due
	}
	for _, name := range []string{"off", "done"} {
		w.activate(name, true)
		r := repository{w.host, name}
		if err := w.putTag(t.Context(), r, seenTag{Tag: "v1", State: stateDue, Pushed: now(), Source: "test"}); err != nil {
			t.Fatal(err)
		}
		if err := w.auto.reconcileRepository(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if n := due(); n != 2 {
		t.Fatalf("%d are due, want 2", n)
	}
	w.activate("off", false)
	if n := due(); n != 1 {
		t.Errorf("%d are due, want 1", n)
	}
	if err := w.putTag(t.Context(), repository{w.host, "done"}, seenTag{Tag: "v1", State: stateDone, Digest: digest.FromString("x"), Pushed: now()}); err != nil {
		t.Fatal(err)
	}
	if n := due(); n != 0 {
		t.Errorf("%d are due, want none", n)
	}
}

// TestForeignArtifact: an artifact that a stranger has attached keeps a service that signs from making none of its own, which is then the one that is there.
func TestForeignArtifact(t *testing.T) {
	w := newWorld(t)
	i := w.push("app", "v1", image(t, "amd64", 1000))
	if _, _, err := w.Submit(t.Context(), Request{Image: i, By: "bob"}); err != nil {
		t.Fatal(err)
	}
	op := w.converted(i)
	_, raw, err := w.place("app").Manifest(t.Context(), op.Artifacts[0].Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	m, err := artifact.DecodeManifest(raw)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.place("app").Delete(t.Context(), op.Artifacts[0].Digest, i.Digest); err != nil {
		t.Fatal(err)
	}
	m.Layers[0].IndexDigest = digest.FromString("an index that lies")
	lie := w.attach(m, "stranger")
	w.stop()
	c := w.config()
	c.Convert.Signer = trusttest.NewCA(t, "authority", nil).Issue(t, "service", trusttest.Leaf{}).Signer(t, notary.SignOptions{})
	w.process = run(t, c)
	w.activate("app", true)
	w.told(Pushed, i, "v1")
	w.until("our own", func() bool {
		last, err := w.Last(t.Context(), i)
		return err == nil && last.ID != op.ID && last.State.Ended()
	})
	made := w.converted(i)
	if len(made.Artifacts) != 1 || made.Artifacts[0].Digest != op.Artifacts[0].Digest || made.Artifacts[0].Existed {
		t.Fatalf("%s", show(made))
	}
	signed := func(d digest.Digest) bool {
		return slices.ContainsFunc(w.attached(Image{w.host, "app", d}), func(d ocispec.Descriptor) bool { return d.ArtifactType == trust.SignatureType })
	}
	if !signed(made.Artifacts[0].Digest) || signed(lie) {
		t.Error("ours is not signed, or the lie is")
	}
	if again, _, err := w.Submit(t.Context(), Request{Image: i, By: "bob"}); err == nil {
		t.Errorf("again: %s", show(again))
	}
}

// TestReportsOfOneRegistry: a registry that does not answer keeps nobody from telling of another's images, however many wait for it.
func TestReportsOfOneRegistry(t *testing.T) {
	silent := registrytest.Start(t, registrytest.Options{})
	silent.Inject(registrytest.Any, -1, registrytest.Stall(-1))
	w := newWorld(t)
	i := w.push("app", "v1", image(t, "amd64", 1000))
	if _, _, err := w.Submit(t.Context(), Request{Image: i, By: "bob"}); err != nil {
		t.Fatal(err)
	}
	a := w.converted(i).Artifacts[0]
	w.stop()
	c := w.config()
	c.Registries = append(c.Registries, NewRegistry(silent.Host(), converter.RegistryOptions{}, 0))
	w.process = run(t, c)
	w.fleet.turns[silent.Host()] = make(chan struct{}, 3) // not hundreds, for the test
	ended := make(chan error, 3)
	for n := range cap(ended) {
		go func() {
			_, err := w.Report(t.Context(), silent.Host(), "app", report(n, a, "none", 4))
			ended <- err
		}()
	}
	w.until("all of them wait", func() bool { return len(w.fleet.turns[silent.Host()]) == cap(ended) })
	w.until("one asks", func() bool { n, _ := silent.Count(); return n > 0 })
	if _, err := w.Report(t.Context(), silent.Host(), "app", report(9, a, "none", 4)); err == nil {
		t.Error("one more is taken")
	}
	if got, err := w.Report(t.Context(), w.host, "app", report(1, a, "none", 4)); err != nil || got.Counted != 1 {
		t.Errorf("of another registry: %+v, %v", got, err)
	}
	if len(ended) != 0 {
		t.Errorf("the registry has answered: %v", <-ended)
	}
	silent.Close()
	for range cap(ended) {
		<-ended
	}
}

package service

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// profiled converts an image and attaches a profile to each of its platforms.
func (w *world) profiled(i Image) Operation {
	w.t.Helper()
	if _, _, err := w.Submit(w.t.Context(), Request{Image: i, By: "bob"}); err != nil {
		w.t.Fatal(err)
	}
	op := w.converted(i)
	w.attachProfiles(op)
	return op
}

// attachProfiles attaches a recorded profile to each platform that an operation has converted.
func (w *world) attachProfiles(op Operation) {
	w.t.Helper()
	p := w.place(op.Repository)
	for _, a := range op.Artifacts {
		_, raw, err := p.Manifest(w.t.Context(), a.Digest.String())
		if err != nil {
			w.t.Fatal(err)
		}
		m, err := artifact.DecodeManifest(raw)
		if err != nil {
			w.t.Fatal(err)
		}
		profile := &artifact.Profile{Layers: []digest.Digest{m.Layers[0].IndexDigest}, Chunks: []artifact.HotChunk{{Layer: 0, Chunk: 0}}}
		if _, _, err := converter.AttachProfile(w.t.Context(), p, a.Subject.String(), profile, artifact.ProfileRecorded, time.Time{}, converter.Options{}); err != nil {
			w.t.Fatal(err)
		}
	}
}

func subjects(op Operation) (list []digest.Digest) {
	for _, a := range op.Artifacts {
		if a.Subject != op.Digest {
			list = append(list, a.Subject)
		}
	}
	return list
}

// later makes it later by how long an image that is gone may come back.
func (w *world) later() {
	w.t.Helper()
	for _, name := range []string{"app", "other"} {
		all, err := w.madeIn(w.t.Context(), repository{w.host, name})
		if err != nil {
			w.t.Fatal(err)
		}
		for _, m := range all {
			if m.Gone.IsZero() {
				continue
			}
			m.Gone = m.Gone.Add(-notYet)
			if !m.Alone.IsZero() {
				m.Alone = m.Alone.Add(-longMissing)
			}
			if err := w.setMade(w.t.Context(), &m); err != nil {
				w.t.Fatal(err)
			}
		}
	}
}

// TestDeletedImage: when an image is deleted, its artifacts and profiles go with it, told by an event or found by reconcile, in repositories that are active
// or not. What another image needs stays.
func TestDeletedImage(t *testing.T) {
	for name, told := range map[string]bool{"told": true, "found": false} {
		t.Run(name, func(t *testing.T) {
			onRegistries(t, func(t *testing.T, w *world) {
				amd, arm := image(t, "amd64", 1000), image(t, "arm64", 2000)
				both := w.push("app", "v1", index(amd, arm))
				alone := w.push("app", "v2", arm)
				other := w.push("app", "v3", image(t, "amd64", 3000))
				ops := map[Image]Operation{}
				for _, i := range []Image{both, other} {
					ops[i] = w.profiled(i)
				}
				// Of the image that is an index's platform, too, the artifact is found.
				if _, err := w.SetSettings(t.Context(), Settings{Registry: w.host, Repository: "app", Active: true}, true); err != nil {
					t.Fatal(err)
				}
				w.settled()
				w.activate("app", false) // keeps all
				w.reconciled()
				if got := w.attached(both, subjects(ops[both])...); len(got) != 4 {
					t.Fatalf("off: referrers %+v", got)
				}
				gone := func(i Image, tag string) {
					t.Helper()
					w.deleted(i, tag)
					had := len(w.attached(i, subjects(ops[i])...))
					if told {
						w.told(Deleted, i, "")
						w.settled()
					} else {
						w.reconciled()
					}
					if got := w.attached(i, subjects(ops[i])...); len(got) != had {
						t.Errorf("at once: referrers %+v", got)
					}
					w.later()
					w.reconciled()
				}
				gone(both, "v1")
				if got := w.attached(alone); len(got) != 2 {
					t.Errorf("of the platform that is an image, too, there are %+v", got)
				}
				amdDigest, err := amd.Digest()
				if err != nil {
					t.Fatal(err)
				}
				if got := w.attached(Image{w.host, "app", digest.Digest(amdDigest.String())}); len(got) != 0 {
					t.Errorf("of the index there are %+v", got)
				}
				if got := w.attached(other); len(got) != 2 {
					t.Errorf("of another image there are %+v", got)
				}
				gone(alone, "v2")
				if got := w.attached(alone); len(got) != 0 {
					t.Errorf("of the image there are %+v", got)
				}
				if all, err := w.madeIn(t.Context(), repository{w.host, "app"}); err != nil || len(all) != 1 {
					t.Errorf("still known are %+v, %v", all, err)
				}
				// A deletion that did not happen.
				w.told(Deleted, other, "v3")
				w.settled()
				if got := w.attached(other); len(got) != 2 {
					t.Errorf("of an image that is there, there are %+v", got)
				}
			})
		})
	}
}

// TestPushedAgain: an image that was deleted and is pushed again is converted again.
func TestPushedAgain(t *testing.T) {
	onRegistries(t, func(t *testing.T, w *world) {
		w.activate("app", true)
		img := image(t, "amd64", 1000)
		i := w.push("app", "v1", img)
		w.told(Pushed, i, "v1")
		first := w.converted(i)
		w.settled()
		w.deleted(i, "v1")
		w.told(Deleted, i, "")
		w.settled()
		w.later()
		w.reconciled()
		if got := w.attached(i); len(got) != 0 {
			t.Fatalf("referrers %+v", got)
		}
		w.push("app", "v1", img)
		w.reconciled()
		w.until("another operation", func() bool {
			op, err := w.Last(t.Context(), i)
			return err == nil && op.ID != first.ID && op.State == Succeeded
		})
		if got := w.attached(i); len(got) != 1 {
			t.Errorf("referrers %+v", got)
		}
	})
}

// TestCopiesDiffer: a registry whose copies have different things loses no artifacts: the image is there the next time.
func TestCopiesDiffer(t *testing.T) {
	w := newWorld(t)
	w.activate("app", true)
	i := w.push("app", "v1", image(t, "amd64", 1000))
	w.told(Pushed, i, "v1")
	w.converted(i)
	w.settled()
	for range 2 {
		back := w.reg.Inject(func(req *http.Request) bool { return strings.HasSuffix(req.URL.Path, "/manifests/"+i.Digest.String()) }, -1, registrytest.Status(http.StatusNotFound))
		w.told(Deleted, i, "v1")
		w.settled()
		w.reconciled()
		back()
		w.reconciled()
		w.later()
	}
	w.settled()
	w.reconciled()
	w.asked(i)
	if got := w.attached(i); len(got) != 1 {
		t.Errorf("referrers %+v", got)
	}
}

// TestComesAndGoes: an image that is found anew again and again is not converted without end.
func TestComesAndGoes(t *testing.T) {
	w := newWorld(t)
	w.activate("app", true)
	img := image(t, "amd64", 1000)
	for n := range maxTries + 3 {
		i := w.push("app", "v1", img)
		w.reconciled()
		ops, err := w.Operations(t.Context(), Filter{})
		if want := min(n+1, maxTries+1); err != nil || len(ops) != want {
			t.Fatalf("%d operations, %v, want %d", len(ops), err, want)
		}
		w.ended(i)
		w.deleted(i, "v1")
		w.reconciled()
		w.later()
		w.reconciled()
	}
}

// TestSharedPlatform: an image that is deleted, or is not among those that are kept, leaves the artifacts of what another one has, of which the service knows
// nothing. They go with that.
func TestSharedPlatform(t *testing.T) {
	onRegistries(t, func(t *testing.T, w *world) {
		amd, arm := image(t, "amd64", 1000), image(t, "arm64", 2000)
		first := w.push("app", "v1", index(amd, arm))
		op := w.profiled(first)
		other := w.push("app", "v2", index(image(t, "amd64", 3000), arm))
		w.deleted(first, "v1")
		for range 2 {
			w.reconciled()
			w.later()
		}
		if got := w.attached(first, subjects(op)...); len(got) != 2 {
			t.Errorf("referrers %+v", got)
		}
		w.deleted(other, "v2")
		w.reconciled()
		if got := w.attached(first, subjects(op)...); len(got) != 2 {
			t.Errorf("after one list without tags: referrers %+v", got)
		}
		w.later()
		w.reconciled()
		if got := w.attached(first, subjects(op)...); len(got) != 0 {
			t.Errorf("with the other one gone, too, there are %+v", got)
		}
		if all, err := w.madeIn(t.Context(), repository{w.host, "app"}); err != nil || len(all) != 0 {
			t.Errorf("still known are %+v, %v", all, err)
		}
	})
	t.Run("kept", func(t *testing.T) {
		w := newWorld(t)
		w.activate("app", true)
		arm := image(t, "arm64", 2000)
		first := w.push("app", "v1", index(image(t, "amd64", 1000), arm))
		w.told(Pushed, first, "v1")
		op := w.converted(first)
		w.activate("app", true, func(s *Settings) { s.Rules = Rules{Keep: 1, MinSize: 100 << 20} })
		other := w.push("app", "v2", index(image(t, "amd64", 3000), arm))
		w.told(Pushed, other, "v2")
		w.settled()
		w.reconciled()
		w.asked(first)
		if got := w.attached(first, subjects(op)...); len(got) != 1 {
			t.Errorf("referrers %+v", got)
		}
	})
}

// TestOutageIsNoDeletion: a registry that is away, or says of everything that there is none, has not lost its images.
func TestOutageIsNoDeletion(t *testing.T) {
	w := newWorld(t)
	w.activate("app", true, func(s *Settings) { s.Rules.Keep = 5 })
	i := w.push("app", "v1", image(t, "amd64", 1000))
	w.profiled(i)
	pushed := w.push("app", "v2", image(t, "amd64", 2000))
	w.told(Pushed, pushed, "v2")
	w.converted(pushed)
	w.settled()
	w.reconciled()
	tags := func(req *http.Request) bool { return strings.HasSuffix(req.URL.Path, "/tags/list") }
	subject := func(req *http.Request) bool { return strings.HasSuffix(req.URL.Path, "/manifests/"+i.Digest.String()) }
	for name, fault := range map[string]struct {
		match func(*http.Request) bool
		fault registrytest.Fault
	}{
		"refuses":               {registrytest.Any, registrytest.Status(http.StatusTeapot)},
		"forbids":               {registrytest.Any, registrytest.Status(http.StatusForbidden)},
		"knows nothing":         {registrytest.Any, registrytest.Status(http.StatusNotFound)},
		"knows nothing but /v2": {func(req *http.Request) bool { return req.URL.Path != "/v2/" }, registrytest.Status(http.StatusNotFound)},
		"lists no tags":         {tags, registrytest.Answer("application/json", `{"name":"app","tags":[]}`)},
		"the image alone fails": {subject, registrytest.Status(http.StatusForbidden)},
	} {
		remove := w.reg.Inject(fault.match, -1, fault.fault)
		w.reconciled()
		w.later()
		w.reconciled()
		w.told(Deleted, i, "")
		w.until("a look at it", func() bool {
			w.auto.mu.Lock()
			defer w.auto.mu.Unlock()
			h := w.auto.hints[repository{w.host, "app"}]
			return h == nil || h.tries > 0
		})
		remove()
		w.settled()
		if got := w.attached(i); len(got) != 2 {
			t.Errorf("%s: referrers %+v", name, got)
		}
		if got := w.attached(pushed); len(got) != 1 {
			t.Errorf("%s: referrers of what nobody asked for %+v", name, got)
		}
		for _, i := range []Image{i, pushed} {
			if m, err := w.getMade(t.Context(), i); err != nil || m.rev == 0 {
				t.Errorf("%s: forgotten: %+v, %v", name, m, err)
			}
		}
	}
	w.reconciled()
	w.settled()
	w.asked(i, pushed) // and it is not new after that

	w.reg.Close()
	w.reconciled()
	if m, err := w.getMade(t.Context(), i); err != nil || m.rev == 0 {
		t.Errorf("refuses connections: forgotten: %+v, %v", m, err)
	}
}

// TestDeletionMeetsConversion: of an image that is deleted while it is converted nothing is attached in the end.
func TestDeletionMeetsConversion(t *testing.T) {
	for name, hanging := range map[string]bool{"it attaches": false, "it hangs": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.activate("app", true)
			img := image(t, "amd64", 1000)
			i := w.push("app", "v1", img)
			match := attaches // too late to fail
			if hanging {
				match = reads(layers(t, img)[0])
			}
			e := &env{t: t, registry: w.reg}
			h := e.hold(match)
			w.told(Pushed, i, "v1")
			h.wait(t)
			w.settled()
			w.deleted(i, "v1")
			w.told(Deleted, i, "")
			w.settled()
			if op, err := w.Last(t.Context(), i); err != nil || op.Cancel {
				t.Errorf("at once: operation %+v, %v", op, err)
			}
			if hanging {
				w.later()
				w.reconciled()
			}
			h.release()
			op := w.ended(i)
			if hanging != (op.State == Canceled) {
				t.Errorf("operation %+v", op)
			}
			w.later()
			w.reconciled()
			if got := w.attached(i); len(got) != 0 {
				t.Errorf("%v: referrers %+v", op.State, got)
			}
			if all, err := w.madeIn(t.Context(), repository{w.host, "app"}); err != nil || len(all) != 0 {
				t.Errorf("still known are %+v, %v", all, err)
			}
		})
	}
}

// TestDeleteArtifacts: the image stays, and is not converted again because it is there. A conversion that is under way is cancelled.
func TestDeleteArtifacts(t *testing.T) {
	onRegistries(t, func(t *testing.T, w *world) {
		w.activate("app", true)
		i := w.push("app", "v1", index(image(t, "amd64", 1000), image(t, "arm64", 2000)))
		w.told(Pushed, i, "v1")
		op := w.converted(i)
		w.settled()
		deleted, err := w.DeleteArtifacts(t.Context(), i, "carol")
		if err != nil || len(deleted) != 2 {
			t.Errorf("deleted %v, %v", deleted, err)
		}
		if again, err := w.DeleteArtifacts(t.Context(), i, "carol"); !errors.Is(err, ErrNotFound) {
			t.Errorf("again: %v, %v", again, err)
		}
		w.reconciled()
		w.settled()
		w.asked(i)
		if got := w.attached(i, subjects(op)...); len(got) != 0 {
			t.Errorf("referrers %+v", got)
		}
		if _, err := w.Resolve(t.Context(), w.host, "app", "v1"); err != nil {
			t.Errorf("the image: %v", err)
		}
	})
	t.Run("under way", func(t *testing.T) {
		w := newWorld(t)
		img := image(t, "amd64", 1000)
		i := w.push("app", "v1", img)
		e := &env{t: t, registry: w.reg}
		h := e.hold(reads(layers(t, img)[0]))
		if _, _, err := w.Submit(t.Context(), Request{Image: i, By: "bob"}); err != nil {
			t.Fatal(err)
		}
		h.wait(t)
		if deleted, err := w.DeleteArtifacts(t.Context(), i, "carol"); !errors.Is(err, ErrNotFound) {
			t.Errorf("deleted %v, %v", deleted, err)
		}
		if op, err := w.Last(t.Context(), i); err != nil || op.State != Canceled || op.CancelBy != "carol" {
			t.Errorf("operation %+v, %v", op, err)
		}
	})
}

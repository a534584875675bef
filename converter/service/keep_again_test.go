package service

import (
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// tag has a tag name an image that is there.
func (w *world) tag(i Image, tag string) {
	w.t.Helper()
	d, raw, err := w.place(i.Repository).Manifest(w.t.Context(), i.Digest.String())
	if err != nil {
		w.t.Fatal(err)
	}
	w.reg.PutManifest(i.Repository, tag, d.MediaType, raw)
}

// before calls f once, right before the registry is given the first request that matches.
func (w *world) before(match func(*http.Request) bool, f func()) (called func() bool) {
	var began, done atomic.Bool
	w.reg.Inject(match, -1, func(_ *registrytest.Registry, next http.Handler) http.Handler {
		return http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
			if began.CompareAndSwap(false, true) { // f may ask, too
				f()
				done.Store(true)
			}
			next.ServeHTTP(rw, req)
		})
	})
	return done.Load
}

// TestKeepLooksAgain: an image that is pushed again while a pass is about to delete its artifacts keeps them, by a new tag, one that was there, or one that an event
// tells of.
func TestKeepLooksAgain(t *testing.T) {
	nth := func(i int32, match func(*http.Request) bool) func(*http.Request) bool { // the first is the visit's own look
		var n atomic.Int32
		return func(req *http.Request) bool { return match(req) && n.Add(1) >= i }
	}
	for name, c := range map[string]struct {
		at   func(*http.Request) bool
		tag  string
		told bool
	}{
		"a new tag":              {nth(2, listsTags), "v3", false},
		"a tag that was there":   {nth(2, listsTags), "v2", false},
		"a new tag, a bit later": {nth(3, listsTags), "v3", false},
		"an event": {func(req *http.Request) bool {
			return req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/referrers/")
		}, "v3", true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			old, _, _ := w.kept()
			called := w.before(c.at, func() {
				w.tag(old, c.tag)
				if c.told {
					w.told(Pushed, old, c.tag)
					w.settled()
				}
			})
			w.reconciled()
			if !called() {
				t.Fatal("the pass did not look again")
			}
			if got := w.attached(old); len(got) != 1 && !c.told {
				t.Error("it was deleted")
			}
			w.settled()
			w.reconciled()
			w.ended(old)
			if got := w.attached(old); len(got) != 1 {
				t.Errorf("referrers %+v", got)
			}
			if m, err := w.getMade(t.Context(), old); err != nil || !m.Leaving.IsZero() {
				t.Errorf("noted: %+v, %v", m.Leaving, err)
			}
		})
	}
}

// TestPushedWhileKeepDeletes: what a push found complete a moment before its artifacts are deleted is noticed by who deletes, or made again; also what was deleted
// between the two looks of who asks.
func TestPushedWhileKeepDeletes(t *testing.T) {
	for name, who := range map[string]Request{"pushed": {By: pushTo + "v3", pushed: true}, "asked": {By: "bob"}} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			old, _, first := w.kept()
			v, err := w.auto.visit(t.Context(), repository{w.host, "app"})
			if err != nil {
				t.Fatal(err)
			}
			m := v.made[old.Digest]
			who.Image = old
			if _, _, err := w.Submit(t.Context(), who); err == nil {
				t.Fatal("it is there")
			}
			if d, err := v.leave(t.Context(), m); err != nil || len(d.images) != 0 {
				t.Errorf("%+v, %v are being deleted, which was asked for since", d.images, err)
			}
			if m, err = w.getMade(t.Context(), old); err != nil {
				t.Fatal(err)
			}
			// Who asks has seen that there is an artifact, and then it goes.
			gone := w.before(func(req *http.Request) bool {
				return strings.HasSuffix(req.URL.Path, "/manifests/"+first.Artifacts[0].Digest.String())
			}, func() {
				if err := removeKey(t.Context(), w.made, madeKey(old), m.rev); err != nil {
					t.Error(err)
				}
			})
			op, existed, err := w.Submit(t.Context(), who)
			if err != nil || existed || !gone() {
				t.Errorf("%s, %v, %v", show(op), existed, err)
			}
			w.ended(old)
		})
	}
}

// TestDeletionFails: what a registry does not delete is not being deleted for ever, also if it says so in the middle, or the process died over it.
func TestDeletionFails(t *testing.T) {
	leaving := func(w *world) (list []digest.Digest) {
		t.Helper()
		all, err := w.madeIn(t.Context(), repository{w.host, "app"})
		if err != nil {
			t.Fatal(err)
		}
		for d, m := range all {
			if !m.Leaving.IsZero() {
				list = append(list, d)
			}
		}
		return list
	}
	deletes := func(req *http.Request) bool { return req.Method == http.MethodDelete }
	t.Run("not among the newest", func(t *testing.T) {
		w := newWorld(t)
		old, _, _ := w.kept()
		back := w.reg.Inject(deletes, -1, registrytest.Status(http.StatusMethodNotAllowed))
		w.reconciled()
		if n, _ := w.reg.Count(func(q registrytest.Request) bool { return q.Method == http.MethodDelete }); n == 0 || len(leaving(w)) != 0 {
			t.Errorf("%d deletions, and being deleted are %v", n, leaving(w))
		}
		back()
		w.reconciled()
		if got := w.attached(old); len(got) != 0 {
			t.Errorf("referrers %+v", got)
		}
	})
	t.Run("of a deleted image", func(t *testing.T) {
		w := newWorld(t)
		i := w.push("app", "v1", image(t, "amd64", 1000))
		w.profiled(i)
		w.deleted(i, "v1")
		w.reconciled()
		w.later()
		back := w.reg.Inject(deletes, -1, registrytest.Status(http.StatusInternalServerError))
		w.reconciled()
		if n, _ := w.reg.Count(func(q registrytest.Request) bool { return q.Method == http.MethodDelete }); n == 0 || len(leaving(w)) != 0 {
			t.Errorf("%d deletions, and being deleted are %v", n, leaving(w))
		}
		back()
		w.reconciled()
		if got := w.attached(i); len(got) != 0 {
			t.Errorf("referrers %+v", got)
		}
	})
	t.Run("whose process died", func(t *testing.T) {
		w := newWorld(t)
		_, newest, _ := w.kept()
		m, err := w.getMade(t.Context(), newest)
		if err != nil {
			t.Fatal(err)
		}
		m.Leaving = now().Add(-2 * time.Hour)
		if err := w.setMade(t.Context(), &m); err != nil {
			t.Fatal(err)
		}
		w.reconciled()
		if slices.Contains(leaving(w), newest.Digest) {
			t.Error("it is being deleted still")
		}
	})
}

// TestUnreadableTag: a tag that is listed, and of which the registry says twice, ten minutes apart, that there is no such, keeps no other image's artifacts; one that it
// fails to give does.
func TestUnreadableTag(t *testing.T) {
	for name, c := range map[string]struct {
		known  bool // it could be read before
		status int
		want   int // referrers that are left
	}{
		"never read":            {false, http.StatusNotFound, 0},
		"read before":           {true, http.StatusNotFound, 0},
		"an error":              {false, http.StatusInternalServerError, 1},
		"an error, read before": {true, http.StatusForbidden, 1},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			old, _, _ := w.kept()
			w.activate("app", true, func(s *Settings) { s.Rules = Rules{Keep: 1, MinSize: 100 << 20} })
			bad := w.push("app", "bad", image(t, "arm64", 3000))
			if c.known {
				w.told(Pushed, bad, "bad")
				w.settled()
			}
			w.reg.Inject(func(req *http.Request) bool {
				return strings.HasSuffix(req.URL.Path, "/manifests/bad") || strings.HasSuffix(req.URL.Path, "/manifests/"+bad.Digest.String())
			}, -1, registrytest.Status(c.status))
			for range 2 {
				w.auto.viewer = newViewer() // or it is known still what the image has
				_, _ = w.auto.pass(t.Context(), w.host)
			}
			if got := w.attached(old); len(got) != 1 {
				t.Fatalf("at once: referrers %+v", got)
			}
			w.laterUnread()
			_, _ = w.auto.pass(t.Context(), w.host)
			if got := w.attached(old); len(got) != c.want {
				t.Errorf("referrers %+v, want %d", got, c.want)
			}
		})
	}
}

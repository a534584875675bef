package service

import (
	"errors"
	"slices"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// TestJoin: who asks for more than an image's operation does gets it from the same operation, whether that waits or runs.
func TestJoin(t *testing.T) {
	e := newEnv(t)
	amd, arm := image(t, "amd64", 10_000), image(t, "arm64", 20_000)
	i := e.push("app", index(amd, arm))
	idle := e.startIdle()
	only := func(platform string) func(*Request) { return func(r *Request) { r.Platforms = []string{platform} } }
	first := submit(t, idle.Service, i, only("linux/arm64"))
	for _, c := range []struct {
		platforms []string
		want      int
	}{{[]string{"linux/arm64"}, 1}, {[]string{"linux/amd64"}, 2}, {[]string{"linux/amd64", "linux/arm64"}, 2}} {
		op, existed, err := idle.Submit(t.Context(), Request{Image: i, Platforms: c.platforms})
		if err != nil || !existed || op.ID != first.ID || len(op.Platforms) != c.want {
			t.Errorf("waits: %v: %s, %t, %v", c.platforms, show(op), existed, err)
		}
	}
	var refused *converter.Error
	if op, _, err := idle.Submit(t.Context(), Request{Image: i, Platforms: []string{"linux/s390x"}}); !errors.As(err, &refused) {
		t.Errorf("a platform that there is not: %s, %v", show(op), err)
	}
	if op, err := idle.Cancel(t.Context(), first.ID, "test"); err != nil || op.State != Canceled {
		t.Fatal(show(op), err)
	}

	h := e.hold(reads(layers(t, arm)[0]))
	s := e.start()
	first = submit(t, idle.Service, i, only("linux/arm64"))
	h.wait(t)
	op, existed, err := idle.Submit(t.Context(), Request{Image: i})
	if err != nil || !existed || op.ID != first.ID || len(op.Platforms) != 0 {
		t.Errorf("runs: %s, %t, %v", show(op), existed, err)
	}
	h.release()
	if op = succeed(t, s.Service, first.ID); len(op.Artifacts) != 2 || slices.ContainsFunc(op.Artifacts, func(a Artifact) bool { return a.Existed }) {
		t.Error(show(op))
	}
	e.verify(i, 2)

	h = e.hold(attaches)
	forced := submit(t, idle.Service, i, only("linux/arm64"), func(r *Request) { r.Force = true })
	h.wait(t)
	if op, existed, err = idle.Submit(t.Context(), Request{Image: i, Platforms: []string{"linux/arm64"}}); err != nil || !existed || op.ID != forced.ID {
		t.Errorf("less than is done: %s, %t, %v", show(op), existed, err)
	}
	if _, _, err = idle.Submit(t.Context(), Request{Image: i, Platforms: []string{"linux/amd64"}}); !errors.Is(err, ErrExists) {
		t.Errorf("what is there: %v", err)
	}
	h.release()
	succeed(t, s.Service, forced.ID)
}

// TestJoinPushed: a push while somebody has another platform converted gets what the rules want; and what a person asks for while it is converted because
// it was pushed is the person's, and stays.
func TestJoinPushed(t *testing.T) {
	w := newWorld(t)
	w.activate("app", true, func(s *Settings) { s.Rules = Rules{Platforms: []string{"linux/amd64"}, Keep: 1} })
	arm := image(t, "arm64", 2000)
	i := w.push("app", "v1", index(image(t, "amd64", 1000), arm))
	e := &env{t: t, registry: w.reg}
	h := e.hold(reads(layers(t, arm)[0]))
	if _, _, err := w.Submit(t.Context(), Request{Image: i, By: "bob", Platforms: []string{"linux/arm64"}}); err != nil {
		t.Fatal(err)
	}
	h.wait(t)
	w.told(Pushed, i, "v1")
	w.settled()
	h.release()
	if op := w.converted(i); len(op.Artifacts) != 2 || op.By != "bob" {
		t.Error(show(op))
	}
	w.asked(i)

	img := image(t, "amd64", 3000)
	pushed := w.push("app", "v2", img)
	h = e.hold(reads(layers(t, img)[0]))
	w.told(Pushed, pushed, "v2")
	h.wait(t)
	if _, existed, err := w.Submit(t.Context(), Request{Image: pushed, By: "bob"}); err != nil || !existed {
		t.Error(existed, err)
	}
	h.release()
	w.converted(pushed)
	third := w.push("app", "v3", image(t, "amd64", 4000))
	w.told(Pushed, third, "v3")
	w.converted(third)
	if _, _, err := w.Submit(t.Context(), Request{Image: third, By: "bob"}); !errors.Is(err, ErrExists) {
		t.Error(err)
	}
	last := w.push("app", "v4", image(t, "amd64", 5000))
	w.told(Pushed, last, "v4")
	w.converted(last)
	w.settled()
	w.reconciled()
	for _, i := range []Image{pushed, third, last} {
		if got := w.attached(i); len(got) != 1 {
			t.Errorf("%s has %d referrers", i, len(got))
		}
	}
}

package snapshot

import (
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// startWith starts the node anew with a bandwidth for the background, bytes per second.
func (n *testNode) startWith(background int64) {
	n.t.Helper()
	n.stop()
	n.background = background
	n.start()
}

// completed reports whether all of the image was fetched in the background.
func (n *testNode) completed(id string) bool {
	_, err := os.Stat(filepath.Join(n.root, "images", id, "completed"))
	return err == nil
}

// started pulls an image and starts a container that reads a part of it.
func (n *testNode) started(img testImage, files map[string]string) (id string) {
	n.t.Helper()
	n.prepareAll(img, 0, "")
	id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
	if err != nil {
		n.t.Fatal(err)
	}
	n.wantMounted(id, map[string]string{"hot0": files["hot0"]})
	return id
}

// After the start the rest comes in a few requests, each byte once, and then the registry is needed no more.
func TestCompletion(t *testing.T) {
	n := newTestNode(t)
	n.startWith(1 << 30)
	img, files := pushHot(n)
	id := n.started(img, files)
	before := n.chunks.Stats()
	n.poll("completion", func() bool { return n.completed(id) })
	s := n.chunks.Stats()
	size := int64(0)
	for _, l := range n.artifactOf(img).Layers {
		size += l.IndexOffset
	}
	if s.FetchedBytes != size {
		t.Errorf("%d bytes were fetched, want each of the %d once", s.FetchedBytes, size)
	}
	if requests := s.Requests - before.Requests; requests > 4 {
		t.Errorf("%d requests for the rest of two layers", requests)
	}
	n.reg.Inject(registrytest.Any, -1, registrytest.Status(http.StatusServiceUnavailable))
	n.restart()
	n.wantMounted(id, files)
	if s := n.chunks.Stats(); s.Requests != 0 {
		t.Errorf("%d requests after a restart", s.Requests)
	}
}

// A container that reads interrupts it, and it goes on later; a restart of the daemon, too. Nothing is fetched twice but what was in flight.
func TestCompletionIsInterrupted(t *testing.T) {
	n := newTestNode(t)
	n.startWith(30_000)
	img, files := pushHot(n)
	id := n.started(img, files)
	begun := func() bool {
		b := n.images.Background()
		return b != nil && n.chunks.Stats().Hot > 0
	}
	n.poll("completion to begin", begun)
	if b := n.images.Background(); !strings.HasSuffix(b.Image, img.manifest.String()) || b.Done == 0 || b.Done >= b.Total {
		t.Errorf("progress %+v", b)
	}
	misses := n.chunks.Stats().Misses
	n.wantMounted(id, map[string]string{"cold1": files["cold1"]}) // the last of it, which will take a while to come by itself
	if n.chunks.Stats().Misses == misses {
		t.Error("a read waited for the background")
	}
	requests := n.chunks.Stats().Requests
	n.poll("another request", func() bool { return n.chunks.Stats().Requests > requests })
	fetched := n.chunks.Stats().Hot
	n.startWith(1 << 30)
	n.poll("completion", func() bool { return n.completed(id) })
	if again := n.chunks.Stats().Hot; again == 0 || fetched == 0 {
		t.Errorf("%d chunks before the restart and %d after", fetched, again)
	}
	n.reg.Inject(registrytest.Any, -1, registrytest.Status(http.StatusServiceUnavailable))
	n.wantMounted(id, files)
}

// Whoever waits has the link to himself, also one who reads a file from its start to its end, of which the registry sends little at a time.
func TestCompletionMakesWay(t *testing.T) {
	n := newTestNode(t)
	img, files := pushHot(n)
	id := n.started(img, files)
	n.poll("the record of the start", func() bool {
		_, err := os.Stat(filepath.Join(n.root, "images", id, "first-use.json"))
		return err == nil
	})
	n.quiet = 8 * time.Second // nobody has waited for half a second
	n.startWith(30_000)
	n.poll("completion to begin", func() bool { return n.chunks.Stats().Hot > 0 })

	m := n.artifactOf(img)
	of := func(layer int) (all []registrytest.Request) {
		for _, q := range n.reg.Requests() {
			if q.Method == http.MethodGet && strings.HasSuffix(q.Path, m.Layers[layer].Digest.String()) {
				all = append(all, q)
			}
		}
		return all
	}
	n.reg.Inject(func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, m.Layers[1].Digest.String()) }, -1,
		registrytest.Throttle(8<<10, 150*time.Millisecond)) // a chunk takes more than a second
	dev, err := n.images.Device(testContext(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.(io.Closer).Close()
	base := n.index(m, 0).TarSize + 512 // the second layer's first file
	got, begun := make([]byte, len(files["cold1"])), time.Now()
	for off := 0; off < len(got); off += 32 << 10 {
		p := got[off:min(off+32<<10, len(got))]
		if _, err := dev.ReadAt(testContext(), p, base+int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	ended := time.Now()
	if string(got) != files["cold1"] {
		t.Error("other bytes")
	}
	if s := n.chunks.Stats(); s.Waits == 0 || s.Waiting != 0 {
		t.Errorf("%+v: want some that have waited", s)
	}
	for _, q := range of(0) {
		if q.Begin.Before(ended) && (q.Begin.After(begun) || q.End.IsZero()) {
			t.Errorf("a request in the background while somebody reads: %+v", q)
		}
	}
	n.poll("the background to go on", func() bool { // with the layer that it was at, or the one that was read if that one was complete already
		all := append(of(0), of(1)...)
		return slices.ContainsFunc(all, func(q registrytest.Request) bool { return q.Begin.After(ended) })
	})
}

// An image that is removed meanwhile leaves nothing.
func TestForgetEndsCompletion(t *testing.T) {
	n := newTestNode(t)
	n.startWith(30_000)
	img, files := pushHot(n)
	id := n.started(img, files)
	n.poll("completion to begin", func() bool { return n.images.Background() != nil && n.chunks.Stats().Hot > 0 })
	if err := n.images.Forget(id); err != nil {
		t.Fatal(err)
	}
	n.poll("empty cache", func() bool {
		left, err := filepath.Glob(filepath.Join(n.root, "cache", "sha256-*"))
		return err == nil && len(left) == 0
	})
	n.poll("end of completion", func() bool { return n.images.Background() == nil })
}

// An image whose registry does not answer does not hold up another's completion.
func TestCompletionGoesOn(t *testing.T) {
	n := newTestNode(t)
	n.budget = 5 * time.Minute
	n.stop()
	n.start()
	repos := map[string]string{} // by image
	for _, repo := range []string{"app", "other"} {
		files := map[string]string{"hot0": noise(1, 700_000), repo: noise(2, 700_000)} // of which the second is cold
		img := n.push(repo, tarOf(t, file{"hot0", files["hot0"]}), tarOf(t, file{repo, files[repo]}))
		n.convert(img)
		repos[n.started(img, files)] = repo
	}
	n.poll("end of the starts", func() bool {
		records, err := filepath.Glob(filepath.Join(n.root, "images", "*", "first-use.json"))
		return err == nil && len(records) == 2
	})
	order := slices.Sorted(maps.Keys(repos))
	n.reg.Inject(func(r *http.Request) bool {
		return strings.HasPrefix(r.URL.Path, "/v2/"+repos[order[0]]+"/blobs/")
	}, -1, registrytest.Stall(-1))
	n.startWith(1 << 30)
	n.poll("completion of the second", func() bool { return n.completed(order[1]) })
	if n.completed(order[0]) {
		t.Error("what has no registry is completed")
	}
}

package snapshot

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// What the first start on one node has used is what the next node has before its container asks.
func TestFirstUses(t *testing.T) {
	n := newTestNode(t)
	img, files := pushHot(n)
	hot := map[string]string{"hot1": files["hot1"], "hot0": files["hot0"]}
	if _, err := n.images.FirstUses(img.manifest); !errors.Is(err, stream.ErrNoRecord) {
		t.Errorf("an image that is not here: error %v, want ErrNoRecord", err)
	}
	n.prepareAll(img, 0, "")
	id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.images.FirstUses(img.manifest); !errors.Is(err, stream.ErrNoRecord) {
		t.Errorf("an image that was not started: error %v, want ErrNoRecord", err)
	}
	target := t.TempDir()
	if err := n.images.Mount(testContext(), id, 2, target); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, target, map[string]string{"hot1": files["hot1"]})
	wantFiles(t, target, map[string]string{"hot0": files["hot0"]})
	p, err := n.images.FirstUses(img.manifest) // while it goes on
	if err != nil {
		t.Fatal(err)
	}
	m := n.artifactOf(img)
	if len(p.Layers) != 2 || len(p.Chunks) == 0 || p.Layers[p.Chunks[0].Layer] != m.Layers[1].IndexDigest {
		t.Errorf("got %+v, want the second layer's chunks first", p)
	}
	for _, c := range n.hotProfile(img).Chunks {
		if !slices.Contains(p.Chunks, c) {
			t.Errorf("chunk %+v is not among the first uses %v", c, p.Chunks)
		}
	}
	record := filepath.Join(n.root, "images", id, "first-use.json")
	n.poll("end of the start", func() bool {
		_, err := os.Stat(record)
		return err == nil
	})
	one := n.firstStart(img)
	if one.Source != "" || one.Profile != "" || one.Misses == 0 || one.Missed == 0 || one.Bytes < one.Missed {
		t.Errorf("the start was %+v", one)
	}
	wantFiles(t, target, map[string]string{"cold0": files["cold0"]}) // the start is over
	n.unmount(target)
	n.restart()
	n.wantMounted(id, files)
	kept, err := n.images.FirstUses(img.manifest)
	if err != nil || !slices.Equal(kept.Chunks, p.Chunks) {
		t.Errorf("after a restart: %v, %v, want %v", kept, err, p)
	}

	second := newTestNode(t)
	second.stop()
	second.reg = n.reg
	second.start()
	second.attachProfile(img, kept, artifact.ProfileLearned, time.Unix(1e9, 0))
	if id, _, err = second.images.Find(testContext(), img.ref, img.manifest); err != nil {
		t.Fatal(err)
	}
	second.poll("hot chunks", func() bool { return second.chunks.Stats().Hot == int64(len(kept.Chunks)) })
	second.wantMounted(id, hot)
	if s := second.chunks.Stats(); s.Misses != 0 {
		t.Errorf("%d misses on the second node", s.Misses)
	}
	if two := second.firstStart(img); two.Source != artifact.ProfileLearned || two.Profile == "" || two.Misses != 0 || two.Missed != 0 || two.Bytes == 0 {
		t.Errorf("the start was %+v", two)
	}
	if len(n.starts) > 0 {
		t.Errorf("a start that is no first one was told of: %+v", <-n.starts)
	}
}

// firstStart waits for what is told of the first start of img.
func (n *testNode) firstStart(img testImage) stream.Start {
	n.t.Helper()
	select {
	case s := <-n.starts:
		if s.Manifest != img.manifest || s.Mounted.IsZero() || s.Took <= 0 || s.Took > time.Since(s.Mounted) {
			n.t.Errorf("the start was %+v", s)
		}
		return s
	case <-time.After(time.Minute):
		n.t.Fatal("no start was told of within a minute")
		panic("unreachable")
	}
}

// A start is over when its image is removed; one that the daemon's end cuts short is told to nobody.
func TestStartOfRemoved(t *testing.T) {
	n := newTestNode(t)
	n.stop()
	n.quiet = time.Hour
	n.start()
	img, files := pushHot(n)
	cutShort, _ := pushHotTo(n, "other")
	var ids []string
	for _, i := range []testImage{img, cutShort} {
		id, _, err := n.images.Find(testContext(), i.ref, i.manifest)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	n.wantMounted(ids[0], map[string]string{"hot0": files["hot0"]})
	n.wantMounted(ids[1], map[string]string{"hot1": files["hot1"]})
	if err := n.images.Forget(ids[0]); err != nil {
		t.Fatal(err)
	}
	n.firstStart(img)
	n.stop()
	if len(n.starts) > 0 {
		t.Errorf("also told of: %+v", <-n.starts)
	}
	n.start()
}

// A daemon that ends in the middle of a first start keeps what it has seen; a record that is damaged is said to be.
func TestFirstUsesCutShort(t *testing.T) {
	n := newTestNode(t)
	n.stop()
	n.quiet = time.Hour
	n.start()
	img, files := pushHot(n)
	n.prepareAll(img, 0, "")
	id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
	if err != nil {
		t.Fatal(err)
	}
	n.wantMounted(id, map[string]string{"hot0": files["hot0"]})
	record := filepath.Join(n.root, "images", id, "first-use.json")
	part := filepath.Join(filepath.Dir(record), "first-use.part")
	var saved []byte
	n.poll("record on disk", func() bool {
		saved, _ = os.ReadFile(part)
		return len(saved) > 0
	})
	n.stop()
	if err := errors.Join(os.Remove(record), os.WriteFile(part, saved, 0o600)); err != nil { // as if it had been killed
		t.Fatal(err)
	}
	n.start()
	p, err := n.images.FirstUses(img.manifest)
	if err != nil || len(p.Chunks) == 0 {
		t.Fatalf("got %v, %v, want what was read", p, err)
	}
	if err := os.WriteFile(record, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := n.images.FirstUses(img.manifest); err == nil || errors.Is(err, stream.ErrNoRecord) {
		t.Errorf("a damaged record: error %v", err)
	}
	n.wantMounted(id, files)
	if _, err := n.images.FirstUses(digest.FromString("other")); !errors.Is(err, stream.ErrNoRecord) {
		t.Errorf("another image: error %v", err)
	}
}

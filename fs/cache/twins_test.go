package cache

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// openSharing opens a cache that copies between layers, once it knows those that are there.
func openSharing(t *testing.T, dir string, limit int64, layers ...*layer) *Cache {
	t.Helper()
	c, err := Open(dir, Options{NoReadAhead: true, Limit: limit, Index: func(dgst digest.Digest) (*artifact.Index, error) {
		for _, ly := range layers {
			if ly.dgst == dgst {
				return ly.index, nil
			}
		}
		return nil, errors.New("no such index")
	}})
	must(t, err)
	t.Cleanup(func() { must(t, c.Close()) })
	poll(t, "knowledge of the layers", func() bool { return c.twins.layers.Load() != nil })
	return c
}

// pollKnown waits until c knows the chunks of ly.
func pollKnown(t *testing.T, c *Cache, ly *layer) {
	t.Helper()
	poll(t, "knowledge of a layer", func() bool { return (*c.twins.layers.Load())[ly.dgst].places != nil })
}

// versions returns two versions of a layer: the second has a file more before the others, so that everything moves.
func versions(t *testing.T) (v1, v2 *layer) {
	t.Helper()
	v1 = newLayer(t, 8<<10, 3000, 400_001, 70, 9000)
	var grown bytes.Buffer
	w := tar.NewWriter(&grown)
	must(t, w.WriteHeader(&tar.Header{Name: "new", Mode: 0o644, Size: 700}))
	_, err := w.Write(make([]byte, 700))
	must(t, err)
	must(t, w.Flush())
	return v1, encode(t, append(grown.Bytes(), v1.tar...), 8<<10)
}

func TestTheNextVersionIsCopied(t *testing.T) {
	v1, v2 := versions(t)
	dir := t.TempDir()
	c := openSharing(t, dir, 0, v1, v2)
	l := openLayer(t, c, v1, v1.serve())
	readAll(t, l, v1, 5000)
	pollKnown(t, c, v1)

	for _, state := range []string{"open", "closed", "of a former life"} {
		t.Run(state, func(t *testing.T) {
			switch state {
			case "closed":
				must(t, l.Close())
			case "of a former life":
				must(t, c.Close())
				c = openSharing(t, dir, 0, v1, v2)
			}
			b := v2.serve()
			l := openLayer(t, c, v2, b)
			before := c.Stats()
			readAll(t, l, v2, 5000)
			must(t, l.Close())
			must(t, c.remove(v2.dgst, false))
			if got := b.bytes.Load(); got == 0 || got > int64(len(v2.blob)/10) {
				t.Errorf("%d bytes of %d were fetched", got, len(v2.blob))
			}
			after := c.Stats()
			if copied, misses := after.Copied-before.Copied, after.Misses-before.Misses; copied+misses != int64(v2.index.NumChunks()) || misses > 3 {
				t.Errorf("%d chunks were copied, %d fetched, of %d", copied, misses, v2.index.NumChunks())
			}
		})
	}
}

// What the other layer has is proven before it is shown: damage is a miss.
func TestADamagedTwinIsAMiss(t *testing.T) {
	v1, v2 := versions(t)
	c := openSharing(t, t.TempDir(), 0, v1, v2)
	l := openLayer(t, c, v1, v1.serve())
	readAll(t, l, v1, 5000)
	pollKnown(t, c, v1)
	poll(t, "end of the fills", l.store.idle) // or a late write repairs the damage
	f, err := os.OpenFile(c.dataPath(v1.dgst), os.O_WRONLY, 0)
	must(t, err)
	defer f.Close()
	for i := range v1.index.NumChunks() {
		off := v1.index.Chunk(i).TarOffset
		_, err := f.WriteAt([]byte{^v1.tar[off]}, off)
		must(t, err)
	}
	b := v2.serve()
	readAll(t, openLayer(t, c, v2, b), v2, 5000)
	checkFetched(t, b, v2)
}

// A layer repeats itself, too: equal files are fetched once.
func TestEqualChunksOfALayer(t *testing.T) {
	one := newLayer(t, 8<<10, 400_001)
	twice := encode(t, append(bytes.Clone(one.tar[:len(one.tar)-1024]), one.tar...), 8<<10)
	c := openSharing(t, t.TempDir(), 0, twice)
	b := twice.serve()
	l := openLayer(t, c, twice, b)
	pollKnown(t, c, twice)
	readAll(t, l, twice, 5000)
	if got := b.bytes.Load(); got > twice.index.FramesSize()*6/10 {
		t.Errorf("%d bytes of %d were fetched", got, twice.index.FramesSize())
	}
}

// TestOwnPlace: what a former life has written to a layer's file and not to its map is taken, verified; in a file of this life nothing can be that is not known, and it is not looked at.
func TestOwnPlace(t *testing.T) {
	ly := newLayer(t, 8<<10, 400_001)
	dir := t.TempDir()
	for i, former := range []bool{false, true} {
		c := openSharing(t, dir, 0, ly)
		b := ly.serve()
		l := openLayer(t, c, ly, b)
		pollKnown(t, c, ly)
		f, err := os.OpenFile(c.dataPath(ly.dgst), os.O_WRONLY, 0)
		must(t, err)
		_, err = f.WriteAt(ly.tar, 0)
		must(t, errors.Join(err, f.Close()))
		readRange(t, l, ly, make([]byte, 8<<10), int64(1+i)*100_000)
		if got := b.requests.Load(); (got == 0) != former {
			t.Errorf("%d requests, of a layer of a former life: %v", got, former)
		}
		must(t, errors.Join(l.Close(), c.Close()))
	}
}

func TestLayersThatLeftAreForgotten(t *testing.T) {
	v1, v2 := versions(t)
	c := openSharing(t, t.TempDir(), 0, v1, v2)
	l := openLayer(t, c, v1, v1.serve())
	readAll(t, l, v1, 5000)
	must(t, l.Close())
	must(t, c.Retain(func(digest.Digest) bool { return false }))
	b := v2.serve()
	readAll(t, openLayer(t, c, v2, b), v2, 5000)
	checkFetched(t, b, v2)
	pollKnown(t, c, v2)
	if n := len(*c.twins.layers.Load()); n != 1 {
		t.Errorf("%d layers are remembered", n)
	}
}

// checkFetched: all was fetched, but for what is only zeros: those are everywhere.
func checkFetched(t *testing.T, b *memBlob, ly *layer) {
	t.Helper()
	if got, want := b.bytes.Load(), ly.index.FramesSize(); got < want-100 || got > want {
		t.Errorf("%d bytes of %d were fetched", got, want)
	}
}

// Who is cancelled gets back all that was not copied, or those who wait for it would for ever.
func TestCancelledCopyLeavesNothingOut(t *testing.T) {
	v1, v2 := versions(t)
	c := openSharing(t, t.TempDir(), 0, v1, v2)
	l := openLayer(t, c, v1, v1.serve())
	flights := []*flight{{chunk: 0}, {chunk: 1}, {chunk: 2}}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if got := (&fill{layer: l}).copy(ctx, flights); len(got) != len(flights) {
		t.Errorf("%d of %d chunks are given back", len(got), len(flights))
	}
}

// So many chunks are known and no more: those of the layers used last, and none of a layer that has too many.
func TestKnownChunksAreBounded(t *testing.T) {
	layers := make(map[digest.Digest]*layer)
	var order []digest.Digest
	for _, size := range []int{100_000, 50_000, 300_000, 60_000} {
		ly := newLayer(t, 4<<10, size)
		layers[ly.dgst], order = ly, append(order, ly.dgst)
	}
	opened := 0
	tw := &twins{index: func(dgst digest.Digest) (*artifact.Index, error) {
		opened++
		return layers[dgst].index, nil
	}}
	known := func(i int) bool { return (*tw.layers.Load())[order[i]].places != nil }
	n := func(i int) int { return layers[order[i]].index.NumChunks() }
	tw.learn(order, n(0)+n(1)+n(3), nil)
	if !known(0) || !known(1) || known(2) || !known(3) || opened != 4 {
		t.Errorf("known: %v %v %v %v, want all but the third; %d indexes opened", known(0), known(1), known(2), known(3), opened)
	}
	slices.Reverse(order)
	tw.learn(order, n(0)+n(1)+n(2), nil)
	if !known(0) || !known(1) || !known(2) || known(3) || opened != 5 {
		t.Errorf("known: %v %v %v %v, want all but the last; %d indexes opened", known(0), known(1), known(2), known(3), opened)
	}
	if n(3) > layerPlaces {
		t.Fatal("a layer has more chunks than the test thinks")
	}
}

// No read waits until the chunks of a layer are known, however long that takes.
func TestReadsDoNotWaitForKnowledge(t *testing.T) {
	ly := newLayer(t, 8<<10, 300_000)
	gate := make(chan struct{})
	c, err := Open(t.TempDir(), Options{Index: func(digest.Digest) (*artifact.Index, error) {
		<-gate
		return ly.index, nil
	}})
	must(t, err)
	t.Cleanup(func() { must(t, c.Close()) })
	defer close(gate)
	poll(t, "knowledge of no layer", func() bool { return c.twins.layers.Load() != nil })
	l := openLayer(t, c, ly, ly.serve())
	ctx, cancel := context.WithTimeout(t.Context(), patient)
	defer cancel()
	_, err = l.ReadAt(ctx, make([]byte, 100_000), 0)
	must(t, err)
}

package cache

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

// mapIndex gives ly an index in a mapped file, which can be cut then as a disk loses blocks.
func mapIndex(t *testing.T, ly *layer) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "index")
	must(t, os.WriteFile(path, ly.blob[ly.index.FramesSize():], 0o600))
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	mem, err := mapped.Open(f)
	must(t, err)
	ly.index, err = artifact.DecodeIndex(mem)
	must(t, err)
	return path
}

// What a hot blob's copy has begun when the index is lost is given back to the reads.
func TestIndexLostInACopy(t *testing.T) {
	v1 := newLayer(t, 1<<10, 3000, 400_001, 70, 9000)
	v2 := encode(t, append(bytes.Clone(v1.tar[:len(v1.tar)-1024]), v1.tar...), 1<<10)
	c := openSharing(t, t.TempDir(), 0, v1, v2)
	l1 := openLayer(t, c, v1, v1.serve())
	readAll(t, l1, v1, 5000)
	poll(t, "end of the fills", l1.store.idle)
	path := mapIndex(t, v2)
	l2 := openLayer(t, c, v2, v2.serve())
	var frames []Frame
	n := int64(0)
	for i := range 20 {
		frames = append(frames, Frame{l2, i})
		n += v2.index.Chunk(i).BlobSize
	}
	pollKnown(t, c, v2)
	must(t, os.Truncate(path, 4096))
	if err := c.Share().Fill(t.Context(), v2.serve(), 0, n, frames, 10*time.Millisecond); err == nil {
		t.Error("the index was not lost")
	}
	if n := l2.store.underWay(); n != 0 {
		t.Errorf("%d chunks are under way for ever", n)
	}
}

func TestIndexLostWhenCounting(t *testing.T) {
	ly := newLayer(t, 4<<10, 900_000)
	path := mapIndex(t, ly)
	c := openCache(t, t.TempDir())
	l := openLayer(t, c, ly, ly.serve())
	readAll(t, l, ly, 5000)
	must(t, os.Truncate(path, 0))
	if n := l.Present(); n > int64(len(ly.tar)) { // it ends, and not the process
		t.Errorf("%d bytes of %d are here", n, len(ly.tar))
	}
}

// A read beside a chunk whose entry of the index is lost leaves nothing under way for ever.
func TestIndexLostBesideARead(t *testing.T) {
	ly := newLayer(t, 1<<10, 400_000)
	path := mapIndex(t, ly)
	l := openLayer(t, openCache(t, t.TempDir()), ly, ly.serve())
	s := l.store
	const last = 82 // whose entry lies in the index's first page, as no later one does
	s.mu.Lock()
	s.present.set(last - 1) // so that last is looked at for itself
	c := ly.index.Chunk(last + 1)
	beside := &fill{layer: l, open: true, off: c.TarOffset, end: c.TarOffset + c.TarSize}
	beside.add(s, last+1)
	s.mu.Unlock()
	must(t, os.Truncate(path, 4096))
	if mapped.Guard(func() { ly.index.Chunk(last) }) != nil || mapped.Guard(func() { ly.index.Chunk(last + 1) }) == nil {
		t.Fatal("the first page ends elsewhere")
	}
	var flights []*flight
	mapped.Guard(func() { flights = l.claim(last-2, last+1) })
	s.mu.Lock()
	l.start(beside)
	s.mu.Unlock()
	s.release(flights)
	poll(t, "end of the fills", s.idle)
}

func TestIndexLostWhenOpened(t *testing.T) {
	ly := newLayer(t, 4<<10, 900_000)
	path := mapIndex(t, ly)
	must(t, os.Truncate(path, 0))
	c := openCache(t, t.TempDir())
	if _, err := c.Layer(ly.dgst, ly.index, ly.serve()); err == nil {
		t.Error("a layer was opened whose index cannot be read")
	}
	if len(c.slots) != 0 {
		t.Error("the layer is still in use")
	}
}

// lostTar is a Rebuilder, the index of whose layer is lost while the tar is read.
type lostTar struct {
	memBlob
	tar  []byte
	path string
}

func (b *lostTar) Gone(error) bool { return true }

func (b *lostTar) Tar(context.Context, int) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(b.tar)), os.Truncate(b.path, 0)
}

func TestIndexLostInAPass(t *testing.T) {
	ly := newLayer(t, 4<<10, 900_000)
	b := &lostTar{tar: ly.tar, path: mapIndex(t, ly)}
	l := openLayer(t, openCache(t, t.TempDir()), ly, b)
	if _, err := l.ReadAt(t.Context(), make([]byte, 10), 5000); err == nil {
		t.Error("a chunk was read whose index is lost")
	}
	poll(t, "end of the fills", l.store.idle)
}

// Eviction and what the disk did not take go on when a layer's index is lost.
func TestIndexLostWhenFlushed(t *testing.T) {
	lost, other := newLayer(t, 4<<10, 600_000), newLayer(t, 4<<10, 300_000, 200_000)
	path := mapIndex(t, lost)
	c := limited(t, t.TempDir(), 1<<20)
	l, o := openLayer(t, c, lost, lost.serve()), openLayer(t, c, other, other.serve())
	readRange(t, l, lost, make([]byte, 500_000), 0)
	c.stats.suspended.Store(true) // as after a failed write
	readRange(t, l, lost, make([]byte, 10), 599_000)
	c.stats.suspended.Store(false)
	must(t, os.Truncate(path, 0))
	c.flush()
	for c.Stats().Evicted == 0 {
		readAll(t, o, other, 50_000)
		c.flush()
	}
	if mapped.Guard(func() { l.ReadAt(t.Context(), make([]byte, 10), 0) }) == nil {
		t.Error("a layer without an index was read")
	}
}

package cache

import (
	"bytes"
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
	c.learn()
	must(t, os.Truncate(path, 4096))
	if err := c.Fill(t.Context(), v2.serve(), 0, n, frames, 10*time.Millisecond); err == nil {
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

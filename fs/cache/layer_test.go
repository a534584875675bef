package cache

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// layer is a layer blob made by the converter's own encoder, and the tar inside.
type layer struct {
	tar   []byte
	blob  []byte
	dgst  digest.Digest
	index *artifact.Index
}

// newLayer encodes a tar of regular files of the given sizes, with content that compresses to about a half.
func newLayer(t testing.TB, chunkSize int, sizes ...int) *layer {
	t.Helper()
	rnd := rand.New(rand.NewPCG(1, uint64(len(sizes))))
	var tb bytes.Buffer
	w := tar.NewWriter(&tb)
	for i, n := range sizes {
		must(t, w.WriteHeader(&tar.Header{Name: fmt.Sprintf("dir/file-%d", i), Mode: 0o644, Size: int64(n)}))
		b := make([]byte, 0, n+8)
		for len(b) < n {
			b = binary.NativeEndian.AppendUint64(b, rnd.Uint64()&0x0f0f0f0f0f0f0f0f)
		}
		_, err := w.Write(b[:n])
		must(t, err)
	}
	must(t, w.Close())
	return encode(t, tb.Bytes(), chunkSize)
}

func encode(t testing.TB, tarBytes []byte, chunkSize int) *layer {
	t.Helper()
	var bb bytes.Buffer
	enc, err := artifact.EncodeLayer(context.Background(), &bb, bytes.NewReader(tarBytes), artifact.EncodeOptions{ChunkSize: chunkSize})
	must(t, err)
	x, err := artifact.DecodeIndex(bb.Bytes()[enc.IndexOffset:])
	must(t, err)
	return &layer{tar: tarBytes, blob: bb.Bytes(), dgst: enc.Digest, index: x}
}

// frames returns the size of the frames of the chunks that hold [off, off+n), bytes.
func (ly *layer) frames(off, n int64) (size int64) {
	for i := ly.index.Find(off); i <= ly.index.Find(off+n-1); i++ {
		size += ly.index.Chunk(i).BlobSize
	}
	return size
}

// memBlob serves a layer blob from memory. hosts holds the bytes that each try gets; there are no more hosts after the last.
type memBlob struct {
	hosts   [][]byte
	latency time.Duration
	gate    chan struct{} // if not nil, each request waits for a value or for the closing of it
	cut     int64         // if not 0, bodies end after so many bytes

	down   atomic.Bool  // fails
	doomed atomic.Int64 // so many requests fail, the first ones

	requests, bytes, cancelled atomic.Int64
	open                       atomic.Int64 // bodies not closed
}

var errNoHost = errors.New("no other host")

func (b *memBlob) ReadRange(ctx context.Context, off, n int64, try int) (io.ReadCloser, error) {
	doomed := b.requests.Add(1) <= b.doomed.Load()
	b.bytes.Add(n)
	if try >= len(b.hosts) {
		return nil, errNoHost
	}
	var after <-chan time.Time
	if b.latency > 0 {
		after = time.After(b.latency)
	}
	if b.gate != nil || after != nil {
		select {
		case <-b.gate:
		case <-after:
		case <-ctx.Done():
			b.cancelled.Add(1)
			return nil, ctx.Err()
		}
	}
	if doomed || b.down.Load() {
		return nil, errNoHost
	}
	body := io.Reader(bytes.NewReader(b.hosts[try][off : off+n]))
	if b.cut > 0 {
		body = io.LimitReader(body, b.cut)
	}
	b.open.Add(1)
	return &memBody{body, b}, nil
}

type memBody struct {
	io.Reader
	blob *memBlob
}

func (b *memBody) Close() error {
	b.blob.open.Add(-1)
	return nil
}

func (ly *layer) serve() *memBlob { return &memBlob{hosts: [][]byte{ly.blob}} }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func openCache(t testing.TB, dir string) *Cache {
	t.Helper()
	c, err := Open(dir, Options{})
	must(t, err)
	t.Cleanup(func() { must(t, c.Close()) })
	return c
}

func openLayer(t testing.TB, c *Cache, ly *layer, b Blob) *Layer {
	t.Helper()
	l, err := c.Layer(ly.dgst, ly.index, b)
	must(t, err)
	if b, ok := b.(*memBlob); ok {
		t.Cleanup(func() { poll(t, "end of all bodies", func() bool { return b.open.Load() == 0 }) })
	}
	return l
}

// readAll compares the whole tar, read in pieces of n bytes, with what it must be.
func readAll(t testing.TB, l *Layer, ly *layer, n int) {
	t.Helper()
	p := make([]byte, n)
	for off := 0; off < len(ly.tar); off += n {
		readRange(t, l, ly, p, int64(off))
	}
}

// readRange compares len(p) bytes at off.
func readRange(t testing.TB, l *Layer, ly *layer, p []byte, off int64) {
	t.Helper()
	want := ly.tar[min(off, int64(len(ly.tar))):]
	want = want[:min(len(want), len(p))]
	n, err := l.ReadAt(t.Context(), p, off)
	if len(want) < len(p) {
		if err != io.EOF {
			t.Fatalf("ReadAt(%d bytes at %d): error %v, want io.EOF", len(p), off, err)
		}
	} else if err != nil {
		t.Fatalf("ReadAt(%d bytes at %d): %v", len(p), off, err)
	}
	if !bytes.Equal(p[:n], want) {
		t.Fatalf("ReadAt(%d bytes at %d) gave %d bytes that are not the tar's", len(p), off, n)
	}
}

// poll waits until cond holds.
func poll(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !cond(); {
		if time.Now().After(end) {
			t.Fatalf("no %s in 10 s", what)
		}
		time.Sleep(100 * time.Microsecond) // leaves the processor to what we wait for
	}
}

func TestReadsEqualTar(t *testing.T) {
	layers := map[string]*layer{
		"small files": newLayer(t, 8<<10, 0, 1, 511, 512, 513, 3000, 100, 7000, 9, 8192, 4000, 12),
		"large file":  newLayer(t, 4<<10, 100, 300_001, 70),
		"one chunk":   newLayer(t, 0, 100),
		"no files":    encode(t, make([]byte, 1024), 0),
		"odd tail":    encode(t, append(newLayer(t, 4<<10, 5000, 10).tar, "tail"...), 4<<10),
	}
	for name, ly := range layers {
		t.Run(name, func(t *testing.T) {
			c := openCache(t, t.TempDir())
			l := openLayer(t, c, ly, ly.serve())
			var wg sync.WaitGroup
			for g := range 8 {
				rnd := rand.New(rand.NewPCG(7, uint64(g)))
				wg.Go(func() {
					for range 200 {
						off := rnd.Int64N(int64(len(ly.tar)) + 10)
						p := make([]byte, 1+rnd.IntN(1<<(1+rnd.IntN(16))))
						want := ly.tar[min(off, int64(len(ly.tar))):]
						want = want[:min(len(want), len(p))]
						n, err := l.ReadAt(t.Context(), p, off)
						if err != nil && (err != io.EOF || len(want) == len(p)) {
							t.Errorf("ReadAt(%d at %d): %v", len(p), off, err)
						} else if !bytes.Equal(p[:n], want) {
							t.Errorf("ReadAt(%d at %d): wrong bytes", len(p), off)
						}
					}
				})
			}
			wg.Wait()
			readAll(t, l, ly, len(ly.tar)+1)
		})
	}
}

func TestReadAtEdges(t *testing.T) {
	ly := newLayer(t, 4<<10, 10_000)
	l := openLayer(t, openCache(t, t.TempDir()), ly, ly.serve())
	size := int64(len(ly.tar))
	for _, c := range []struct {
		name   string
		off    int64
		n      int
		want   int
		eof    bool
		failed bool
	}{
		{"empty", 5, 0, 0, false, false},
		{"at the end", size, 1, 0, true, false},
		{"beyond", size + 5, 1, 0, true, false},
		{"up to the end", size - 7, 7, 7, false, false},
		{"over the end", size - 7, 8, 7, true, false},
		{"negative", -1, 1, 0, false, true},
	} {
		n, err := l.ReadAt(t.Context(), make([]byte, c.n), c.off)
		if n != c.want || (err == io.EOF) != c.eof || (err != nil && err != io.EOF) != c.failed {
			t.Errorf("%s: got %d, %v", c.name, n, err)
		}
	}
	empty := encode(t, nil, 0)
	l = openLayer(t, openCache(t, t.TempDir()), empty, empty.serve())
	if n, err := l.ReadAt(t.Context(), make([]byte, 1), 0); n != 0 || err != io.EOF {
		t.Errorf("empty tar: got %d, %v", n, err)
	}
}

func TestReopenFetchesNothing(t *testing.T) {
	ly := newLayer(t, 4<<10, 50_000, 100, 200, 9000)
	dir := t.TempDir()
	c := openCache(t, dir)
	readAll(t, openLayer(t, c, ly, ly.serve()), ly, 5000)
	must(t, c.Close()) // closes the layer, too

	c = openCache(t, dir)
	b := ly.serve()
	l := openLayer(t, c, ly, b)
	readAll(t, l, ly, 3000)
	if n := b.requests.Load(); n != 0 {
		t.Errorf("%d requests after reopening, want 0", n)
	}
	if got, want := c.Stats().Verified, int64(ly.index.NumChunks()); got != want {
		t.Errorf("%d chunks verified after reopening, want %d", got, want)
	}
	usage, err := c.Usage(ly.dgst, ly.dgst)
	must(t, err)
	if usage < int64(len(ly.tar)) || usage > int64(len(ly.tar))+64<<10 {
		t.Errorf("usage is %d for a tar of %d bytes", usage, len(ly.tar))
	}
	for _, f := range []struct {
		path string
		mode os.FileMode
	}{{c.layerDir(ly.dgst), 0o700}, {c.dataPath(ly.dgst), 0o600}, {c.mapPath(ly.dgst), 0o600}} {
		fi, err := os.Stat(f.path)
		must(t, err)
		if fi.Mode().Perm() != f.mode {
			t.Errorf("%s has mode %o, want %o", filepath.Base(f.path), fi.Mode().Perm(), f.mode)
		}
	}
}

func TestOpenersShareALayer(t *testing.T) {
	ly := newLayer(t, 4<<10, 50_000)
	c := openCache(t, t.TempDir())
	b1, b2 := ly.serve(), ly.serve()
	l1, l2 := openLayer(t, c, ly, b1), openLayer(t, c, ly, b2)
	readAll(t, l1, ly, len(ly.tar))
	readAll(t, l2, ly, len(ly.tar))
	if n := b2.requests.Load(); n != 0 {
		t.Errorf("the second opener made %d requests, want 0", n)
	}

	other := encode(t, ly.tar, 8<<10)
	if _, err := c.Layer(ly.dgst, other.index, b1); !errors.Is(err, artifact.ErrInvalid) {
		t.Errorf("opened with another index: error %v, want ErrInvalid", err)
	}
	must(t, l1.Close())
	must(t, l1.Close()) // is no error
	if _, err := l1.ReadAt(t.Context(), make([]byte, 1), 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("read after Close: error %v, want os.ErrClosed", err)
	}
	readAll(t, l2, ly, len(ly.tar))
	if n := b2.requests.Load(); n != 0 {
		t.Errorf("the second opener made %d requests, want 0", n)
	}
	must(t, l2.Close())
	if n := openFiles(t, c.dir); n != 1 { // the lock
		t.Errorf("%d files of the cache open after the last Close, want 1", n)
	}

	// Now another index is a miss.
	b := other.serve()
	l := openLayer(t, c, &layer{tar: ly.tar, dgst: ly.dgst, index: other.index}, b)
	readAll(t, l, ly, len(ly.tar))
	if b.requests.Load() == 0 {
		t.Error("chunks of another index were used")
	}
}

// openFiles counts the descriptors of this process for files in dir.
func openFiles(t testing.TB, dir string) (n int) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	for _, fd := range fds {
		if path, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(path, dir) {
			n++
		}
	}
	return n
}

func TestOneProcessHoldsACache(t *testing.T) {
	dir := t.TempDir()
	c := openCache(t, dir)
	if _, err := Open(dir, Options{}); err == nil {
		t.Fatal("opened twice")
	}
	must(t, c.Close())
	openCache(t, dir)
	ly := newLayer(t, 0, 1)
	if _, err := c.Layer(ly.dgst, ly.index, ly.serve()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Layer after Close: error %v, want os.ErrClosed", err)
	}
	if _, err := c.Layer("sha256:../../etc", ly.index, ly.serve()); err == nil {
		t.Error("took a digest that is none")
	}
}

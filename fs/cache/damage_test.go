package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// Each byte of a blob's frames is changed in turn. Nobody may see wrong bytes, and a second host heals them all.
func TestCorruptBlobNeverReachesAReader(t *testing.T) {
	ly := newLayer(t, 512, 30, 1200)
	l := openLayer(t, openCache(t, t.TempDir()), ly, nil)
	bad := slices.Clone(ly.blob)
	if ly.index.NumChunks() < 4 {
		t.Fatalf("only %d chunks", ly.index.NumChunks())
	}
	for at := range ly.index.FramesSize() {
		bad[at] ^= 0x40
		for _, hosts := range [][][]byte{{bad}, {bad, ly.blob}} {
			l.blob = &memBlob{hosts: hosts}
			p := make([]byte, len(ly.tar))
			_, err := l.ReadAt(t.Context(), p, 0)
			if len(hosts) > 1 {
				must(t, err)
			}
			// A change that zstd does not mind (an unused bit) gives the right bytes.
			if err == nil && !bytes.Equal(p, ly.tar) {
				t.Fatalf("byte %d changed: wrong bytes reached the reader", at)
			}
			if err != nil && (!errors.Is(err, artifact.ErrInvalid) || !errors.Is(err, errNoHost)) {
				t.Fatalf("byte %d changed: error %v, want both ErrInvalid and the Blob's", at, err)
			}
			// Nor may they be on disk.
			poll(t, "end of the fills", func() bool { return l.store.idle() })
			for i := range ly.index.NumChunks() {
				if !l.store.present.has(i) {
					continue
				}
				ch := ly.index.Chunk(i)
				_, err := l.store.data.ReadAt(p[:ch.TarSize], ch.TarOffset)
				must(t, err)
				if !bytes.Equal(p[:ch.TarSize], ly.tar[ch.TarOffset:][:ch.TarSize]) {
					t.Fatalf("byte %d changed: wrong bytes in chunk %d on disk", at, i)
				}
			}
			l.store.forget(0, l.store.n)
		}
		bad[at] ^= 0x40
	}
}

// One bad chunk costs one more request of its frame, and its neighbours nothing.
func TestOnlyTheCorruptChunkIsAskedForAgain(t *testing.T) {
	ly := newLayer(t, 4<<10, 100_000)
	bad := slices.Clone(ly.blob)
	for _, i := range []int{5, 9, 10} {
		ch := ly.index.Chunk(i)
		clear(bad[ch.BlobOffset:][:ch.BlobSize])
	}
	c := openCache(t, t.TempDir())
	b := &memBlob{hosts: [][]byte{bad, ly.blob}}
	l := openLayer(t, c, ly, b)
	off := ly.index.Chunk(3).TarOffset
	n := ly.index.Chunk(13).TarOffset - off
	readRange(t, l, ly, make([]byte, n), off)
	if got := b.requests.Load(); got != 3 {
		t.Errorf("%d requests, want 3: all, chunk 5, chunks 9 and 10", got)
	}
	want := ly.frames(off, n) + ly.index.Chunk(5).BlobSize + ly.index.Chunk(9).BlobSize + ly.index.Chunk(10).BlobSize
	if got := b.bytes.Load(); got != want {
		t.Errorf("%d bytes fetched, want %d", got, want)
	}
	if got := c.Stats().CorruptChunks; got != 3 {
		t.Errorf("%d corrupt chunks, want 3", got)
	}
}

// A Blob that has wrong bytes is asked until it says that it is enough, and right bytes are taken whenever they come.
func TestAskedWhileTheBlobHasPatience(t *testing.T) {
	ly := newLayer(t, 4<<10, 10_000)
	wrong := slices.Repeat([][]byte{make([]byte, len(ly.blob))}, 30)
	b := &memBlob{hosts: wrong}
	l := openLayer(t, openCache(t, t.TempDir()), ly, b)
	if _, err := l.ReadAt(t.Context(), make([]byte, 10), 5000); !errors.Is(err, artifact.ErrInvalid) || !errors.Is(err, errNoHost) {
		t.Errorf("error %v, want ErrInvalid and the Blob's", err)
	}
	if n := b.requests.Load(); n != 31 {
		t.Errorf("%d requests, want 31", n)
	}
	b.hosts = append(wrong[:29:29], ly.blob)
	readRange(t, l, ly, make([]byte, 10), 5000)
}

// tellingBlob notes what it is told is wrong.
type tellingBlob struct {
	Blob
	mu   sync.Mutex
	told [][2]int64
}

type tellingBody struct {
	io.ReadCloser
	blob *tellingBlob
}

func (b *tellingBlob) ReadRange(ctx context.Context, off, n int64, try int) (io.ReadCloser, error) {
	r, err := b.Blob.ReadRange(ctx, off, n, try)
	return &tellingBody{r, b}, err
}

func (r *tellingBody) Wrong(off, n int64) {
	r.blob.mu.Lock()
	defer r.blob.mu.Unlock()
	r.blob.told = append(r.blob.told, [2]int64{off, n})
}

// Who gave wrong bytes is told which, be it for a read or in a stream.
func TestWrongBytesAreTold(t *testing.T) {
	ly := newLayer(t, 4<<10, 100_000)
	ch := ly.index.Chunk(5)
	wrong := slices.Clone(ly.blob)
	clear(wrong[ch.BlobOffset:][:ch.BlobSize])
	want := [2]int64{ch.BlobOffset, ch.BlobSize}
	for name, get := range map[string]func(l *Layer, b *tellingBlob){
		"read": func(l *Layer, b *tellingBlob) { readAll(t, l, ly, 50_000) },
		"stream": func(l *Layer, b *tellingBlob) {
			if err := l.Complete(t.Context(), b); !errors.Is(err, artifact.ErrInvalid) {
				t.Errorf("error %v, want ErrInvalid", err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := &tellingBlob{Blob: &memBlob{hosts: [][]byte{wrong, ly.blob}}}
			l := openLayer(t, exactCache(t), ly, b)
			get(l, b)
			if len(b.told) != 1 || b.told[0] != want {
				t.Errorf("told of %v, want %v", b.told, want)
			}
		})
	}
}

// Runs of wrong chunks do not wait for one another: each may take as long as the blob has patience.
func TestWrongRunsAreAskedForTogether(t *testing.T) {
	ly := newLayer(t, 4<<10, 100_000)
	bad := slices.Clone(ly.blob)
	for _, i := range []int{5, 9} {
		ch := ly.index.Chunk(i)
		clear(bad[ch.BlobOffset:][:ch.BlobSize])
	}
	meet := make(chan struct{}) // both runs' second requests are under way
	var blob blobFunc = func(ctx context.Context, off, n int64, try int) (io.ReadCloser, error) {
		if try == 0 {
			return io.NopCloser(bytes.NewReader(bad[off : off+n])), nil
		}
		select {
		case meet <- struct{}{}:
		case <-meet:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		return io.NopCloser(bytes.NewReader(ly.blob[off : off+n])), nil
	}
	l, err := openCache(t, t.TempDir()).Layer(ly.dgst, ly.index, blob)
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	p := make([]byte, len(ly.tar))
	if _, err := l.ReadAt(ctx, p, 0); err != nil || !bytes.Equal(p, ly.tar) {
		t.Errorf("wrong bytes, or %v", err)
	}
	must(t, l.Close())
}

// lying returns a layer whose index has the headers of ly and the chunks of its tar, in which the first file has another mode.
func lying(t testing.TB, ly *layer) *layer {
	t.Helper()
	other := slices.Clone(ly.tar)
	copy(other[100:], "0000755\x00")
	sum := 0
	for i, b := range other[:512] {
		if i >= 148 && i < 156 {
			b = ' '
		}
		sum += int(b)
	}
	copy(other[148:], fmt.Sprintf("%06o\x00 ", sum))
	truth := encode(t, other, 4<<10)

	// The index: the headers of ly, the chunk table of truth.
	const tableStart, entry = 72, 48
	frame := slices.Clone(ly.blob[ly.index.FramesSize():])
	table := tableStart + entry*ly.index.NumChunks()
	if ly.index.NumChunks() != truth.index.NumChunks() {
		t.Fatal("the tars differ in their chunks")
	}
	copy(frame[tableStart:table], truth.blob[truth.index.FramesSize():][tableStart:table])
	x, err := artifact.DecodeIndex(frame)
	must(t, err)
	return &layer{tar: other, blob: truth.blob, dgst: truth.dgst, index: x}
}

// Headers that the index claims otherwise are corruption, though every chunk's digest is right.
func TestLyingIndexIsRefused(t *testing.T) {
	lie := lying(t, newLayer(t, 4<<10, 3000, 50_000))
	b := &tellingBlob{Blob: lie.serve()}
	l := openLayer(t, openCache(t, t.TempDir()), lie, b)
	if _, err := l.ReadAt(t.Context(), make([]byte, 1), 0); !errors.Is(err, artifact.ErrInvalid) {
		t.Errorf("chunk with other headers: error %v, want ErrInvalid", err)
	}
	if len(b.told) > 0 {
		t.Error("who gave the right bytes is told that they are wrong")
	}
	readRange(t, l, lie, make([]byte, 1000), 40_000) // a chunk without headers
}

func TestShortBodyIsAnError(t *testing.T) {
	ly := newLayer(t, 4<<10, 50_000)
	for _, cut := range []int64{1, ly.index.Chunk(0).BlobSize, ly.index.Chunk(0).BlobSize + 1, ly.index.FramesSize() - 1} {
		b := ly.serve()
		b.cut = cut
		l := openLayer(t, openCache(t, t.TempDir()), ly, b)
		n, err := l.ReadAt(t.Context(), make([]byte, len(ly.tar)), 0)
		if n != 0 || err == io.EOF || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("body of %d bytes: got %d, %v, want io.ErrUnexpectedEOF", cut, n, err)
		}
		b.cut = 0
		readAll(t, l, ly, 7000)
	}
}

// Whatever happens to the files of a layer between two processes costs fetches, never wrong bytes.
func TestDamagedFilesAreMisses(t *testing.T) {
	ly := newLayer(t, 4<<10, 60_000, 100, 9000)
	n := ly.index.NumChunks()
	flip := func(off int64) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			b, err := os.ReadFile(path)
			must(t, err)
			b[off] ^= 1
			must(t, os.WriteFile(path, b, 0o600))
		}
	}
	put := func(b []byte) func(t *testing.T, path string) {
		return func(t *testing.T, path string) { must(t, os.WriteFile(path, b, 0o600)) }
	}
	remove := func(t *testing.T, path string) { must(t, os.Remove(path)) }
	cut := func(size int64) func(t *testing.T, path string) {
		return func(t *testing.T, path string) { must(t, os.Truncate(path, size)) }
	}
	all := append(encodeMapHeader(ly.index, identity(ly.index)), bytes.Repeat([]byte{0xff}, (n+7)/8)...)
	for _, c := range []struct {
		name   string
		file   string
		damage func(t *testing.T, path string)
		misses int // chunks fetched again
	}{
		{"nothing", "map", func(*testing.T, string) {}, 0},
		{"data: flipped bit", "data", flip(30_000), 1},
		{"data: first byte", "data", flip(0), 1},
		{"data: deleted", "data", remove, n},
		{"data: empty", "data", put(nil), n},
		{"data: cut", "data", cut(int64(len(ly.tar)) - 1), n},
		{"data: longer", "data", cut(int64(len(ly.tar)) + 1), n},
		{"data: garbage", "data", put(bytes.Repeat([]byte{0xa5}, len(ly.tar))), n},
		{"map: deleted", "map", remove, n},
		{"map: empty", "map", put(nil), n},
		{"map: cut", "map", cut(mapHeaderSize), n},
		{"map: longer", "map", cut(int64(mapSize(n)) + 1), n},
		{"map: garbage", "map", put(bytes.Repeat([]byte{0xa5}, mapSize(n))), n},
		{"map: magic", "map", flip(0), n},
		{"map: version", "map", flip(8), n},
		{"map: reserved", "map", flip(12), n},
		{"map: tar size", "map", flip(16), n},
		{"map: chunks", "map", flip(24), n},
		{"map: index", "map", flip(63), n},
		{"map: one bit less", "map", flip(64), 1},
		{"map: bits beyond the last chunk", "map", put(all), n},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			cache := openCache(t, dir)
			readAll(t, openLayer(t, cache, ly, ly.serve()), ly, len(ly.tar))
			path := cache.layerDir(ly.dgst) + "/" + c.file
			must(t, cache.Close())

			c.damage(t, path)
			cache = openCache(t, dir)
			readAll(t, openLayer(t, cache, ly, ly.serve()), ly, 5000)
			if got := cache.Stats().Misses + cache.Stats().ReadAhead; got != int64(c.misses) {
				t.Errorf("%d chunks fetched again, want %d", got, c.misses)
			}
			must(t, cache.Close())

			cache = openCache(t, dir)
			b := ly.serve()
			readAll(t, openLayer(t, cache, ly, b), ly, 5000)
			if b.requests.Load() != 0 {
				t.Error("the damage was not healed")
			}
		})
	}
}

// The map claims all, the data is garbage: each chunk is found wrong at its first use.
func TestMapThatClaimsTooMuch(t *testing.T) {
	ly := newLayer(t, 4<<10, 60_000)
	c := openCache(t, t.TempDir())
	must(t, os.MkdirAll(c.layerDir(ly.dgst), 0o700))
	all := newBitmap(ly.index.NumChunks())
	for i := range ly.index.NumChunks() {
		all.set(i)
	}
	must(t, os.WriteFile(c.mapPath(ly.dgst), encodeMap(encodeMapHeader(ly.index, identity(ly.index)), ly.index.NumChunks(), all), 0o600))
	must(t, os.WriteFile(c.dataPath(ly.dgst), bytes.Repeat([]byte{0xa5}, len(ly.tar)), 0o600))
	l := openLayer(t, c, ly, ly.serve())
	readAll(t, l, ly, 3000)
	if got, want := c.Stats().DamagedChunks, int64(ly.index.NumChunks()); got != want {
		t.Errorf("%d damaged chunks, want %d", got, want)
	}
}

// The data file is cut under a running process.
func TestDataCutWhileOpen(t *testing.T) {
	ly := newLayer(t, 4<<10, 60_000)
	c := openCache(t, t.TempDir())
	l := openLayer(t, c, ly, ly.serve())
	readAll(t, l, ly, len(ly.tar))
	must(t, os.Truncate(c.dataPath(ly.dgst), 20_000))
	readAll(t, l, ly, 3000)
	readAll(t, l, ly, len(ly.tar))
	// What is written behind the cut leaves zeros before it, which nobody may take for what was there, whether the cut is first seen by a read or a write.
	for _, missing := range []bool{false, true} {
		must(t, os.Truncate(c.dataPath(ly.dgst), 20_000))
		if missing {
			l.store.forget(l.store.n-1, l.store.n)
		}
		readRange(t, l, ly, make([]byte, 100), int64(len(ly.tar)-100))
		poll(t, "end of the fills", l.store.idle)
		readAll(t, l, ly, 3000)
	}
	if err := c.Err(); err != nil {
		t.Errorf("the disk is said to fail: %v", err)
	}
}

// blobFunc is a Blob.
type blobFunc func(ctx context.Context, off, n int64, try int) (io.ReadCloser, error)

func (f blobFunc) ReadRange(ctx context.Context, off, n int64, try int) (io.ReadCloser, error) {
	return f(ctx, off, n, try)
}

// An index that the disk loses while a chunk is fetched costs the read, and not the process, nor the reads of when it is back.
func TestIndexLost(t *testing.T) {
	for name, table := range map[string]int{"all": 0, "the headers": 1} {
		t.Run(name, func(t *testing.T) { testIndexLost(t, table) })
	}
}

func testIndexLost(t *testing.T, table int) {
	ly := newLayer(t, 4<<10, slices.Repeat([]int{700}, 5000)...)
	path := mapIndex(t, ly)
	index, err := os.ReadFile(path)
	must(t, err)
	keep := table * (72 + 48*ly.index.NumChunks() + 4095) / 4096 * 4096
	if keep >= len(index) {
		t.Fatalf("an index of %d bytes, of which %d are kept", len(index), keep)
	}
	c := openCache(t, t.TempDir())
	lose := true
	l := openLayer(t, c, ly, blobFunc(func(ctx context.Context, off, n int64, try int) (io.ReadCloser, error) {
		if !lose {
			return io.NopCloser(bytes.NewReader(ly.blob[off : off+n])), nil
		}
		return io.NopCloser(bytes.NewReader(ly.blob[off : off+n])), os.Truncate(path, int64(keep))
	}))
	if _, err := l.ReadAt(t.Context(), make([]byte, 10), 5000); err == nil || !strings.Contains(err.Error(), "memory map") {
		t.Errorf("got %v, want that the index is gone", err)
	}
	lose = false
	must(t, os.WriteFile(path, index, 0o600))
	readRange(t, l, ly, make([]byte, 10), 5000)
	must(t, l.Close())
}

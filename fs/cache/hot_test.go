package cache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// patient is for streams that are to come in time on a busy machine.
const patient = time.Minute

// hotBlob is a hot blob of some head and frames.
type hotBlob struct {
	memBlob
	frames []Frame
	head   int64
	n      int64
}

// newHotBlob puts together the frames of the chunks that pick gives, in random order, of the layers.
func newHotBlob(layers []*layer, handles []*Layer, pick func(layer, chunk int) bool) *hotBlob {
	b := &hotBlob{head: 100}
	for l, ly := range layers {
		for i := range ly.index.NumChunks() {
			if pick(l, i) {
				b.frames = append(b.frames, Frame{handles[l], i})
			}
		}
	}
	rand.New(rand.NewPCG(1, 2)).Shuffle(len(b.frames), func(i, j int) { b.frames[i], b.frames[j] = b.frames[j], b.frames[i] })
	blob := make([]byte, b.head)
	for _, f := range b.frames {
		ly := layers[slices.Index(handles, f.Layer)]
		c := ly.index.Chunk(f.Chunk)
		blob = append(blob, ly.blob[c.BlobOffset:c.BlobOffset+c.BlobSize]...)
	}
	b.n = int64(len(blob)) - b.head
	b.hosts = [][]byte{blob}
	return b
}

func (b *hotBlob) fill(ctx context.Context, c *Cache, patience time.Duration) error {
	return c.Share().Fill(ctx, b, b.head, b.n, b.frames, patience)
}

// slowBlob is a hotBlob that sends what it is allowed to.
type slowBlob struct {
	*hotBlob
	allowed atomic.Int64 // bytes
	sent    atomic.Int64
}

func (b *slowBlob) ReadRange(ctx context.Context, off, n int64, try int) (io.ReadCloser, error) {
	r, err := b.hotBlob.ReadRange(ctx, off, n, try)
	return &slowBody{r, b, ctx}, err
}

type slowBody struct {
	io.ReadCloser
	blob *slowBlob
	ctx  context.Context
}

func (r *slowBody) Read(p []byte) (int, error) {
	room := func() int64 { return r.blob.allowed.Load() - r.blob.sent.Load() } // less than nothing, if several read at once
	for n := room(); ; n = room() {
		if n > 0 {
			p = p[:min(int64(len(p)), n)]
			break
		}
		select {
		case <-r.ctx.Done():
			return 0, r.ctx.Err()
		case <-time.After(100 * time.Microsecond):
		}
	}
	n, err := r.ReadCloser.Read(p)
	r.blob.sent.Add(int64(n))
	return n, err
}

// twoLayers opens two layers in c, with blobs that count.
func twoLayers(t testing.TB, c *Cache) (layers []*layer, blobs []*memBlob, handles []*Layer) {
	for _, size := range []int{300_000, 200_000} {
		ly := newLayer(t, 4<<10, size, 50)
		b := ly.serve()
		layers, blobs, handles = append(layers, ly), append(blobs, b), append(handles, openLayer(t, c, ly, b))
	}
	return layers, blobs, handles
}

// readFrames reads the chunks of frames.
func readFrames(t testing.TB, layers []*layer, handles []*Layer, frames []Frame) {
	t.Helper()
	for _, f := range frames {
		ly := layers[slices.Index(handles, f.Layer)]
		c := ly.index.Chunk(f.Chunk)
		readRange(t, f.Layer, ly, make([]byte, c.TarSize), c.TarOffset)
	}
}

func requests(blobs []*memBlob) (n int64) {
	for _, b := range blobs {
		n += b.requests.Load()
	}
	return n
}

func exactCache(t testing.TB) *Cache {
	c, err := Open(t.TempDir(), Options{NoReadAhead: true})
	must(t, err)
	t.Cleanup(func() { must(t, c.Close()) })
	return c
}

func TestFill(t *testing.T) {
	c := exactCache(t)
	layers, blobs, handles := twoLayers(t, c)
	hot := newHotBlob(layers, handles, func(l, i int) bool { return (i+l)%3 != 0 })
	must(t, hot.fill(t.Context(), c, patient))
	readFrames(t, layers, handles, hot.frames)
	if n := requests(blobs); n != 0 || hot.requests.Load() != 1 || hot.bytes.Load() != hot.n {
		t.Errorf("%d requests to the layers, %d to the hot blob for %d bytes; want 0, 1 and %d", n, hot.requests.Load(), hot.bytes.Load(), hot.n)
	}
	if s := c.Stats(); s.Misses != 0 || s.Hot != int64(len(hot.frames)) {
		t.Errorf("%d misses, %d chunks from the stream; want 0 and %d", s.Misses, s.Hot, len(hot.frames))
	}
	for i, l := range handles {
		readAll(t, l, layers[i], 10_000)
	}
	must(t, hot.fill(t.Context(), c, patient))
	if n := hot.requests.Load(); n != 1 {
		t.Error("a hot blob was asked for that brings nothing new")
	}
}

// Reads that begin before the stream wait for it, wherever they are within the reserve.
func TestReadsJoinFill(t *testing.T) {
	c := exactCache(t)
	layers, blobs, handles := twoLayers(t, c)
	hot := &slowBlob{hotBlob: newHotBlob(layers, handles, func(l, i int) bool { return true })}
	done := make(chan error, 1)
	go func() { done <- c.Share().Fill(t.Context(), hot, hot.head, hot.n, hot.frames, patient) }()
	poll(t, "reservation of all", func() bool {
		return handles[0].store.underWay()+handles[1].store.underWay() == len(hot.frames)
	})
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() { readFrames(t, layers, handles, hot.frames[g*len(hot.frames)/8:(g+1)*len(hot.frames)/8]) })
	}
	poll(t, "waiters", func() bool { return handles[0].store.waiting()+handles[1].store.waiting() == 8 })
	hot.allowed.Store(hot.n)
	wg.Wait()
	must(t, <-done)
	if n := requests(blobs); n != 0 || hot.bytes.Load() != hot.n {
		t.Errorf("%d requests to the layers, %d bytes from the hot blob, want 0 and %d", n, hot.bytes.Load(), hot.n)
	}
}

// A stream that stands still holds up a read for its patience, once, and what it still brings later is taken.
func TestFillStandsStill(t *testing.T) {
	c := exactCache(t)
	layers, blobs, handles := twoLayers(t, c)
	hot := &slowBlob{hotBlob: newHotBlob(layers, handles, func(l, i int) bool { return true })}
	hot.allowed.Store(hot.n / 4)
	done := make(chan error, 1)
	go func() { done <- c.Share().Fill(t.Context(), hot, hot.head, hot.n, hot.frames, 50*time.Millisecond) }()
	poll(t, "a quarter", func() bool { return hot.sent.Load() == hot.n/4 })
	half := len(hot.frames) / 2
	readFrames(t, layers, handles, hot.frames[half:half+1])
	if n := requests(blobs); n != 1 {
		t.Errorf("%d requests, want one for the chunk that did not come", n)
	}
	poll(t, "giving back", func() bool { return handles[0].store.idle() && handles[1].store.idle() })
	readFrames(t, layers, handles, hot.frames[half+1:half+5]) // none waits
	before := requests(blobs)
	if before != 5 {
		t.Errorf("%d requests, want one for each chunk", before)
	}
	hot.allowed.Store(hot.n)
	must(t, <-done)
	readFrames(t, layers, handles, hot.frames)
	if n := requests(blobs); n != before {
		t.Errorf("%d chunks were fetched after the stream went on", n-before)
	}
	if s := c.Stats(); s.Hot != int64(len(hot.frames)-5) {
		t.Errorf("the stream brought %d chunks, want %d", s.Hot, len(hot.frames)-5)
	}
}

// A read that waits in vain for a chunk of the stream keeps what it fetches itself meanwhile.
func TestLateReadKeepsItsOwnFetches(t *testing.T) {
	c := exactCache(t)
	ly := newLayer(t, 4<<10, 300_000)
	b := ly.serve()
	b.gate = make(chan struct{})
	l := openLayer(t, c, ly, b)
	hot := &slowBlob{hotBlob: newHotBlob([]*layer{ly}, []*Layer{l}, func(_, i int) bool { return i == 10 })}
	done := make(chan error, 1)
	go func() { done <- c.Share().Fill(t.Context(), hot, hot.head, hot.n, hot.frames, 50*time.Millisecond) }()
	poll(t, "reservation", func() bool { return l.store.underWay() == 1 })
	var reader sync.WaitGroup
	from, to := ly.index.Chunk(10).TarOffset, ly.index.Chunk(12).TarOffset
	reader.Go(func() { readRange(t, l, ly, make([]byte, to-from), from) })
	poll(t, "both requests", func() bool { return b.requests.Load() >= 2 }) // of chunk 11, and then of chunk 10
	close(b.gate)
	reader.Wait()
	hot.allowed.Store(hot.n)
	must(t, <-done)
	if n, cancelled := b.requests.Load(), b.cancelled.Load(); n != 2 || cancelled != 0 {
		t.Errorf("%d requests, %d of them cancelled; want one for each of two chunks", n, cancelled)
	}
}

func TestFillSkips(t *testing.T) {
	c := exactCache(t)
	big := newLayer(t, 64<<10, 8<<20)
	l := openLayer(t, c, big, big.serve())
	layers, handles := []*layer{big}, []*Layer{l}
	hot := newHotBlob(layers, handles, func(_, i int) bool { return true })
	// All but the first and the last few are here.
	readFrames(t, layers, handles, hot.frames[2:len(hot.frames)-3])
	must(t, hot.fill(t.Context(), c, patient))
	want := int64(0)
	for _, f := range slices.Concat(hot.frames[:2], hot.frames[len(hot.frames)-3:]) {
		want += big.index.Chunk(f.Chunk).BlobSize
	}
	if hot.requests.Load() != 2 || hot.bytes.Load() != want {
		t.Errorf("%d requests for %d bytes, want 2 for the %d that are missing", hot.requests.Load(), hot.bytes.Load(), want)
	}
	misses := c.Stats().Misses
	readFrames(t, layers, handles, hot.frames)
	if n := c.Stats().Misses; n != misses {
		t.Errorf("%d misses", n-misses)
	}
}

// The first frame that is wrong ends it, and nothing of it is seen.
func TestFillIsVerified(t *testing.T) {
	for name, damage := range map[string]func(h *hotBlob){
		"bytes": func(h *hotBlob) {
			h.hosts[0] = bytes.Clone(h.hosts[0])
			for i := h.head + h.n/2; i < h.head+h.n/2+5000; i++ {
				h.hosts[0][i] ^= 0x55
			}
		},
		"another order":      func(h *hotBlob) { slices.Reverse(h.frames) },
		"no such chunk":      func(h *hotBlob) { h.frames[3].Chunk = 1 << 20 },
		"a chunk too many":   func(h *hotBlob) { h.frames = append(h.frames, Frame{h.frames[0].Layer, 0}) },
		"more than its size": func(h *hotBlob) { h.n-- },
		"ends early":         func(h *hotBlob) { h.cut = h.n / 2 },
	} {
		t.Run(name, func(t *testing.T) {
			c := exactCache(t)
			layers, _, handles := twoLayers(t, c)
			hot := newHotBlob(layers, handles, func(l, i int) bool { return i > 0 })
			damage(hot)
			err := hot.fill(t.Context(), c, patient)
			if want := artifact.ErrInvalid; err == nil || hot.cut == 0 && !errors.Is(err, want) {
				t.Errorf("error %v, want %v", err, want)
			}
			for i, l := range handles {
				if !l.store.idle() {
					t.Error("chunks are still reserved")
				}
				readAll(t, l, layers[i], 10_000)
			}
		})
	}
}

func TestFillEnds(t *testing.T) {
	for name, end := range map[string]func(cancel func(), l *Layer){
		"cancelled": func(cancel func(), _ *Layer) { cancel() },
		"closed":    func(_ func(), l *Layer) { l.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			c := exactCache(t)
			layers, _, handles := twoLayers(t, c)
			hot := &slowBlob{hotBlob: newHotBlob(layers, handles, func(l, i int) bool { return true })}
			hot.allowed.Store(hot.n / 3)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan error, 1)
			go func() { done <- c.Share().Fill(ctx, hot, hot.head, hot.n, hot.frames, patient) }()
			poll(t, "a third", func() bool { return hot.sent.Load() == hot.n/3 })
			read := make(chan struct{})
			go func() {
				defer close(read)
				readAll(t, handles[0], layers[0], 20_000)
			}()
			poll(t, "a waiter", func() bool { return handles[0].store.waiting() > 0 })
			end(cancel, handles[1])
			if err := <-done; !errors.Is(err, context.Canceled) {
				t.Errorf("error %v, want context.Canceled", err)
			}
			<-read // it has fetched the rest itself
			if name == "closed" {
				if err := c.Share().Fill(t.Context(), hot, hot.head, hot.n, hot.frames, patient); !errors.Is(err, os.ErrClosed) {
					t.Errorf("of a closed layer: error %v, want os.ErrClosed", err)
				}
			}
		})
	}
}

// A cache with a limit is filled by a quarter at most, by all streams of a share and with what they copy.
func TestFillHasALimit(t *testing.T) {
	const limit = 4 << 20
	ly := newLayer(t, 16<<10, 600_000, 1<<20)
	other := encode(t, append(bytes.Clone(ly.tar[:512+600_064]), make([]byte, 1024)...), 16<<10) // the first file
	for name, had := range map[string]bool{"streamed": false, "copied": true} {
		t.Run(name, func(t *testing.T) {
			c := openSharing(t, t.TempDir(), limit, ly, other)
			if had {
				o := openLayer(t, c, other, other.serve())
				readAll(t, o, other, 100_000)
				pollKnown(t, c, other)
				poll(t, "end of the fills", o.store.idle)
			}
			l := openLayer(t, c, ly, ly.serve())
			hot := newHotBlob([]*layer{ly}, []*Layer{l}, func(_, i int) bool { return true })
			share := c.Share()
			for range 3 {
				must(t, share.Fill(t.Context(), hot, hot.head, hot.n, hot.frames, patient))
			}
			if n := l.Present(); n < limit/4-64<<10 || n > limit/4 {
				t.Errorf("%d bytes were brought of a cache of %d, want a quarter of it", n, limit)
			}
			if n := c.Stats().Copied; had != (n > 30) {
				t.Errorf("%d chunks were copied", n)
			}
			readAll(t, l, ly, 100_000)
		})
	}
}

// Streams, reads and closings in any order.
func TestFillsAtRandom(t *testing.T) {
	for seed := range uint64(8) {
		rnd := rand.New(rand.NewPCG(seed, 3))
		c := openCache(t, t.TempDir())
		layers, _, handles := twoLayers(t, c)
		hot := &slowBlob{hotBlob: newHotBlob(layers, handles, func(l, i int) bool { return rnd.IntN(4) > 0 })}
		var wg sync.WaitGroup
		for range 3 {
			ctx, cancel := context.WithCancel(t.Context())
			wg.Go(func() { c.Share().Fill(ctx, hot, hot.head, hot.n, hot.frames, time.Millisecond) })
			wg.Go(func() {
				defer cancel()
				readFrames(t, layers, handles, hot.frames)
			})
			wg.Go(func() { readAll(t, handles[1], layers[1], 7000) })
		}
		stop := make(chan struct{})
		var feed sync.WaitGroup
		feed.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
					hot.allowed.Add(hot.n / 50)
				}
			}
		})
		wg.Wait()
		close(stop)
		feed.Wait()
		for _, l := range handles {
			poll(t, "end of all flights", l.store.idle)
		}
	}
}

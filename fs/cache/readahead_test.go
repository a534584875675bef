package cache

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
)

// aheadLayer is a layer with two large files; body returns the data run of each.
func aheadLayer(t testing.TB) *layer { return newLayer(t, 64<<10, 6<<20, 4<<20) }

func body(ly *layer, file int) (off, end int64) {
	if file == 0 {
		return 512, 512 + 6<<20
	}
	return 512 + 6<<20 + 512, 512 + 6<<20 + 512 + 4<<20
}

func TestStreamIsReadAhead(t *testing.T) {
	for chunk, size := range map[int]int64{64 << 10: 6 << 20, 512 << 10: 12 << 20} {
		t.Run(fmt.Sprintf("chunks of %d KiB", chunk>>10), func(t *testing.T) {
			ly := newLayer(t, chunk, int(size), 1<<20)
			c := openCache(t, t.TempDir())
			b := ly.serve()
			b.latency = time.Millisecond
			l := openLayer(t, c, ly, b)
			p := make([]byte, 128<<10)
			off, end := int64(512), 512+size
			for o := off; o < end; o += int64(len(p)) {
				readRange(t, l, ly, p, o)
			}
			poll(t, "end of the fills", l.store.idle)
			s := c.Stats()
			if s.ReadAhead < s.Misses*4 {
				t.Errorf("%d chunks were read ahead and %d waited for", s.ReadAhead, s.Misses)
			}
			// Nothing twice, and nothing of the next file but what shares the last chunk.
			if got, want := b.bytes.Load(), ly.frames(off, end-off); got != want {
				t.Errorf("%d bytes fetched, want %d: the frames of the file", got, want)
			}
			if got, most := b.requests.Load(), int64(30); got > most {
				t.Errorf("%d requests for %d chunks, want at most %d", got, ly.index.NumChunks(), most)
			}
		})
	}
}

// Several streams at once, each by several reads in flight that overtake each other, as the kernel makes them.
func TestConcurrentStreams(t *testing.T) {
	ly := aheadLayer(t)
	c := openCache(t, t.TempDir())
	b := ly.serve()
	b.latency = time.Millisecond
	l := openLayer(t, c, ly, b)
	var wg sync.WaitGroup
	for file := range 2 {
		off, end := body(ly, file)
		places := make(chan int64)
		wg.Go(func() {
			defer close(places)
			for o := off; o < end; o += 64 << 10 {
				places <- o
			}
		})
		for range 4 {
			wg.Go(func() {
				p := make([]byte, 64<<10)
				for o := range places {
					n, err := l.ReadAt(t.Context(), p, o)
					if err != nil || string(p[:n]) != string(ly.tar[o:o+int64(n)]) {
						t.Errorf("ReadAt(%d): %v, or wrong bytes", o, err)
					}
				}
			})
		}
	}
	wg.Wait()
	poll(t, "end of the fills", l.store.idle)
	if c.Stats().ReadAhead == 0 { // how many depends on who runs first
		t.Error("no chunk was read ahead")
	}
	off, _ := body(ly, 0)
	_, end := body(ly, 1)
	if got, want := b.bytes.Load(), ly.frames(off, end-off); got > want {
		t.Errorf("%d bytes fetched, want at most %d: the frames of both files", got, want)
	}
}

// Reads that are no stream and not dense fetch what they touch and nothing else.
func TestOtherReadsAreExact(t *testing.T) {
	ly := newLayer(t, 16<<10, 6<<20)
	off, end := body(ly, 0)
	rnd := rand.New(rand.NewPCG(1, 2))
	for name, next := range map[string]func(i int) (off, n int64){
		"random 4 KiB":       func(int) (int64, int64) { return off + rnd.Int64N(end-off-4096), 4096 },
		"random 16 KiB":      func(int) (int64, int64) { return off + rnd.Int64N(end-off-16<<10), 16 << 10 },
		"backwards":          func(i int) (int64, int64) { return end - int64(i+1)*4<<10, 4 << 10 },
		"every fifth 16 KiB": func(i int) (int64, int64) { return off + int64(i)*80<<10, 16 << 10 },
		"one place":          func(int) (int64, int64) { return off, 300 << 10 },
		"short streams":      func(i int) (int64, int64) { return off + int64(i/3)*512<<10 + int64(i%3)*16<<10, 16 << 10 },
	} {
		t.Run(name, func(t *testing.T) {
			c := openCache(t, t.TempDir())
			b := ly.serve()
			l := openLayer(t, c, ly, b)
			touched := newBitmap(ly.index.NumChunks())
			for i := range 30 {
				o, n := next(i)
				readRange(t, l, ly, make([]byte, n), o)
				for ch := ly.index.Find(o); ch <= ly.index.Find(o+n-1); ch++ {
					touched.set(ch)
				}
			}
			poll(t, "end of the fills", l.store.idle)
			var want int64
			for ch := range ly.index.NumChunks() {
				if touched.has(ch) {
					want += ly.index.Chunk(ch).BlobSize
				}
			}
			if got := b.bytes.Load(); got != want {
				t.Errorf("%d bytes fetched, want %d: the frames of the chunks touched", got, want)
			}
		})
	}
}

// Around misses that others came before, more is fetched, and what nobody comes near is not.
func TestNeighbourhood(t *testing.T) {
	small := make([]int, 1200)
	for i := range small {
		small[i] = 5000
	}
	for name, c := range map[string]struct {
		files []int
		exact int // misses that fetch nothing else
		dense int // chunks that are read, in any order
		most  int64
	}{
		"small files": {small, 2, 120, 90},
		"large file":  {[]int{6 << 20}, 8, 120, 118},
	} {
		t.Run(name, func(t *testing.T) {
			ly := newLayer(t, 16<<10, c.files...)
			b := ly.serve()
			cache := openCache(t, t.TempDir())
			l := openLayer(t, cache, ly, b)
			rnd := rand.New(rand.NewPCG(1, 2))
			first := 20
			read := func(i int) {
				readRange(t, l, ly, make([]byte, 100), ly.index.Chunk(i).TarOffset+100)
				poll(t, "end of the fills", l.store.idle)
			}
			for i := range c.exact {
				read(first + i*2%c.dense)
			}
			read(ly.index.NumChunks() - 1)
			if got := b.requests.Load(); got != int64(c.exact)+1 {
				t.Fatalf("%d requests for the first %d chunks", got, c.exact+1)
			}
			for _, i := range rnd.Perm(c.dense) {
				read(first + i)
			}
			if got := b.requests.Load(); got > c.most {
				t.Errorf("%d requests for %d chunks, want at most %d", got, c.dense, c.most)
			}
			for i := range ly.index.NumChunks() - 1 {
				if d := max(first-i, i-first-c.dense); d > 2*nearChunks && l.store.present.has(i) {
					t.Errorf("chunk %d was fetched, %d from what was read", i, d)
				}
			}
			if s := cache.Stats(); s.Misses+s.ReadAhead > int64(c.dense*3/2) {
				t.Errorf("%d chunks were waited for and %d fetched ahead, of which %d were read", s.Misses, s.ReadAhead, c.dense)
			}
		})
	}
}

// The READs of one read-ahead of the kernel come one by one, and each misses chunks of its own.
func TestNeighboursShareARequest(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // all readers come before the request begins
	ly := newLayer(t, 64<<10, 6<<20)
	at := func(i int) int64 { return ly.index.Chunk(i).TarOffset }
	for name, c := range map[string]struct {
		chunks      []int
		least, most int64 // requests; how many depends on who runs first
	}{
		"forwards":  {[]int{10, 11, 12, 13, 14, 15, 16, 17}, 1, 4},
		"backwards": {[]int{17, 16, 15, 14, 13, 12, 11, 10}, 1, 4},
		"apart":     {[]int{10, 12, 14, 20, 21}, 4, 5},
		"long":      {[]int{10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23}, 2, 7},
	} {
		t.Run(name, func(t *testing.T) {
			b := ly.serve()
			l := openLayer(t, exactCache(t), ly, b)
			var wg sync.WaitGroup
			var want int64
			for _, i := range c.chunks {
				want += ly.index.Chunk(i).BlobSize
				wg.Go(func() {
					p := make([]byte, 1000)
					n, err := l.ReadAt(t.Context(), p, at(i)+500)
					if err != nil || string(p[:n]) != string(ly.tar[at(i)+500:at(i)+500+int64(n)]) {
						t.Errorf("ReadAt in chunk %d: %v, or wrong bytes", i, err)
					}
				})
			}
			wg.Wait()
			if got := b.requests.Load(); got < c.least || got > c.most {
				t.Errorf("%d requests for chunks %v, want %d to %d", got, c.chunks, c.least, c.most)
			}
			if got := b.bytes.Load(); got != want {
				t.Errorf("%d bytes fetched, want %d: the frames of the chunks", got, want)
			}
		})
	}
}

// A reader that stops has cost at most its share.
func TestReadAheadIsBounded(t *testing.T) {
	ly := aheadLayer(t)
	c := openCache(t, t.TempDir())
	b := ly.serve()
	l := openLayer(t, c, ly, b)
	off, _ := body(ly, 0)
	const n = 2 << 20
	for o := off; o < off+n; o += 64 << 10 {
		readRange(t, l, ly, make([]byte, 64<<10), o)
	}
	poll(t, "end of the fills", l.store.idle)
	if got, most := b.bytes.Load(), ly.frames(off, n+n/windowShare); got > most {
		t.Errorf("%d bytes fetched for a stream of %d, want at most %d", got, n, most)
	}
}

// walkLayer is a layer of files of sizes; files are their data runs.
func walkLayer(t testing.TB, sizes []int) (ly *layer, files [][2]int64) {
	off := int64(0)
	for _, n := range sizes {
		files = append(files, [2]int64{off + 512, off + 512 + int64(n)})
		off += 512 + (int64(n)+511)/512*512
	}
	return newLayer(t, 16<<10, sizes...), files
}

// Who reads file after file in the order of the tar does not wait for each.
func TestWalkIsReadAhead(t *testing.T) {
	sizes := slices.Repeat([]int{3000, 4000, 5000, 6000, 7000, 8000, 9000}, 200)
	sizes[500], sizes[1000] = 1<<20, 700<<10
	ly, files := walkLayer(t, sizes)
	const piece = 128 << 10 // of the reads of a large file, as the kernel makes them
	for name, c := range map[string]struct {
		skip      func(i int) bool
		overtaken bool  // the pieces of a large file come two by two, the later one first
		most      int64 // requests
	}{
		"every file":      {func(int) bool { return false }, false, 70},
		"pieces overtake": {func(int) bool { return false }, true, 70},
		"some left out":   {func(i int) bool { return i%3 == 0 || i > 700 && i < 720 || i > 1200 && i < 1290 }, false, 100},
	} {
		t.Run(name, func(t *testing.T) {
			b := ly.serve()
			l := openLayer(t, openCache(t, t.TempDir()), ly, b)
			for i, f := range files {
				if c.skip(i) {
					continue
				}
				var offs []int64
				for o := f[0]; o < f[1]; o += piece {
					offs = append(offs, o)
				}
				for k := 0; c.overtaken && k+1 < len(offs); k += 2 {
					offs[k], offs[k+1] = offs[k+1], offs[k]
				}
				for _, o := range offs {
					readRange(t, l, ly, make([]byte, min(piece, f[1]-o)), o)
					poll(t, "end of the fills", l.store.idle)
				}
			}
			if got := b.requests.Load(); got > c.most {
				t.Errorf("%d requests for %d chunks, want at most %d", got, ly.index.NumChunks(), c.most)
			}
		})
	}
}

// A walk that stops, or leaves out more than it reads, has cost at most its share.
func TestWalkIsBounded(t *testing.T) {
	ly, files := walkLayer(t, slices.Repeat([]int{6000}, 3000))
	for name, next := range map[string]func(i int) bool{
		"stops":           func(int) bool { return false },
		"leaves most out": func(i int) bool { return i%20 == 0 },
	} {
		t.Run(name, func(t *testing.T) {
			b := ly.serve()
			l := openLayer(t, openCache(t, t.TempDir()), ly, b)
			touched := newBitmap(ly.index.NumChunks())
			size := int64(0)
			for i, f := range files {
				if i >= 450 && !next(i) {
					continue
				}
				readRange(t, l, ly, make([]byte, f[1]-f[0]), f[0])
				poll(t, "end of the fills", l.store.idle)
				for k := ly.index.Find(f[0]); k <= ly.index.Find(f[1]-1); k++ {
					if !touched.has(k) {
						touched.set(k)
						size += ly.index.Chunk(k).BlobSize
					}
				}
			}
			if got := b.bytes.Load(); got > size*(windowShare+1)/windowShare {
				t.Errorf("%d bytes fetched for chunks of %d", got, size)
			}
		})
	}
}

// Close ends read-ahead and waits for it.
func TestReadAheadEnds(t *testing.T) {
	ly := aheadLayer(t)
	b := ly.serve()
	before := runtime.NumGoroutine()
	c, err := Open(t.TempDir(), Options{})
	must(t, err)
	l := openLayer(t, c, ly, b)
	off, _ := body(ly, 0)
	p := make([]byte, 128<<10)
	for i := range int64(2) {
		readRange(t, l, ly, p, off+i*int64(len(p)))
	}
	poll(t, "end of the fills", l.store.idle)
	if n := b.requests.Load(); n != 2 {
		t.Fatalf("%d requests for two reads, want 2", n)
	}
	b.gate = make(chan struct{})
	done := make(chan error, 1)
	go func() {
		_, err := l.ReadAt(t.Context(), make([]byte, 512<<10), off+256<<10)
		done <- err
	}()
	poll(t, "read-ahead", func() bool { return b.requests.Load() > 3 })
	must(t, c.Close())
	if <-done == nil {
		t.Error("the read at Close gave no error")
	}
	if got, want := b.cancelled.Load(), b.requests.Load()-2; got != want {
		t.Errorf("%d requests were cancelled when Close returned, want %d", got, want)
	}
	poll(t, "end of all goroutines", func() bool { return runtime.NumGoroutine() <= before })
}

// A read that joins a request of read-ahead which then fails makes its own.
func TestReadAheadFails(t *testing.T) {
	ly := aheadLayer(t)
	b := ly.serve()
	b.gate = make(chan struct{})
	b.doomed.Store(aheadRequests)
	l := openLayer(t, openCache(t, t.TempDir()), ly, b)
	off, _ := body(ly, 0)
	for i := range int64(4) { // as four reads of a stream
		l.ahead.read(off+i<<20, off+(i+1)<<20, 0, 1, nil)
	}
	poll(t, "read-ahead", func() bool { return b.requests.Load() >= 2 })
	done := make(chan struct{})
	go func() {
		defer close(done)
		readRange(t, l, ly, make([]byte, 10), off+4<<20)
	}()
	poll(t, "reader", func() bool { return l.store.waiting() == 1 })
	b.doomed.Store(b.requests.Load())
	close(b.gate)
	<-done
}

func TestStreamsAreSeenInAnyOrder(t *testing.T) {
	ly := aheadLayer(t)
	l := openLayer(t, exactCache(t), ly, ly.serve())
	off, _ := body(ly, 0)
	for name, c := range map[string]struct {
		reads   [][2]int64
		forward bool // the last one moved a stream
		want    []stream
	}{
		"in order":           {[][2]int64{{0, 4}, {4, 8}, {8, 12}}, true, []stream{{from: 0, next: 12, reads: 3}}},
		"overlapping":        {[][2]int64{{0, 4}, {2, 8}, {7, 12}}, true, []stream{{from: 0, next: 12, reads: 3}}},
		"again":              {[][2]int64{{0, 4}, {0, 4}, {1, 2}}, false, []stream{{from: 0, next: 4, reads: 1}}},
		"overtaken":          {[][2]int64{{0, 4}, {8, 12}, {4, 8}}, true, []stream{{from: 0, next: 12, reads: 3}}},
		"overtaken by three": {[][2]int64{{0, 4}, {8, 12}, {12, 16}, {16, 20}, {4, 8}}, true, []stream{{from: 0, next: 20, reads: 5}}},
		"backwards":          {[][2]int64{{8, 12}, {4, 8}, {0, 4}}, false, []stream{{from: 0, next: 12, reads: 1}}},
		"two":                {[][2]int64{{0, 4}, {100, 104}, {4, 8}, {104, 108}}, true, []stream{{from: 0, next: 8, reads: 2}, {from: 100, next: 108, reads: 2}}},
	} {
		t.Run(name, func(t *testing.T) {
			r := readAhead{layer: l}
			var st *stream
			for _, rd := range c.reads {
				st = r.note(off+rd[0], off+rd[1])
			}
			if (st != nil) != c.forward {
				t.Errorf("moved forward: %v, want %v", st != nil, c.forward)
			}
			var got []stream
			for _, st := range r.streams {
				got = append(got, stream{from: st.from - off, next: st.next - off, reads: st.reads, bodies: st.bodies})
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("streams %+v, want %+v", got, c.want)
			}
		})
	}
	r := readAhead{layer: l}
	for i := range int64(1000) {
		r.note(off+i*100, off+i*100+1)
	}
	if len(r.streams) != maxStreams {
		t.Errorf("%d streams after 1000 random reads, want %d", len(r.streams), maxStreams)
	}
}

// TestQuiet: reads of what is here predict nothing after Quiet, until one misses.
func TestQuiet(t *testing.T) {
	ly := aheadLayer(t)
	c := openCache(t, t.TempDir())
	b := ly.serve()
	l := openLayer(t, c, ly, b)
	off, end := body(ly, 0)
	middle := off + 2<<20
	p := make([]byte, 1<<20)
	for o := middle - int64(len(p)); o >= off; o -= int64(len(p)) { // backwards, which is no stream
		readRange(t, l, ly, p, o)
	}
	poll(t, "end of the fills", l.store.idle)
	here := b.requests.Load()
	l.Quiet()
	p = p[:64<<10]
	for o := off; o < middle; o += int64(len(p)) {
		readRange(t, l, ly, p, o)
	}
	poll(t, "end of the fills", l.store.idle)
	if got := b.requests.Load() - here; got != 0 {
		t.Errorf("%d requests by reads of what is here", got)
	}
	for o := middle; o < end; o += int64(len(p)) {
		readRange(t, l, ly, p, o)
	}
	if s := c.Stats(); s.ReadAhead < s.Misses {
		t.Errorf("after a miss %d chunks were read ahead and %d waited for", s.ReadAhead, s.Misses)
	}
}

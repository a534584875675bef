package cache

import (
	"context"
	"errors"
	"os"
	"runtime"
	"sync"
	"testing"
)

// waiting returns the number of claims on the chunks under way.
func (s *store) waiting() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := make(map[*fill]bool)
	for _, fl := range s.flights {
		if !seen[fl.fill] {
			seen[fl.fill] = true
			n += fl.fill.waiters
		}
	}
	return n
}

// idle reports whether no chunk is under way.
func (s *store) idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.flights) == len(s.kept)
}

func (s *store) underWay() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.flights)
}

func TestChunkIsFetchedOnce(t *testing.T) {
	ly := newLayer(t, 4<<10, 100_000)
	c := openCache(t, t.TempDir())
	b := ly.serve()
	b.gate = make(chan struct{})
	l := openLayer(t, c, ly, b)

	// 64 readers of the same three chunks, at different places in them.
	first := ly.index.Chunk(3)
	end := ly.index.Chunk(6).TarOffset
	var wg sync.WaitGroup
	for g := range 64 {
		wg.Go(func() {
			from := first.TarOffset + int64(g)
			readRange(t, l, ly, make([]byte, end-from), from)
		})
	}
	poll(t, "64 waiters of 3 chunks", func() bool { return l.store.waiting() == 64*3 })
	close(b.gate)
	wg.Wait()
	if n := b.requests.Load(); n != 1 {
		t.Errorf("%d requests, want 1", n)
	}
	if got, want := b.bytes.Load(), ly.frames(first.TarOffset, end-first.TarOffset); got != want {
		t.Errorf("%d bytes fetched, want %d: the frames of three chunks", got, want)
	}
}

func TestReadFetchesWhatIsMissing(t *testing.T) {
	ly := newLayer(t, 4<<10, 100_000)
	c := openCache(t, t.TempDir())
	b := ly.serve()
	l := openLayer(t, c, ly, b)
	at := func(i int) int64 { return ly.index.Chunk(i).TarOffset }
	read := func(lo, hi int) { readRange(t, l, ly, make([]byte, at(hi)-at(lo)), at(lo)) }

	read(4, 5)
	read(8, 10)
	poll(t, "end of the fills", l.store.idle)
	b.requests.Store(0)
	b.bytes.Store(0)
	read(2, 12) // 2-3, 5-7, 10-11 are missing
	if n := b.requests.Load(); n != 3 {
		t.Errorf("%d requests for three gaps, want 3", n)
	}
	want := ly.frames(at(2), at(4)-at(2)) + ly.frames(at(5), at(8)-at(5)) + ly.frames(at(10), at(12)-at(10))
	if got := b.bytes.Load(); got != want {
		t.Errorf("%d bytes fetched for three gaps, want %d", got, want)
	}
	s := c.Stats()
	if s.Misses != 10 || s.Hits != 3 {
		t.Errorf("%d misses and %d hits, want 10 and 3", s.Misses, s.Hits)
	}
}

func TestCancelledReaderReturns(t *testing.T) {
	ly := newLayer(t, 4<<10, 100_000)
	b := ly.serve()
	b.gate = make(chan struct{})
	l := openLayer(t, openCache(t, t.TempDir()), ly, b)

	// Two readers of a chunk: the first one's end is its own, the second one's is the fetch's.
	ctx1, cancel1 := context.WithCancel(t.Context())
	ctx2, cancel2 := context.WithCancel(t.Context())
	read := func(ctx context.Context) chan error {
		err := make(chan error, 1)
		go func() {
			_, e := l.ReadAt(ctx, make([]byte, 10), 50_000)
			err <- e
		}()
		return err
	}
	err1 := read(ctx1)
	poll(t, "first waiter", func() bool { return l.store.waiting() == 1 })
	err2 := read(ctx2)
	poll(t, "second waiter", func() bool { return l.store.waiting() == 2 })
	cancel1()
	if err := <-err1; !errors.Is(err, context.Canceled) {
		t.Errorf("first reader: error %v, want context.Canceled", err)
	}
	if n := b.cancelled.Load(); n != 0 {
		t.Error("the fetch ended while a reader waited for it")
	}
	cancel2()
	if err := <-err2; !errors.Is(err, context.Canceled) {
		t.Errorf("second reader: error %v, want context.Canceled", err)
	}
	poll(t, "end of the fetch", func() bool { return b.cancelled.Load() == 1 })

	// Whoever comes next is not harmed.
	close(b.gate)
	readRange(t, l, ly, make([]byte, 10), 50_000)
	if n := b.requests.Load(); n != 2 {
		t.Errorf("%d requests, want 2", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.ReadAt(ctx, make([]byte, 10), 90_000); !errors.Is(err, context.Canceled) {
		t.Errorf("reader that was cancelled before: error %v, want context.Canceled", err)
	}
	if n := b.requests.Load(); n != 2 {
		t.Error("a cancelled reader made a request")
	}
}

func TestCloseEndsReadsAndFetches(t *testing.T) {
	ly := newLayer(t, 4<<10, 100_000)
	c := exactCache(t)
	b := ly.serve()
	b.gate = make(chan struct{})
	before := runtime.NumGoroutine()
	l := openLayer(t, c, ly, b)
	errs := make(chan error, 4)
	for i := range cap(errs) {
		go func() {
			_, err := l.ReadAt(t.Context(), make([]byte, 10), int64(i*20_000))
			errs <- err
		}()
	}
	poll(t, "4 requests", func() bool { return b.requests.Load() == 4 })
	must(t, l.Close())
	for range cap(errs) {
		if err := <-errs; !errors.Is(err, os.ErrClosed) {
			t.Errorf("reader at Close: error %v, want os.ErrClosed", err)
		}
	}
	if n := b.cancelled.Load(); n != 4 {
		t.Errorf("%d fetches cancelled when Close returned, want 4", n)
	}
	poll(t, "end of all goroutines", func() bool { return runtime.NumGoroutine() <= before })
	if n := openFiles(t, c.dir); n != 1 {
		t.Errorf("%d files open after Close, want 1", n)
	}
}

// A fetch is its starter's: when that closes, or its Blob fails, the others turn to their own.
func TestOthersFetchSurvives(t *testing.T) {
	for _, how := range []string{"close", "failure"} {
		t.Run(how, func(t *testing.T) {
			ly := newLayer(t, 4<<10, 100_000)
			c := openCache(t, t.TempDir())
			b1, b2 := ly.serve(), ly.serve()
			b1.gate = make(chan struct{})
			l1, l2 := openLayer(t, c, ly, b1), openLayer(t, c, ly, b2)
			var wg sync.WaitGroup
			wg.Go(func() {
				if _, err := l1.ReadAt(t.Context(), make([]byte, 10), 0); err == nil {
					t.Error("no error for the starter")
				}
			})
			poll(t, "first waiter", func() bool { return l1.store.waiting() == 1 })
			wg.Go(func() { readRange(t, l2, ly, make([]byte, 10), 0) })
			poll(t, "second waiter", func() bool { return l1.store.waiting() == 2 })
			if how == "close" {
				must(t, l1.Close())
			} else {
				b1.down.Store(true)
				close(b1.gate)
			}
			wg.Wait()
			if n := b2.requests.Load(); n != 1 {
				t.Errorf("%d requests of the second, want 1", n)
			}
		})
	}
}

// Readers that open, read, give up and close at random leave nothing behind and see only the truth.
func TestManyOpenersAtOnce(t *testing.T) {
	ly := newLayer(t, 2<<10, 200_000, 10, 20, 30_000)
	dir := t.TempDir()
	c := openCache(t, dir)
	before := runtime.NumGoroutine()
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 30 {
				l, err := c.Layer(ly.dgst, ly.index, ly.serve())
				if err != nil {
					t.Errorf("open: %v", err)
					return
				}
				ctx, cancel := context.WithCancel(t.Context())
				var readers sync.WaitGroup
				for r := range 3 {
					readers.Go(func() {
						off := int64((g*7919 + i*104729 + r*31337) % len(ly.tar))
						p := make([]byte, min(9000, len(ly.tar)-int(off)))
						n, err := l.ReadAt(ctx, p, off)
						switch {
						case err == nil && string(p[:n]) != string(ly.tar[off:off+int64(len(p))]):
							t.Error("wrong bytes")
						case err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, os.ErrClosed):
							t.Errorf("read: %v", err)
						}
					})
				}
				if i%3 == 0 {
					cancel()
				}
				if i%5 == 0 {
					c.flush()
				}
				if i%2 == 0 {
					readers.Wait()
				}
				if err := l.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
				readers.Wait()
				cancel()
			}
		})
	}
	wg.Wait()
	poll(t, "end of all goroutines", func() bool { return runtime.NumGoroutine() <= before })
	if n := openFiles(t, dir); n != 1 {
		t.Errorf("%d files open, want 1", n)
	}
	if len(c.slots) != 0 || len(c.handles) != 0 {
		t.Errorf("%d slots and %d handles left", len(c.slots), len(c.handles))
	}
}

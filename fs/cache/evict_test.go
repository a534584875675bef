package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

func limited(t testing.TB, dir string, limit int64) *Cache {
	t.Helper()
	c, err := Open(dir, Options{Limit: limit})
	must(t, err)
	t.Cleanup(func() { must(t, c.Close()) })
	return c
}

// diskUsage is what du would say of the layers in c.
func diskUsage(t testing.TB, c *Cache) int64 {
	t.Helper()
	n, err := c.Usage(c.layersOnDisk()...)
	must(t, err)
	return n
}

// Many read more than the cache may hold, for ever as it were: every byte is right, everybody gets on, and the disk used stays below the limit.
func TestWorkingSetLargerThanTheLimit(t *testing.T) {
	const limit = 2 << 20
	var layers []*layer
	for i := range 3 {
		layers = append(layers, newLayer(t, 16<<10, 1<<20, 3000, 70_000, 100, 1<<20+i, 5000))
	}
	c := limited(t, t.TempDir(), limit)
	handles := make([]*Layer, len(layers))
	for i, ly := range layers {
		handles[i] = openLayer(t, c, ly, ly.serve())
	}
	rounds := 4
	if os.Getenv("FULL") != "" {
		rounds = 60
	}
	var over atomic.Int64
	watching := make(chan struct{})
	var watcher, readers sync.WaitGroup
	watcher.Go(func() {
		for {
			select {
			case <-watching:
				return
			default:
			}
			c.evictMu.Lock() // or what moves from layer to layer is counted twice
			n := diskUsage(t, c)
			c.evictMu.Unlock()
			if n > limit {
				over.Store(n)
			}
		}
	})
	for g := range 8 {
		readers.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(g), 5))
			// On a busy machine the evictions come late.
			for round := 0; round < rounds || c.Stats().Evicted == 0 && t.Context().Err() == nil; round++ {
				k := rnd.IntN(len(layers))
				ly, l := layers[k], handles[k]
				p := make([]byte, 1+rnd.IntN(100_000))
				for off := 0; off < len(ly.tar); {
					n, err := l.ReadAt(t.Context(), p, int64(off))
					if err != nil && err != io.EOF {
						t.Errorf("read at %d: %v", off, err)
						return
					}
					if !slices.Equal(p[:n], ly.tar[off:off+n]) {
						t.Errorf("reader %d: wrong bytes at %d", g, off)
						return
					}
					off += n
				}
			}
		})
	}
	readers.Wait()
	close(watching)
	watcher.Wait()
	if n := over.Load(); n > 0 {
		t.Errorf("%d bytes on disk, the limit is %d", n, limit)
	}
	st := c.Stats()
	if st.Evicted == 0 || st.DamagedChunks != 0 || st.DiskErrors != 0 || st.CorruptChunks != 0 {
		t.Errorf("%+v", st)
	}
	t.Logf("%+v", st)
	for _, l := range handles { // what one layer still writes may cost another its chunks
		poll(t, "end of the fills", l.store.idle)
	}
	c.flush()
	c.evictMu.Lock() // or the flusher's makes a hole between the reading of a map and of its data
	defer c.evictMu.Unlock()
	for i := range handles {
		checkMap(t, c.layerDir(layers[i].dgst), layers[i])
	}
}

// Chunks are evicted under readers who keep looking at them, as often as can be.
func TestEvictionUnderReaders(t *testing.T) {
	ly := newLayer(t, 4<<10, 60_000, 100, 9000, 3000, 500, 40_000)
	c := openCache(t, t.TempDir())
	l := openLayer(t, c, ly, ly.serve())
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var readers sync.WaitGroup
	var reads atomic.Int64
	for g := range 4 {
		readers.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(g), 6))
			p := make([]byte, 20_000)
			for ctx.Err() == nil {
				off := rnd.IntN(len(ly.tar) - len(p))
				n := 1 + rnd.IntN(len(p))
				if _, err := l.ReadAt(t.Context(), p[:n], int64(off)); err != nil {
					t.Error(err)
					return
				}
				if !slices.Equal(p[:n], ly.tar[off:off+n]) {
					t.Errorf("wrong bytes in %d at %d", n, off)
					return
				}
				reads.Add(1)
			}
		})
	}
	rnd := rand.New(rand.NewPCG(7, 7))
	for i := 0; i < 400 || reads.Load() < 2000; i++ {
		part := rnd.IntN(4)
		l.store.evict(func(int) bool { return rnd.IntN(4) <= part })
		if t.Failed() {
			break
		}
	}
	stop()
	readers.Wait()
	poll(t, "end of the fills", l.store.idle)
	c.flush()
	checkMap(t, c.layerDir(ly.dgst), ly)
	if st := c.Stats(); st.DamagedChunks != 0 || st.Evicted == 0 {
		t.Errorf("%+v", st)
	}
}

// What was used least recently goes first, in the next life too, and what goes is off the disk to the last block.
func TestLeastRecentlyUsedGoesFirst(t *testing.T) {
	ly := newLayer(t, 64<<10, 4<<20)
	dir := t.TempDir()
	c := limited(t, dir, 1<<30)
	l := openLayer(t, c, ly, ly.serve())
	readAll(t, l, ly, 1<<20)
	poll(t, "end of the fills", l.store.idle)
	old := now() - 1000
	for i := range l.store.recent {
		l.store.recent[i].Store(old)
	}
	l.store.touch(20, 30)
	must(t, c.Close())

	c = limited(t, dir, 1<<30)
	l = openLayer(t, c, ly, ly.serve())
	c.giveBack(3 << 20)
	for i := 20; i < 30; i++ {
		if !l.store.present.has(i) {
			t.Errorf("chunk %d, used a moment ago, was evicted", i)
		}
	}
	if n := diskUsage(t, c); n > 1<<20+200<<10 || n < 10*64<<10 {
		t.Errorf("%d bytes on disk after 3 of 4 MiB were given back", n)
	}
	l.store.evict(func(int) bool { return true })
	if n, err := dirUsage(c.layerDir(ly.dgst)); err != nil || n > 3*blockSize {
		t.Errorf("%d bytes on disk (%v) when all chunks were given back", n, err)
	}
	readAll(t, l, ly, 100_000)
}

// Blocks that chunks share go with the last of them, in whatever order they go.
func TestSharedBlocksAreGivenBack(t *testing.T) {
	ly := newLayer(t, 1<<10, 3000, 5000, 700, 20_000, 1, 600, 9000)
	for seed := range uint64(30) {
		rnd := rand.New(rand.NewPCG(seed, 8))
		c := openCache(t, t.TempDir())
		l := openLayer(t, c, ly, ly.serve())
		readAll(t, l, ly, len(ly.tar))
		poll(t, "end of the fills", l.store.idle)
		for k := range 20 {
			l.store.evict(func(int) bool { return k == 19 || rnd.IntN(8) == 0 })
			checkMap(t, c.layerDir(ly.dgst), ly)
		}
		if n, err := dirUsage(c.layerDir(ly.dgst)); err != nil || n > 2*blockSize {
			t.Errorf("seed %d: %d bytes on disk (%v) when all chunks were given back", seed, n, err)
		}
		readAll(t, l, ly, 3000)
		must(t, c.Close())
	}
}

// Layers that nobody has open go as a whole; others' files stay.
func TestIdleLayersAreEvicted(t *testing.T) {
	a, b := newLayer(t, 64<<10, 1<<20), newLayer(t, 64<<10, 1<<20, 10)
	c := limited(t, t.TempDir(), 1<<30)
	la := openLayer(t, c, a, a.serve())
	readAll(t, la, a, 1<<20)
	must(t, la.Close())
	long := time.Now().Add(-time.Hour)
	for _, p := range []string{c.mapPath(a.dgst), c.usesPath(a.dgst)} {
		must(t, os.Chtimes(p, long, long))
	}
	others := filepath.Join(c.layerDir(a.dgst), "others")
	must(t, os.WriteFile(others, nil, 0o600))
	lb := openLayer(t, c, b, b.serve())
	readAll(t, lb, b, 1<<20)
	poll(t, "end of the fills", lb.store.idle)
	c.giveBack(500_000)
	if n, err := c.Usage(a.dgst); n != 0 || err != nil {
		t.Errorf("the layer that is not open has %d bytes (%v)", n, err)
	}
	if c.Stats().Evicted != 0 {
		t.Error("chunks in use went before what is not open")
	}
	if _, err := os.Stat(others); err != nil {
		t.Error(err)
	}
	readAll(t, openLayer(t, c, a, a.serve()), a, 1<<20)
}

func TestRetain(t *testing.T) {
	a, b, d := newLayer(t, 64<<10, 1<<20), newLayer(t, 64<<10, 1<<20, 10), newLayer(t, 64<<10, 1<<20, 10, 20)
	c := openCache(t, t.TempDir())
	for _, ly := range []*layer{a, b, d} {
		l := openLayer(t, c, ly, ly.serve())
		readAll(t, l, ly, 1<<20)
		if ly != d {
			must(t, l.Close())
		}
	}
	ld := openLayer(t, c, d, d.serve())
	used := func(ly *layer) bool {
		n, err := c.Usage(ly.dgst)
		must(t, err)
		return n > 0
	}
	must(t, c.Retain(func(dgst digest.Digest) bool { return dgst == b.dgst }))
	if used(a) || !used(b) || !used(d) {
		t.Errorf("on disk: a %v, b %v, d (open) %v; want b and d", used(a), used(b), used(d))
	}
	readAll(t, ld, d, 1<<20)
	for _, l := range c.openLayers() {
		must(t, l.Close())
	}
	if used(d) {
		t.Error("a layer that is not used stays when it was closed")
	}
	if len(c.slots) != 0 {
		t.Errorf("%d slots, want none", len(c.slots))
	}
}

// A crash between the map and the hole leaves bytes that nobody claims: they are found and given back.
func TestUnclaimedBytesAreGivenBack(t *testing.T) {
	ly := newLayer(t, 64<<10, 4<<20)
	c := limited(t, t.TempDir(), 1<<30)
	l := openLayer(t, c, ly, ly.serve())
	readAll(t, l, ly, 1<<20)
	poll(t, "end of the fills", l.store.idle)
	l.store.forget(5, l.store.n)
	c.giveBack(0)
	if n := diskUsage(t, c); n > 600<<10 {
		t.Errorf("%d bytes on disk for 5 chunks", n)
	}
	checkMap(t, c.layerDir(ly.dgst), ly)
	readAll(t, l, ly, 1<<20)
}

// Power is lost at any moment of evictions: no map claims what is not there.
func TestPowerLossDuringEviction(t *testing.T) {
	ly := newLayer(t, 3<<10, 200_000, 700, 9000)
	claimed, seeds := 0, uint64(10)
	if os.Getenv("FULL") != "" {
		seeds = 200
	}
	for seed := range seeds {
		rnd := rand.New(rand.NewPCG(seed, 9))
		root := t.TempDir()
		d := &volatileDisk{disk: unsynced{}, files: make(map[string]*volatileFile)}
		c, err := open(filepath.Join(root, "cache"), Options{}, d)
		must(t, err)
		l := openLayer(t, c, ly, ly.serve())
		crash := func() {
			lost := filepath.Join(root, fmt.Sprint(rnd.Uint64()), filepath.Base(c.layerDir(ly.dgst)))
			d.crash(t, lost, rnd)
			claimed += checkMap(t, lost, ly)
			must(t, os.RemoveAll(filepath.Dir(lost)))
		}
		for range 20 {
			readRange(t, l, ly, make([]byte, 30_000), rnd.Int64N(int64(len(ly.tar))-30_000))
			poll(t, "end of the fills", l.store.idle)
			if rnd.IntN(2) == 0 {
				c.flush()
			}
			d.meanwhile = crash // after the data's sync, and after the map's
			l.store.evict(func(int) bool { return rnd.IntN(3) == 0 })
			d.meanwhile = nil
			crash()
		}
		readAll(t, l, ly, 10_000)
		must(t, c.Close())
	}
	if claimed == 0 {
		t.Error("no map claimed anything: the test has tested nothing")
	}
}

// Each disk operation of reads and evictions fails in turn.
func TestFailingDiskDuringEviction(t *testing.T) {
	ly := newLayer(t, 4<<10, 40_000, 100, 9000)
	for _, forever := range []bool{false, true} {
		for at := int64(0); ; at++ {
			d := &faultyDisk{disk: unsynced{}, err: syscall.EIO, at: at, forever: forever}
			c, err := open(t.TempDir(), Options{}, d)
			must(t, err)
			l := openLayer(t, c, ly, ly.serve())
			for k := range 3 {
				readAll(t, l, ly, 10_000)
				poll(t, "end of the fills", l.store.idle)
				l.store.evict(func(i int) bool { return (i+k)%6 < 4 }) // runs, or no block would be free
				checkMap(t, c.layerDir(ly.dgst), ly)
			}
			readAll(t, l, ly, 10_000)
			poll(t, "end of the fills", l.store.idle)
			failed := d.ops.Load() > at
			if failed && !errors.Is(c.Err(), syscall.EIO) {
				t.Errorf("operation %d: Err is %v", at, c.Err())
			}
			c.Close() // it may fail with the disk
			checkMap(t, c.layerDir(ly.dgst), ly)
			if !failed {
				break
			}
		}
	}
}

// A disk that refuses files, and is well again later, is used again; the state says so.
func TestDiskRecovers(t *testing.T) {
	ly := newLayer(t, 4<<10, 100_000)
	d := &faultyDisk{disk: osDisk{}, err: syscall.EROFS, forever: true}
	c, err := open(t.TempDir(), Options{}, d)
	must(t, err)
	t.Cleanup(func() { must(t, c.Close()) })
	l := openLayer(t, c, ly, ly.serve())
	readAll(t, l, ly, 10_000)
	if st := c.Status(); !st.NotCaching || !errors.Is(st.Err, syscall.EROFS) {
		t.Errorf("status of a disk that refuses: %+v", st)
	}
	poll(t, "end of the fills", l.store.idle)
	d.ops.Store(-1 << 40)
	c.flush()
	readAll(t, l, ly, 10_000)
	poll(t, "end of the fills", l.store.idle)
	c.flush()
	if st := c.Status(); st.NotCaching {
		t.Errorf("status of a disk that is well again: %+v", st)
	}
	if checkMap(t, c.layerDir(ly.dgst), ly) == 0 {
		t.Error("nothing is cached after the disk is well again")
	}
}

func FuzzDecodeMap(f *testing.F) {
	ly := newLayer(f, 4<<10, 300_000)
	n := ly.index.NumChunks()
	header := encodeMapHeader(ly.index, identity(ly.index))
	some := newBitmap(n)
	some.set(3)
	f.Add(encodeMap(header, n, some))
	f.Add(encodeMap(header, n, newBitmap(n))[:mapHeaderSize])
	f.Fuzz(func(t *testing.T, m []byte) {
		b, err := decodeMap(header, n, m)
		if err != nil {
			if !errors.Is(err, errStale) {
				t.Errorf("error %v, want errStale", err)
			}
			return
		}
		if got := encodeMap(header, n, b); !slices.Equal(got, m) {
			t.Errorf("%x is encoded as %x", m, got)
		}
	})
}

// readHook is a disk with something that happens around the next read, once the reader has decided for it.
type readHook struct {
	osDisk
	before, after func()
}

type readHookFile struct {
	file
	disk *readHook
}

func (d *readHook) open(path string) (file, error) {
	f, err := d.osDisk.open(path)
	return &readHookFile{f, d}, err
}

func (f *readHookFile) ReadAt(p []byte, off int64) (int, error) {
	before, after := f.disk.before, f.disk.after
	f.disk.before, f.disk.after = nil, nil
	if before != nil {
		before()
	}
	n, err := f.file.ReadAt(p, off)
	if after != nil {
		after()
	}
	return n, err
}

// A chunk is given back between a reader's look at verified and its pread, and may even be back before it looks again.
func TestEvictionInTheMiddleOfARead(t *testing.T) {
	ly := newLayer(t, 4<<10, 60_000)
	for _, back := range []bool{false, true} {
		for _, n := range []int{100, 30_000} { // all on disk, and also what is not
			d := &readHook{}
			c, err := open(t.TempDir(), Options{NoReadAhead: true}, d)
			must(t, err)
			l := openLayer(t, c, ly, ly.serve())
			readRange(t, l, ly, make([]byte, 20_000), 10_000)
			poll(t, "end of the fills", l.store.idle)
			called := false
			d.before = func() {
				called = true
				l.store.evict(func(int) bool { return true })
			}
			if back {
				d.after = func() {
					readRange(t, l, ly, make([]byte, 20_000), 10_000)
					poll(t, "end of the fills", func() bool { return l.store.verified.has(ly.index.Find(12_000)) })
				}
			}
			readRange(t, l, ly, make([]byte, n), 12_000)
			if !called {
				t.Error("the read did not come from disk")
			}
			must(t, c.Close())
		}
	}
}

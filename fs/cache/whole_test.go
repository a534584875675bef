package cache

import (
	"bytes"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

func noPace(int64) error { return nil }

// whole makes l, all of which is here, whole.
func whole(t testing.TB, l *Layer) (path string) {
	t.Helper()
	for err := ErrLeft; errors.Is(err, ErrLeft); {
		if err = l.Verify(t.Context(), noPace); err != nil && !errors.Is(err, ErrLeft) {
			t.Fatal(err)
		}
		poll(t, "end of the fills", l.store.idle)
	}
	paths, err := l.store.cache.Whole([]*Layer{l, l})
	must(t, err)
	if len(paths) != 2 || paths[0] != paths[1] {
		t.Errorf("paths %q of one layer twice", paths)
	}
	return paths[0]
}

// wantTar compares a file with the layer's tar, byte for byte.
func wantTar(t testing.TB, path string, ly *layer) {
	t.Helper()
	got, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Equal(got, ly.tar) {
		t.Errorf("%s is not the tar", path)
	}
}

// Only what is proven in this life is whole, all of it, and it is the tar; nothing of it is given back by the chunk.
func TestWhole(t *testing.T) {
	ly := newLayer(t, 16<<10, 1<<20, 100, 70_000)
	dir := t.TempDir()
	c := limited(t, dir, 1<<30)
	l := openLayer(t, c, ly, ly.serve())
	if _, err := c.Whole([]*Layer{l}); !errors.Is(err, ErrNotWhole) {
		t.Errorf("error %v of a layer of which nothing is here", err)
	}
	readAll(t, l, ly, 100_000)
	poll(t, "end of the fills", l.store.idle)
	l.store.evict(func(i int) bool { return i == 7 })
	c.flush()
	if _, err := c.Whole([]*Layer{l}); !errors.Is(err, ErrNotWhole) {
		t.Errorf("error %v of a layer with a hole", err)
	}
	readAll(t, l, ly, 100_000)
	poll(t, "end of the fills", l.store.idle)
	path := whole(t, l)
	wantTar(t, path, ly)
	before, evicted := diskUsage(t, c), c.Stats().Evicted
	l.store.evict(func(int) bool { return true })
	c.giveBack(1 << 20)
	l.store.forget(0, 3)
	l.store.trim()
	if n := diskUsage(t, c); n != before || c.Stats().Evicted != evicted {
		t.Errorf("%d of %d bytes are left, %d chunks were evicted", n, before, c.Stats().Evicted-evicted)
	}
	wantTar(t, path, ly)
	readAll(t, l, ly, 50_000)
	must(t, c.Close())

	// In the next life it is what it was, also where an older release has begun anew beside it, but nothing is proven yet.
	must(t, os.WriteFile(c.dataPath(ly.dgst), make([]byte, len(ly.tar)), 0o600))
	c = limited(t, dir, 1<<30)
	b := ly.serve()
	l = openLayer(t, c, ly, b)
	if _, err := c.Whole([]*Layer{l}); !errors.Is(err, ErrNotWhole) {
		t.Errorf("error %v of what was not proven", err)
	}
	l.store.evict(func(int) bool { return true })
	if got := whole(t, l); got != path {
		t.Errorf("path %s, was %s", got, path)
	}
	wantTar(t, path, ly)
	readAll(t, l, ly, 50_000)
	if s := c.Stats(); b.requests.Load() != 0 || s.Verified != int64(ly.index.NumChunks()) || s.Waits != 0 {
		t.Errorf("%d requests, %+v", b.requests.Load(), s)
	}
	if _, err := os.Stat(c.dataPath(ly.dgst)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what an older release has left: %v", err)
	}
}

// What the disk has damaged is found before a file is given out, and mended in its place.
func TestDamagedWholeFile(t *testing.T) {
	ly := newLayer(t, 16<<10, 1<<20)
	dir := t.TempDir()
	c := openCache(t, dir)
	l := openLayer(t, c, ly, ly.serve())
	readAll(t, l, ly, 100_000)
	poll(t, "end of the fills", l.store.idle)
	path := whole(t, l)
	user, err := os.Open(path)
	must(t, err)
	defer user.Close()
	must(t, c.Close())
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("damage"), 300_000)
	must(t, errors.Join(err, f.Close()))

	c = openCache(t, dir)
	b := ly.serve()
	l = openLayer(t, c, ly, b)
	whole(t, l)
	if s := c.Stats(); s.DamagedChunks != 1 || b.requests.Load() != 1 {
		t.Errorf("%d requests, %+v", b.requests.Load(), s)
	}
	got := make([]byte, len(ly.tar))
	if _, err := user.ReadAt(got, 0); err != nil || !bytes.Equal(got, ly.tar) {
		t.Errorf("who has had it open all the time does not read the tar: %v", err)
	}

	// One that was cut is none.
	must(t, c.Close())
	must(t, os.Truncate(path, 1000))
	c = openCache(t, dir)
	l = openLayer(t, c, ly, ly.serve())
	readAll(t, l, ly, 100_000)
	poll(t, "end of the fills", l.store.idle)
	wantTar(t, whole(t, l), ly)
}

// A whole file that somebody has open, of whatever life, counts as used and stays; when nobody does it goes as a whole. Such files take half of the limit.
func TestWholeFilesAndTheLimit(t *testing.T) {
	const limit = 4 << 20
	dir := t.TempDir()
	a, b := newLayer(t, 64<<10, 1<<20, 700_000), newLayer(t, 64<<10, 1<<20, 10)
	c := limited(t, dir, limit)
	la, lb := openLayer(t, c, a, a.serve()), openLayer(t, c, b, b.serve())
	readAll(t, la, a, 100_000)
	readAll(t, lb, b, 100_000)
	poll(t, "end of the fills", func() bool { return la.store.idle() && lb.store.idle() })
	c.flush()
	if _, err := c.Whole([]*Layer{la, lb}); !errors.Is(err, ErrFull) {
		t.Errorf("error %v for more than half of the limit", err)
	}
	path := whole(t, la)
	if _, err := c.Whole([]*Layer{lb}); !errors.Is(err, ErrFull) {
		t.Errorf("error %v for more than half of the limit together with what is there", err)
	}
	whole(t, la) // takes nothing more
	user, err := os.Open(path)
	must(t, err)
	long := time.Now().Add(-time.Hour)
	for _, live := range []bool{true, false} {
		if !live {
			must(t, c.Close())
			for _, p := range []string{c.mapPath(a.dgst), c.usesPath(a.dgst)} {
				must(t, os.Chtimes(p, long, long))
			}
			c = limited(t, dir, limit)
			lb = openLayer(t, c, b, b.serve())
		}
		readAll(t, lb, b, 100_000)
		c.giveBack(1)
		c.giveBack(limit) // all that can be
		wantTar(t, path, a)
		if n, err := c.Usage(a.dgst); n < int64(len(a.tar)) || err != nil {
			t.Errorf("%d bytes used (%v) while somebody reads it", n, err)
		}
		if n, _ := c.Usage(b.dgst); n > 100_000 {
			t.Errorf("%d bytes of another layer are left", n)
		}
	}
	must(t, user.Close())
	c.giveBack(1)
	if n, err := c.Usage(a.dgst); n != 0 || err != nil {
		t.Errorf("%d bytes (%v) when nobody reads it any more", n, err)
	}
}

// A layer that is removed leaves its bytes to those that read them.
func TestRemovedWhileRead(t *testing.T) {
	ly := newLayer(t, 64<<10, 1<<20)
	c := openCache(t, t.TempDir())
	l := openLayer(t, c, ly, ly.serve())
	readAll(t, l, ly, 100_000)
	poll(t, "end of the fills", l.store.idle)
	user, err := os.Open(whole(t, l))
	must(t, err)
	defer user.Close()
	must(t, l.Close())
	must(t, c.Retain(func(digest.Digest) bool { return false }))
	if n, err := c.Usage(ly.dgst); n != 0 || err != nil {
		t.Errorf("%d bytes (%v) of a removed layer", n, err)
	}
	got := make([]byte, len(ly.tar))
	if _, err := user.ReadAt(got, 0); err != nil || !bytes.Equal(got, ly.tar) {
		t.Errorf("who has it open does not read the tar: %v", err)
	}
	readAll(t, openLayer(t, c, ly, ly.serve()), ly, 100_000)
}

// Verify ends with its pace's error, and goes on from there.
func TestVerifyIsPaced(t *testing.T) {
	ly := newLayer(t, 64<<10, 1<<20)
	dir := t.TempDir()
	c := openCache(t, dir)
	l := openLayer(t, c, ly, ly.serve())
	readAll(t, l, ly, 100_000)
	must(t, c.Close())
	c = openCache(t, dir)
	l = openLayer(t, c, ly, ly.serve())
	busy, calls := errors.New("busy"), 0
	pace := func(int64) error {
		if calls++; calls == 5 {
			return busy
		}
		return nil
	}
	if err := l.Verify(t.Context(), pace); !errors.Is(err, busy) {
		t.Errorf("error %v", err)
	}
	done := c.Stats().Verified
	must(t, l.Verify(t.Context(), pace))
	if n := int64(ly.index.NumChunks()); done == 0 || done == n || c.Stats().Verified != n {
		t.Errorf("%d chunks of %d, then %d", done, n, c.Stats().Verified)
	}
}

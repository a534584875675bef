package cache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// sweep reads all of ly by way of s and returns it.
func sweep(t testing.TB, s *Sweep) []byte {
	t.Helper()
	defer s.Pause()
	var all []byte
	for {
		b, err := s.Next()
		if err == io.EOF {
			return all
		}
		must(t, err)
		all = append(all, b...)
	}
}

func wantSwept(t testing.TB, s *Sweep, ly *layer) {
	t.Helper()
	if got := sweep(t, s); !bytes.Equal(got, ly.tar) {
		t.Errorf("%d other bytes than the tar's %d", len(got), len(ly.tar))
	}
}

// TestSweep: a reading asks for what is not here, in few requests, and keeps it; the next asks for nothing.
func TestSweep(t *testing.T) {
	for _, checked := range []bool{false, true} {
		c := exactCache(t)
		ly := newLayer(t, 16<<10, 3<<20, 100)
		b := ly.serve()
		l := openLayer(t, c, ly, b)
		for off := int64(0); off < 1<<20; off += 100 << 10 { // holes that are not worth a request each
			readRange(t, l, ly, make([]byte, 10), off)
		}
		poll(t, "end of the fills", l.store.idle)
		b.requests.Store(0)
		wantSwept(t, l.Sweep(t.Context(), ly.index, b, checked), ly)
		if n := b.requests.Load(); n != 1 || l.Present() != ly.index.TarSize {
			t.Errorf("%d requests, want 1; %d bytes are here, want all", n, l.Present())
		}
		b.down.Store(true)
		wantSwept(t, l.Sweep(t.Context(), ly.index, b, checked), ly)
		readAll(t, l, ly, 100_000)
		if b.open.Load() != 0 {
			t.Error("a request is open")
		}
	}
}

// TestSweepGoesAround: what is here in one piece is not asked for again.
func TestSweepGoesAround(t *testing.T) {
	c := exactCache(t)
	ly := newLayer(t, 16<<10, 8<<20)
	b := ly.serve()
	l := openLayer(t, c, ly, b)
	must(t, l.Complete(t.Context(), b))
	poll(t, "end of the fills", l.store.idle)
	l.store.forget(3, 5)
	l.store.forget(400, 402)
	b.requests.Store(0)
	b.bytes.Store(0)
	wantSwept(t, l.Sweep(t.Context(), ly.index, b, false), ly)
	want := int64(0)
	for _, i := range []int{3, 4, 400, 401} {
		want += ly.index.Chunk(i).BlobSize
	}
	if n := b.requests.Load(); n != 2 || b.bytes.Load() != want {
		t.Errorf("%d requests for %d bytes, want 2 for %d", n, b.bytes.Load(), want)
	}
}

// TestSweepOfAFullCache: nothing goes for what nobody reads, and all is read.
func TestSweepOfAFullCache(t *testing.T) {
	c := limited(t, t.TempDir(), 2<<20)
	used, ly := newLayer(t, 16<<10, 1600<<10), newLayer(t, 16<<10, 3<<20, 5)
	ly.dgst = digest.FromString("another layer")
	lu := openLayer(t, c, used, used.serve())
	readAll(t, lu, used, 100_000)
	here := used.index.TarSize
	poll(t, "end of the fills", func() bool { return lu.Present() == here })
	b := ly.serve()
	l := openLayer(t, c, ly, b)
	wantSwept(t, l.Sweep(t.Context(), ly.index, b, false), ly)
	c.flush()
	if got := lu.Present(); got != here || c.Stats().Evicted > 0 {
		t.Errorf("%d bytes of what was used are left of %d", got, here)
	}
	if n := diskUsage(t, c); n > c.high() {
		t.Errorf("%d bytes are used of %d", n, c.limit)
	}
}

// TestSweepOfADamagedDisk: a plain reading has what is on disk, a checked one has what was put there, and mends it.
func TestSweepOfADamagedDisk(t *testing.T) {
	dir := t.TempDir()
	var told []Damage
	c, err := Open(dir, Options{NoReadAhead: true, OnDamage: func(d Damage) { told = append(told, d) }})
	must(t, err)
	t.Cleanup(func() { must(t, c.Close()) })
	ly := newLayer(t, 16<<10, 1<<20)
	b := ly.serve()
	l := openLayer(t, c, ly, b)
	must(t, l.Complete(t.Context(), b))
	poll(t, "end of the fills", l.store.idle)
	const at = 100_000
	f, err := os.OpenFile(c.dataPath(ly.dgst), os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteAt([]byte{ly.tar[at] ^ 1}, at)
	must(t, err)
	if got := sweep(t, l.Sweep(t.Context(), ly.index, b, false)); bytes.Equal(got, ly.tar) || len(got) != len(ly.tar) || len(told) > 0 {
		t.Error("a plain reading has other bytes than the disk")
	}
	wantSwept(t, l.Sweep(t.Context(), ly.index, b, true), ly)
	if i := ly.index.Find(at); len(told) != 1 || told[0].Offset != ly.index.Chunk(i).TarOffset || !l.Damaged() {
		t.Errorf("told of %+v", told)
	}
	wantSwept(t, l.Sweep(t.Context(), ly.index, b, false), ly)
}

// TestSweepOfWrongBytes: wrong bytes are asked for again of another host, and are an error when there is no better.
func TestSweepOfWrongBytes(t *testing.T) {
	ly := newLayer(t, 16<<10, 300<<10)
	bad := bytes.Clone(ly.blob)
	for i := range ly.index.NumChunks() {
		bad[ly.index.Chunk(i).BlobOffset+20] ^= 1
	}
	c := exactCache(t)
	b := ly.serve()
	b.hosts = [][]byte{bad, ly.blob}
	wantSwept(t, openLayer(t, c, ly, b).Sweep(t.Context(), ly.index, b, false), ly)

	other := *ly
	other.dgst = digest.FromString("another layer")
	b = ly.serve()
	b.hosts = [][]byte{bad, bad, bad, bad, bad, bad}
	l := openLayer(t, c, &other, b)
	s := l.Sweep(t.Context(), ly.index, b, false)
	if _, err := s.Next(); !errors.Is(err, artifact.ErrInvalid) || b.requests.Load() != wrongTries || l.Present() > 0 {
		t.Errorf("got %v after %d requests, %d bytes are here", err, b.requests.Load(), l.Present())
	}
	b.hosts = [][]byte{ly.blob}
	wantSwept(t, s, ly) // from the same chunk on
}

// TestSweepPauses: an interrupted reading goes on where it was.
func TestSweepPauses(t *testing.T) {
	c := exactCache(t)
	ly := newLayer(t, 16<<10, 1<<20)
	b := ly.serve()
	l := openLayer(t, c, ly, b)
	s := l.Sweep(t.Context(), ly.index, b, false)
	var all []byte
	for range 10 {
		p, err := s.Next()
		must(t, err)
		all = append(all, p...)
		s.Pause()
		if b.open.Load() != 0 {
			t.Fatal("a request is open")
		}
	}
	b.down.Store(true)
	if _, err := s.Next(); !errors.Is(err, errNoHost) {
		t.Errorf("got %v", err)
	}
	b.down.Store(false)
	if all = append(all, sweep(t, s)...); !bytes.Equal(all, ly.tar) {
		t.Error("other bytes than the tar's")
	}
	l.Close()
	if _, err := l.Sweep(t.Context(), ly.index, b, false).Next(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after closing: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := openLayer(t, c, ly, b).Sweep(ctx, ly.index, b, false).Next(); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestSweepCopies: what another layer has is not fetched, unless it was given back.
func TestSweepCopies(t *testing.T) {
	v1, v2 := versions(t)
	v2.dgst = digest.FromString("the next version")
	c := openSharing(t, t.TempDir(), 0, v1, v2)
	l1 := openLayer(t, c, v1, v1.serve())
	readAll(t, l1, v1, 5000)
	pollKnown(t, c, v1)
	poll(t, "end of the fills", l1.store.idle)
	b := v2.serve()
	l2 := openLayer(t, c, v2, b)
	// v2's own chunks are known, and are not here: they are no copies of what is to be read.
	pollKnown(t, c, v2)
	pollKnown(t, c, v1) // still
	wantSwept(t, l2.Sweep(t.Context(), v2.index, b, true), v2)
	if fetched, all := b.bytes.Load(), int64(len(v2.blob)); fetched == 0 || fetched > all/4 {
		t.Errorf("%d bytes were fetched of %d", fetched, all)
	}
}

// TestOnLie: bytes that have their digest, and headers that the index does not have, are told of; those that are only wrong are not.
func TestOnLie(t *testing.T) {
	ly := newLayer(t, 4<<10, 3000, 50_000)
	liar := lying(t, ly)
	lies := make(chan digest.Digest, 100)
	c, err := Open(t.TempDir(), Options{NoReadAhead: true, OnLie: func(dgst digest.Digest, chunk int, err error) { lies <- dgst }})
	must(t, err)
	t.Cleanup(func() { must(t, c.Close()) })
	b := ly.serve()
	b.hosts = [][]byte{make([]byte, len(ly.blob)), ly.blob}
	readAll(t, openLayer(t, c, ly, b), ly, 10_000)
	if len(lies) > 0 {
		t.Error("wrong bytes are taken for a lie of the index")
	}
	lb := liar.serve()
	l := openLayer(t, c, liar, lb)
	if _, err := l.ReadAt(t.Context(), make([]byte, 10), 0); !errors.Is(err, artifact.ErrInvalid) && !errors.Is(err, errNoHost) {
		t.Errorf("read: %v", err)
	}
	if len(lies) == 0 || <-lies != liar.dgst {
		t.Error("nobody is told of the lie")
	}
	if s := sweep(t, l.Sweep(t.Context(), liar.index, lb, true)); !bytes.Equal(s, liar.tar) {
		t.Error("who judges the layer does not see its bytes")
	}
	if l.store.holds(0) {
		t.Error("what the index does not say can be read")
	}
}

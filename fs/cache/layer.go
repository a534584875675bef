package cache

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// Layer is a layer's tar, read at random. Its methods may be called from many goroutines.
type Layer struct {
	blob    Blob
	store   *store
	index   *artifact.Index // the opener's own, which is the store's or equal to it
	closing chan struct{}   // closed by Close: wakes who waits
	close   func() error    // end, once

	running sync.WaitGroup // calls of ReadAt, and fills

	// Guarded by store.mu.
	closed bool
	fills  map[*fill]struct{} // started by this handle and not ended

	ahead readAhead
}

// ReadAt reads len(p) bytes of the tar at off, fetching what is missing. Short only at the tar's end, with io.EOF. p holds verified bytes or there is an error; ctx ends the wait, and the fetch if nobody else waits for it.
//
// Errors: ctx's, os.ErrClosed after Close, artifact.ErrInvalid when every source gave wrong bytes, and the Blob's. With an error, n is 0.
func (l *Layer) ReadAt(ctx context.Context, p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("read layer %s at %d: negative offset", l.store.dgst, off)
	}
	rest := l.store.index.TarSize - off
	if rest <= 0 {
		return 0, io.EOF
	}
	if int64(len(p)) > rest {
		p, err = p[:rest], io.EOF
	}
	if len(p) == 0 {
		return 0, err
	}
	if !l.enter() {
		return 0, fmt.Errorf("read layer %s: %w", l.store.dgst, os.ErrClosed)
	}
	defer l.running.Done()

	lo, hi := l.store.index.Find(off), l.store.index.Find(off+int64(len(p))-1)+1
	var flights []*flight // those of a round are held until the next has claimed its own: what this read has begun must not end between them
	defer func() { l.store.release(flights) }()
	for {
		again, err := l.read(ctx, p, off, lo, hi, &flights)
		if err != nil {
			return 0, fmt.Errorf("read layer %s at %d: %w", l.store.dgst, off, err)
		}
		if !again {
			break
		}
	}
	return len(p), err
}

// enter counts a caller in, unless the layer is closed.
func (l *Layer) enter() bool {
	l.store.mu.Lock()
	defer l.store.mu.Unlock()
	if l.closed {
		return false
	}
	l.running.Add(1)
	return true
}

// read fills p, which lies in chunks [lo, hi). It says again if something that it counted on went away: the disk lost a chunk,
// or another handle's fetch failed. The next round then has fewer to count on. It releases claims, the flights of the last round, and leaves its own.
func (l *Layer) read(ctx context.Context, p []byte, off int64, lo, hi int, claims *[]*flight) (again bool, err error) {
	s := l.store
	s.touch(lo, hi)
	evictions := s.evictions.Load() // before looking at verified: see evict.go
	if s.verified.hasAll(lo, hi) {  // the common case, without a lock
		l.ahead.read(off, off+int64(len(p)), lo, hi, nil)
		s.hit(hi - lo)
		return !l.pread(p, off, lo, hi, evictions), nil
	}
	if err := ctx.Err(); err != nil {
		return false, err
	}
	flights := l.claim(lo, hi)
	s.release(*claims)
	*claims = flights
	l.ahead.read(off, off+int64(len(p)), lo, hi, flights)

	for i := lo; i < hi; {
		if flights[i-lo] == nil { // on disk, with its neighbours
			j := i + 1
			for j < hi && flights[j-lo] == nil {
				j++
			}
			from, to := l.overlap(p, off, i, j)
			if !l.pread(p[from-off:to-off], from, i, j, evictions) {
				return true, nil
			}
			s.hit(j - i)
			i = j
			continue
		}
		again, err := l.wait(ctx, flights[i-lo])
		if again || err != nil {
			return again, err
		}
		from, to := l.overlap(p, off, i, i+1)
		at := from - l.store.index.Chunk(i).TarOffset
		copy(p[from-off:to-off], flights[i-lo].buf.b[at:])
		i++
	}
	return false, nil
}

// overlap returns the tar offsets that p at off and chunks [lo, hi) have in common.
func (l *Layer) overlap(p []byte, off int64, lo, hi int) (from, to int64) {
	first, last := l.store.index.Chunk(lo), l.store.index.Chunk(hi-1)
	return max(off, first.TarOffset), min(off+int64(len(p)), last.TarOffset+last.TarSize)
}

// pread reads p from disk, all of it in chunks [lo, hi), which were verified when evictions was the count of them. If it cannot, it forgets
// them and returns false; so it does if they may have been given back meanwhile.
func (l *Layer) pread(p []byte, off int64, lo, hi int, evictions uint64) bool {
	n, err := l.store.data.ReadAt(p, off)
	if n == len(p) {
		return l.store.evictions.Load() == evictions
	}
	l.store.short(err)
	l.store.forget(lo, hi)
	return false
}

// wait waits for fl. Again says that a fetch failed on which this reader has only looked on, another handle's, read-ahead or a hot blob's, or
// that the hot blob takes too long: ours may do better.
func (l *Layer) wait(ctx context.Context, fl *flight) (again bool, err error) {
	if !fl.landed() {
		defer l.store.cache.stats.wait()()
	}
	var late <-chan time.Time
	if h := fl.fill.hot; h != nil {
		t := time.NewTimer(h.patience)
		defer t.Stop()
		late = t.C
	}
	select {
	case <-fl.done:
		if fl.err == nil {
			return false, nil
		}
	case <-late:
		fl.fill.hot.late(fl)
		return true, nil
	case <-ctx.Done():
		return false, ctx.Err()
	case <-l.closing:
	}
	select {
	case <-l.closing: // which is also why the fetch has failed
		return false, os.ErrClosed
	default:
	}
	if fl.fill.layer != l || fl.fill.ahead {
		return true, nil
	}
	return false, fl.err
}

// Close ends the use of the layer. Its chunks stay. It ends reads and fetches that go on, and waits for them.
func (l *Layer) Close() error { return l.close() }

func (l *Layer) end() error {
	s := l.store
	s.mu.Lock()
	l.closed = true
	close(l.closing)
	for f := range l.fills {
		f.cancel()
	}
	if s.pass != nil && s.pass.layer == l {
		s.pass.cancel()
	}
	s.mu.Unlock()
	l.running.Wait()

	c := s.cache
	c.mu.Lock()
	delete(c.handles, l)
	c.mu.Unlock()
	if err := c.release(s.dgst); err != nil {
		return fmt.Errorf("close layer %s in the cache: %w", s.dgst, err)
	}
	return nil
}

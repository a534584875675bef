package cache

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

// wrongTries is how often a chunk is asked for in vain before the blob's bytes are taken to be wrong for good, and another way to the tar is tried.
const wrongTries = 4

// flight is a chunk on its way to everyone who waits for it.
type flight struct {
	chunk int
	fill  *fill
	done  chan struct{} // closed when buf or err is set
	buf   *buffer       // the chunk's verified bytes
	off   int64         // of buf, in the tar
	err   error

	taken bool // by a pass or a stream, which delivers it; guarded by store.mu
	refs  int  // who may look at buf: the waiters and the fill; guarded by store.mu
}

// fill brings in a run of adjacent chunks, one flight each, for whoever waits.
type fill struct {
	layer   *Layer // whose blob is asked
	flights []*flight
	onDisk  bool  // the map claims them: read and verify first
	ahead   bool  // read-ahead: goes on without waiters
	open    bool  // has not begun: misses beside its own join it, see readahead.go; guarded by store.mu
	off     int64 // where its flights begin in the tar, and end; for those that may join
	end     int64
	hot     *hot // the stream that brings them, if it is one; flights is empty then
	cancel  context.CancelFunc

	waiters int // claims on flights; guarded by store.mu
}

// claim returns a flight for each of chunks [lo, hi) that is not verified on disk: the one under way, or one of a new
// fill. The caller releases them.
func (l *Layer) claim(lo, hi int) []*flight {
	s := l.store
	flights := make([]*flight, hi-lo)
	ends := make([]int64, hi-lo+1) // of the chunks, and of the one before: the index may fault, which must not leave flights that nobody brings
	ends[0] = s.index.Chunk(lo).TarOffset
	for i := lo; i < hi; i++ {
		c := s.index.Chunk(i)
		ends[i-lo+1] = c.TarOffset + c.TarSize
	}
	var fills []*fill
	s.mu.Lock()
	defer s.mu.Unlock()
	var run *fill // the fill that the next chunk may join
	for i := lo; i < hi; i++ {
		fl := s.flights[i]
		if fl == nil && s.verified.has(i) {
			run = nil
			continue
		}
		if fl != nil {
			run = nil
		} else {
			off, end := ends[i-lo], ends[i-lo+1]
			if run == nil || run.onDisk != s.present.has(i) {
				onDisk := s.present.has(i)
				if run = l.neighbour(i, off, end); run == nil || onDisk {
					run = &fill{layer: l, onDisk: onDisk, open: !onDisk, off: off}
					fills = append(fills, run)
				}
			}
			fl = run.add(s, i)
			run.off, run.end = min(run.off, off), max(run.end, end)
		}
		fl.refs++
		fl.fill.waiters++
		flights[i-lo] = fl
	}
	for _, f := range fills {
		l.start(f)
	}
	return flights
}

// add makes a flight for chunk i. The caller holds store.mu.
func (f *fill) add(s *store, i int) *flight {
	fl := &flight{chunk: i, fill: f, done: make(chan struct{}), refs: 1}
	if at := len(f.flights); at > 0 && i < f.flights[0].chunk {
		f.flights = slices.Insert(f.flights, 0, fl)
	} else {
		f.flights = append(f.flights, fl)
	}
	s.flights[i] = fl
	return fl
}

// start runs f. The caller holds store.mu and has entered l.
func (l *Layer) start(f *fill) {
	ctx, cancel := context.WithCancel(context.Background())
	f.cancel = cancel
	if l.closed { // between enter and here
		cancel()
	}
	l.fills[f] = struct{}{}
	l.running.Add(1)
	go f.run(ctx)
}

// release gives flights back, after they were waited for or not.
func (s *store) release(flights []*flight) {
	if len(flights) == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, fl := range flights {
		if fl == nil {
			continue
		}
		s.unref(fl)
		f := fl.fill
		if f.waiters--; f.waiters == 0 && !f.ahead {
			// Nobody is left: end the fetch, and let whoever comes next start a new one.
			for _, fl := range f.flights {
				if !fl.landed() { // the others are on their way to the disk
					s.land(fl)
				}
			}
			f.cancel()
		}
	}
}

// land takes fl out of the chunks under way. The caller holds store.mu.
func (s *store) land(fl *flight) {
	if s.flights[fl.chunk] == fl {
		delete(s.flights, fl.chunk)
	}
}

// unref drops a reference to fl's buffer. The caller holds store.mu.
func (s *store) unref(fl *flight) {
	if fl.refs--; fl.refs == 0 && fl.buf != nil {
		s.cache.bufs.put(fl.buf)
		fl.buf = nil
	}
}

// run brings in every chunk of f, or gives it an error.
func (f *fill) run(ctx context.Context) {
	l, s := f.layer, f.layer.store
	defer l.running.Done()
	flights := f.begin()
	f.guard(flights, func() { f.bring(ctx, flights) })
	f.cancel()
	s.mu.Lock()
	delete(l.fills, f)
	s.mu.Unlock()
	if f.ahead {
		mapped.Guard(l.ahead.ended) // what cannot be read ahead is left to the reads
	}
}

// guard fails flights if do meets a fault of the mapped index.
func (f *fill) guard(flights []*flight, do func()) {
	if err := mapped.Guard(do); err != nil {
		f.fail(flights, err)
	}
}

func (f *fill) bring(ctx context.Context, missing []*flight) {
	if f.onDisk {
		missing = f.load(ctx, missing)
	}
	for _, run := range adjacent(f.copy(ctx, missing)) {
		f.fetch(ctx, run, 0, nil)
	}
}

// load reads flights from disk and delivers those that verify. It returns the others, which are all the rest when ctx ends.
func (f *fill) load(ctx context.Context, flights []*flight) (damaged []*flight) {
	s := f.layer.store
	for i, fl := range flights {
		if ctx.Err() != nil {
			return append(damaged, flights[i:]...)
		}
		c := s.index.Chunk(fl.chunk)
		buf := s.cache.bufs.get(int(c.TarSize))
		b := buf.mem[:c.TarSize]
		n, err := s.data.ReadAt(b, c.TarOffset)
		if n < len(b) {
			s.short(err)
		} else if err = s.verify(fl.chunk, c.Digest, b); err == nil {
			buf.b = b
			s.cache.stats.verified.Add(1)
			f.deliver(fl, buf, c.TarOffset, true)
			continue
		}
		s.cache.bufs.put(buf)
		s.spoilt(fl.chunk, c)
		damaged = append(damaged, fl)
	}
	return damaged
}

// spoilt makes a miss of chunk i, which is c and did not verify on disk, or was given back meanwhile.
func (s *store) spoilt(i int, c artifact.Chunk) {
	if s.holds(i) {
		s.damaged.Store(true)
		s.cache.stats.damaged.Add(1)
		if tell := s.cache.onDamage; tell != nil {
			path := s.cache.dataPath(s.dgst)
			if s.isWhole() {
				path = s.cache.wholePath(s.dgst)
			}
			tell(Damage{s.dgst, path, c.TarOffset, c.TarSize})
		}
	}
	s.forget(i, i+1)
}

// verify compares b, from disk, with what the index says of chunk i.
func (s *store) verify(i int, want [32]byte, b []byte) error {
	if sha256.Sum256(b) != want {
		return artifact.ErrInvalid
	}
	return s.check(i, b)
}

// check compares the headers in b, chunk i, which has its digest, with those of the index.
func (s *store) check(i int, b []byte) error {
	layout, err := s.layout()
	if err != nil {
		return err
	}
	err = layout.Check(i, b)
	if err != nil && s.cache.onLie != nil {
		s.cache.onLie(s.dgst, i, err)
	}
	return err
}

// fetch asks the blob for flights, which are adjacent, in one request, and delivers them as they come. Those whose bytes are wrong are asked
// for again until the blob says that it is enough; corrupt is why the ones at hand are.
func (f *fill) fetch(ctx context.Context, flights []*flight, try int, corrupt error) {
	if err := ctx.Err(); err != nil {
		f.fail(flights, err)
		return
	}
	src, canRebuild := f.layer.blob.(Rebuilder)
	again, why, err := f.stream(ctx, flights, try)
	if err != nil {
		if canRebuild && ctx.Err() == nil && src.Gone(err) {
			flights, err = f.rebuild(ctx, src, flights, err)
		}
		f.fail(flights, errors.Join(err, corrupt))
		return
	}
	if canRebuild && try+1 == wrongTries {
		again, why = f.rebuild(ctx, src, again, why)
	}
	var runs sync.WaitGroup // each may take as long as the blob has patience
	for _, run := range adjacent(again) {
		runs.Go(func() { f.guard(run, func() { f.fetch(ctx, run, try+1, why) }) })
	}
	runs.Wait()
}

// stream reads flights' frames from one range of the blob. It returns those that did not verify, and why.
func (f *fill) stream(ctx context.Context, flights []*flight, try int) (again []*flight, why, err error) {
	l, s := f.layer, f.layer.store
	first, last := l.store.index.Chunk(flights[0].chunk), l.store.index.Chunk(flights[len(flights)-1].chunk)
	n := last.BlobOffset + last.BlobSize - first.BlobOffset
	s.cache.stats.requests.Add(1)
	s.cache.stats.fetchedBytes.Add(n)
	body, err := l.blob.ReadRange(ctx, first.BlobOffset, n, try)
	if err != nil {
		return nil, nil, noEOF(err)
	}
	defer body.Close()

	frame := s.cache.bufs.get(int(first.BlobSize))
	defer func() { s.cache.bufs.put(frame) }()
	for _, fl := range flights {
		c := l.store.index.Chunk(fl.chunk)
		frame.grow(int(c.BlobSize))
		b := frame.mem[:c.BlobSize]
		if _, err := io.ReadFull(body, b); err != nil {
			return nil, nil, noEOF(err)
		}
		buf, err := s.decode(fl.chunk, b)
		if err != nil {
			tellWrong(body, c.BlobOffset, c.BlobSize, err)
			again, why = append(again, fl), fmt.Errorf("chunk %d: %w", fl.chunk, err)
			continue
		}
		if f.ahead {
			s.cache.stats.readAhead.Add(1)
		} else {
			s.miss(c.TarSize)
		}
		f.deliver(fl, buf, c.TarOffset, false)
	}
	return again, why, nil
}

// wrongBytes are not those of the chunk's digest. Of those that are, but are not what the index says otherwise, the index is wrong.
type wrongBytes struct{ error }

func (e wrongBytes) Unwrap() error { return e.error }

// tellWrong tells body, whoever gave them, that the n bytes at off of the blob were wrong, if err says so.
func tellWrong(body io.Reader, off, n int64, err error) {
	if w, ok := body.(interface{ Wrong(off, n int64) }); ok && errors.As(err, new(wrongBytes)) {
		w.Wrong(off, n)
	}
}

// decode returns chunk i out of its frame, verified.
func (s *store) decode(i int, frame []byte) (*buffer, error) {
	buf := s.cache.bufs.get(int(s.index.Chunk(i).TarSize) + artifact.DecodeSlack)
	b, err := s.index.Decompress(i, frame, buf.mem[:0])
	if err != nil {
		err = wrongBytes{err}
	} else {
		err = s.check(i, b)
	}
	if err != nil {
		s.cache.stats.corrupt.Add(1)
		s.cache.bufs.put(buf)
		return nil, err
	}
	buf.b = b
	return buf, nil
}

// deliver hands fl's verified bytes, which lie at off in the tar, to its waiters, then to the disk unless they come from there.
func (f *fill) deliver(fl *flight, buf *buffer, off int64, onDisk bool) {
	s := f.layer.store
	fl.buf, fl.off = buf, off
	if onDisk {
		s.mu.Lock()
		if s.present.has(fl.chunk) {
			s.verified.set(fl.chunk)
		}
		s.mu.Unlock()
	}
	close(fl.done)
	written := onDisk || s.write(fl.chunk, off, buf.b)
	s.mu.Lock()
	defer s.mu.Unlock()
	if written {
		s.land(fl)
	} else if s.flights[fl.chunk] == fl {
		s.keep(fl)
	}
	s.unref(fl)
}

// fail ends those of flights that were not delivered with err.
func (f *fill) fail(flights []*flight, err error) {
	s := f.layer.store
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, fl := range flights {
		if fl.landed() {
			continue
		}
		fl.err = err
		close(fl.done)
		s.land(fl)
		s.unref(fl)
	}
}

// landed reports whether fl has its bytes or its error.
func (fl *flight) landed() bool {
	select {
	case <-fl.done:
		return true
	default:
		return false
	}
}

// adjacent splits flights, in order, into runs of adjacent chunks.
func adjacent(flights []*flight) (runs [][]*flight) {
	start := 0
	for i := 1; i <= len(flights); i++ {
		if i == len(flights) || flights[i].chunk != flights[i-1].chunk+1 {
			runs = append(runs, flights[start:i])
			start = i
		}
	}
	return runs
}

// noEOF keeps a Blob's early end from looking like the end of the tar.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// buffers recycles the memory of chunks and frames.
type buffers struct{ pool sync.Pool }

type buffer struct {
	b   []byte // what is in it
	mem []byte // its memory
}

// get returns a buffer with room for n bytes in mem.
func (p *buffers) get(n int) *buffer {
	buf, _ := p.pool.Get().(*buffer)
	if buf == nil {
		buf = new(buffer)
	}
	buf.grow(n)
	return buf
}

func (p *buffers) put(buf *buffer) { p.pool.Put(buf) }

// grow makes room for n bytes in mem; what was there is gone if there was none.
func (b *buffer) grow(n int) {
	if cap(b.mem) < n {
		b.mem = make([]byte, max(n, 128<<10+artifact.DecodeSlack))
	}
}

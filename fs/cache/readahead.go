package cache

import (
	"runtime"
	"slices"
	"sync"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

// Read-ahead is done here and not by the kernel, which knows neither chunks nor what a request costs: its windows stay
// small, so that random reads and page faults fetch exactly what they touch, and a stream is seen by what it has read.
//
// A stream is an interval of the tar that reads have covered without a gap, in whatever order they came: the kernel has
// several requests of one reader in flight, and they overtake each other. Once a stream is evident, what follows it is
// fetched up to a window that grows with the stream, within the data run (the file's body) that it reads: the next file
// in the tar is nobody's wish yet. It is once the stream walks: a reader that has read several files of some length in all in the order of the tar, as
// whoever copies or searches a directory does, goes on so, and the window passes the ends of bodies. What it leaves out counts against what it has read.
//
// Measured (BenchmarkReadCold*: a 64 MiB file, 5 ms per request, reads of 128 KiB one at a time, two cores): 500 MB/s and
// 72 requests, where one request per read would give 25 MB/s and 512; random reads fetch no byte more than the frames of
// the chunks that they touch. With chunks of 512 KiB, as large files have: 67 requests, and as few reads that wait.
//
// Measured (python-app read whole, file after file, 5 ms, 500 Mbit/s): 1,662 requests without walks, 946 with. Of its largest layer alone, 7,589 chunks: 1,300 requests and 140 chunks
// that a read missed, and 740 and 6. What an upper layer has deleted comes, too: 288 MB instead of 279.
//
// A neighbourhood is the chunks around a miss. Programs start by touching many files of few directories, and much of few libraries, in no order: where
// much was wanted, more will be. So a miss fetches around itself, the further the more of its neighbours was waited for before; and the first read of a chunk that was guessed
// so does the same, before the reads get to the end of what was guessed. A profile's chunks do not count: what it left out around them, it left out for a reason. Inside a
// large file it takes half of the neighbours, so that random reads of a data file stay small until they are not sparse any more.
// Measured (simulated on the reads of a container that compiles a Go program, 863 chunks of 3,021, and of the four images of integration/images, all with a static profile; the
// requests that a read waits for): 740 without, 283 with these constants, for 10 % of what it needs more; 173, 43, 57 and 72 without, 168, 43, 55 and 72 with, for 1, 0, 0 and 1 % more.
// A neighbourhood of 16 on either side: 281, for 14 % more. Random reads that touch a quarter of a large file's chunks fetch nothing in vain, and of a half 1.3 times what they touch; with
// a threshold of 4 inside large files it would be 2.6 and 1.9 times.
//
// Reads come as READs of 64 KiB or less (16 pages, in file-backed mode), microseconds apart. A miss beside a
// chunk whose request has not begun joins that request; a request begins when the processors have let those run that are about to read, and
// never waits for a timer: that would cost every miss what only one in four gains (Go's timers are good to 1 ms, a fifth of the round trip).
const (
	// Streams that one layer follows. Random reads open one each and push out the one longest unused, so this is several
	// times the number of concurrent readers that we want to see.
	maxStreams = 32
	// A stream is evident from here: more than the kernel's own read-ahead (128 KiB) makes out of a single page fault.
	streamBytes = 256 << 10
	streamReads = 3
	// The window is the stream's length over windowShare, so that what is fetched in vain, should the reader stop, is at
	// most this share of what it read ...
	windowShare = 2
	// ... and at most this: 5 ms away, 8 MiB in flight are 1.6 GB/s, more than two cores decode.
	maxWindow = 8 << 20
	// Bytes of tar per request, and requests in flight per layer. Fewer, larger requests cost a registry less; more are
	// decoded on more cores.
	aheadRequest  = 1 << 20
	aheadRequests = 8
	// Chunks on either side of a miss that are its neighbourhood, and how many of them must have been wanted for more to be fetched: between small files, and inside
	// a file of more than largeFile bytes.
	nearChunks = 8
	nearFew    = 2
	nearMany   = 8
	largeFile  = 1 << 20
	// Then three chunks for two that were wanted are fetched behind the miss, and a nearBack-th of that before it, within so many bytes of tar; where nobody waits, if
	// it is nearWorth chunks at least.
	nearBack  = 4
	nearBytes = 4 << 20
	nearWorth = 4
	// A stream walks if it has left so many bodies behind, and read so many bytes. From one to the next it leaves out headers, and files of up to half a chunk in all, or
	// what is read ahead already.
	walkBodies = 8
	walkBytes  = 2 << 20
	walkGap    = 64 << 10
	// Bytes of tar that misses of several reads may share a request for: the kernel's own read-ahead, and the rest of the chunks at its ends.
	joinBytes = 768 << 10
)

// readAhead watches the reads of a layer.
type readAhead struct {
	layer *Layer

	mu      sync.Mutex
	quiet   bool
	streams []*stream // most recently used last
	running int       // requests in flight

	wanted  bitmap // chunks that were waited for, or guessed and read; nil before the first miss
	guessed bitmap // fetched for the neighbourhood's sake, and not read yet
}

// stream is an interval of the tar that was read.
type stream struct {
	from, next int64
	reads      int   // that moved next
	end        int64 // of the data run that ends at next or later; 0 is not known yet
	ahead      int64 // fetched or being fetched up to here

	// Of the walk that has come here:
	bodies int   // left behind
	walked int64 // bytes read of them, less what was left out between them
}

// Quiet says that all that will be read is here, as far as is known: nothing is read ahead until a read misses.
func (l *Layer) Quiet() {
	l.ahead.mu.Lock()
	defer l.ahead.mu.Unlock()
	l.ahead.quiet = true
}

// read notes a read of [off, end), which is in chunks [lo, hi) and waits for flights, and fetches ahead if that continues a stream, or around it.
func (r *readAhead) read(off, end int64, lo, hi int, flights []*flight) {
	if r.layer.store.cache.exact {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	mapped.Guard(func() { // of the index: what cannot be read ahead is left to the reads
		news, missed := r.want(lo, hi, flights)
		if r.quiet = r.quiet && !missed; r.quiet {
			return
		}
		if st := r.note(off, end); st != nil {
			r.pump(st)
		}
		if news {
			r.around(lo, hi, missed)
		}
	})
}

// may reports whether there is room for what nobody has asked for.
func (r *readAhead) may() bool {
	c := r.layer.store.cache
	return r.running < aheadRequests && !c.stats.suspended.Load() && c.room(aheadRequest)
}

// want notes which of chunks [lo, hi), whose read waits for flights, are wanted. It reports whether one was not before, and whether one that nobody had guessed.
func (r *readAhead) want(lo, hi int, flights []*flight) (news, missed bool) {
	if r.wanted == nil {
		if flights == nil {
			return false, false
		}
		r.wanted, r.guessed = newBitmap(r.layer.store.n), newBitmap(r.layer.store.n)
	}
	for i := lo; i < hi; i++ {
		miss := flights != nil && flights[i-lo] != nil && flights[i-lo].fill.hot == nil && !flights[i-lo].fill.onDisk && !flights[i-lo].fill.ahead
		if (miss || r.guessed.has(i)) && !r.wanted.has(i) {
			r.wanted.set(i)
			r.guessed.clear(i)
			news, missed = true, missed || miss
		}
	}
	return news, missed
}

// around fetches the neighbourhood of chunks [lo, hi), which a read wants, as far as it was wanted before. Missed says that the read waits.
func (r *readAhead) around(lo, hi int, missed bool) {
	if !r.may() {
		return
	}
	s := r.layer.store
	near := 0
	for i := max(0, lo-nearChunks); i < min(s.n, hi+nearChunks); i++ {
		if (i < lo || i >= hi) && r.wanted.has(i) {
			near++
		}
	}
	if near < nearFew || near < nearMany && s.inLargeFile(lo) {
		return
	}
	n := near * 3 / 2
	end := s.index.Chunk(lo).TarOffset + nearBytes
	from, to := max(0, lo-n/nearBack), hi
	missing := 0
	for to < min(hi+n, s.n) && s.index.Chunk(to).TarOffset+s.index.Chunk(to).TarSize <= end {
		to++
	}
	for i := from; i < to; i++ {
		if !s.present.has(i) && !r.guessed.has(i) && !r.wanted.has(i) {
			missing++
		}
	}
	if missing == 0 || !missed && missing < max(n/2, nearWorth) {
		return // not worth a request yet
	}
	r.running += r.layer.prefetch(from, to, r.guessed.set)
}

// inLargeFile reports whether chunk i begins in the data run of a large file.
func (s *store) inLargeFile(i int) bool {
	layout, err := s.layout()
	if err != nil {
		return false
	}
	off, end := layout.DataRun(s.index.Chunk(i).TarOffset)
	return end-off > largeFile
}

// note extends the stream that [off, end) touches, or opens one. It returns it if it has moved forward.
func (r *readAhead) note(off, end int64) *stream {
	i := slices.IndexFunc(r.streams, func(st *stream) bool { return off <= st.next && end >= st.from })
	st := &stream{from: off, next: off}
	if i >= 0 {
		st = r.streams[i]
		r.streams = slices.Delete(r.streams, i, i+1)
	} else if len(r.streams) == maxStreams {
		r.streams = slices.Delete(r.streams, 0, 1)
	}
	r.streams = append(r.streams, st)
	if i < 0 || off < st.from { // a walk may have come here
		st.from = off
		if o := r.take(st, func(o *stream) bool {
			return o.next < off && off <= max(o.next+walkGap, o.ahead) && r.endOf(o) <= off
		}); o != nil {
			st.bodies, st.walked, st.ahead = o.bodies+1, o.walked+o.next-o.from, max(st.ahead, o.ahead)
			if gap := off - o.next; gap > walkGap {
				st.walked -= gap
			}
		}
	}
	if end <= st.next {
		return nil
	}
	st.next = end
	st.reads++
	// A read that was ahead of the others has opened a stream that this one now reaches.
	if o := r.take(st, func(o *stream) bool { return o.from <= st.next && st.next <= o.next }); o != nil {
		st.next, st.reads, st.ahead = o.next, st.reads+o.reads, max(st.ahead, o.ahead)
		st.bodies, st.walked = st.bodies+o.bodies, st.walked+o.walked
	}
	return st
}

// take removes the first of the other streams than st that is joined to it.
func (r *readAhead) take(st *stream, joined func(o *stream) bool) *stream {
	i := slices.IndexFunc(r.streams, func(o *stream) bool { return o != st && joined(o) })
	if i < 0 {
		return nil
	}
	o := r.streams[i]
	r.streams = slices.Delete(r.streams, i, i+1)
	return o
}

// endOf returns where the data run ends that st reads, 0 if that cannot be known.
func (r *readAhead) endOf(st *stream) int64 {
	if st.end < st.next { // the first time, or the stream has gone on into another body
		layout, err := r.layer.store.layout()
		if err != nil {
			return 0
		}
		_, st.end = layout.DataRun(st.next - 1)
	}
	return st.end
}

// pump starts the requests that st calls for, as many as may run.
func (r *readAhead) pump(st *stream) {
	l, s := r.layer, r.layer.store
	length := st.next - st.from
	walk := st.bodies >= walkBodies && st.walked+length >= walkBytes
	if !walk && (st.reads < streamReads || length < streamBytes) || !r.may() {
		return
	}
	end := s.index.TarSize
	if walk {
		length += st.walked
	} else {
		end = r.endOf(st)
	}
	window := min(length/windowShare, maxWindow)
	target := min(st.next+window, end)
	for r.running < aheadRequests {
		lo, hi, n, full := s.within(max(st.ahead, st.next), target, target == end)
		if n == 0 || !full && n < min(window/2, aheadRequest) && target < end {
			return // not worth a request yet
		}
		r.running += l.prefetch(lo, hi, nil)
		last := s.index.Chunk(hi - 1)
		st.ahead = last.TarOffset + last.TarSize
	}
}

// within returns the chunks [lo, hi) of n bytes that one request brings: those that begin at off or later and end at
// target or before, or, if whole, also the one that holds target. A chunk that begins before off was read already. Full says that more would be
// more than a request.
func (s *store) within(off, target int64, whole bool) (lo, hi int, n int64, full bool) {
	if off >= target {
		return 0, 0, 0, false
	}
	lo = s.index.Find(off)
	if s.index.Chunk(lo).TarOffset < off {
		lo++
	}
	for hi = lo; hi < s.n; hi++ {
		c := s.index.Chunk(hi)
		end := c.TarOffset + c.TarSize
		if c.TarOffset >= target || end > target && !whole {
			break
		}
		if full = hi > lo && n+c.TarSize > aheadRequest; full {
			break
		}
		n += c.TarSize
	}
	return lo, hi, n, full
}

// prefetch fetches those of chunks [lo, hi) that are neither on disk nor under way, and tells each to note, if that is not nil. It returns how many requests that takes.
func (l *Layer) prefetch(lo, hi int, note func(i int)) (requests int) {
	s := l.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.closed {
		return 0
	}
	var fills []*fill
	var run *fill
	for i := lo; i < hi; i++ {
		if s.flights[i] != nil || s.present.has(i) {
			run = nil
			continue
		}
		if run == nil {
			run = &fill{layer: l, ahead: true}
			fills = append(fills, run)
		}
		run.add(s, i)
		if note != nil {
			note(i)
		}
	}
	for _, f := range fills {
		l.start(f)
	}
	return len(fills)
}

// ended notes that a request has ended, and starts those that had to wait for it. What it did not bring is left to the reads.
func (r *readAhead) ended() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running--
	for _, st := range r.streams {
		r.pump(st)
	}
}

// neighbour returns a fill that has not begun and that chunk i, at [off, end) of the tar and missing, continues at either end. The caller holds store.mu.
func (l *Layer) neighbour(i int, off, end int64) *fill {
	s := l.store
	for _, fl := range []*flight{s.flights[i-1], s.flights[i+1]} {
		if fl == nil || !fl.fill.open || fl.fill.layer != l {
			continue
		}
		if f := fl.fill; max(end, f.end)-min(off, f.off) <= joinBytes {
			return f
		}
	}
	return nil
}

// begin lets those that are about to read claim what they need, and closes f to neighbours. It returns what f is to bring.
func (f *fill) begin() []*flight {
	runtime.Gosched()
	s := f.layer.store
	s.mu.Lock()
	defer s.mu.Unlock()
	f.open = false
	return f.flights
}

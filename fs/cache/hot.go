package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

// A hot blob brings the chunks of many places, of several layers, in one stream (Fill). Reads must gain by it and never lose, so chunks of the
// stream are reserved, as flights that reads may join, only as far ahead as the stream is to get within the time that a read may wait
// (its patience); what lies behind is fetched by who wants it, and the stream then leaves it out. A read that has waited in vain takes its chunk
// back, and all others too if the stream stands still.
const (
	// Bytes of stream that are reserved at least, before its speed is known, and at most; and chunks, which bounds the memory.
	minReserve      = 1 << 20
	maxReserve      = 64 << 20
	maxReservations = 4096
	// After so many standstills the stream reserves nothing more. What it still brings is taken.
	maxStandstills = 3
	// Frames that are on disk already are read over up to so many bytes, which costs less than another request.
	hotGap = 512 << 10
	// hotShare is the part of a cache with a limit that a Share is.
	hotShare = 4
	// maxDecoders is how many frames are decoded at once: 0.6 GB/s of tar each.
	maxDecoders = 4
)

// errReturned ends the flights that a stream gives back: who waits asks for himself.
var errReturned = errors.New("the hot blob did not bring it in time")

// Frame is a chunk of an open layer, as an entry of a list of frames.
type Frame struct {
	Layer *Layer
	Chunk int
}

// Share is what streams may fill together of a cache with a limit: a quarter.
type Share struct {
	cache *Cache
	left  atomic.Int64 // bytes; of no meaning without a limit
}

// Share returns a share that nothing has been taken of.
func (c *Cache) Share() *Share {
	s := &Share{cache: c}
	s.left.Store(c.limit / hotShare)
	return s
}

// Fill brings in chunks from a blob that has their frames, in this order, in its n bytes from off on. Chunks that are here, or asked for
// by reads, are left out, and nothing is asked for if that is all. A read of a chunk that is about to come waits for it, at most for patience.
//
// It returns when the stream has ended. Errors cost nothing but what has not come: artifact.ErrInvalid for the first frame that is wrong and for frames that do
// not add up to n, the Blob's, ctx's, os.ErrClosed when a layer is closed meanwhile. It fills what is left of
// the share at most, copies from other layers included, and no more than there is room for.
func (s *Share) Fill(ctx context.Context, src Blob, off, n int64, frames []Frame, patience time.Duration) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	h := &hot{cache: s.cache, share: s, patience: patience, fills: make(map[*Layer]*fill)}
	defer h.leave()
	for _, f := range frames {
		if h.fills[f.Layer] == nil && !h.enter(f.Layer, cancel) {
			return fmt.Errorf("fill from a hot blob: %w", os.ErrClosed)
		}
	}
	var err error
	if fault := mapped.Guard(func() { err = h.fill(ctx, src, off, n, frames) }); fault != nil { // of an index
		err = fault
	}
	if err != nil {
		return fmt.Errorf("fill from a hot blob: %w", err)
	}
	return nil
}

// hot is a stream of frames.
type hot struct {
	cache    *Cache
	share    *Share
	patience time.Duration
	fills    map[*Layer]*fill // what its flights belong to, one for each layer

	moved atomic.Int64 // when the last frame came, Unix nanoseconds

	// LOCK ORDER: mu before store.mu.
	mu          sync.Mutex
	items       []hotItem // not looked at for reservation yet
	reserved    []reservation
	standstills int
	wrong       []func() // tells who gave wrong bytes, once nobody reads from him
}

// hotItem is a frame of the stream, at [from, end) of the blob.
type hotItem struct {
	Frame
	from, end int64
}

type reservation struct {
	flight *flight
	from   int64 // in the blob
}

// enter makes h one of the fills of l, which l's closing ends; false if it is closed.
func (h *hot) enter(l *Layer, cancel context.CancelFunc) bool {
	if !l.enter() {
		return false
	}
	f := &fill{layer: l, ahead: true, hot: h, cancel: cancel}
	h.fills[l] = f
	l.store.mu.Lock()
	defer l.store.mu.Unlock()
	l.fills[f] = struct{}{}
	return !l.closed
}

// leave gives back what has not come.
func (h *hot) leave() {
	h.giveBack()
	for l, f := range h.fills {
		l.store.mu.Lock()
		delete(l.fills, f)
		l.store.mu.Unlock()
		l.running.Done()
	}
}

func (h *hot) fill(ctx context.Context, src Blob, off, n int64, frames []Frame) error {
	items, err := h.list(off, n, frames)
	if err != nil {
		return err
	}
	h.copy(ctx, items)
	runs := h.missing(items)
	for _, run := range runs {
		h.items = append(h.items, run...)
	}
	g, ctx := errgroup.WithContext(ctx)
	jobs := make(chan hotJob, maxDecoders)
	g.Go(func() (err error) {
		defer close(jobs)
		if fault := mapped.Guard(func() {
			for i := 0; i < len(runs) && err == nil; i++ {
				err = h.stream(ctx, src, runs[i], jobs)
			}
		}); fault != nil {
			err = fault
		}
		return err
	})
	for range min(max(runtime.GOMAXPROCS(0)-1, 1), maxDecoders) { // one processor for the container that is about to start
		g.Go(func() error {
			for j := range jobs {
				if err := h.bring(j); err != nil {
					return err
				}
			}
			return nil
		})
	}
	err = g.Wait()
	for _, tell := range h.wrong {
		tell()
	}
	for j := range jobs {
		j.flight.fill.fail([]*flight{j.flight}, errReturned)
		h.cache.bufs.put(j.frame)
	}
	return err
}

// list finds out where the frames lie.
func (h *hot) list(off, n int64, frames []Frame) ([]hotItem, error) {
	end := off
	items := make([]hotItem, len(frames))
	for i, f := range frames {
		if f.Chunk < 0 || f.Chunk >= f.Layer.store.n {
			return nil, fmt.Errorf("there is no chunk %d in layer %s: %w", f.Chunk, f.Layer.store.dgst, artifact.ErrInvalid)
		}
		items[i] = hotItem{f, end, end + f.Layer.store.index.Chunk(f.Chunk).BlobSize}
		end = items[i].end
	}
	if end != off+n {
		return nil, fmt.Errorf("the frames of its chunks have %d bytes, it has %d: %w", end-off, n, artifact.ErrInvalid)
	}
	return items, nil
}

// copy brings in the chunks that another layer on this node has, as long as there is room for them.
func (h *hot) copy(ctx context.Context, items []hotItem) {
	if h.cache.twins.layers.Load() == nil {
		return
	}
	for i := range items {
		it := &items[i]
		if !it.Layer.store.absent(it.Chunk) {
			continue
		}
		size := it.Layer.store.index.Chunk(it.Chunk).TarSize
		if !h.room(size) || h.cache.limit > 0 && h.share.left.Load() < size {
			return
		}
		if fl := h.take(it); fl != nil {
			own := []*flight{fl}
			fl.fill.guard(own, func() {
				left := fl.fill.copy(ctx, own)
				fl.fill.fail(left, errReturned)
				if len(left) == 0 {
					h.share.left.Add(-size)
				}
			})
		}
	}
}

// room reports whether the disk takes n bytes more.
func (h *hot) room(n int64) bool { return !h.cache.stats.suspended.Load() && h.cache.room(int(n)) }

// missing returns runs of items, those that are not here and what lies between them, up to what is left of the share.
func (h *hot) missing(items []hotItem) (runs [][]hotItem) {
	start, last := -1, 0 // of the run
	room := h.share.left.Load()
	for i := range items {
		it := &items[i]
		if !it.Layer.store.absent(it.Chunk) {
			continue
		}
		if room -= it.Layer.store.index.Chunk(it.Chunk).TarSize; room < 0 && h.cache.limit > 0 {
			break
		}
		if start >= 0 && it.from-items[last].end > hotGap {
			runs = append(runs, items[start:last+1])
			start = -1
		}
		if start < 0 {
			start = i
		}
		last = i
	}
	if start >= 0 {
		runs = append(runs, items[start:last+1])
	}
	return runs
}

// absent reports whether chunk i is neither on disk nor on its way.
func (s *store) absent(i int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.present.has(i) && s.flights[i] == nil
}

// hotJob is a frame to decode.
type hotJob struct {
	flight *flight
	frame  *buffer
	off    int64 // of the chunk, in the tar
	body   io.Reader
	from   int64 // of the frame, in the blob
}

// stream reads a run of frames from one range of the blob, and hands over those that are still missing.
func (h *hot) stream(ctx context.Context, src Blob, run []hotItem, jobs chan<- hotJob) error {
	c := h.cache
	n := run[len(run)-1].end - run[0].from
	c.stats.requests.Add(1)
	c.stats.fetchedBytes.Add(n)
	begun := time.Now()
	h.moved.Store(begun.UnixNano())
	h.reserve(run[0].from, minReserve)
	body, err := src.ReadRange(ctx, run[0].from, n, 0)
	if err != nil {
		return noEOF(err)
	}
	defer body.Close()
	for i := range run {
		it := &run[i]
		chunk := it.Layer.store.index.Chunk(it.Chunk)
		if !h.room(chunk.TarSize) {
			return errors.New("the cache has no room")
		}
		frame := c.bufs.get(int(it.end - it.from))
		frame.b = frame.mem[:it.end-it.from]
		if _, err := io.ReadFull(body, frame.b); err != nil {
			c.bufs.put(frame)
			return noEOF(err)
		}
		now := time.Now()
		h.moved.Store(now.UnixNano())
		fl := h.take(it)
		speed := float64(it.end-run[0].from) / max(now.Sub(begun), time.Millisecond).Seconds()
		h.reserve(it.end, int64(min(max(speed*h.patience.Seconds(), minReserve), maxReserve)))
		if fl == nil {
			c.bufs.put(frame)
			continue
		}
		select {
		case jobs <- hotJob{fl, frame, chunk.TarOffset, body, it.from}:
		case <-ctx.Done():
			fl.fill.fail([]*flight{fl}, errReturned)
			c.bufs.put(frame)
			return ctx.Err()
		}
	}
	return nil
}

// reserve lets reads join the chunks that come within n bytes from off on.
func (h *hot) reserve(off, n int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(h.reserved) > 0 && h.reserved[0].from < off { // they have come
		h.reserved = h.reserved[1:]
	}
	for h.standstills < maxStandstills && len(h.items) > 0 && h.items[0].end <= off+n && len(h.reserved) < maxReservations {
		it := &h.items[0]
		h.items = h.items[1:]
		if it.from < off {
			continue
		}
		if fl := h.flight(it, false); fl != nil {
			h.reserved = append(h.reserved, reservation{fl, it.from})
		}
	}
}

// take returns a flight for it, which has come, or nil if it is not missing any more.
func (h *hot) take(it *hotItem) *flight { return h.flight(it, true) }

// flight returns a flight for it, or nil if it is here or comes another way. A flight that is taken is not given back.
func (h *hot) flight(it *hotItem, taken bool) *flight {
	s := it.Layer.store
	s.mu.Lock()
	defer s.mu.Unlock()
	fl := s.flights[it.Chunk]
	switch {
	case s.present.has(it.Chunk) || fl != nil && fl.fill.hot != h:
		return nil
	case fl == nil:
		fl = &flight{chunk: it.Chunk, fill: h.fills[it.Layer], done: make(chan struct{}), refs: 1}
		s.flights[it.Chunk] = fl
	case fl.taken:
		return nil
	}
	fl.taken = taken
	return fl
}

// bring decodes a frame and delivers the chunk.
func (h *hot) bring(j hotJob) (err error) {
	f := j.flight.fill
	if fault := mapped.Guard(func() {
		var buf *buffer
		if buf, err = f.layer.store.decode(j.flight.chunk, j.frame.b); err == nil {
			h.cache.stats.hot.Add(1)
			h.share.left.Add(-int64(len(buf.b)))
			f.deliver(j.flight, buf, j.off, false)
		}
	}); fault != nil {
		err = fault
	}
	n := int64(len(j.frame.b))
	h.cache.bufs.put(j.frame)
	if err != nil {
		h.mu.Lock()
		h.wrong = append(h.wrong, func() { tellWrong(j.body, j.from, n, err) })
		h.mu.Unlock()
		err = fmt.Errorf("layer %s: chunk %d: %w", f.layer.store.dgst, j.flight.chunk, err)
		f.fail([]*flight{j.flight}, err)
	}
	return err
}

// late is told by a read that has waited for fl in vain.
func (h *hot) late(fl *flight) {
	if time.Since(time.Unix(0, h.moved.Load())) < h.patience/2 {
		fl.giveBack()
		return
	}
	h.mu.Lock()
	h.standstills++
	h.mu.Unlock()
	h.giveBack()
	fl.giveBack()
}

// giveBack leaves to the reads what has not come.
func (h *hot) giveBack() {
	h.mu.Lock()
	reserved := h.reserved
	h.reserved = nil
	h.mu.Unlock()
	for _, r := range reserved {
		r.flight.giveBack()
	}
}

func (fl *flight) giveBack() {
	s := fl.fill.layer.store
	s.mu.Lock()
	taken := fl.taken
	fl.taken = true // by nobody, from now on
	s.mu.Unlock()
	if !taken {
		fl.fill.fail([]*flight{fl}, errReturned)
	}
}

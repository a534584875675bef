package cache

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

const (
	// sweepRead is what is read of the disk at once, bytes, if it has so much in one piece.
	sweepRead = 1 << 20
	// sweepGap is how many bytes of a blob, of chunks that are here, are fetched again rather than asked around.
	sweepGap = 1 << 20
	// noTwins is for how many chunks no copies are counted on, after one was not there.
	noTwins = 256
)

// Sweep reads a layer's tar once, from its start to its end, whatever the cache has of it: for who judges it as a whole. Chunks that are here come from disk, the others from other
// layers or the blob; these stay here as far as there is room that nothing used has to leave for them. Reads neither take part in it nor wait for it. It is one goroutine's.
type Sweep struct {
	ctx     context.Context // of the one reading that this value lives for
	layer   *Layer
	index   *artifact.Index
	src     Blob
	checked bool

	next int    // chunk
	last int    // the chunk where it ends
	here []byte // of disk: bytes of the chunks from next on
	buf  []byte
	lone int // chunks below are taken to have no copies

	body  io.ReadCloser // at the frame of chunk next, or nil
	end   int           // the chunk where body ends
	try   int           // of the requests for chunk next
	frame []byte
}

// Sweep begins a reading, with x, which is the layer's index or a copy of it, through src, which reads the layer's blob. If checked is set, all bytes have the digests that x has for them, and what the disk has
// damaged is a miss; otherwise that holds for what was fetched and not for what is here. That the bytes are what x says otherwise, its headers, is not known of any.
func (l *Layer) Sweep(ctx context.Context, x *artifact.Index, src Blob, checked bool) *Sweep {
	return &Sweep{ctx: ctx, layer: l, index: x, src: src, checked: checked, last: x.NumChunks()}
}

// Chunk is a checked Sweep of chunk i alone.
func (l *Layer) Chunk(ctx context.Context, x *artifact.Index, src Blob, i int) ([]byte, error) {
	s := l.Sweep(ctx, x, src, true)
	s.next, s.last = i, i+1
	defer s.Pause()
	return s.Next()
}

// Next returns the next chunk's bytes, valid until the next call, and io.EOF after the last. The other errors are ctx's, os.ErrClosed, src's and artifact.ErrInvalid, if src gave wrong bytes several
// times. After an error it may be called again for the same chunk.
func (s *Sweep) Next() (b []byte, err error) {
	if s.next == s.last {
		return nil, io.EOF
	}
	if !s.layer.enter() {
		err = os.ErrClosed
	} else {
		defer s.layer.running.Done()
		if fault := mapped.Guard(func() { b, err = s.chunk() }); fault != nil { // of the index
			err = fault
		}
	}
	if err != nil {
		s.Pause()
		return nil, fmt.Errorf("read layer %s: %w", s.layer.store.dgst, err)
	}
	s.next++
	if s.body != nil && s.next == s.end {
		s.Pause()
	}
	return b, nil
}

// Pause ends the request that is under way, if one is. Next begins another.
func (s *Sweep) Pause() {
	if s.body != nil {
		s.body.Close()
		s.body = nil
	}
}

func (s *Sweep) chunk() ([]byte, error) {
	if err := s.ctx.Err(); err != nil {
		return nil, err
	}
	c := s.index.Chunk(s.next)
	if s.body == nil {
		if b := s.local(c); b != nil {
			return b, nil
		}
	}
	for {
		b, err := s.fetch(c)
		if !errors.As(err, new(wrongBytes)) {
			if err == nil {
				s.try = 0
				s.keep(c, b)
			}
			return b, err
		}
		if s.try++; s.try == wrongTries {
			s.try = 0
			return nil, err
		}
	}
}

// local returns chunk next if this disk has it.
func (s *Sweep) local(c artifact.Chunk) []byte {
	n := int(c.TarSize)
	if len(s.here) < n {
		s.here = s.read(c)
	}
	if len(s.here) >= n {
		b := s.here[:n:n]
		s.here = s.here[n:]
		if !s.checked || sha256.Sum256(b) == c.Digest {
			return b
		}
		s.here = nil
		s.layer.store.spoilt(s.next, c)
	}
	cache := s.layer.store.cache
	layers := cache.twins.layers.Load()
	if layers == nil || s.next < s.lone || !known(*layers, s.layer.store.dgst, c) {
		return nil
	}
	b := s.grow(n)
	if !cache.readTwin(*layers, s.layer.store.dgst, "", c, b) {
		s.lone = s.next + noTwins
		return nil
	}
	cache.stats.copied.Add(1)
	s.keep(c, b)
	return b
}

// read returns the bytes of the chunks from next on that are on disk in one piece, at most sweepRead or one chunk, which is c; none if that is not there.
func (s *Sweep) read(c artifact.Chunk) []byte {
	st := s.layer.store
	evictions := st.evictions.Load() // before looking at what is here: see evict.go
	n := int64(0)
	for i := s.next; i < st.n && st.holds(i); i++ {
		size := s.index.Chunk(i).TarSize
		if n > 0 && n+size > sweepRead {
			break
		}
		n += size
	}
	if n == 0 {
		return nil
	}
	b := s.grow(int(n))
	if got, err := st.data.ReadAt(b, c.TarOffset); got < len(b) {
		st.short(err)
		st.forget(s.next, s.next+1)
		return nil
	}
	if st.evictions.Load() != evictions {
		return nil // some of it may have been given back meanwhile
	}
	return b
}

// grow returns n bytes of memory, with the room behind them that a decoder likes.
func (s *Sweep) grow(n int) []byte {
	if cap(s.buf) < n+artifact.DecodeSlack {
		s.buf = make([]byte, max(n, sweepRead)+artifact.DecodeSlack)
	}
	return s.buf[:n]
}

// fetch reads chunk next from the blob, where the request under way is, or another.
func (s *Sweep) fetch(c artifact.Chunk) ([]byte, error) {
	if s.body == nil {
		if err := s.ask(c); err != nil {
			return nil, noEOF(err)
		}
	}
	if cap(s.frame) < int(c.BlobSize) {
		s.frame = make([]byte, c.BlobSize)
	}
	frame := s.frame[:c.BlobSize]
	if _, err := io.ReadFull(s.body, frame); err != nil {
		return nil, noEOF(err)
	}
	b, err := s.index.Decompress(s.next, frame, s.grow(int(c.TarSize))[:0])
	if err != nil {
		err = wrongBytes{err}
		tellWrong(s.body, c.BlobOffset, c.BlobSize, err)
		s.layer.store.cache.stats.corrupt.Add(1)
		s.Pause()
		return nil, err
	}
	return b, nil
}

// ask asks for chunk next and those behind it that are not here, in one request.
func (s *Sweep) ask(c artifact.Chunk) (err error) {
	st := s.layer.store
	var layers map[digest.Digest]twin
	if p := st.cache.twins.layers.Load(); p != nil {
		layers = *p
	}
	end := c.BlobOffset + c.BlobSize
	s.end = s.next + 1
	for i := s.end; i < s.last; i++ {
		d := s.index.Chunk(i)
		if d.BlobOffset-end > sweepGap || d.BlobOffset+d.BlobSize-c.BlobOffset > completeRequest {
			break
		}
		if !st.holds(i) && (i < s.lone || !known(layers, st.dgst, d)) {
			s.end, end = i+1, d.BlobOffset+d.BlobSize
		}
	}
	st.cache.stats.requests.Add(1)
	st.cache.stats.fetchedBytes.Add(end - c.BlobOffset)
	s.body, err = s.src.ReadRange(s.ctx, c.BlobOffset, end-c.BlobOffset, s.try)
	return err
}

// keep puts chunk next on disk, if it is not there, there is room, and its headers are the index's: what is here may be read.
func (s *Sweep) keep(c artifact.Chunk, b []byte) {
	st := s.layer.store
	cache := st.cache
	if st.holds(s.next) || cache.limit > 0 && cache.used.Load()+onDisk(len(b)) > cache.low() {
		return
	}
	if st.check(s.next, b) == nil {
		st.write(s.next, c.TarOffset, b)
	}
}

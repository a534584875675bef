package cache

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

// maxPasses bounds how often a tar is read because it was wrong.
const maxPasses = 3

// Rebuilder is a Blob whose layer's tar can be had without it, should it go away or be wrong.
type Rebuilder interface {
	Blob
	// Gone reports whether err, of ReadRange or of what it returned, says that ranges of the blob cannot be had any more.
	Gone(err error) bool
	// Tar returns the tar from its start, unverified. It ends with ctx. Bytes that cannot be the tar's are artifact.ErrInvalid; try is as for
	// ReadRange.
	Tar(ctx context.Context, try int) (io.ReadCloser, error)
}

// pass is one reading of the tar of a layer whose blob is gone or wrong, from its start to its end: a stream that was compressed as a whole cannot be
// read elsewhere. All fills of the layer share it. What it passes is verified and delivered or put on disk, wanted or not: the next read would
// begin from the start again.
type pass struct {
	layer  *Layer // that began it
	cancel context.CancelFunc
	wanted map[int]*flight // by chunk; guarded by store.mu
	done   chan struct{}
	err    error // before done is closed; nil if it got to the end
}

// rebuild brings flights in from the tar itself; why is what speaks against the blob. It returns those that could not be had so, and why.
func (f *fill) rebuild(ctx context.Context, src Rebuilder, flights []*flight, why error) ([]*flight, error) {
	s := f.layer.store
	for {
		// An earlier pass may have put them on disk after they were missed.
		if flights = f.reload(ctx, flights); len(flights) == 0 {
			return nil, nil
		}
		p := s.joinPass(f.layer, src, flights)
		if flights = p.await(ctx, s, flights); len(flights) == 0 {
			return nil, nil
		}
		if err := ctx.Err(); err != nil {
			return flights, err
		}
		if p.err != nil && !errors.Is(p.err, context.Canceled) { // when who began it closes, another goes on
			return flights, fmt.Errorf("%w; the source layer: %w", why, p.err)
		}
	}
}

// reload delivers those of flights that are on disk now, and returns the others that have not landed.
func (f *fill) reload(ctx context.Context, flights []*flight) (missing []*flight) {
	s := f.layer.store
	var onDisk []*flight
	s.mu.Lock()
	for _, fl := range flights {
		if fl.landed() {
			continue
		}
		if s.present.has(fl.chunk) {
			onDisk = append(onDisk, fl)
		} else {
			missing = append(missing, fl)
		}
	}
	s.mu.Unlock()
	return append(missing, f.load(ctx, onDisk)...)
}

// joinPass lets the pass under way look out for flights, or a new one that l begins.
func (s *store) joinPass(l *Layer, src Rebuilder, flights []*flight) *pass {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pass
	if p == nil {
		ctx, cancel := context.WithCancel(context.Background())
		p = &pass{layer: l, cancel: cancel, wanted: map[int]*flight{}, done: make(chan struct{})}
		s.pass = p
		if l.closed {
			cancel()
		}
		l.running.Add(1)
		go p.run(ctx, s, src)
	}
	for _, fl := range flights {
		p.wanted[fl.chunk] = fl
	}
	return p
}

// await waits until flights have landed, ctx has ended or the pass has. It returns those that the pass has not delivered and will not.
func (p *pass) await(ctx context.Context, s *store, flights []*flight) (left []*flight) {
	for _, fl := range flights {
		select {
		case <-fl.done:
		case <-p.done:
		case <-ctx.Done():
		}
	}
	var taken []*flight
	s.mu.Lock()
	for _, fl := range flights {
		if fl.taken {
			taken = append(taken, fl)
			continue
		}
		if p.wanted[fl.chunk] == fl {
			delete(p.wanted, fl.chunk)
		}
		left = append(left, fl)
	}
	s.mu.Unlock()
	for _, fl := range taken {
		<-fl.done // at once: its bytes are there
	}
	return left
}

func (p *pass) run(ctx context.Context, s *store, src Rebuilder) {
	defer p.layer.running.Done()
	defer p.cancel()
	err := p.read(ctx, s, src, 0)
	for try := 1; try < maxPasses && errors.Is(err, artifact.ErrInvalid) && ctx.Err() == nil; try++ {
		again := p.read(ctx, s, src, try)
		if again != nil && !errors.Is(again, artifact.ErrInvalid) {
			err = errors.Join(err, again) // nobody is left to ask
			break
		}
		err = again
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	s.pass, p.err = nil, err
	close(p.done)
}

// read goes through the tar once.
func (p *pass) read(ctx context.Context, s *store, src Rebuilder, try int) (err error) {
	if fault := mapped.Guard(func() { err = p.readTar(ctx, s, src, try) }); fault != nil { // of the index
		return fault
	}
	return err
}

func (p *pass) readTar(ctx context.Context, s *store, src Rebuilder, try int) error {
	body, err := src.Tar(ctx, try)
	if err != nil {
		return noEOF(err)
	}
	defer body.Close()
	for i := range s.n {
		c := s.index.Chunk(i)
		buf := s.cache.bufs.get(int(c.TarSize))
		buf.b = buf.mem[:c.TarSize]
		if _, err := io.ReadFull(body, buf.b); err != nil {
			s.cache.bufs.put(buf)
			if err == io.EOF || err == io.ErrUnexpectedEOF { // of the tar, well ended; a connection's end is wrapped by whoever gave it up
				err = fmt.Errorf("%w: the source layer's tar ends in chunk %d", artifact.ErrInvalid, i)
			}
			return err
		}
		if err := p.pass(s, i, c, buf); err != nil {
			return err
		}
	}
	return nil
}

// pass takes chunk i, whose bytes the tar has in buf, to where it is needed.
func (p *pass) pass(s *store, i int, c artifact.Chunk, buf *buffer) error {
	s.mu.Lock()
	needed := p.wanted[i] != nil || !s.present.has(i)
	s.mu.Unlock()
	if !needed {
		s.cache.bufs.put(buf)
		return nil
	}
	err := s.verify(i, c.Digest, buf.b)
	if err != nil {
		s.cache.stats.corrupt.Add(1)
		s.cache.bufs.put(buf)
		return fmt.Errorf("chunk %d of the source layer's tar: %w", i, err)
	}
	s.mu.Lock()
	fl := p.wanted[i]
	if fl != nil {
		fl.taken = true
		delete(p.wanted, i)
	}
	s.mu.Unlock()
	if fl != nil {
		s.miss(c.TarSize)
		fl.fill.deliver(fl, buf, c.TarOffset, false)
		return nil
	}
	s.write(i, c.TarOffset, buf.b)
	s.cache.bufs.put(buf)
	return nil
}

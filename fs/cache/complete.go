package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

const (
	// completeRequest is what one request for the rest of a layer asks for, bytes of its blob: a registry serves few large ones for less.
	completeRequest = 32 << 20
	// completePatience is how long a read may wait for what is on its way at a low priority.
	completePatience = 100 * time.Millisecond
)

// ErrFull says that there is no more room in the cache but by giving back chunks that were used.
var ErrFull = errors.New("the cache is full")

// ErrLeft says that chunks came another way, which has not ended or has failed.
var ErrLeft = errors.New("not all is here yet")

// Complete brings in what is missing of the layer, from its start to its end, through src, which reads the layer's blob as fast and at such times as
// suits. Reads take precedence: they wait for it no longer than they gain by it. The errors are ErrFull, src's, ctx's and os.ErrClosed.
func (l *Layer) Complete(ctx context.Context, src Blob) (err error) {
	if !l.enter() {
		return fmt.Errorf("complete layer %s: %w", l.store.dgst, os.ErrClosed)
	}
	defer l.running.Done()
	if fault := mapped.Guard(func() { err = l.complete(ctx, src) }); fault != nil { // of the index
		err = fault
	}
	if err != nil {
		return fmt.Errorf("complete layer %s: %w", l.store.dgst, err)
	}
	return nil
}

func (l *Layer) complete(ctx context.Context, src Blob) error {
	s := l.store
	for lo := 0; lo < s.n; lo++ {
		if !s.absent(lo) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		first := s.index.Chunk(lo)
		var frames []Frame
		missing, end := int64(0), first.BlobOffset
		for ; lo < s.n; lo++ {
			c := s.index.Chunk(lo)
			if len(frames) > 0 && c.BlobOffset+c.BlobSize-first.BlobOffset > completeRequest {
				break
			}
			if s.absent(lo) {
				missing += onDisk(int(c.TarSize))
			}
			frames = append(frames, Frame{l, lo})
			end = c.BlobOffset + c.BlobSize
		}
		lo--
		if c := s.cache; c.limit > 0 && (c.used.Load()+missing > c.low() || missing > c.limit/hotShare) {
			return ErrFull
		}
		if err := s.cache.Share().Fill(ctx, src, first.BlobOffset, end-first.BlobOffset, frames, completePatience); err != nil {
			return err
		}
	}
	for i := range s.n {
		if !s.holds(i) {
			return ErrLeft
		}
	}
	return nil
}

// Has reports whether chunk i is on disk, as far as is known.
func (l *Layer) Has(i int) bool { return l.store.holds(i) }

// Present returns how many bytes of the layer's tar are here.
func (l *Layer) Present() (n int64) {
	s := l.store
	mapped.Guard(func() { // of the index: what it says until then counts
		s.mu.Lock()
		defer s.mu.Unlock()
		for i := range s.n {
			if s.present.has(i) {
				n += s.index.Chunk(i).TarSize
			}
		}
	})
	return n
}

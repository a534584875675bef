package stream

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

const (
	// hotHead is how much of a hot blob is asked for of an image that shares layers with others on this node, of whose chunks it may have many: the list, and what fits
	// of the indexes. Of another image all is asked for at once.
	hotHead = 256 << 10
	// maxHotSkip is how much of the open hot blob is dropped rather than asked around.
	maxHotSkip = 256 << 10

	aheadBlock  = 128 << 10 // bytes
	aheadBlocks = 128       // 16 MiB: what 60 MB/s, which is much for one connection, bring while the tree of 50,000 files is made
)

// hotBlob is a hot blob as it comes: open from its start until somebody wants a range that is far from where it is. It is a cache.Blob, for one goroutine.
type hotBlob struct {
	fetch *hotFetch
	dgst  digest.Digest
	size  int64

	body   io.ReadCloser
	ahead  *aheadReader       // of body, from readAhead on
	cancel context.CancelFunc // of body
	pos    int64              // of body
	end    int64              // of body
	asked  time.Time          // when body was asked for
}

// head reads the head, and leaves open what follows it: of an image that shares layers not all of that, of which much may be here.
func (b *hotBlob) head(ctx context.Context) (*artifact.HotHead, error) {
	if b.fetch.shares && hotHead < b.size {
		if err := b.open(ctx, hotHead); err != nil {
			return nil, err
		}
		h, err := artifact.ReadHotHead(b)
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			return h, err
		}
		b.close()
		b.pos = 0 // the list is longer
	}
	if err := b.open(ctx, b.size); err != nil {
		return nil, err
	}
	return artifact.ReadHotHead(b)
}

// open asks for the first n bytes.
func (b *hotBlob) open(ctx context.Context, n int64) (err error) {
	ctx, b.cancel = context.WithCancel(ctx)
	b.asked, b.end = time.Now(), n
	b.body, err = b.readRange(ctx, 0, n, 0)
	return err
}

func (b *hotBlob) readRange(ctx context.Context, off, n int64, try int) (io.ReadCloser, error) {
	return b.fetch.store.o.Registry.ReadRange(ctx, b.fetch.repo, b.dgst, off, n, try)
}

// readAhead lets all that follows come while nobody reads it: the processors have the tree of the image to make, which containers wait for first. If not all was asked
// for, it ends what was.
func (b *hotBlob) readAhead() {
	if b.end < b.size {
		b.close()
	} else {
		b.ahead = newAheadReader(b.body)
	}
}

func (b *hotBlob) Read(p []byte) (n int, err error) {
	if b.ahead != nil {
		n, err = b.ahead.Read(p)
	} else {
		n, err = b.body.Read(p)
	}
	b.pos += int64(n)
	b.fetch.moved.Store(time.Now().UnixNano())
	return n, err
}

// ReadRange goes on with the open body if that is at hand.
func (b *hotBlob) ReadRange(ctx context.Context, off, n int64, try int) (io.ReadCloser, error) {
	if b.body == nil || off < b.pos || off-b.pos > maxHotSkip || try > 0 {
		b.close()
		return b.readRange(ctx, off, n, try)
	}
	r := &hotRange{hotBlob: b, answer: b.body, stop: context.AfterFunc(ctx, b.cancel)}
	if _, err := io.CopyN(io.Discard, b, off-b.pos); err != nil {
		r.Close()
		return nil, err
	}
	r.Reader = io.LimitReader(b, n)
	return r, nil
}

func (b *hotBlob) close() {
	if b.cancel != nil {
		b.cancel()
	}
	if b.ahead != nil {
		b.ahead.stop()
		b.ahead = nil
	}
	if b.body != nil {
		b.body.Close()
		b.body = nil
	}
}

// hotRange is a range of the open hot blob.
type hotRange struct {
	*hotBlob
	io.Reader
	answer io.Reader
	stop   func() bool
}

func (r *hotRange) Read(p []byte) (int, error) { return r.Reader.Read(p) }

// Wrong passes on what fs/cache.Blob's readers are told.
func (r *hotRange) Wrong(off, n int64) { tellWrong(r.answer, off, n) }

// Close closes the hot blob, too: one range is read out of it.
func (r *hotRange) Close() error {
	r.stop()
	r.hotBlob.close()
	return nil
}

// aheadReader reads a body into memory, a few blocks ahead of its one reader.
type aheadReader struct {
	blocks  chan []byte // closed after the last
	err     error       // set before
	block   []byte      // that is being read
	left    []byte      // of it
	free    chan []byte // blocks that were read, to be filled again: new memory costs the kernel more than that
	stopped chan struct{}
}

func newAheadReader(body io.Reader) *aheadReader {
	r := &aheadReader{blocks: make(chan []byte, aheadBlocks), free: make(chan []byte, aheadBlocks), stopped: make(chan struct{})}
	go func() {
		defer close(r.blocks)
		for r.err == nil {
			var b []byte
			select {
			case b = <-r.free:
			default:
				b = make([]byte, aheadBlock)
			}
			var n int
			n, r.err = io.ReadFull(body, b)
			if r.err == io.ErrUnexpectedEOF {
				r.err = io.EOF
			}
			select {
			case r.blocks <- b[:n]:
			case <-r.stopped:
				return
			}
		}
	}()
	return r
}

func (r *aheadReader) Read(p []byte) (int, error) {
	for len(r.left) == 0 {
		b, ok := <-r.blocks
		if !ok {
			return 0, r.err
		}
		if r.block != nil {
			select {
			case r.free <- r.block:
			default: // there are enough
			}
		}
		r.block, r.left = b[:cap(b)], b
	}
	n := copy(p, r.left)
	r.left = r.left[n:]
	return n, nil
}

// stop ends the reading, once the body's context has ended.
func (r *aheadReader) stop() {
	close(r.stopped)
	for range r.blocks {
	}
}

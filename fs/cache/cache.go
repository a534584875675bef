// Package cache keeps verified chunks on local disk.
package cache

import (
	"context"
	"io"

	"github.com/opencontainers/go-digest"
	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// Blob reads ranges of a layer blob from wherever it is kept.
type Blob interface {
	// ReadRange returns exactly n bytes at off, or an error: a reader that ends early fails with io.ErrUnexpectedEOF.
	// It may be called from many goroutines.
	// try counts from 0: a chunk whose bytes proved wrong is asked for again with try+1, and the Blob should then
	// turn to another host. When there is no other, it returns an error.
	ReadRange(ctx context.Context, off, n int64, try int) (io.ReadCloser, error)
}

// Cache is a directory of layers.
type Cache struct{}

// Open opens or creates the cache in dir. Damage is a miss, never an error.
func Open(dir string) (*Cache, error) { panic("todo") }

// Layer opens layer blob dgst, whose index is x, for reading; the data files are shared by all openers of the same dgst. Close it when no mount needs it.
func (c *Cache) Layer(dgst digest.Digest, x *artifact.Index, blob Blob) (*Layer, error) {
	panic("todo")
}

// Close flushes and closes all.
func (c *Cache) Close() error { panic("todo") }

// Layer is a layer's tar, read at random.
type Layer struct{}

// ReadAt reads len(p) bytes of the tar at off, fetching what is missing. Short only at the tar's end, with io.EOF. p holds verified bytes or there is an error; ctx ends the wait, and the fetch if nobody else waits for it.
func (l *Layer) ReadAt(ctx context.Context, p []byte, off int64) (int, error) { panic("todo") }

// Usage returns the bytes on disk.
func (l *Layer) Usage() (int64, error) { panic("todo") }

// Close ends the use of the layer. Its chunks stay.
func (l *Layer) Close() error { panic("todo") }

package cache

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// bitmap is a set of chunks. Every method is safe for concurrent use.
type bitmap []atomic.Uint64

func newBitmap(n int) bitmap { return make(bitmap, (n+63)/64) }

func (b bitmap) has(i int) bool { return b[i/64].Load()&(1<<(i%64)) != 0 }
func (b bitmap) set(i int)      { b[i/64].Or(1 << (i % 64)) }
func (b bitmap) clear(i int)    { b[i/64].And(^uint64(1 << (i % 64))) }

func (b bitmap) clearAll() {
	for i := range b {
		b[i].Store(0)
	}
}

// setAll makes b the set of all n chunks.
func (b bitmap) setAll(n int) {
	for i := range n {
		b.set(i)
	}
}

// empty reports whether b has nothing.
func (b bitmap) empty() bool {
	for i := range b {
		if b[i].Load() != 0 {
			return false
		}
	}
	return true
}

// hasAll reports whether b has all of [lo, hi).
func (b bitmap) hasAll(lo, hi int) bool {
	for i := lo; i < hi; i++ {
		if !b.has(i) {
			return false
		}
	}
	return true
}

// The map file: see the package doc.
const (
	mapMagic      = "SSCHUNKS"
	mapVersion    = 1
	mapHeaderSize = 64
)

// errStale: the files are whole, as far as the disk knows, but not what this version has written for this layer.
var errStale = errors.New("stale cache file")

// mapSize returns the size of the map of n chunks, bytes.
func mapSize(n int) int { return mapHeaderSize + (n+7)/8 }

func encodeMapHeader(x *artifact.Index, id [32]byte) []byte {
	h := make([]byte, mapHeaderSize)
	copy(h, mapMagic)
	binary.LittleEndian.PutUint32(h[8:], mapVersion)
	binary.LittleEndian.PutUint64(h[16:], uint64(x.TarSize))
	binary.LittleEndian.PutUint64(h[24:], uint64(x.NumChunks()))
	copy(h[32:], id[:])
	return h
}

// encodeMap returns the map file of a layer of n chunks with b present.
func encodeMap(header []byte, n int, b bitmap) []byte {
	m := bytes.Clone(header)
	for i := range b {
		m = binary.LittleEndian.AppendUint64(m, b[i].Load())
	}
	return m[:mapSize(n)]
}

// decodeMap returns the chunks that map file m claims, or why it is not a map of the layer that header describes.
func decodeMap(header []byte, n int, m []byte) (bitmap, error) {
	if len(m) != mapSize(n) {
		return nil, fmt.Errorf("map of %d bytes, want %d: %w", len(m), mapSize(n), errStale)
	}
	if !bytes.HasPrefix(m, header) {
		return nil, fmt.Errorf("map of another version or layer: %w", errStale)
	}
	b := newBitmap(n)
	for i, octet := range m[mapHeaderSize:] {
		b[i/8].Or(uint64(octet) << (i % 8 * 8))
	}
	if n%64 != 0 && b[n/64].Load()>>(n%64) != 0 {
		return nil, fmt.Errorf("map with bits beyond chunk %d: %w", n-1, errStale)
	}
	return b, nil
}

// identity hashes what the index says of chunks: two indexes of one identity mean the same bytes at the same places.
func identity(x *artifact.Index) [32]byte {
	h := sha256.New()
	b := make([]byte, 0, 64)
	b = binary.LittleEndian.AppendUint64(b, uint64(x.TarSize))
	b = binary.LittleEndian.AppendUint64(b, uint64(x.HeadersSize))
	h.Write(append(b, x.DiffID...))
	for i := range x.NumChunks() {
		c := x.Chunk(i)
		b = binary.LittleEndian.AppendUint64(b[:0], uint64(c.TarOffset))
		b = binary.LittleEndian.AppendUint64(b, uint64(c.TarSize))
		b = binary.LittleEndian.AppendUint64(b, uint64(c.BlobOffset))
		b = binary.LittleEndian.AppendUint64(b, uint64(c.BlobSize))
		h.Write(append(b, c.Digest[:]...))
	}
	return [32]byte(h.Sum(nil))
}

package artifact

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"sort"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// DecodeSlack is the room behind a chunk, bytes, with which the decompressor copies without looking for the buffer's end at each step (compress/zstd's compressedBlockOverAlloc).
const DecodeSlack = 32

// Limits that every decoder enforces and every encoder keeps.
const (
	MaxChunkSize    = 4 << 20   // bytes of tar in a chunk
	MaxIndexSize    = 512 << 20 // bytes of the index's skippable frame
	MaxHeadersSize  = 4 << 30   // bytes of headers, uncompressed: so at most 8 Mi entries
	MaxManifestSize = 4 << 20   // bytes of an artifact's manifest
	MaxLayers       = 4096

	// Limits of an image, which who reads its artifact enforces, so that none can take all memory or disk. They are far from what images have: 100,000
	// files have 50 MiB of headers, 2 to 5 MiB of indexes.
	MaxImageIndexes = 512 << 20 // bytes of the indexes of all layers
	MaxImageHeaders = 1 << 30   // bytes of their headers, uncompressed: 2 Mi files, whose merged tree takes 1.4 GiB while it is made

	// maxBlobSize is more than a full chunk table can describe. It keeps sums over all layers far from overflow.
	maxBlobSize = 1 << 46

	maxWindow = 8 << 20 // of every zstd frame, bytes: what RFC 8878 asks every decoder to support
)

// The index's skippable frame, little endian. The frame's header is zstd's own (RFC 8878, 3.1.2); the headers, one zstd frame, follow the chunk table to the end.
const (
	skippableMagic = 0x184D2A5E
	indexMagic     = "tarindex"
	indexVersion   = 1

	offSkippableMagic = 0  // uint32
	offSkippableSize  = 4  // uint32: bytes of the frame from offIndexMagic on
	offIndexMagic     = 8  // [8]byte
	offVersion        = 16 // uint32
	offChunks         = 20 // uint32: entries of the chunk table
	offTarSize        = 24 // uint64
	offHeadersSize    = 32 // uint64: of the headers, uncompressed
	offDiffID         = 40 // [32]byte
	indexHeaderSize   = 72

	// An entry of the chunk table. A chunk begins where the one before ends, in the tar and in the blob.
	offTarEnd      = 0  // uint64
	offFrameEnd    = 8  // uint64
	offDigest      = 16 // [32]byte
	tableEntrySize = 48
)

// Index is a decoded index: a layer's headers and its chunk table. It keeps the bytes it was decoded from (which may be a
// memory map) and copies nothing, so that a large index costs no heap. It may be used by several goroutines.
type Index struct {
	TarSize     int64         // of the layer's tar, bytes
	HeadersSize int64         // of the headers, uncompressed, bytes
	DiffID      digest.Digest // SHA-256 of the tar, as the converter saw it: a claim until proven

	table   []byte // the chunk table, validated
	headers []byte // the headers' zstd frame

	decoders sync.Pool // of *zstd.Decoder, for chunks

	layout atomic.Pointer[Layout] // once the headers were read to their end
}

// Chunk is a run of the tar and its zstd frame in the blob. Chunks are contiguous in both.
type Chunk struct {
	TarOffset, TarSize   int64
	BlobOffset, BlobSize int64
	Digest               [32]byte // SHA-256 of the chunk's uncompressed bytes
}

// Index decodes b, the index of the layer, and checks it against everything that the manifest says about it.
func (l *Layer) Index(b []byte) (*Index, error) {
	if int64(len(b)) != l.IndexSize {
		return nil, fmt.Errorf("index of layer %s: %d bytes, want %d: %w", l.Digest, len(b), l.IndexSize, ErrInvalid)
	}
	if got := digest.FromBytes(b); got != l.IndexDigest {
		return nil, fmt.Errorf("index of layer %s: digest %s, want %s: %w", l.Digest, got, l.IndexDigest, ErrInvalid)
	}
	x, err := DecodeIndex(b)
	if err != nil {
		return nil, fmt.Errorf("index of layer %s: %w", l.Digest, err)
	}
	if got := x.FramesSize(); got != l.IndexOffset {
		return nil, fmt.Errorf("index of layer %s: chunks end at %d in the blob, the index begins at %d: %w", l.Digest, got, l.IndexOffset, ErrInvalid)
	}
	return x, nil
}

// DecodeIndex decodes and validates the skippable frame b. It does not decode the headers. Errors are ErrInvalid or
// ErrUnsupported.
func DecodeIndex(b []byte) (*Index, error) {
	le := binary.LittleEndian
	switch {
	case len(b) < indexHeaderSize || len(b) > MaxIndexSize:
		return nil, fmt.Errorf("index of %d bytes: %w", len(b), ErrInvalid)
	case le.Uint32(b[offSkippableMagic:]) != skippableMagic || string(b[offIndexMagic:offVersion]) != indexMagic:
		return nil, fmt.Errorf("index without its magic numbers: %w", ErrInvalid)
	case int64(le.Uint32(b[offSkippableSize:])) != int64(len(b)-offIndexMagic):
		return nil, fmt.Errorf("index of %d bytes says %d: %w", len(b), le.Uint32(b[offSkippableSize:]), ErrInvalid)
	case le.Uint32(b[offVersion:]) != indexVersion:
		return nil, fmt.Errorf("index version %d: %w", le.Uint32(b[offVersion:]), ErrUnsupported)
	}
	chunks, tarSize, headersSize := int64(le.Uint32(b[offChunks:])), le.Uint64(b[offTarSize:]), le.Uint64(b[offHeadersSize:])
	body := b[indexHeaderSize:]
	switch {
	case chunks == 0 || chunks*tableEntrySize > int64(len(body)):
		return nil, fmt.Errorf("index of %d chunks in %d bytes: %w", chunks, len(b), ErrInvalid)
	case headersSize > MaxHeadersSize || headersSize > tarSize:
		return nil, fmt.Errorf("index with %d bytes of headers in %d of tar: %w", headersSize, tarSize, ErrInvalid)
	}
	x := &Index{
		TarSize:     int64(tarSize),
		HeadersSize: int64(headersSize),
		DiffID:      digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(b[offDiffID:indexHeaderSize])),
		table:       body[: chunks*tableEntrySize : chunks*tableEntrySize],
		headers:     body[chunks*tableEntrySize:],
	}
	if err := x.checkTable(tarSize); err != nil {
		return nil, err
	}
	return x, nil
}

// checkTable validates the chunk table. Ends are compared as unsigned numbers and each chunk is bounded, and there are fewer than 2^24 of
// them, so that after it every number of the table is a small, positive int64.
func (x *Index) checkTable(tarSize uint64) error {
	var tarEnd, frameEnd uint64
	for i := range x.NumChunks() {
		t, f := x.ends(i)
		n, frame := t-tarEnd, f-frameEnd // wraps around, to more than any limit, if the ends decrease
		switch {
		case n > MaxChunkSize, n == 0 && tarSize != 0:
			return fmt.Errorf("chunk %d ends at %d in the tar, the one before at %d: %w", i, t, tarEnd, ErrInvalid)
		case frame == 0 || frame > maxFrameSize(n):
			return fmt.Errorf("chunk %d of %d bytes has a frame from %d to %d: %w", i, n, frameEnd, f, ErrInvalid)
		}
		tarEnd, frameEnd = t, f
	}
	if tarEnd != tarSize || tarSize == 0 && x.NumChunks() != 1 {
		return fmt.Errorf("%d chunks end at %d in a tar of %d bytes: %w", x.NumChunks(), tarEnd, tarSize, ErrInvalid)
	}
	return nil
}

// maxFrameSize bounds the zstd frame of n bytes: stored blocks and the largest frame header.
func maxFrameSize(n uint64) uint64 { return n + n/256 + 64 }

// ends returns where chunk i ends in the tar and in the blob.
func (x *Index) ends(i int) (tar, blob uint64) {
	e := x.table[i*tableEntrySize:]
	return binary.LittleEndian.Uint64(e[offTarEnd:]), binary.LittleEndian.Uint64(e[offFrameEnd:])
}

// NumChunks returns the number of chunks, at least one: an empty tar has one empty chunk.
func (x *Index) NumChunks() int { return len(x.table) / tableEntrySize }

// FramesSize returns the bytes of all the chunks' frames: where the index begins in the blob.
func (x *Index) FramesSize() int64 {
	_, f := x.ends(x.NumChunks() - 1)
	return int64(f)
}

// Chunk returns chunk i, 0 <= i < NumChunks.
func (x *Index) Chunk(i int) Chunk {
	t, f := x.ends(i)
	c := Chunk{TarSize: int64(t), BlobSize: int64(f), Digest: [32]byte(x.table[i*tableEntrySize+offDigest:])}
	if i > 0 {
		t, f = x.ends(i - 1)
		c.TarOffset, c.BlobOffset = int64(t), int64(f)
		c.TarSize, c.BlobSize = c.TarSize-c.TarOffset, c.BlobSize-c.BlobOffset
	}
	return c
}

// Find returns the chunk that holds tar offset off, 0 <= off < TarSize.
func (x *Index) Find(off int64) int {
	return sort.Search(x.NumChunks(), func(i int) bool {
		end, _ := x.ends(i)
		return off < int64(end)
	})
}

// Decompress decodes frame, the zstd frame of chunk i, appending to dst[:0], and verifies it against the chunk's digest.
// It allocates nothing if dst has room for the chunk, and is fastest if it has for DecodeSlack bytes more, whose values are then unspecified. Its error is ErrInvalid.
func (x *Index) Decompress(i int, frame, dst []byte) ([]byte, error) {
	c := x.Chunk(i)
	if int64(len(frame)) != c.BlobSize {
		return nil, fmt.Errorf("chunk %d: frame of %d bytes, want %d: %w", i, len(frame), c.BlobSize, ErrInvalid)
	}
	if int64(cap(dst)) < c.TarSize {
		dst = make([]byte, 0, c.TarSize+DecodeSlack)
	}
	dec, err := x.decoder()
	if err != nil {
		return nil, err
	}
	defer x.decoders.Put(dec)
	b, err := dec.DecodeAll(frame, dst[:0:min(int64(cap(dst)), c.TarSize+DecodeSlack)])
	if err != nil {
		return nil, fmt.Errorf("chunk %d: %w: %w", i, err, ErrInvalid)
	}
	if int64(len(b)) != c.TarSize || sha256.Sum256(b) != c.Digest {
		return nil, fmt.Errorf("chunk %d: its bytes are not those of its digest: %w", i, ErrInvalid)
	}
	return b[:len(b):len(b)], nil
}

func (x *Index) decoder() (*zstd.Decoder, error) {
	if dec, ok := x.decoders.Get().(*zstd.Decoder); ok {
		return dec, nil
	}
	return zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecodeAllCapLimit(true))
}

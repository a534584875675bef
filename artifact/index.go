package artifact

import (
	"archive/tar"
	"io"

	"github.com/opencontainers/go-digest"
)

// Limits that every decoder enforces and every encoder keeps.
const (
	MaxChunkSize    = 4 << 20   // bytes of tar in a chunk
	MaxIndexSize    = 512 << 20 // bytes of the index's skippable frame
	MaxHeadersSize  = 4 << 30   // bytes of headers, uncompressed
	MaxManifestSize = 4 << 20   // bytes of an artifact's manifest
	MaxLayers       = 4096
)

// Index is a decoded index: a layer's headers and its chunk table. It keeps the bytes it was decoded from (which may be a
// memory map) and copies nothing, so that a large index costs no heap.
type Index struct {
	TarSize     int64         // of the layer's tar, bytes
	HeadersSize int64         // of the headers, uncompressed, bytes
	DiffID      digest.Digest // SHA-256 of the tar, as the converter saw it: a claim until proven
}

// Chunk is a run of the tar and its zstd frame in the blob. Chunks are contiguous in both.
type Chunk struct {
	TarOffset, TarSize   int64
	BlobOffset, BlobSize int64
	Digest               [32]byte // SHA-256 of the chunk's uncompressed bytes
}

// DecodeIndex decodes and validates the skippable frame b. It does not decode the headers. Errors are ErrInvalid or
// ErrUnsupported.
func DecodeIndex(b []byte) (*Index, error) { panic("todo") }

// NumChunks returns the number of chunks.
func (x *Index) NumChunks() int { panic("todo") }

// Chunk returns chunk i, 0 <= i < NumChunks.
func (x *Index) Chunk(i int) Chunk { panic("todo") }

// Find returns the chunk that holds tar offset off, 0 <= off < TarSize.
func (x *Index) Find(off int64) int { panic("todo") }

// Decompress decodes frame, the zstd frame of chunk i, appending to dst[:0], and verifies it against the chunk's digest.
// Its error is ErrInvalid.
func (x *Index) Decompress(i int, frame, dst []byte) ([]byte, error) { panic("todo") }

// Entry is an entry of a layer's tar.
type Entry struct {
	*tar.Header
	Offset     int64 // tar offset of the entry's first block (of its extended headers, if any)
	DataOffset int64 // tar offset of the data run
	DataSize   int64 // length of the data run in the tar: Size unless the member is sparse
	// Sparse maps the file's data if the member is sparse (Header.Size is then the logical size), in order, without overlaps,
	// holes left out; nil for others. A sparse member that is all hole has an empty, non-nil map.
	Sparse []SparseRun
}

// SparseRun says that n bytes of a file at FileOffset lie at TarOffset.
type SparseRun struct{ FileOffset, TarOffset, Size int64 }

// Entries reads the headers from the start. Next returns io.EOF after the last entry; other errors are ErrInvalid.
func (x *Index) Entries() *EntryReader { panic("todo") }

// EntryReader yields the entries of a layer in the tar's order.
type EntryReader struct{}

// Next returns the next entry.
func (r *EntryReader) Next() (*Entry, error) { return nil, io.EOF }

// Close releases the decoder.
func (r *EntryReader) Close() {}

// Layout says which bytes of the tar are data and which are headers, and what the headers hash to in each chunk: what
// is needed to compare a fetched chunk with the index's claim.
type Layout struct{}

// Layout decodes the headers once and derives the layout. Its memory is proportional to the number of files and of chunks with header bytes.
func (x *Index) Layout() (*Layout, error) { panic("todo") }

// Check compares the header bytes inside chunk i, whose uncompressed bytes are b, with the index's headers. Its error is ErrInvalid.
func (l *Layout) Check(i int, b []byte) error { panic("todo") }

// DataEnd returns the end of the data run that holds tar offset off, or off if that is a header byte: how far read-ahead may go.
func (l *Layout) DataEnd(off int64) int64 { panic("todo") }

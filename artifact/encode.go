package artifact

import (
	"context"
	"io"

	"github.com/opencontainers/go-digest"
)

// EncodeOptions are the parameters that decide a blob's bytes (but for Workers, which does not).
type EncodeOptions struct {
	ChunkSize int // most bytes of tar in a chunk; 0 is 128 KiB
	Workers   int // chunks compressed at once; 0 is GOMAXPROCS
}

// ID names everything that decides a blob's bytes, for records of layers converted before: format version, chunk size, encoder and its version.
func (o EncodeOptions) ID() string { panic("todo") }

// EncodedLayer is what EncodeLayer has written.
type EncodedLayer struct {
	Layer                     // all but Source
	DiffID      digest.Digest // SHA-256 of the tar
	TarSize     int64
	HeadersSize int64
	Chunks      int
}

// EncodeLayer reads a tar and writes the layer blob: the chunks' frames and the index. Memory is bounded whatever the tar's size. A tar that archive/tar cannot read to its end is ErrInvalid.
func EncodeLayer(ctx context.Context, w io.Writer, tar io.Reader, o EncodeOptions) (EncodedLayer, error) {
	panic("todo")
}

// VerifyLayer reads a whole layer blob and proves it: the blob's digest, every chunk's digest, the tar against diffID, and the index against an index derived again from the tar. Its error names the first difference.
func VerifyLayer(ctx context.Context, blob io.Reader, l Layer, diffID digest.Digest) error {
	panic("todo")
}

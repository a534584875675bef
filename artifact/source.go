package artifact

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxSourceWindow bounds the memory that a zstd source layer can ask for: what the zstd command decompresses without --long.
const maxSourceWindow = 128 << 20

// SourceTar returns the tar in r, the blob of a source layer of the given media type, as containerd reads it (images.DiffCompression): plain
// tars are read as they are; all that may be compressed is looked at, because builders mislabel. What follows the compressed stream is an
// error, as it is for containerd where neither igzip nor unpigz is installed; several gzip members or zstd frames are one stream.
func SourceTar(mediaType string, r io.Reader) (io.ReadCloser, error) {
	switch mediaType {
	case ocispec.MediaTypeImageLayer, "application/vnd.oci.image.layer.nondistributable.v1.tar":
		return io.NopCloser(r), nil
	}
	buf := bufio.NewReaderSize(r, 128<<10)
	magic, err := buf.Peek(8)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b, 0x08}):
		return gzip.NewReader(buf)
	case isZstd(magic):
		d, err := zstd.NewReader(buf, zstd.WithDecoderMaxWindow(maxSourceWindow), zstd.WithDecoderConcurrency(2))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}
	return io.NopCloser(buf), nil
}

func isZstd(b []byte) bool {
	if bytes.HasPrefix(b, []byte{0x28, 0xb5, 0x2f, 0xfd}) {
		return true
	}
	return len(b) == 8 && binary.LittleEndian.Uint32(b)&0xfffffff0 == 0x184d2a50 // a skippable frame first
}

package converter

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxWindow bounds the memory that a zstd layer can ask for: what the zstd command decompresses without --long.
const maxWindow = 128 << 20

// layerKind says how a layer of the media type is to be read, as containerd does (images.DiffCompression): plain tars are
// read as they are; all that may be compressed is looked at, because builders mislabel.
type layerKind int

const (
	unknownLayer layerKind = iota
	plainLayer
	compressedLayer
)

func kindOf(mediaType string) (k layerKind, foreign bool) {
	switch mediaType {
	case ocispec.MediaTypeImageLayer:
		return plainLayer, false
	case ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd,
		"application/vnd.docker.image.rootfs.diff.tar",
		"application/vnd.docker.image.rootfs.diff.tar.gzip",
		"application/vnd.docker.image.rootfs.diff.tar.zstd":
		return compressedLayer, false
	case "application/vnd.oci.image.layer.nondistributable.v1.tar":
		return plainLayer, true
	case "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
		"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
		"application/vnd.docker.image.rootfs.foreign.diff.tar",
		"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":
		return compressedLayer, true
	}
	return unknownLayer, false
}

// checkLayer says why a layer cannot be converted.
func checkLayer(ctx context.Context, p Place, d ocispec.Descriptor) error {
	kind, foreign := kindOf(d.MediaType)
	switch {
	case strings.HasSuffix(d.MediaType, "+encrypted"):
		return &Error{UnsupportedMediaType, fmt.Errorf("it is encrypted (%s)", d.MediaType)}
	case kind == unknownLayer:
		return &Error{UnsupportedMediaType, fmt.Errorf("its type %q is not known", d.MediaType)}
	case foreign:
		// Its bytes belong to somebody else's server, unless whoever pushed it chose to bring them.
		has, err := p.HasBlob(ctx, d.Digest)
		if err != nil {
			return err
		}
		if !has {
			return &Error{UnsupportedMediaType, fmt.Errorf("it is not distributable (%s), and its bytes are not in %s", d.MediaType, p)}
		}
	}
	return nil
}

// decompress returns the tar in r, a blob of the given media type. What follows the compressed stream is an error, as it
// is for containerd where neither igzip nor unpigz is installed; several gzip members or zstd frames are one stream.
func decompress(mediaType string, r io.Reader) (io.ReadCloser, error) {
	kind, _ := kindOf(mediaType)
	if kind == plainLayer {
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
		d, err := zstd.NewReader(buf, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(2))
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

package converter

import (
	"context"
	"fmt"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

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

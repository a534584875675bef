// Package artifact is the format of streaming artifacts, shared by the converter and the node: media types, manifest,
// layer blobs and their index. It encodes, decodes and validates; it does no I/O of its own. docs/format.md is the
// same format byte by byte.
//
// A layer's index is the tar without its file data, and a table of chunks. Encoding, reading entries and verifying all divide a tar into headers and data with
// one scanner on top of archive/tar (which reads all but plain headers), so that they cannot disagree. What is decoded comes from a registry and is taken for hostile: memory is bounded by
// limits that are checked first, and what is wrong is ErrInvalid. This package does not say what the entries mean; that is the matter of fs.
package artifact

import "errors"

// Media types and annotations of the artifact's manifest.
const (
	// ArtifactType is the artifactType of the artifact's manifest: what referrers are filtered by.
	ArtifactType = "application/vnd.streaming-snapshotter.artifact.v1"
	// LayerMediaType is the media type of every layer: a blob is an ordinary zstd-compressed OCI layer.
	LayerMediaType = "application/vnd.oci.image.layer.v1.tar+zstd"

	// Format and Version are the values of AnnotationFormat and AnnotationVersion.
	Format  = "tar-index"
	Version = "v1"

	AnnotationFormat  = "streaming.format"
	AnnotationVersion = "streaming.version"
	AnnotationOS      = "streaming.platform.os"
	AnnotationArch    = "streaming.platform.arch"
	AnnotationVariant = "streaming.platform.variant"
	// AnnotationConverter says what has made the artifact, for people: nothing follows from it.
	AnnotationConverter = "streaming.converter"

	// On a layer's descriptor: where its index lies in the blob, what it hashes to, and which layer of the image it re-encodes.
	AnnotationIndexOffset  = "streaming.index.offset"
	AnnotationIndexSize    = "streaming.index.size"
	AnnotationIndexDigest  = "streaming.index.digest"
	AnnotationSourceDigest = "streaming.source.digest"
)

var (
	// ErrInvalid: the bytes are not what the format says. Refuse, never serve.
	ErrInvalid = errors.New("invalid streaming artifact")
	// ErrUnsupported: well formed, but of a version or with a feature that this release does not know. Fall back.
	ErrUnsupported = errors.New("unsupported streaming artifact")
)

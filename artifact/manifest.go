package artifact

import (
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Manifest is an artifact's manifest in the terms of this package.
type Manifest struct {
	Subject  ocispec.Descriptor // the image's platform manifest
	Config   ocispec.Descriptor // the image's own config descriptor, unchanged
	Platform ocispec.Platform   // os, architecture, variant
	Created  time.Time          // the config's creation time; zero if it has none
	Layers   []Layer            // one for each layer of the image, in its order
}

// Layer describes one layer blob.
type Layer struct {
	Digest      digest.Digest // of the whole blob
	Size        int64         // of the whole blob, bytes
	IndexOffset int64         // where the index's skippable frame begins in the blob; the frame ends the blob
	IndexSize   int64         // of the skippable frame, its 8-byte header included
	IndexDigest digest.Digest // SHA-256 of the skippable frame, its header included
	Source      digest.Digest // the layer of the image that this one re-encodes
}

// Encode returns the manifest as JSON, the same bytes for the same m.
func (m *Manifest) Encode() ([]byte, error) { panic("todo") }

// DecodeManifest reads and validates an artifact's manifest. Errors are ErrInvalid or ErrUnsupported.
func DecodeManifest(b []byte) (*Manifest, error) { panic("todo") }

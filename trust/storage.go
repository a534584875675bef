package trust

import (
	"encoding/json"
	"fmt"
	"maps"
	"strconv"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// SignatureType is the artifactType of Notary Project signatures. Their manifests have it as the media type of the config, and no artifactType of their own.
const SignatureType = "application/vnd.cncf.notary.signature"

// Hints are annotations that say what envelope there is: a list of referrers has them, so that nodes need not ask for the manifest first. Manifests of our
// signatures have them, and profiles beside artifacts that others have signed. A hint that is wrong costs a request.
const (
	HintDigest = "streaming.signature.digest"
	HintSize   = "streaming.signature.size" // bytes, decimal
	HintType   = "streaming.signature.type" // media type
)

// HintOf is the descriptor of the envelope that hints name; false if they name none that may be one.
func HintOf(annotations map[string]string) (ocispec.Descriptor, bool) {
	n, err := strconv.ParseInt(annotations[HintSize], 10, 64)
	if err != nil {
		return ocispec.Descriptor{}, false
	}
	d := ocispec.Descriptor{MediaType: annotations[HintType], Digest: digest.Digest(annotations[HintDigest]), Size: n}
	return d, checkEnvelope(d) == nil
}

// Hints are the annotations of which HintOf makes d.
func Hints(d ocispec.Descriptor) map[string]string {
	return map[string]string{HintDigest: d.Digest.String(), HintSize: strconv.FormatInt(d.Size, 10), HintType: d.MediaType}
}

// Descriptor is the envelope's, as the manifest of its signature has it.
func (e Envelope) Descriptor() ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: e.MediaType, Digest: e.Digest, Size: int64(len(e.Bytes))}
}

// Manifest makes the manifest of a signature, with hints, as the `notation` command stores it
// (https://github.com/notaryproject/specifications/blob/v1.1.0/specs/signature-specification.md, "Storage"), and its descriptor as lists of referrers have
// it. Its config is ocispec.DescriptorEmptyJSON.Data. Annotations are the Signer's.
func Manifest(subject ocispec.Descriptor, e Envelope, annotations map[string]string) (ocispec.Descriptor, []byte, error) {
	if err := checkEnvelope(e.Descriptor()); err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	all := Hints(e.Descriptor())
	maps.Copy(all, annotations)
	raw, err := json.Marshal(ocispec.Manifest{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   ocispec.MediaTypeImageManifest,
		Config:      ocispec.Descriptor{MediaType: SignatureType, Digest: ocispec.DescriptorEmptyJSON.Digest, Size: ocispec.DescriptorEmptyJSON.Size},
		Layers:      []ocispec.Descriptor{e.Descriptor()},
		Subject:     &ocispec.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
		Annotations: all,
	})
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: SignatureType, Digest: digest.FromBytes(raw), Size: int64(len(raw)),
		Annotations: all}, raw, nil
}

// EnvelopeOf is the descriptor of the envelope that the manifest of a signature of subject names. Its error is ErrInvalid.
func EnvelopeOf(manifest []byte, subject digest.Digest) (ocispec.Descriptor, error) {
	m, err := artifact.UnmarshalManifest(manifest)
	switch {
	case err != nil:
		return ocispec.Descriptor{}, fmt.Errorf("manifest of a signature: %w: %w", err, ErrInvalid)
	case m.Subject == nil || m.Subject.Digest != subject:
		return ocispec.Descriptor{}, fmt.Errorf("manifest of a signature: not of %s: %w", subject, ErrInvalid)
	case len(m.Layers) != 1:
		return ocispec.Descriptor{}, fmt.Errorf("manifest of a signature: %d envelopes where one should be: %w", len(m.Layers), ErrInvalid)
	}
	if err := checkEnvelope(m.Layers[0]); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("manifest of a signature: %w", err)
	}
	d := m.Layers[0]
	return ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}, nil
}

// checkEnvelope refuses what no envelope is. Which media types there are is the verifier's to say.
func checkEnvelope(d ocispec.Descriptor) error {
	if d.Digest.Validate() != nil || d.Digest.Algorithm() != digest.SHA256 || d.MediaType == "" || d.Size <= 0 || d.Size > MaxEnvelope {
		return fmt.Errorf("envelope %q of %d bytes, media type %q: %w", string(d.Digest), d.Size, d.MediaType, ErrInvalid)
	}
	return nil
}

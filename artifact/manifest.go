package artifact

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Manifest is an artifact's manifest in the terms of this package.
type Manifest struct {
	Subject  ocispec.Descriptor // the image's platform manifest
	Config   ocispec.Descriptor // the image's own config descriptor, unchanged
	Platform ocispec.Platform   // os, architecture, variant
	Created  time.Time          // the config's creation time; zero if it has none
	Layers   []Layer            // one for each layer of the image, in its order
	// Converter is the program that has made the artifact, as it says itself; "" if it does not, or in more than 256 bytes.
	Converter string
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

// maxConverter bounds a claim that nodes record, bytes.
const maxConverter = 256

// Encode returns the manifest as JSON, the same bytes for the same m.
func (m *Manifest) Encode() ([]byte, error) {
	o := ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: ArtifactType,
		Config:       m.Config,
		Layers:       []ocispec.Descriptor{},
		Subject:      &m.Subject,
		Annotations: map[string]string{
			AnnotationFormat:  Format,
			AnnotationVersion: Version,
			AnnotationOS:      m.Platform.OS,
			AnnotationArch:    m.Platform.Architecture,
		},
	}
	if m.Platform.Variant != "" {
		o.Annotations[AnnotationVariant] = m.Platform.Variant
	}
	if m.Converter != "" {
		o.Annotations[AnnotationConverter] = m.Converter
	}
	if !m.Created.IsZero() {
		o.Annotations[ocispec.AnnotationCreated] = m.Created.UTC().Format(time.RFC3339Nano)
	}
	for _, l := range m.Layers {
		o.Layers = append(o.Layers, l.descriptor())
	}
	b, err := json.MarshalIndent(&o, "", "  ")
	if err != nil {
		return nil, err
	}
	// What a node would refuse is not made.
	if _, err := DecodeManifest(b); err != nil {
		return nil, err
	}
	return b, nil
}

func (l *Layer) descriptor() ocispec.Descriptor {
	return ocispec.Descriptor{
		MediaType: LayerMediaType,
		Digest:    l.Digest,
		Size:      l.Size,
		Annotations: map[string]string{
			AnnotationIndexOffset:  strconv.FormatInt(l.IndexOffset, 10),
			AnnotationIndexSize:    strconv.FormatInt(l.IndexSize, 10),
			AnnotationIndexDigest:  l.IndexDigest.String(),
			AnnotationSourceDigest: l.Source.String(),
		},
	}
}

// DecodeManifest reads and validates an artifact's manifest. Errors are ErrInvalid or ErrUnsupported. A field or an annotation
// that it does not know is no error.
func DecodeManifest(b []byte) (*Manifest, error) {
	if len(b) > MaxManifestSize {
		return nil, fmt.Errorf("manifest of %d bytes: %w", len(b), ErrInvalid)
	}
	o, err := UnmarshalManifest(b)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	if err := checkManifest(o); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	m := &Manifest{
		Subject:  *o.Subject,
		Config:   o.Config,
		Platform: ocispec.Platform{OS: o.Annotations[AnnotationOS], Architecture: o.Annotations[AnnotationArch], Variant: o.Annotations[AnnotationVariant]},
	}
	if s := o.Annotations[AnnotationConverter]; len(s) <= maxConverter {
		m.Converter = s
	}
	if s, ok := o.Annotations[ocispec.AnnotationCreated]; ok {
		t, err := time.Parse(time.RFC3339Nano, s)
		if err != nil {
			return nil, fmt.Errorf("manifest: creation time: %w: %w", err, ErrInvalid)
		}
		m.Created = t.UTC()
	}
	for i, d := range o.Layers {
		l, err := decodeLayer(d)
		if err != nil {
			return nil, fmt.Errorf("manifest: layer %d: %w", i, err)
		}
		m.Layers = append(m.Layers, l)
	}
	return m, nil
}

// UnmarshalManifest decodes an image manifest, any image's, and takes no more memory than its size and MaxLayers call for: a megabyte of
// empty descriptors makes hundreds in a []Descriptor. Its error is ErrInvalid.
func UnmarshalManifest(b []byte) (*ocispec.Manifest, error) {
	var o struct {
		ocispec.Manifest
		Layers List[ocispec.Descriptor] `json:"layers"`
	}
	if err := json.Unmarshal(b, &o); err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrInvalid)
	}
	o.Manifest.Layers = o.Layers
	return &o.Manifest, nil
}

// List is decoded from JSON up to MaxLayers elements: what manifests and configs list by layer or by platform, in bounded memory.
type List[T any] []T

// UnmarshalJSON is called by encoding/json.
func (l *List[T]) UnmarshalJSON(b []byte) error {
	*l = nil // of two lists the last counts, as it does for containerd
	d := json.NewDecoder(bytes.NewReader(b))
	switch t, err := d.Token(); {
	case err != nil || t == nil:
		return err
	case t != json.Delim('['):
		return fmt.Errorf("%v where a list should be", t)
	}
	for d.More() {
		if len(*l) == MaxLayers {
			return fmt.Errorf("a list of more than %d", MaxLayers)
		}
		*l = append(*l, *new(T))
		if err := d.Decode(&(*l)[len(*l)-1]); err != nil {
			return err
		}
	}
	return nil
}

// checkManifest validates everything but the layers.
func checkManifest(o *ocispec.Manifest) error {
	switch {
	case o.SchemaVersion != 2, o.MediaType != ocispec.MediaTypeImageManifest, o.ArtifactType != ArtifactType:
		return fmt.Errorf("schema version %d, media type %q, artifact type %q: %w", o.SchemaVersion, o.MediaType, o.ArtifactType, ErrInvalid)
	case o.Annotations[AnnotationFormat] != Format, o.Annotations[AnnotationVersion] != Version:
		return fmt.Errorf("format %q, version %q: %w", o.Annotations[AnnotationFormat], o.Annotations[AnnotationVersion], ErrUnsupported)
	case o.Annotations[AnnotationOS] == "", o.Annotations[AnnotationArch] == "":
		return fmt.Errorf("no platform: %w", ErrInvalid)
	case o.Subject == nil:
		return fmt.Errorf("no subject: %w", ErrInvalid)
	}
	for name, d := range map[string]ocispec.Descriptor{"subject": *o.Subject, "config": o.Config} {
		if err := checkDigest(d.Digest); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if d.Size < 0 || d.MediaType == "" {
			return fmt.Errorf("%s: media type %q, %d bytes: %w", name, d.MediaType, d.Size, ErrInvalid)
		}
	}
	return nil
}

func decodeLayer(d ocispec.Descriptor) (Layer, error) {
	l := Layer{
		Digest:      d.Digest,
		Size:        d.Size,
		IndexDigest: digest.Digest(d.Annotations[AnnotationIndexDigest]),
		Source:      digest.Digest(d.Annotations[AnnotationSourceDigest]),
	}
	if d.MediaType != LayerMediaType {
		return l, fmt.Errorf("media type %q: %w", d.MediaType, ErrInvalid)
	}
	for _, dgst := range []digest.Digest{l.Digest, l.IndexDigest, l.Source} {
		if err := checkDigest(dgst); err != nil {
			return l, err
		}
	}
	var err error
	if l.IndexOffset, err = parseSize(d.Annotations[AnnotationIndexOffset]); err != nil {
		return l, fmt.Errorf("index offset: %w", err)
	}
	if l.IndexSize, err = parseSize(d.Annotations[AnnotationIndexSize]); err != nil {
		return l, fmt.Errorf("index size: %w", err)
	}
	if l.Size > maxBlobSize || l.IndexSize < indexHeaderSize+tableEntrySize || l.IndexSize > MaxIndexSize || l.IndexOffset == 0 || l.IndexOffset != l.Size-l.IndexSize {
		return l, fmt.Errorf("index of %d bytes at %d of %d: %w", l.IndexSize, l.IndexOffset, l.Size, ErrInvalid)
	}
	return l, nil
}

// parseSize parses a decimal number as Encode writes it: no sign, no leading zero.
func parseSize(s string) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || strconv.FormatInt(n, 10) != s {
		return 0, fmt.Errorf("%q is not a size: %w", s, ErrInvalid)
	}
	return n, nil
}

// checkDigest accepts SHA-256 only: what everything of an artifact is verified with.
func checkDigest(d digest.Digest) error {
	if d.Validate() != nil || d.Algorithm() != digest.SHA256 {
		return fmt.Errorf("digest %q: %w", string(d), ErrInvalid)
	}
	return nil
}

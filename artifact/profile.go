package artifact

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// ProfileType is the artifactType of a profile's manifest, a referrer of the image beside the artifact.
	ProfileType = "application/vnd.streaming-snapshotter.profile.v1"
	// HotMediaType is the media type of its one layer, the hot blob.
	HotMediaType = "application/vnd.streaming-snapshotter.hot.v1+zstd"

	// AnnotationProfileSource, on a profile's manifest, says how the profile was found: one of the three below.
	AnnotationProfileSource = "streaming.profile.source"

	ProfileStatic   = "static"   // from the image's config and files alone
	ProfileRecorded = "recorded" // from a run made for it
	ProfileLearned  = "learned"  // from starts on nodes

	// MaxHotChunks bounds the chunks of a profile: 32 GiB of tar at 128 KiB a chunk.
	MaxHotChunks = 1 << 18
)

// The head of a hot blob, a skippable frame, little endian. Frames of the chunks follow, in the order of the list.
const (
	hotMagic   = "hotchunk"
	hotVersion = 1

	offHotVersion = 16 // uint32
	offHotLayers  = 20 // uint32: index digests, 32 bytes each
	offHotChunks  = 24 // uint32: entries of the list, 8 bytes each, after the digests; 4 bytes of zeros before them
	hotHeaderSize = 32
	hotEntrySize  = 8 // uint32 layer, uint32 chunk
)

// Profile lists chunks in the order in which a container first uses them. It is a hint and proves nothing: each chunk is verified against its index.
type Profile struct {
	Layers []digest.Digest // digests of indexes, each once
	Chunks []HotChunk      // each once
}

// HotChunk is a chunk of a profile.
type HotChunk struct {
	Layer int // in Profile.Layers
	Chunk int // in the layer's index
}

// Encode returns the head of p's hot blob; the frames of p.Chunks belong behind it.
func (p *Profile) Encode() ([]byte, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	b := le.AppendUint32(nil, skippableMagic)
	b = le.AppendUint32(b, uint32(p.headSize()-offIndexMagic))
	b = append(b, hotMagic...)
	b = le.AppendUint32(b, hotVersion)
	b = le.AppendUint32(b, uint32(len(p.Layers)))
	b = le.AppendUint32(b, uint32(len(p.Chunks)))
	b = le.AppendUint32(b, 0)
	for _, l := range p.Layers {
		raw, err := hex.DecodeString(l.Encoded())
		if err != nil {
			return nil, err
		}
		b = append(b, raw...)
	}
	for _, c := range p.Chunks {
		b = le.AppendUint32(le.AppendUint32(b, uint32(c.Layer)), uint32(c.Chunk))
	}
	return b, nil
}

func (p *Profile) headSize() int {
	return hotHeaderSize + len(p.Layers)*32 + len(p.Chunks)*hotEntrySize
}

// check validates p as far as that is possible without the indexes.
func (p *Profile) check() error {
	if len(p.Layers) > MaxLayers || len(p.Chunks) > MaxHotChunks {
		return fmt.Errorf("profile of %d chunks in %d layers: %w", len(p.Chunks), len(p.Layers), ErrInvalid)
	}
	layers := make(map[digest.Digest]bool, len(p.Layers))
	for i, l := range p.Layers {
		if err := checkDigest(l); err != nil {
			return fmt.Errorf("profile: layer %d: %w", i, err)
		}
		if layers[l] {
			return fmt.Errorf("profile: layer %d is listed twice: %w", i, ErrInvalid)
		}
		layers[l] = true
	}
	chunks := make(map[HotChunk]bool, len(p.Chunks))
	for i, c := range p.Chunks {
		if c.Layer < 0 || c.Layer >= len(p.Layers) || c.Chunk < 0 || c.Chunk >= MaxIndexSize/tableEntrySize || chunks[c] {
			return fmt.Errorf("profile: entry %d names chunk %d of layer %d, which is not there or listed twice: %w", i, c.Chunk, c.Layer, ErrInvalid)
		}
		chunks[c] = true
	}
	return nil
}

// ReadProfile reads the head of a hot blob from r, and of r no byte more. Errors are ErrInvalid, ErrUnsupported and r's.
func ReadProfile(r io.Reader) (*Profile, error) {
	le := binary.LittleEndian
	head := make([]byte, hotHeaderSize)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, fmt.Errorf("head of a hot blob: %w", err)
	}
	layers, chunks := int64(le.Uint32(head[offHotLayers:])), int64(le.Uint32(head[offHotChunks:]))
	switch {
	case le.Uint32(head[offSkippableMagic:]) != skippableMagic || string(head[offIndexMagic:offVersion]) != hotMagic:
		return nil, fmt.Errorf("hot blob without its magic numbers: %w", ErrInvalid)
	case le.Uint32(head[offHotVersion:]) != hotVersion:
		return nil, fmt.Errorf("hot blob of version %d: %w", le.Uint32(head[offHotVersion:]), ErrUnsupported)
	case layers > MaxLayers || chunks > MaxHotChunks || int64(le.Uint32(head[offSkippableSize:])) != hotHeaderSize-offIndexMagic+layers*32+chunks*hotEntrySize:
		return nil, fmt.Errorf("hot blob with %d chunks in %d layers: %w", chunks, layers, ErrInvalid)
	}
	b := make([]byte, layers*32+chunks*hotEntrySize)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("head of a hot blob: %w", err)
	}
	p := &Profile{}
	for range layers {
		p.Layers = append(p.Layers, digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(b[:32])))
		b = b[32:]
	}
	for ; len(b) > 0; b = b[hotEntrySize:] {
		p.Chunks = append(p.Chunks, HotChunk{Layer: int(le.Uint32(b)), Chunk: int(le.Uint32(b[4:]))})
	}
	return p, p.check()
}

// ProfileManifest is the manifest of a profile in the terms of this package.
type ProfileManifest struct {
	Subject ocispec.Descriptor // the image's platform manifest
	Hot     ocispec.Descriptor // the hot blob; its media type is HotMediaType
	Source  string             // ProfileStatic, ProfileRecorded or ProfileLearned
	Created time.Time          // of a recorded or learned one, when; of a static one, the image's creation time. Zero if unknown
}

// Encode returns the manifest as JSON, the same bytes for the same m.
func (m *ProfileManifest) Encode() ([]byte, error) {
	hot := m.Hot
	hot.MediaType = HotMediaType
	o := ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: ProfileType,
		Config:       ocispec.DescriptorEmptyJSON,
		Layers:       []ocispec.Descriptor{hot},
		Subject:      &m.Subject,
		Annotations:  map[string]string{AnnotationVersion: Version, AnnotationProfileSource: m.Source},
	}
	if !m.Created.IsZero() {
		o.Annotations[ocispec.AnnotationCreated] = m.Created.UTC().Format(time.RFC3339Nano)
	}
	b, err := json.MarshalIndent(&o, "", "  ")
	if err != nil {
		return nil, err
	}
	_, err = DecodeProfileManifest(b)
	return b, err
}

// DecodeProfileManifest reads and validates the manifest of a profile. Errors are ErrInvalid or ErrUnsupported.
func DecodeProfileManifest(b []byte) (*ProfileManifest, error) {
	if len(b) > MaxManifestSize {
		return nil, fmt.Errorf("profile: manifest of %d bytes: %w", len(b), ErrInvalid)
	}
	o, err := UnmarshalManifest(b)
	switch {
	case err != nil:
		return nil, fmt.Errorf("profile: %w", err)
	case o.SchemaVersion != 2, o.MediaType != ocispec.MediaTypeImageManifest, o.ArtifactType != ProfileType:
		return nil, fmt.Errorf("profile: schema version %d, media type %q, artifact type %q: %w", o.SchemaVersion, o.MediaType, o.ArtifactType, ErrInvalid)
	case o.Annotations[AnnotationVersion] != Version:
		return nil, fmt.Errorf("profile: version %q: %w", o.Annotations[AnnotationVersion], ErrUnsupported)
	case o.Subject == nil, len(o.Layers) != 1:
		return nil, fmt.Errorf("profile: no subject, or %d layers where there should be one: %w", len(o.Layers), ErrInvalid)
	}
	hot := o.Layers[0]
	if err := checkDigest(hot.Digest); err != nil {
		return nil, fmt.Errorf("profile: hot blob: %w", err)
	}
	if hot.MediaType != HotMediaType || hot.Size < hotHeaderSize || hot.Size > maxBlobSize {
		return nil, fmt.Errorf("profile: hot blob of media type %q, %d bytes: %w", hot.MediaType, hot.Size, ErrInvalid)
	}
	m := &ProfileManifest{Subject: *o.Subject, Hot: hot, Source: o.Annotations[AnnotationProfileSource]}
	if s, ok := o.Annotations[ocispec.AnnotationCreated]; ok {
		if m.Created, err = time.Parse(time.RFC3339Nano, s); err != nil {
			return nil, fmt.Errorf("profile: creation time: %w: %w", err, ErrInvalid)
		}
		m.Created = m.Created.UTC()
	}
	return m, nil
}

package artifact

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
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

	// AnnotationHotDigest and AnnotationHotSize, bytes, on a profile's manifest, describe its hot blob: nodes learn it from the list of referrers, which has the
	// annotations, and need not ask for the manifest first.
	AnnotationHotDigest = "streaming.hot.digest"
	AnnotationHotSize   = "streaming.hot.size"

	ProfileStatic   = "static"   // from the image's config and files alone
	ProfileRecorded = "recorded" // from a run made for it
	ProfileLearned  = "learned"  // from starts on nodes

	// MaxHotChunks bounds the chunks of a profile: 32 GiB of tar at 128 KiB a chunk.
	MaxHotChunks = 1 << 18
)

// MaxHotIndex is the largest index, in bytes, that hot blobs have a copy of. Larger ones come faster in parts, side by side.
const MaxHotIndex = 1 << 20

// The head of a hot blob, a skippable frame, little endian. Indexes follow, which are skippable frames, too, in the order of the layers, and then the
// frames of the chunks, in the order of the list.
const (
	hotMagic   = "hotchunk"
	hotVersion = 2

	offHotVersion = 16 // uint32
	offHotLayers  = 20 // uint32: entries of 40 bytes each
	offHotChunks  = 24 // uint32: entries of the list, 8 bytes each, after the layers; 4 bytes of zeros before them
	hotHeaderSize = 32
	hotLayerSize  = 40 // digest of the layer's index, uint64 bytes of it in the hot blob
	hotEntrySize  = 8  // uint32 layer, uint32 chunk
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

// HotHead is the head of a hot blob.
type HotHead struct {
	Profile
	Indexes []int64 // for each of Layers, how many bytes its index has that follows the head; 0 if it is not there
}

// Encode returns the head of a hot blob; the indexes and the frames of h.Chunks belong behind it.
func (h *HotHead) Encode() ([]byte, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	b := le.AppendUint32(nil, skippableMagic)
	b = le.AppendUint32(b, uint32(h.Size()-offIndexMagic))
	b = append(b, hotMagic...)
	b = le.AppendUint32(b, hotVersion)
	b = le.AppendUint32(b, uint32(len(h.Layers)))
	b = le.AppendUint32(b, uint32(len(h.Chunks)))
	b = le.AppendUint32(b, 0)
	for i, l := range h.Layers {
		raw, err := hex.DecodeString(l.Encoded())
		if err != nil {
			return nil, err
		}
		b = le.AppendUint64(append(b, raw...), uint64(h.Indexes[i]))
	}
	for _, c := range h.Chunks {
		b = le.AppendUint32(le.AppendUint32(b, uint32(c.Layer)), uint32(c.Chunk))
	}
	return b, nil
}

// Size is how many bytes the head has.
func (h *HotHead) Size() int64 {
	return hotHeaderSize + int64(len(h.Layers))*hotLayerSize + int64(len(h.Chunks))*hotEntrySize
}

// Frames is the offset of the first frame in the hot blob: behind the indexes.
func (h *HotHead) Frames() int64 {
	off := h.Size()
	for _, n := range h.Indexes {
		off += n
	}
	return off
}

func (h *HotHead) check() error {
	if len(h.Indexes) != len(h.Layers) {
		return fmt.Errorf("profile of %d layers with the sizes of %d indexes: %w", len(h.Layers), len(h.Indexes), ErrInvalid)
	}
	for i, n := range h.Indexes {
		if n < 0 || n > MaxHotIndex {
			return fmt.Errorf("profile: the index of layer %d has %d bytes: %w", i, n, ErrInvalid)
		}
	}
	return h.Profile.check()
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

// ReadHotHead reads the head of a hot blob from r, and of r no byte more. Errors are ErrInvalid, ErrUnsupported and r's.
func ReadHotHead(r io.Reader) (*HotHead, error) {
	le := binary.LittleEndian
	head := make([]byte, hotHeaderSize)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, fmt.Errorf("head of a hot blob: %w", err)
	}
	layers, chunks := int64(le.Uint32(head[offHotLayers:])), int64(le.Uint32(head[offHotChunks:]))
	rest := layers*hotLayerSize + chunks*hotEntrySize
	switch {
	case le.Uint32(head[offSkippableMagic:]) != skippableMagic || string(head[offIndexMagic:offVersion]) != hotMagic:
		return nil, fmt.Errorf("hot blob without its magic numbers: %w", ErrInvalid)
	case le.Uint32(head[offHotVersion:]) != hotVersion:
		return nil, fmt.Errorf("hot blob of version %d: %w", le.Uint32(head[offHotVersion:]), ErrUnsupported)
	case layers > MaxLayers || chunks > MaxHotChunks || int64(le.Uint32(head[offSkippableSize:])) != hotHeaderSize-offIndexMagic+rest:
		return nil, fmt.Errorf("hot blob with %d chunks in %d layers: %w", chunks, layers, ErrInvalid)
	}
	b := make([]byte, rest)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("head of a hot blob: %w", err)
	}
	h := &HotHead{}
	for range layers {
		h.Layers = append(h.Layers, digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(b[:32])))
		h.Indexes = append(h.Indexes, int64(min(le.Uint64(b[32:]), MaxHotIndex+1)))
		b = b[hotLayerSize:]
	}
	for ; len(b) > 0; b = b[hotEntrySize:] {
		h.Chunks = append(h.Chunks, HotChunk{Layer: int(le.Uint32(b)), Chunk: int(le.Uint32(b[4:]))})
	}
	return h, h.check()
}

// ProfileManifest is the manifest of a profile in the terms of this package.
type ProfileManifest struct {
	Subject ocispec.Descriptor // the image's platform manifest
	Hot     ocispec.Descriptor // the hot blob; its media type is HotMediaType
	Source  string             // ProfileStatic, ProfileRecorded or ProfileLearned
	Created time.Time          // of a recorded or learned one, when; of a static one, the image's creation time. Zero if unknown
	Hints   map[string]string  // annotations that say where the signature of the artifact is; only written, never read back
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
		Annotations: map[string]string{
			AnnotationVersion: Version, AnnotationProfileSource: m.Source,
			AnnotationHotDigest: string(hot.Digest), AnnotationHotSize: strconv.FormatInt(hot.Size, 10),
		},
	}
	if !m.Created.IsZero() {
		o.Annotations[ocispec.AnnotationCreated] = m.Created.UTC().Format(time.RFC3339Nano)
	}
	for key, value := range m.Hints {
		o.Annotations[key] = value
	}
	b, err := json.MarshalIndent(&o, "", "  ")
	if err != nil {
		return nil, err
	}
	_, err = DecodeProfileManifest(b)
	return b, err
}

// HotOf returns what the annotations of a profile's manifest say of its hot blob; false if they say nothing of it, or are of another version. The error is
// ErrInvalid.
func HotOf(annotations map[string]string) (ocispec.Descriptor, bool, error) {
	if annotations[AnnotationVersion] != Version || annotations[AnnotationHotDigest] == "" {
		return ocispec.Descriptor{}, false, nil
	}
	size, err := strconv.ParseInt(annotations[AnnotationHotSize], 10, 64)
	if err != nil {
		return ocispec.Descriptor{}, false, fmt.Errorf("profile: size of the hot blob: %w: %w", err, ErrInvalid)
	}
	hot := ocispec.Descriptor{MediaType: HotMediaType, Digest: digest.Digest(annotations[AnnotationHotDigest]), Size: size}
	return hot, true, checkHot(hot)
}

func checkHot(hot ocispec.Descriptor) error {
	if err := checkDigest(hot.Digest); err != nil {
		return fmt.Errorf("profile: hot blob: %w", err)
	}
	if hot.MediaType != HotMediaType || hot.Size < hotHeaderSize || hot.Size > maxBlobSize {
		return fmt.Errorf("profile: hot blob of media type %q, %d bytes: %w", hot.MediaType, hot.Size, ErrInvalid)
	}
	return nil
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
	if err := checkHot(hot); err != nil {
		return nil, err
	}
	if noted, ok, err := HotOf(o.Annotations); err != nil || ok && (noted.Digest != hot.Digest || noted.Size != hot.Size) {
		return nil, fmt.Errorf("profile: the hot blob of its annotations is not its layer: %w", ErrInvalid)
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

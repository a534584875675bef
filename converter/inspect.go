package converter

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// Inspection describes an artifact. Sizes are bytes.
type Inspection struct {
	Platform   string           `json:"platform"`
	Subject    digest.Digest    `json:"subject"`
	Artifact   digest.Digest    `json:"artifact"`
	Config     digest.Digest    `json:"config"`
	Converter  string           `json:"converter,omitempty"` // as the artifact says
	Created    *time.Time       `json:"created,omitempty"`
	Layers     []InspectedLayer `json:"layers"`
	Size       int64            `json:"size"`       // of all layers' blobs
	IndexSize  int64            `json:"indexSize"`  // of the indexes in them: what a pull fetches
	Source     int64            `json:"sourceSize"` // of the image's layers; 0 if the image is not there
	TarSize    int64            `json:"tarSize"`
	Chunks     int              `json:"chunks"`
	Profiles   []Profile        `json:"profiles"`   // of the subject
	Signatures []Signature      `json:"signatures"` // of the artifact
}

// InspectedLayer describes a layer of an artifact. Sizes are bytes.
type InspectedLayer struct {
	Source      digest.Digest `json:"source"`
	SourceSize  int64         `json:"sourceSize"`
	Digest      digest.Digest `json:"digest"`
	Size        int64         `json:"size"`
	IndexSize   int64         `json:"indexSize"`
	TarSize     int64         `json:"tarSize"`
	HeadersSize int64         `json:"headersSize"`
	DiffID      digest.Digest `json:"diffID"` // as the index says; Verify proves it
	Chunks      int           `json:"chunks"`
}

// Inspect describes the artifacts of the image that ref names, or the artifact that it names itself, and the image's profiles, from their
// manifests, indexes and lists, and what judge, unless it is nil, says of its signatures.
func Inspect(ctx context.Context, p Place, ref string, platforms []ocispec.Platform, judge Judge) ([]Inspection, error) {
	list, err := artifactsNamed(ctx, p, ref, platforms)
	if err != nil {
		return nil, err
	}
	var all []Inspection
	for _, a := range list {
		if a.manifest == nil {
			return all, fmt.Errorf("artifact %s: %w", a.desc.Digest, a.err)
		}
		i, err := inspect(ctx, p, a, judge)
		if err != nil {
			return all, fmt.Errorf("artifact %s: %w", a.desc.Digest, err)
		}
		all = append(all, i)
	}
	return all, nil
}

func inspect(ctx context.Context, p Place, a attached, judge Judge) (Inspection, error) {
	m := a.manifest
	res := Inspection{
		Platform: platformString(m.Platform), Subject: m.Subject.Digest, Artifact: a.desc.Digest, Config: m.Config.Digest, Converter: m.Converter,
	}
	if !m.Created.IsZero() {
		res.Created = &m.Created
	}
	sizes := map[digest.Digest]int64{}
	if _, raw, err := p.Manifest(ctx, m.Subject.Digest.String()); err == nil {
		c, err := parseContent(raw)
		if err != nil {
			return res, fmt.Errorf("subject: %w", err)
		}
		for _, l := range c.Layers {
			sizes[l.Digest] = l.Size
		}
	}
	for i, l := range m.Layers {
		raw, err := readIndex(ctx, p, l)
		if err != nil {
			return res, fmt.Errorf("fetch index of layer %d, %s: %w", i, l.Digest, err)
		}
		x, err := l.Index(raw)
		if err != nil {
			return res, fmt.Errorf("index of layer %d, %s: %w", i, l.Digest, err)
		}
		res.Layers = append(res.Layers, InspectedLayer{
			Source: l.Source, SourceSize: sizes[l.Source], Digest: l.Digest, Size: l.Size, IndexSize: l.IndexSize,
			TarSize: x.TarSize, HeadersSize: x.HeadersSize, DiffID: x.DiffID, Chunks: x.NumChunks(),
		})
		res.Size += l.Size
		res.IndexSize += l.IndexSize
		res.Source += sizes[l.Source]
		res.TarSize += x.TarSize
		res.Chunks += x.NumChunks()
	}
	var err error
	if res.Profiles, err = describeProfiles(ctx, p, m.Subject.Digest); err != nil || judge == nil {
		return res, err
	}
	res.Signatures, err = signaturesOf(ctx, p, a.desc, judge)
	return res, err
}

// readIndex fetches a layer's index as a node does, verified against the manifest.
func readIndex(ctx context.Context, p Place, l artifact.Layer) ([]byte, error) {
	rc, err := p.Blob(ctx, ocispec.Descriptor{Digest: l.Digest, Size: l.Size}, l.IndexOffset)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	v, err := newVerifyReader(io.LimitReader(rc, l.IndexSize), ocispec.Descriptor{Digest: l.IndexDigest, Size: l.IndexSize})
	if err != nil {
		return nil, err
	}
	return io.ReadAll(v)
}

// indexedLayer is an artifact's layer with its index.
type indexedLayer struct {
	artifact.Layer
	index *artifact.Index
	raw   []byte // index keeps them
}

// readIndexes fetches the indexes of layers, which are an image's, into memory. Those of an image that no node takes are ErrUnsupported.
func readIndexes(ctx context.Context, p Place, layers []artifact.Layer) ([]indexedLayer, error) {
	size, headers := int64(0), int64(0)
	for _, l := range layers {
		if size += l.IndexSize; size > artifact.MaxImageIndexes {
			return nil, fmt.Errorf("%w: its indexes have more than %d MiB", artifact.ErrUnsupported, artifact.MaxImageIndexes>>20)
		}
	}
	var list []indexedLayer
	for _, l := range layers {
		raw, err := readIndex(ctx, p, l)
		if err != nil {
			return nil, fmt.Errorf("fetch index of layer %s: %w", l.Digest, err)
		}
		x, err := l.Index(raw)
		if err != nil {
			return nil, err
		}
		if headers += x.HeadersSize; headers > artifact.MaxImageHeaders {
			return nil, fmt.Errorf("%w: its headers have more than %d MiB", artifact.ErrUnsupported, artifact.MaxImageHeaders>>20)
		}
		list = append(list, indexedLayer{l, x, raw})
	}
	return list, nil
}

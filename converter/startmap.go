package converter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// StartMap says which parts of an image's layers a container reads at its start. Sizes and offsets are bytes.
type StartMap struct {
	Artifact digest.Digest
	Profile  string // source of the profile that says it, "" if the image has none: then nothing is hot
	// ProfileDigest is of that profile's manifest.
	ProfileDigest digest.Digest
	Layers        []StartLayer
}

// StartLayer is a layer of an artifact with its hot parts.
type StartLayer struct {
	artifact.Layer
	TarSize int64
	Chunks  int
	Hot     []Range // of the tar, in order, none touching another
}

// Range is a part of a tar.
type Range struct{ Off, Size int64 }

// MapStart reads the indexes of the artifact attached to the platform manifest subject, and the list of its best profile: what was seen in a run made for
// it, what nodes have seen, what the image's files say. No usable artifact is ErrNotFound.
func MapStart(ctx context.Context, p Place, subject digest.Digest) (StartMap, error) {
	list, err := artifactsOf(ctx, p, subject)
	if err != nil {
		return StartMap{}, err
	}
	i := slices.IndexFunc(list, func(a attached) bool { return a.manifest != nil })
	if i < 0 {
		return StartMap{}, fmt.Errorf("%w: %s in %s has no usable artifact", ErrNotFound, subject, p)
	}
	m := StartMap{Artifact: list[i].desc.Digest}
	layers, err := readIndexes(ctx, p, list[i].manifest.Layers)
	if err != nil {
		return m, fmt.Errorf("artifact %s: %w", m.Artifact, err)
	}
	profile, err := bestProfile(ctx, p, subject, list[i].manifest)
	if err != nil {
		return m, err
	}
	hot := map[digest.Digest][]int{} // chunks by the digest of their layer's index
	if profile != nil {
		m.Profile, m.ProfileDigest = profile.source, profile.digest
		for _, c := range profile.Chunks {
			hot[profile.Layers[c.Layer]] = append(hot[profile.Layers[c.Layer]], c.Chunk)
		}
	}
	for _, l := range layers {
		m.Layers = append(m.Layers, StartLayer{l.Layer, l.index.TarSize, l.index.NumChunks(), hotRanges(l.index, hot[l.IndexDigest])})
	}
	return m, nil
}

// hotRanges joins the chunks of an index that follow each other.
func hotRanges(x *artifact.Index, chunks []int) []Range {
	list := []Range{}
	for _, n := range slices.Compact(slices.Sorted(slices.Values(chunks))) {
		if n >= x.NumChunks() {
			break // the profile is a hint
		}
		c := x.Chunk(n)
		if last := len(list) - 1; last >= 0 && list[last].Off+list[last].Size == c.TarOffset {
			list[last].Size += c.TarSize
		} else if c.TarSize > 0 {
			list = append(list, Range{c.TarOffset, c.TarSize})
		}
	}
	return list
}

type bestOf struct {
	artifact.Profile
	source string
	digest digest.Digest // of its manifest
}

// bestProfile returns the profile of subject that nodes would take first of those that are of the artifact; nil if there is none.
func bestProfile(ctx context.Context, p Place, subject digest.Digest, a *artifact.Manifest) (*bestOf, error) {
	list, err := profilesOf(ctx, p, subject)
	if err != nil {
		return nil, err
	}
	rank := func(f attachedProfile) int {
		if f.manifest == nil {
			return -1
		}
		return slices.Index([]string{artifact.ProfileStatic, artifact.ProfileLearned, artifact.ProfileRecorded}, f.manifest.Source)
	}
	slices.SortStableFunc(list, func(a, b attachedProfile) int { return cmp.Compare(rank(b), rank(a)) })
	for _, f := range list {
		if f.manifest == nil {
			break
		}
		h, err := readHead(ctx, p, f.manifest)
		switch {
		case errors.Is(err, artifact.ErrUnsupported), errors.Is(err, artifact.ErrInvalid), errors.Is(err, ErrNotFound):
			continue // a hint that is no use here
		case err != nil:
			return nil, fmt.Errorf("profile %s: %w", f.desc.Digest, err)
		case covers(a, &h.Profile):
			return &bestOf{h.Profile, f.manifest.Source, f.desc.Digest}, nil
		}
	}
	return nil, nil
}

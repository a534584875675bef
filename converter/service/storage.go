package service

import (
	"context"
	"errors"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// blobs adds up blobs, each once.
type blobs struct {
	mu    sync.Mutex
	sizes map[digest.Digest]int64
	total int64
}

func (b *blobs) add(dgst digest.Digest, size int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.sizes[dgst]; !ok {
		b.sizes[dgst] = size
		b.total += size
	}
}

// storage adds up what a repository holds.
type storage struct {
	a *auto
	r repository
	p converter.Place

	images, artifacts, profiles blobs

	mu       sync.Mutex
	subjects map[digest.Digest]bool // whose referrers are counted
	attached map[digest.Digest]bool // artifacts
}

// Storage adds up what the tagged images of a repository and their artifacts take: the bytes of layers, each once. In a repository with very many tags it
// counts those of some, and says Partial.
func (a *auto) Storage(ctx context.Context, registry, repositoryName string) (StorageInfo, error) {
	r, p, err := a.reach(registry, repositoryName)
	if err != nil {
		return StorageInfo{}, err
	}
	names, err := p.Tags(ctx)
	if err != nil {
		return StorageInfo{}, placeError(err)
	}
	s := &storage{a: a, r: r, p: p, subjects: map[digest.Digest]bool{}, attached: map[digest.Digest]bool{}}
	for _, b := range []*blobs{&s.images, &s.artifacts, &s.profiles} {
		b.sizes = map[digest.Digest]int64{}
	}
	info := StorageInfo{Partial: len(names) > storageImages}
	images := map[digest.Digest]bool{}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(viewAtOnce)
	for _, name := range names[:min(len(names), storageImages)] {
		g.Go(func() error {
			d, err := p.Resolve(gctx, name)
			if errors.Is(err, converter.ErrNotFound) {
				return nil // deleted since it was listed
			}
			if err != nil {
				return err
			}
			s.mu.Lock()
			seen := images[d.Digest]
			images[d.Digest] = true
			s.mu.Unlock()
			if seen {
				return nil
			}
			return s.image(gctx, d.Digest)
		})
	}
	if err := g.Wait(); err != nil {
		return info, placeError(err)
	}
	info.Images, info.Artifacts = len(images), len(s.attached)
	info.ImageBytes, info.ArtifactBytes, info.ProfileBytes = s.images.total, s.artifacts.total, s.profiles.total
	return info, nil
}

func (s *storage) image(ctx context.Context, dgst digest.Digest) error {
	desc, err := s.a.describe(ctx, s.p, s.r.image(dgst))
	if err != nil {
		return err
	}
	for _, img := range desc.Platforms {
		for _, l := range img.Layers {
			s.images.add(l.Digest, l.Size)
		}
		s.mu.Lock()
		seen := s.subjects[img.Desc.Digest]
		s.subjects[img.Desc.Digest] = true
		s.mu.Unlock()
		if seen {
			continue
		}
		if err := s.referrers(ctx, img.Desc.Digest); err != nil {
			return err
		}
	}
	return nil
}

func (s *storage) referrers(ctx context.Context, subject digest.Digest) error {
	list, err := s.p.Referrers(ctx, subject)
	if err != nil {
		return err
	}
	for _, d := range list {
		to := &s.artifacts
		switch {
		case isProfile(d):
			to = &s.profiles
		case !isStreaming(d):
			continue
		}
		_, raw, err := s.p.Manifest(ctx, d.Digest.String())
		if errors.Is(err, converter.ErrNotFound) {
			continue // a referrers tag may list what is gone
		}
		if err != nil {
			return err
		}
		m, err := artifact.UnmarshalManifest(raw)
		if err != nil {
			continue // no release of ours wrote it
		}
		for _, l := range m.Layers {
			to.add(l.Digest, l.Size)
		}
		if isStreaming(d) {
			s.mu.Lock()
			s.attached[d.Digest] = true
			s.mu.Unlock()
		}
	}
	return nil
}

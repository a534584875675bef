package service

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/singleflight"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// Bounds on what one view asks a registry.
const (
	tagDetails    = 200 // tags that Tags looks at; of the others it knows the names
	storageImages = 500 // images that Storage counts
	viewAtOnce    = 8   // requests
)

// memo remembers what does not change. When it is full it forgets all: what is asked for again is looked at again.
type memo[K comparable, V any] struct {
	mu sync.Mutex
	m  map[K]V
}

const memoSize = 2000

func (m *memo[K, V]) get(k K) (V, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, ok := m.m[k]
	return v, ok
}

func (m *memo[K, V]) put(k K, v V) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.m == nil || len(m.m) >= memoSize {
		m.m = map[K]V{}
	}
	m.m[k] = v
}

func (m *memo[K, V]) clear() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.m = nil
}

// viewer looks at images, and remembers what does not change.
type viewer struct {
	descriptions memo[Image, converter.Description]
	members      memo[Image, []digest.Digest] // of an index, its manifests
	maps         memo[string, converter.StartMap]
	tags         memo[string, lookedAt]
	looking      singleflight.Group // at tags
	mapping      chan struct{}      // a token for each map being made: they take memory
}

func newViewer() *viewer { return &viewer{mapping: make(chan struct{}, 2)} }

// describe describes the image i, which is in p. That it was there once is no sign that it is there now.
func (v *viewer) describe(ctx context.Context, p converter.Place, i Image) (converter.Description, error) {
	if d, ok := v.descriptions.get(i); ok {
		return d, nil
	}
	d, err := converter.Describe(ctx, p, i.Digest.String())
	// An index may get a platform later that it lists already.
	whole := !slices.ContainsFunc(d.Platforms, func(img converter.PlatformImage) bool { return len(img.Layers) == 0 })
	if err == nil && whole {
		v.descriptions.put(i, d)
	}
	return d, err
}

// Registries returns the registries that the service looks after, in the configuration's order.
func (a *auto) Registries() []RegistryInfo {
	a.mu.Lock()
	defer a.mu.Unlock()
	list := []RegistryInfo{}
	for _, name := range a.names {
		list = append(list, RegistryInfo{Name: name, PullOnly: a.registries[name].PullOnly, NoCatalog: a.noCatalog[name]})
	}
	return list
}

// Repositories returns a registry's repositories whose names contain filter, sorted: those that it lists, those that settings name, and those that were
// ever active. A registry that lists none is no error: see RegistryInfo.NoCatalog.
func (a *auto) Repositories(ctx context.Context, registry, filter string) ([]RepositoryInfo, error) {
	list, _, err := a.readSettings(ctx, registry)
	if err != nil {
		return nil, err
	}
	names, _, err := a.known(ctx, registry, list)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	infos := []RepositoryInfo{}
	for _, r := range names {
		if !strings.Contains(r.name, filter) {
			continue
		}
		info := RepositoryInfo{Registry: registry, Name: r.name, Settings: countingFor(list, r).Settings, Tags: -1}
		if n, ok := a.tagCounts[r]; ok {
			info.Tags = n
		}
		infos = append(infos, info)
	}
	return infos, nil
}

// Resolve returns the image that a tag or digest names.
func (a *auto) Resolve(ctx context.Context, registry, repositoryName, ref string) (Image, error) {
	r, p, err := a.reach(registry, repositoryName)
	if err != nil {
		return Image{}, err
	}
	d, err := resolve(ctx, p, ref)
	return r.image(d.Digest), err
}

func resolve(ctx context.Context, p converter.Place, ref string) (ocispec.Descriptor, error) {
	if digest.Digest(ref).Validate() != nil && !tagName.MatchString(ref) {
		return ocispec.Descriptor{}, fmt.Errorf("%w: %q is neither a tag nor a digest", ErrInvalid, ref)
	}
	d, err := p.Resolve(ctx, ref)
	if err != nil {
		return d, placeError(fmt.Errorf("%s in %s: %w", ref, p, err))
	}
	return d, nil
}

func isStreaming(d ocispec.Descriptor) bool { return d.ArtifactType == artifact.ArtifactType }

func isProfile(d ocispec.Descriptor) bool { return d.ArtifactType == artifact.ProfileType }

// Image describes the image that a tag or digest names, with what refers to it, and which parts of its layers a start reads.
func (a *auto) Image(ctx context.Context, registry, repositoryName, ref string) (ImageInfo, error) {
	r, p, err := a.reach(registry, repositoryName)
	if err != nil {
		return ImageInfo{}, err
	}
	info, err := a.viewer.image(ctx, p, r.image(""), ref)
	if err != nil {
		return info, err
	}
	for n := range info.Platforms {
		if info.Platforms[n].Starts, err = a.startsOf(ctx, r, info.Platforms[n]); err != nil {
			return info, err
		}
	}
	op, err := a.ops.Last(ctx, info.Image)
	if errors.Is(err, ErrNotFound) {
		return info, nil
	}
	info.Last = &op
	return info, err
}

// Describe is Service.Image without a service, and without the last operation: of the image that ref, a tag or digest, names in p. Of i the registry and the
// repository count.
func Describe(ctx context.Context, p converter.Place, i Image, ref string) (ImageInfo, error) {
	return newViewer().image(ctx, p, i, ref)
}

func (v *viewer) image(ctx context.Context, p converter.Place, i Image, ref string) (ImageInfo, error) {
	d, err := resolve(ctx, p, ref)
	if err != nil {
		return ImageInfo{}, err
	}
	i.Digest = d.Digest
	info := ImageInfo{Image: i, MediaType: d.MediaType, Platforms: []PlatformInfo{}, Referrers: []ReferrerInfo{}}
	if d.Digest.String() != ref {
		info.Tag = ref
	}
	desc, err := v.describe(ctx, p, i)
	if err != nil {
		return info, placeError(err)
	}
	info.Subject = desc.Subject
	info.Platforms = make([]PlatformInfo, len(desc.Platforms))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(viewAtOnce)
	own := false // the image is its only platform's manifest
	for n, img := range desc.Platforms {
		own = own || img.Desc.Digest == d.Digest
		g.Go(func() (err error) {
			info.Platforms[n], err = v.platform(gctx, p, img)
			return err
		})
	}
	if !own {
		g.Go(func() error {
			list, err := p.Referrers(gctx, d.Digest)
			info.Referrers = referrerInfos(list)
			return err
		})
	}
	return info, placeError(g.Wait())
}

func (v *viewer) platform(ctx context.Context, p converter.Place, img converter.PlatformImage) (PlatformInfo, error) {
	info := PlatformInfo{Platform: img.String(), Digest: img.Desc.Digest, Size: img.Size(), Layers: []LayerInfo{}}
	for _, l := range img.Layers {
		info.Layers = append(info.Layers, LayerInfo{l.Digest, l.MediaType, l.Size})
	}
	list, err := p.Referrers(ctx, img.Desc.Digest)
	if err != nil {
		return info, err
	}
	info.Referrers = referrerInfos(list)
	if !slices.ContainsFunc(list, isStreaming) {
		return info, nil
	}
	m, err := v.startMap(ctx, p, img.Desc.Digest, list)
	if errors.Is(err, converter.ErrNotFound) || errors.Is(err, artifact.ErrUnsupported) || errors.Is(err, artifact.ErrInvalid) {
		return info, nil // not one that this release can use
	}
	if err != nil {
		return info, err
	}
	info.Streaming = streamingInfo(m)
	return info, nil
}

func referrerInfos(list []ocispec.Descriptor) []ReferrerInfo {
	infos := []ReferrerInfo{}
	for _, d := range list {
		infos = append(infos, ReferrerInfo{d.Digest, d.ArtifactType, d.MediaType, d.Size, d.Annotations})
	}
	slices.SortFunc(infos, func(x, y ReferrerInfo) int {
		return cmp.Or(cmp.Compare(x.ArtifactType, y.ArtifactType), cmp.Compare(x.Digest, y.Digest))
	})
	return infos
}

func streamingInfo(m converter.StartMap) *StreamingInfo {
	s := &StreamingInfo{Artifact: m.Artifact, Profile: m.Profile, ProfileDigest: m.ProfileDigest, Layers: []LayerMap{}}
	for _, l := range m.Layers {
		s.Size += l.Size
		s.Index += l.IndexSize
		lm := LayerMap{Source: l.Source, Digest: l.Digest, Size: l.Size, TarSize: l.TarSize, Chunks: l.Chunks, Hot: []Span{}}
		for _, h := range l.Hot {
			lm.Hot = append(lm.Hot, Span{h.Off, h.Size})
		}
		s.Layers = append(s.Layers, lm)
	}
	return s
}

// startMap makes the map of a platform's artifact, once for each set of artifacts and profiles that refer to it: it takes the indexes of all layers.
func (v *viewer) startMap(ctx context.Context, p converter.Place, subject digest.Digest, referrers []ocispec.Descriptor) (converter.StartMap, error) {
	ours := []string{p.String(), subject.String()}
	for _, d := range referrers {
		if isStreaming(d) || isProfile(d) {
			ours = append(ours, d.Digest.String())
		}
	}
	slices.Sort(ours)
	key := hashKey(strings.Join(ours, " "))
	if m, ok := v.maps.get(key); ok {
		return m, nil
	}
	select {
	case v.mapping <- struct{}{}:
		defer func() { <-v.mapping }()
	case <-ctx.Done():
		return converter.StartMap{}, ctx.Err()
	}
	m, err := converter.MapStart(ctx, p, subject)
	if err == nil {
		v.maps.put(key, m)
	}
	return m, err
}

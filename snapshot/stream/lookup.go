package stream

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/span"
)

// maxConfigSize bounds an image's config, bytes: containerd's own bound for what it reads whole is the same order.
const maxConfigSize = 8 << 20

// indexFetches is how many indexes are fetched at once: enough that the indexes of an image of 128 layers (the most that
// overlayfs is used with) are one round trip.
const indexFetches = 128

// A large index is fetched in parts side by side, because each connection begins slowly: ten segments in the first round trip, twice as many in each
// that follows.
const (
	indexPart  = 192 << 10 // bytes, at least
	indexParts = 4         // at most: as many connections as are dialled beforehand
)

// mergeHeaders bounds the headers of all images whose trees are made at once: the largest image leaves room for others.
const mergeHeaders = artifact.MaxImageHeaders + artifact.MaxImageHeaders/2

// maxReasons is of how many artifacts one log line tells why they cannot be used.
const maxReasons = 4

// image facts that come from the source alone, never from the artifact.
type source struct {
	manifest *ocispec.Manifest
	chainIDs []digest.Digest
	diffIDs  []digest.Digest
	platform ocispec.Platform // of the config
}

// lookup finds, checks and records the artifact of an image, in three dependent round trips:
//
//  1. referrers of the platform manifest, beside the platform manifest itself
//  2. the artifact's manifest, beside the image's config and the hot blob, which begins with the indexes, and beside the list of the artifact's signatures, if
//     it has to have one
//  3. the indexes that are not in a hot blob: all of an image without a profile; and the signature
func (s *Store) lookup(ctx context.Context, repo registryclient.Repository, manifest digest.Digest) (*image, error) {
	var artifacts, profiles []ocispec.Descriptor
	var src source
	_, verifier := s.policyOf(repo)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		artifacts, profiles, err = s.readReferrers(gctx, repo, manifest)
		return err
	})
	g.Go(func() (err error) {
		ctx, end := span.Start(gctx, "image manifest")
		defer func() { end(err) }()
		b, err := s.o.Registry.Manifest(ctx, repo, manifest, artifact.MaxManifestSize)
		if err == nil {
			src.manifest, err = artifact.UnmarshalManifest(b)
		}
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}

	// Newest first; an artifact that cannot be used gives way to the next.
	slices.SortStableFunc(artifacts, func(a, b ocispec.Descriptor) int {
		return cmp.Compare(b.Annotations[ocispec.AnnotationCreated], a.Annotations[ocispec.AnnotationCreated])
	})
	n := min(len(artifacts), maxCandidates)
	c := &candidates{store: s, repo: repo, list: artifacts[:n], more: len(artifacts) - n, verifier: verifier}
	defer c.running.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.askHinted(ctx, profiles)
	c.begin(ctx, 0)
	hot := s.fetchHot(ctx, repo, manifest, profiles, s.shares(src.manifest))
	defer hot.fail()
	config := make(chan error, 1)
	go func() { config <- s.readConfig(ctx, repo, &src) }()
	return c.take(ctx, manifest, &src, config, hot)
}

// readReferrers lists what the registry has for an image: artifacts, at least one, and profiles.
func (s *Store) readReferrers(ctx context.Context, repo registryclient.Repository, manifest digest.Digest) (artifacts, profiles []ocispec.Descriptor, err error) {
	ctx, end := span.Start(ctx, "referrers")
	defer func() { end(err) }()
	referrers, err := s.o.Registry.Referrers(ctx, repo, manifest, artifact.ArtifactType, artifact.ProfileType)
	for _, r := range referrers {
		if r.ArtifactType == artifact.ProfileType {
			profiles = append(profiles, r)
		} else {
			artifacts = append(artifacts, r)
		}
	}
	if err == nil && len(artifacts) == 0 {
		err = reason.New(reason.NoArtifact, fmt.Errorf("%s@%s has no streaming artifact (`streamctl create` makes one)", repo, manifest))
	}
	return artifacts, profiles, err
}

// readConfig fetches the image's config by the digest that the image's manifest names, and derives the chain IDs.
func (s *Store) readConfig(ctx context.Context, repo registryclient.Repository, src *source) (err error) {
	ctx, end := span.Start(ctx, "image config")
	defer func() { end(err) }()
	b, err := s.o.Registry.Blob(ctx, repo, src.manifest.Config.Digest, maxConfigSize)
	if err != nil {
		return err
	}
	diffIDs, platform, err := decodeConfig(b)
	if err != nil {
		return fmt.Errorf("%w: config %s: %w", errImage, src.manifest.Config.Digest, err)
	}
	if len(diffIDs) != len(src.manifest.Layers) || len(diffIDs) == 0 {
		return fmt.Errorf("%w: config %s has %d diffIDs, the manifest %d layers", errImage, src.manifest.Config.Digest, len(diffIDs), len(src.manifest.Layers))
	}
	src.diffIDs, src.platform = diffIDs, platform
	src.chainIDs = identity.ChainIDs(slices.Clone(diffIDs))
	return nil
}

// decodeConfig returns the diffIDs of an image's config, and its platform. It decodes nothing else, so that a long history costs nothing.
func decodeConfig(b []byte) ([]digest.Digest, ocispec.Platform, error) {
	var c struct {
		OS           string `json:"os"`
		Architecture string `json:"architecture"`
		Variant      string `json:"variant"`
		RootFS       struct {
			DiffIDs artifact.List[digest.Digest] `json:"diff_ids"`
		} `json:"rootfs"`
	}
	err := json.Unmarshal(b, &c)
	return c.RootFS.DiffIDs, ocispec.Platform{OS: c.OS, Architecture: c.Architecture, Variant: c.Variant}, err
}

// check compares what the artifact says of the image with the image.
func (src *source) check(manifest digest.Digest, m *artifact.Manifest) error {
	if m.Subject.Digest != manifest {
		return fmt.Errorf("%w: its subject is %s, not the image", artifact.ErrInvalid, m.Subject.Digest)
	}
	if m.Config.Digest != src.manifest.Config.Digest {
		return fmt.Errorf("%w: its config is %s, the image's is %s", artifact.ErrInvalid, m.Config.Digest, src.manifest.Config.Digest)
	}
	if p, want := m.Platform, src.platform; p.OS != want.OS || p.Architecture != want.Architecture || p.Variant != want.Variant {
		return fmt.Errorf("%w: it is of %s/%s%s, the image's config of %s/%s%s", artifact.ErrInvalid, p.OS, p.Architecture, p.Variant, want.OS, want.Architecture, want.Variant)
	}
	if len(m.Layers) != len(src.manifest.Layers) {
		return fmt.Errorf("%w: it has %d layers, the image %d", artifact.ErrInvalid, len(m.Layers), len(src.manifest.Layers))
	}
	for i, l := range m.Layers {
		if l.Source != src.manifest.Layers[i].Digest {
			return fmt.Errorf("%w: layer %d is made of %s, the image has %s there", artifact.ErrInvalid, i, l.Source, src.manifest.Layers[i].Digest)
		}
	}
	return nil
}

// adopt fetches the indexes of an artifact, checks them and adds the image to the set, if its signature is good or none is asked for. Then the hot blob has
// where to go. raw is the artifact's manifest, of which m was made.
func (s *Store) adopt(ctx context.Context, repo registryclient.Repository, manifest digest.Digest, raw []byte, m *artifact.Manifest, src *source, hot *hotFetch, vet *vetting) (_ *image, err error) {
	rec := &record{
		Version: recordVersion, Artifact: digest.FromBytes(raw), Manifest: manifest, Config: m.Config.Digest, Repository: repo,
		ChainIDs: src.chainIDs, DiffIDs: src.diffIDs, Layers: m.Layers, Converter: m.Converter,
	}
	if err := s.refuse(rec); err != nil {
		return nil, err
	}
	for _, l := range src.manifest.Layers {
		rec.Sources = append(rec.Sources, ocispec.Descriptor{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size})
	}
	unpin := s.pin(rec)
	defer func() {
		if unpin(); err != nil {
			err = errors.Join(err, s.discardIndexes())
		}
	}()
	got, err := s.fetched(ctx, rec, raw, hot, vet)
	if err != nil {
		return nil, err
	}
	img, isNew, err := s.add(rec)
	if err != nil {
		return nil, err
	}
	if _, err := s.readIn(img, repo, true); err != nil {
		s.log.Warn("where an image is read, too, is not written down", "image", img.name(), "repository", repo, "error", err)
	}
	// What cannot be mounted must be known now: once a layer is promised to containerd, there is no normal pull to fall back to.
	use, err := img.prepare(ctx)
	if err == nil && got != nil {
		if err = s.vouch(img, nil, got); err != nil {
			use.Close()
		}
	}
	if err != nil {
		if isNew { // snapshots of a former life may need what was there
			err = errors.Join(err, s.drop(img))
		}
		return nil, err
	}
	hot.give(use)
	return img, nil
}

// openIndexes has the indexes of some layers on disk: out of the hot blob, or fetched.
func (s *Store) openIndexes(ctx context.Context, rec *record, layers []int, hot *hotFetch) (err error) {
	ctx, end := span.Start(ctx, "indexes")
	defer func() { end(err) }()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(indexFetches)
	for _, i := range layers {
		l := rec.Layers[i]
		g.Go(func() error {
			if l.IndexSize <= artifact.MaxHotIndex && !s.hasIndex(l) {
				hot.await(gctx)
			}
			x, err := s.openIndex(gctx, blob{store: s, rec: rec, layer: i})
			if err != nil {
				return fmt.Errorf("index of layer %d: %w", i, err)
			}
			if x.DiffID != rec.DiffIDs[i] {
				return fmt.Errorf("%w: index of layer %d is of tar %s, the image's config lists %s", artifact.ErrInvalid, i, x.DiffID, rec.DiffIDs[i])
			}
			return nil
		})
	}
	return g.Wait()
}

// firsts lists the layers without those that repeat the blob of one below. A blob that stands for two different layers of the image is an error, and so are
// indexes beyond the limit.
func (rec *record) firsts() ([]int, error) {
	var list []int
	seen := map[digest.Digest]int{}
	size := int64(0)
	for i, l := range rec.Layers {
		k, again := seen[l.Digest]
		if !again {
			seen[l.Digest] = i
			list = append(list, i)
			if size += l.IndexSize; size > artifact.MaxImageIndexes {
				return nil, fmt.Errorf("%w: its indexes have more than %d MiB", artifact.ErrUnsupported, artifact.MaxImageIndexes>>20)
			}
			continue
		}
		same := rec.Layers[k]
		same.Source = l.Source // one tar may have been compressed in two ways
		if l != same || rec.DiffIDs[i] != rec.DiffIDs[k] {
			return nil, fmt.Errorf("%w: layers %d and %d have the same blob, but are different layers of the image", artifact.ErrInvalid, k, i)
		}
	}
	return list, nil
}

// shares reports whether an image of this node has a layer of m.
func (s *Store) shares(m *ocispec.Manifest) bool {
	sources := make(map[digest.Digest]bool, len(m.Layers))
	for _, l := range m.Layers {
		sources[l.Digest] = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, img := range s.images {
		if slices.ContainsFunc(img.rec.Layers, func(l artifact.Layer) bool { return sources[l.Source] }) {
			return true
		}
	}
	return false
}

// hasIndex reports whether there is a file of the index of l.
func (s *Store) hasIndex(l artifact.Layer) bool {
	_, err := os.Stat(s.indexPath(l.IndexDigest))
	return err == nil
}

// pin keeps the indexes of rec from being swept before the record that names them is on disk.
func (s *Store) pin(rec *record) (unpin func()) {
	add := func(n int) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, l := range rec.Layers {
			name := l.IndexDigest.Encoded()
			if s.pins[name] += n; s.pins[name] == 0 {
				delete(s.pins, name)
			}
		}
	}
	add(1)
	return func() { add(-1) }
}

// openIndex maps the index of b's layer, from disk if an intact copy is there, from the registry otherwise.
func (s *Store) openIndex(ctx context.Context, b blob) (*artifact.Index, error) {
	l := b.rec.Layers[b.layer]
	path := s.indexPath(l.IndexDigest)
	if x, err := mapIndex(path, l); err == nil {
		return x, nil
	}
	var errs []error
	var before []part // of an index that was wrong
	for try := 0; ; try++ {
		parts, err := s.fetchIndex(ctx, b, try)
		if err == nil {
			for i, p := range before {
				if p.sum != parts[i].sum {
					tellWrong(p.answer, p.off, p.n)
				}
			}
			return mapIndex(path, l)
		}
		before = parts
		errs = append(errs, err)
		// Wrong bytes may be one mirror's: the next host is asked. Anything else has been retried below. There is no third time, which would come
		// after a pause: a pull waits.
		if !errors.Is(err, artifact.ErrInvalid) || try == 1 {
			return nil, errors.Join(errs...)
		}
	}
}

// part is n bytes at off of a layer blob, as answer has given them.
type part struct {
	off, n int64
	answer io.Reader
	sum    [sha256.Size]byte
}

// tellWrong tells answer, if it can be told, that the n bytes at off of the blob that it gave are wrong.
func tellWrong(answer io.Reader, off, n int64) {
	if w, ok := answer.(interface{ Wrong(off, n int64) }); ok {
		w.Wrong(off, n)
	}
}

// fetchIndex fetches the index of b's layer. If its digest is another, the parts are returned, too: a right index will tell which of them is wrong.
func (s *Store) fetchIndex(ctx context.Context, b blob, try int) (parts []part, err error) {
	l := b.rec.Layers[b.layer]
	size := max(indexPart, (l.IndexSize+indexParts-1)/indexParts)
	for off := int64(0); off < l.IndexSize; off += size {
		parts = append(parts, part{off: l.IndexOffset + off, n: min(size, l.IndexSize-off)})
	}
	err = s.writeIndex(l, func(f *os.File) error {
		g, gctx := errgroup.WithContext(ctx)
		for i := range parts {
			g.Go(func() error {
				p := &parts[i]
				r, err := b.ReadRange(gctx, p.off, p.n, try)
				if err != nil {
					return err
				}
				defer r.Close()
				p.answer = r
				hash := sha256.New()
				_, err = io.Copy(io.MultiWriter(io.NewOffsetWriter(f, p.off-l.IndexOffset), hash), io.LimitReader(r, p.n))
				hash.Sum(p.sum[:0])
				return err
			})
		}
		return g.Wait()
	})
	return parts, err
}

// writeIndex makes the file of layer l's index from what write puts into it. It goes to disk and not to memory: an index may be large, and 128 of them are fetched at
// once. The file can be fetched again, so it is not synced: what a crash leaves is verified when opened. Another index than l's is ErrInvalid.
func (s *Store) writeIndex(l artifact.Layer, write func(f *os.File) error) error {
	path := s.indexPath(l.IndexDigest)
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+tmpSuffix)
	if err != nil {
		return err
	}
	hash := sha256.New()
	if err = write(f); err == nil {
		_, err = io.Copy(hash, io.NewSectionReader(f, 0, l.IndexSize))
	}
	if err = errors.Join(err, f.Close()); err == nil {
		if got := digest.NewDigest(digest.SHA256, hash); got != l.IndexDigest {
			err = fmt.Errorf("%w: index hashes to %s, the artifact's manifest says %s", artifact.ErrInvalid, got, l.IndexDigest)
		} else {
			err = os.Rename(f.Name(), path)
		}
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

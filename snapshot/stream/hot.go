package stream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

const (
	// maxProfiles is how many profiles of an image are tried, the best first.
	maxProfiles = 4
	// hotTimeout bounds the way of a hot blob to the cache, the registry's pauses included.
	hotTimeout = 10 * time.Minute
	// hotLinger is how long an image's layers stay open after that: its container is about to be mounted, and would have to verify again what it finds on disk.
	hotLinger = 2 * time.Minute
	// hotHead is how much of a hot blob is asked for of an image that shares layers with others on this node, of whose chunks it may have many: the list of 8,000.
	// Of another image all is asked for at once.
	hotHead = 64 << 10
	// maxHotSkip is how much of the open hot blob is dropped rather than asked around.
	maxHotSkip = 256 << 10

	// A read waits for a chunk that the hot blob is about to bring for patienceTrips times what the first byte of the hot blob took, which is about what a request
	// of its own takes; within bounds, for a busy machine and a slow registry.
	patienceTrips = 4
	minPatience   = 100 * time.Millisecond
	maxPatience   = 2 * time.Second
)

// hotFetch brings an image's hot blob into the cache. It begins beside the search for the artifact, whose pull does not wait for it, and goes on when that has ended.
type hotFetch struct {
	cancel context.CancelFunc
	shares chan bool       // gets one value: whether the image shares layers with others on this node
	opened chan *deviceUse // gets one value, nil if the search fails
	given  bool            // by the search
	image  *image          // that it was given; guarded by Store.mu
}

// fetchHot begins to fetch the hot blob of the best of an image's profiles. Without profiles it returns nil. The search calls give or fail.
func (s *Store) fetchHot(repo registryclient.Repository, manifest digest.Digest, profiles []ocispec.Descriptor) *hotFetch {
	if len(profiles) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), hotTimeout)
	h := &hotFetch{cancel: cancel, shares: make(chan bool, 1), opened: make(chan *deviceUse, 1)}
	s.mu.Lock()
	s.hots[h] = true
	if s.closed {
		cancel()
	}
	s.mu.Unlock()
	s.running.Go(func() {
		use := h.run(ctx, s, repo, manifest, profiles)
		if use != nil {
			select {
			case <-ctx.Done():
			case <-time.After(hotLinger):
			}
			use.Close()
		}
		cancel()
		s.mu.Lock()
		delete(s.hots, h)
		s.mu.Unlock()
	})
	return h
}

// share says whether the image that is being searched has layers that this node knows. The first counts.
func (h *hotFetch) share(known bool) {
	if h == nil {
		return
	}
	select {
	case h.shares <- known:
	default:
	}
}

// give hands h the open image, of which it is a use. It takes the first.
func (h *hotFetch) give(ctx context.Context, img *image) error {
	if h == nil || h.given {
		return nil
	}
	img.mu.Lock()
	use, err := img.use(ctx)
	img.mu.Unlock()
	if err != nil {
		return err
	}
	img.store.mu.Lock()
	h.image = img
	img.store.mu.Unlock()
	h.given = true
	h.opened <- use
	return nil
}

// fail says that there is no image, unless give did.
func (h *hotFetch) fail() {
	if h != nil && !h.given {
		h.cancel()
		h.share(false)
		h.given = true
		h.opened <- nil
	}
}

// endHots ends what was given img, which is not needed any more: each search of a repository that has it brings one. The caller holds mu.
func (s *Store) endHots(img *image) {
	for h := range s.hots {
		if img != nil && h.image == img {
			h.cancel()
		}
	}
}

// run fetches the hot blob of one of profiles, and returns the use of the image that it was given.
func (h *hotFetch) run(ctx context.Context, s *Store, repo registryclient.Repository, manifest digest.Digest, profiles []ocispec.Descriptor) (use *deviceUse) {
	slices.SortStableFunc(profiles, func(a, b ocispec.Descriptor) int {
		return cmp.Or(
			sourceRank(a)-sourceRank(b),
			cmp.Compare(b.Annotations[ocispec.AnnotationCreated], a.Annotations[ocispec.AnnotationCreated]))
	})
	waited := false
	image := func() *deviceUse {
		if !waited {
			use, waited = <-h.opened, true // the search ends in any case
		}
		return use
	}
	known := sync.OnceValue(func() bool { return <-h.shares })
	share := s.o.Cache.Share() // of all profiles: what one has brought is there when the next is tried
	for _, p := range profiles[:min(len(profiles), maxProfiles)] {
		begun := time.Now()
		n, err := s.fillHot(ctx, repo, manifest, p.Digest, share, known, image)
		log := s.log.With("image", string(repo)+"@"+manifest.String(), "profile", p.Digest.String(), "source", p.Annotations[artifact.AnnotationProfileSource])
		switch {
		case ctx.Err() != nil:
		case err != nil:
			log.Warn("profile is of no use", "error", err)
			continue
		default:
			log.Info("profile", slog.Int("chunks", n), slog.Duration("took", time.Since(begun)))
		}
		break
	}
	return image()
}

// sourceRank orders profiles: what was seen in a run made for it, what nodes have seen, what the image's files say.
func sourceRank(d ocispec.Descriptor) int {
	order := []string{artifact.ProfileRecorded, artifact.ProfileLearned, artifact.ProfileStatic}
	if i := slices.Index(order, d.Annotations[artifact.AnnotationProfileSource]); i >= 0 {
		return i
	}
	return len(order)
}

// fillHot fetches the hot blob of profile dgst into the layers of the image, as soon as those are open. It returns how many chunks the profile lists.
func (s *Store) fillHot(ctx context.Context, repo registryclient.Repository, manifest, dgst digest.Digest, share *cache.Share, shares func() bool, image func() *deviceUse) (int, error) {
	raw, err := s.o.Registry.Manifest(ctx, repo, dgst, artifact.MaxManifestSize)
	if err != nil {
		return 0, err
	}
	m, err := artifact.DecodeProfileManifest(raw)
	if err != nil {
		return 0, err
	}
	if m.Subject.Digest != manifest {
		return 0, fmt.Errorf("%w: its subject is %s, not the image", artifact.ErrInvalid, m.Subject.Digest)
	}
	b := &hotBlob{store: s, repo: repo, dgst: m.Hot.Digest, size: m.Hot.Size}
	defer b.close()
	p, err := b.list(ctx, shares)
	if err != nil {
		return 0, err
	}
	patience := min(max(patienceTrips*time.Since(b.asked), minPatience), maxPatience)
	use := image()
	if use == nil {
		return 0, context.Canceled
	}
	frames, err := use.frames(p)
	if err != nil {
		return 0, err
	}
	return len(frames), share.Fill(ctx, b, b.pos, b.size-b.pos, frames, patience)
}

// frames finds the chunks of p in d's layers.
func (d *device) frames(p *artifact.Profile) ([]cache.Frame, error) {
	layers := make([]*cache.Layer, len(p.Layers))
	for i, dgst := range p.Layers {
		k := slices.Index(d.digests, dgst)
		if k < 0 {
			return nil, fmt.Errorf("%w: the artifact has no layer with index %s", artifact.ErrInvalid, dgst)
		}
		layers[i] = d.layers[k]
	}
	frames := make([]cache.Frame, len(p.Chunks))
	for i, c := range p.Chunks {
		frames[i] = cache.Frame{Layer: layers[c.Layer], Chunk: c.Chunk}
	}
	return frames, nil
}

// hotBlob is a hot blob as it comes: open from its start until somebody wants a range that is far from where it is. It is a cache.Blob, for one goroutine.
type hotBlob struct {
	store *Store
	repo  registryclient.Repository
	dgst  digest.Digest
	size  int64

	body   io.ReadCloser
	cancel context.CancelFunc // of body
	pos    int64              // of body
	asked  time.Time          // when body was asked for
}

// list reads the list, and leaves open what follows it; of an image that shares layers nothing, of which much may be here.
func (b *hotBlob) list(ctx context.Context, shares func() bool) (*artifact.Profile, error) {
	if shares() && hotHead < b.size {
		if err := b.open(ctx, hotHead); err != nil {
			return nil, err
		}
		p, err := artifact.ReadProfile(b)
		b.close()
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			return p, err
		}
		b.pos = 0 // the list is longer
	}
	if err := b.open(ctx, b.size); err != nil {
		return nil, err
	}
	return artifact.ReadProfile(b)
}

// open asks for the first n bytes.
func (b *hotBlob) open(ctx context.Context, n int64) (err error) {
	ctx, b.cancel = context.WithCancel(ctx)
	b.asked = time.Now()
	b.body, err = b.store.o.Registry.ReadRange(ctx, b.repo, b.dgst, 0, n, 0)
	return err
}

func (b *hotBlob) Read(p []byte) (int, error) {
	n, err := b.body.Read(p)
	b.pos += int64(n)
	return n, err
}

// ReadRange goes on with the open body if that is at hand.
func (b *hotBlob) ReadRange(ctx context.Context, off, n int64, try int) (io.ReadCloser, error) {
	if b.body == nil || off < b.pos || off-b.pos > maxHotSkip || try > 0 {
		b.close()
		return b.store.o.Registry.ReadRange(ctx, b.repo, b.dgst, off, n, try)
	}
	r := &hotRange{hotBlob: b, answer: b.body, stop: context.AfterFunc(ctx, b.cancel)}
	if _, err := io.CopyN(io.Discard, b, off-b.pos); err != nil {
		r.Close()
		return nil, err
	}
	r.Reader = io.LimitReader(b, n)
	return r, nil
}

func (b *hotBlob) close() {
	if b.body != nil {
		b.body.Close()
		b.body = nil
	}
	if b.cancel != nil {
		b.cancel()
	}
}

// hotRange is a range of the open hot blob.
type hotRange struct {
	*hotBlob
	io.Reader
	answer io.Reader
	stop   func() bool
}

func (r *hotRange) Read(p []byte) (int, error) { return r.Reader.Read(p) }

// Wrong passes on what fs/cache.Blob's readers are told.
func (r *hotRange) Wrong(off, n int64) { tellWrong(r.answer, off, n) }

// Close closes the hot blob, too: one range is read out of it.
func (r *hotRange) Close() error {
	r.stop()
	r.hotBlob.close()
	return nil
}

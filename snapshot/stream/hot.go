package stream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/span"
)

const (
	// maxProfiles is how many profiles of an image are tried, the best first.
	maxProfiles = 4
	// hotTimeout bounds the way of a hot blob to the cache, the registry's pauses included.
	hotTimeout = 10 * time.Minute
	// hotLinger is how long an image's layers stay open after that, or after a pull without a hot blob: its container is about to be mounted, and would have to verify
	// again what it finds on disk, and to read the headers again.
	hotLinger = 2 * time.Minute
	// A read waits for a chunk that the hot blob is about to bring for patienceTrips times what the first byte of the hot blob took, which is about what a request
	// of its own takes; within bounds, for a busy machine and a slow registry.
	patienceTrips = 4
	minPatience   = 100 * time.Millisecond
	maxPatience   = 2 * time.Second
)

// hotFetch brings an image's hot blob into the cache, and the indexes in it to where they are looked for. It begins beside the search for the
// artifact, whose pull waits for those indexes only, and goes on when that has ended.
type hotFetch struct {
	store    *Store
	repo     registryclient.Repository
	manifest digest.Digest
	shares   bool         // the image has layers in common with others on this node
	share    *cache.Share // of all profiles: what one has brought is there when the next is tried

	cancel context.CancelFunc
	wanted chan *record      // gets one value from the search: the first artifact that it tries, or nil
	opened chan *deviceUse   // gets one value from the search, nil if it fails
	record func() *record    // waits for wanted's
	use    func() *deviceUse // waits for opened's
	moved  atomic.Int64      // when the last byte came, Unix nanoseconds

	indexed chan struct{} // closed by noMore
	noMore  func()        // says that no index is on its way any more

	// Of the search:
	asked, given bool   // wanted and opened have their values
	image        *image // that it was given; guarded by Store.mu
}

// fetchHot begins to fetch the hot blob of the best of an image's profiles, if there is one. The search calls want and give, or fail.
func (s *Store) fetchHot(ctx context.Context, repo registryclient.Repository, manifest digest.Digest, profiles []ocispec.Descriptor, shares bool) *hotFetch {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), hotTimeout)
	h := &hotFetch{
		store: s, repo: repo, manifest: manifest, shares: shares, share: s.o.Cache.Share(), cancel: cancel,
		wanted: make(chan *record, 1), opened: make(chan *deviceUse, 1), indexed: make(chan struct{}),
	}
	h.record = sync.OnceValue(func() *record { return <-h.wanted })
	h.use = sync.OnceValue(func() *deviceUse { return <-h.opened })
	h.noMore = sync.OnceFunc(func() { close(h.indexed) })
	if len(profiles) == 0 {
		h.noMore()
	}
	s.mu.Lock()
	s.hots[h] = true
	if s.closed {
		cancel()
	}
	s.mu.Unlock()
	s.running.Go(func() {
		h.run(ctx, profiles)
		if use := h.use(); use != nil { // the search ends in any case
			select {
			case <-ctx.Done():
			case <-time.After(hotLinger):
			}
			use.image.cool()
			use.Close()
		}
		cancel()
		s.mu.Lock()
		delete(s.hots, h)
		s.mu.Unlock()
	})
	return h
}

// want says which artifact is tried. The first counts.
func (h *hotFetch) want(rec *record) {
	if !h.asked {
		h.asked = true
		h.wanted <- rec
	}
}

// await waits for the indexes that h brings, as long as something comes.
func (h *hotFetch) await(ctx context.Context) {
	last := time.Now()
	for {
		t := time.NewTimer(time.Until(last.Add(maxPatience)))
		select {
		case <-h.indexed:
		case <-ctx.Done():
		case <-t.C:
			if moved := time.Unix(0, h.moved.Load()); moved.After(last) {
				last = moved
				continue
			}
		}
		t.Stop()
		return
	}
}

// give hands h a use of the image, which it closes. It keeps the first.
func (h *hotFetch) give(use *deviceUse) {
	if h.given {
		use.Close()
		return
	}
	h.store.mu.Lock()
	h.image = use.image
	h.store.mu.Unlock()
	h.given = true
	h.opened <- use
}

// fail says that there is no image, unless give did.
func (h *hotFetch) fail() {
	if !h.given {
		h.cancel()
		h.want(nil)
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

// run fetches the hot blob of one of profiles.
func (h *hotFetch) run(ctx context.Context, profiles []ocispec.Descriptor) {
	defer h.noMore()
	if len(profiles) == 0 {
		return
	}
	ctx, end := span.Start(ctx, "hot blob")
	var err error
	defer func() { end(err) }()
	slices.SortStableFunc(profiles, func(a, b ocispec.Descriptor) int {
		return cmp.Or(
			sourceRank(a)-sourceRank(b),
			cmp.Compare(b.Annotations[ocispec.AnnotationCreated], a.Annotations[ocispec.AnnotationCreated]))
	})
	for _, p := range profiles[:min(len(profiles), maxProfiles)] {
		begun := time.Now()
		var n int
		n, err = h.fill(ctx, p)
		log := h.store.log.With("image", string(h.repo)+"@"+h.manifest.String(), "profile", p.Digest.String(), "source", p.Annotations[artifact.AnnotationProfileSource])
		switch {
		case ctx.Err() != nil:
		case err != nil:
			log.Warn("profile is of no use", "error", err)
			continue
		default:
			log.Info("profile", slog.Int("chunks", n), slog.Duration("took", time.Since(begun)))
		}
		return
	}
}

// sourceRank orders profiles: what was seen in a run made for it, what nodes have seen, what the image's files say.
func sourceRank(d ocispec.Descriptor) int {
	order := []string{artifact.ProfileRecorded, artifact.ProfileLearned, artifact.ProfileStatic}
	if i := slices.Index(order, d.Annotations[artifact.AnnotationProfileSource]); i >= 0 {
		return i
	}
	return len(order)
}

// fill fetches the hot blob of profile p: the indexes for the search, and the chunks into the layers of the image, as soon as those are open. It returns how
// many chunks the profile lists.
func (h *hotFetch) fill(ctx context.Context, p ocispec.Descriptor) (int, error) {
	hot, err := h.find(ctx, p)
	if err != nil {
		return 0, err
	}
	b := &hotBlob{fetch: h, dgst: hot.Digest, size: hot.Size}
	defer b.close()
	head, err := b.head(ctx)
	if err != nil {
		if b.pos > 0 { // of megabytes, maybe: the next one's is not waited for, too
			h.noMore()
		}
		return 0, err
	}
	patience := min(max(patienceTrips*time.Since(b.asked), minPatience), maxPatience)
	if err := h.takeIndexes(b, head); err != nil {
		return 0, err
	}
	b.readAhead()
	use := h.use()
	if use == nil {
		return 0, context.Canceled
	}
	frames, err := use.frames(&head.Profile)
	if err != nil {
		return 0, err
	}
	use.image.profile.Store(&p)
	if err := h.share.Fill(ctx, b, head.Frames(), b.size-head.Frames(), frames, patience); err != nil {
		use.image.profile.Store(nil)
		return 0, err
	}
	// What was seen, and not what a static profile supposes: the kernel's cache is not for what nobody reads, and a record of this start (firstUses) has all that is read ahead.
	if !h.store.o.NoReadAhead && p.Annotations[artifact.AnnotationProfileSource] != artifact.ProfileStatic {
		if err := use.image.warm(use.device, &head.Profile); err != nil && ctx.Err() == nil { // it ends when the image is forgotten
			h.store.log.Warn("read ahead", "image", string(h.repo)+"@"+h.manifest.String(), "error", err)
		}
	}
	return len(frames), nil
}

// find describes the hot blob of profile p: from the list of referrers, or the profile's manifest where that list lacks annotations.
func (h *hotFetch) find(ctx context.Context, p ocispec.Descriptor) (ocispec.Descriptor, error) {
	if hot, ok, err := artifact.HotOf(p.Annotations); ok || err != nil {
		return hot, err
	}
	raw, err := h.store.o.Registry.Manifest(ctx, h.repo, p.Digest, artifact.MaxManifestSize)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	m, err := artifact.DecodeProfileManifest(raw)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if m.Subject.Digest != h.manifest {
		return ocispec.Descriptor{}, fmt.Errorf("%w: its subject is %s, not the image", artifact.ErrInvalid, m.Subject.Digest)
	}
	return m.Hot, nil
}

// takeIndexes puts the indexes that follow head in b to where the search looks for them, if it waits for them. Each must be what the artifact says: of one that is not, no byte is waited for.
func (h *hotFetch) takeIndexes(b *hotBlob, head *artifact.HotHead) error {
	defer h.noMore()
	select {
	case <-h.indexed:
		return nil
	default:
	}
	rec := h.record()
	if rec == nil {
		return context.Canceled
	}
	for i, n := range head.Indexes {
		k := slices.IndexFunc(rec.Layers, func(l artifact.Layer) bool { return l.IndexDigest == head.Layers[i] })
		if k < 0 || b.pos+n > b.end { // of k < 0 frames says what is wrong
			return nil
		}
		if want := rec.Layers[k].IndexSize; n != 0 && n != want {
			return fmt.Errorf("%w: index of layer %d has %d bytes, the artifact's manifest says %d", artifact.ErrInvalid, k, n, want)
		}
		if n == 0 || h.store.hasIndex(rec.Layers[k]) {
			if _, err := io.CopyN(io.Discard, b, n); err != nil {
				return err
			}
			continue
		}
		off := b.pos
		err := h.store.writeIndex(rec.Layers[k], func(f *os.File) error {
			_, err := io.CopyN(f, b, n)
			return err
		})
		if errors.Is(err, artifact.ErrInvalid) {
			tellWrong(b.body, off, n)
		}
		if err != nil {
			return fmt.Errorf("index of layer %d: %w", k, err)
		}
	}
	return nil
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

package stream

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/span"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// vetAhead is how many artifacts are asked for side by side where one must be signed: those that are not, which whoever may push can put before one that is, then
// cost no round trip. Where nothing must be signed the first is nearly always taken, and the next is asked for when it was not.
const vetAhead = 4

// maxCandidates is how many artifacts of an image are tried, the newest first: whoever may push can attach any number. What was read of one is let go of when the next has its turn.
const maxCandidates = 64

// earlyIndexes is how many bytes of indexes are fetched beside the signature: those of nearly all images. Of more, nothing is before that is good.
const earlyIndexes = 16 << 20

// candidates are the artifacts of an image, in the order in which they are tried.
type candidates struct {
	store    *Store
	repo     registryclient.Repository
	list     []ocispec.Descriptor
	more     int                              // artifacts that are not tried
	verifier trust.Verifier                   // nil: no signature is asked for
	early    []func() (trust.Envelope, error) // that the image's profiles hint at
	begun    []*candidate

	running sync.WaitGroup // what was asked
}

// candidate is an artifact that may be taken. Its functions wait for what was asked.
type candidate struct {
	manifest func() (*artifact.Manifest, []byte, error)
	vetting  *vetting // nil: no signature is asked for
}

// at returns the artifact of list[i], once those before it were tried, and lets go of it.
func (c *candidates) at(ctx context.Context, i int) *candidate {
	c.begin(ctx, i)
	a := c.begun[i]
	c.begun[i] = nil
	return a
}

// begin asks for the artifact i and, if they must be signed, for those after it.
func (c *candidates) begin(ctx context.Context, i int) {
	ahead := 1
	if c.verifier != nil {
		ahead = vetAhead
	}
	for n := len(c.begun); n < min(i+ahead, len(c.list)); n++ {
		c.begun = append(c.begun, c.ask(ctx, c.list[n].Digest))
	}
}

func (c *candidates) ask(ctx context.Context, dgst digest.Digest) *candidate {
	type read struct {
		m   *artifact.Manifest
		raw []byte
	}
	manifest := waitFor(c, func() (r read, err error) {
		r.m, r.raw, err = c.store.readArtifact(ctx, c.repo, dgst)
		return r, err
	})
	a := &candidate{manifest: func() (*artifact.Manifest, []byte, error) {
		r, err := manifest()
		return r.m, r.raw, err
	}}
	if c.verifier == nil {
		return a
	}
	v := &vetting{store: c.store, repo: c.repo, artifact: dgst, verifier: c.verifier, early: c.early, known: c.store.known(c.repo, dgst, c.verifier)}
	if v.known == nil {
		v.signatures = waitFor(c, func() (_ []ocispec.Descriptor, err error) {
			ctx, end := span.Start(ctx, "signatures")
			defer func() { end(err) }()
			return c.store.o.Registry.Referrers(ctx, c.repo, dgst, c.verifier.ArtifactType())
		})
	}
	a.vetting = v
	return a
}

// askHinted asks for the envelopes that profiles hint at: so one that was not made by us, whose own manifest has no hints, comes as early as one that was.
func (c *candidates) askHinted(ctx context.Context, profiles []ocispec.Descriptor) {
	if c.verifier == nil {
		return
	}
	seen := map[digest.Digest]bool{}
	for _, p := range profiles {
		d, ok := trust.HintOf(p.Annotations)
		if !ok || seen[d.Digest] || len(seen) == maxProfiles {
			continue
		}
		seen[d.Digest] = true
		c.early = append(c.early, waitFor(c, func() (trust.Envelope, error) { return c.store.envelope(ctx, c.repo, d) }))
	}
}

// waitFor runs f beside the caller, and returns what waits for its result.
func waitFor[T any](c *candidates, f func() (T, error)) func() (T, error) {
	result := make(chan struct{})
	var v T
	var err error
	c.running.Go(func() {
		defer close(result)
		v, err = f()
	})
	return func() (T, error) {
		<-result
		return v, err
	}
}

func (s *Store) readArtifact(ctx context.Context, repo registryclient.Repository, dgst digest.Digest) (m *artifact.Manifest, raw []byte, err error) {
	ctx, end := span.Start(ctx, "artifact manifest")
	defer func() { end(err) }()
	raw, err = s.o.Registry.Manifest(ctx, repo, dgst, artifact.MaxManifestSize)
	if err != nil {
		return nil, nil, err
	}
	m, err = artifact.DecodeManifest(raw)
	return m, raw, err
}

// take tries the artifacts one after the other, and returns the first that can be used. What can be said of the image itself comes from src, once config is
// there.
func (c *candidates) take(ctx context.Context, manifest digest.Digest, src *source, config <-chan error, hot *hotFetch) (*image, error) {
	var errs, unsigned []error
	configRead := false
	for i, r := range c.list {
		a := c.at(ctx, i)
		m, raw, err := a.manifest()
		if !configRead {
			configRead = true
			if err := <-config; err != nil {
				return nil, err
			}
		}
		if err == nil {
			err = src.check(manifest, m)
		}
		if err == nil && a.vetting != nil {
			err = a.vetting.listed()
		}
		if err == nil {
			var img *image
			if img, err = c.store.adopt(ctx, c.repo, manifest, raw, m, src, hot, a.vetting); err == nil {
				return img, nil
			}
		}
		err = WithReason(fmt.Errorf("artifact %s: %w", r.Digest, err))
		if errors.Is(err, trust.ErrMissing) {
			unsigned = append(unsigned, err)
		} else {
			errs = append(errs, err) // the newest one's is the image's
		}
		if ctx.Err() != nil {
			break
		}
	}
	errs = some(append(errs, unsigned...), "artifacts")
	if c.more > 0 && ctx.Err() == nil {
		errs = append(errs, fmt.Errorf("%d older artifacts are not looked at", c.more))
	}
	return nil, errors.Join(errs...)
}

// fetched has the indexes of rec on disk, and a signature that is good if one is asked for: that, and nothing before it, lets bytes of the artifact go where
// they stay.
func (s *Store) fetched(ctx context.Context, rec *record, raw []byte, hot *hotFetch, vet *vetting) (got *vetted, err error) {
	first, err := rec.firsts()
	if err != nil {
		return nil, err
	}
	if vet == nil {
		hot.want(rec)
		return nil, s.openIndexes(ctx, rec, first, hot)
	}
	size := int64(0)
	for _, i := range first {
		size += rec.Layers[i].IndexSize
	}
	good := make(chan struct{})
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		if got, err = vet.verdict(gctx, raw); err == nil {
			hot.want(rec)
			close(good)
		}
		return err
	})
	g.Go(func() error {
		if size > earlyIndexes {
			select {
			case <-good:
			case <-gctx.Done():
				return gctx.Err()
			}
		}
		return s.openIndexes(gctx, rec, first, hot)
	})
	return got, g.Wait()
}

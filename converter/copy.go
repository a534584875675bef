package converter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// CopyOptions say how Copy copies.
type CopyOptions struct {
	Jobs     int // blobs copied at once; 0 is as for Options.Jobs
	Progress Progress
}

// Copied says what Copy did.
type Copied struct {
	Digest    digest.Digest `json:"digest"` // of the image, the same in both places
	Manifests int           `json:"manifests"`
	Referrers int           `json:"referrers"` // of the manifests
	Blobs     int           `json:"blobs"`     // that were not there before
	Bytes     int64         `json:"bytes"`     // of those blobs
}

// Copy copies what ref names, all its platforms, and all their referrers and the referrers of those, from src to dst, where
// it is named tag. Nothing changes on the way: all digests stay. What is there already is not copied.
func Copy(ctx context.Context, src Place, ref string, dst Place, tag string, o CopyOptions) (Copied, error) {
	c := &copier{src: src, dst: dst, o: o, seen: map[digest.Digest]bool{}}
	d, raw, err := src.Manifest(ctx, ref)
	if err != nil {
		return Copied{}, resolveError(src, ref, err)
	}
	err = c.manifest(ctx, d, raw, tag, 0)
	return Copied{d.Digest, c.manifests, c.referrers, int(c.blobs.Load()), c.bytes.Load()}, err
}

type copier struct {
	src, dst Place
	o        CopyOptions

	seen                 map[digest.Digest]bool
	manifests, referrers int
	blobs, bytes         atomic.Int64
}

// maxReferrerDepth: a referrer of a referrer of a referrer ... (a signature of an artifact of an image is two).
const maxReferrerDepth = 8

func (c *copier) manifest(ctx context.Context, d ocispec.Descriptor, raw []byte, tag string, depth int) error {
	c.seen[d.Digest] = true
	if depth > maxReferrerDepth {
		return fmt.Errorf("%s lies under more than %d manifests", d.Digest, maxReferrerDepth)
	}
	if len(c.seen) > maxManifests {
		return fmt.Errorf("more than %d manifests and referrers", maxManifests)
	}
	parts, err := parseContent(raw)
	if err != nil {
		return fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	for _, child := range parts.Manifests {
		if c.seen[child.Digest] {
			continue
		}
		d, raw, err := c.src.Manifest(ctx, child.Digest.String())
		if err != nil {
			return resolveError(c.src, child.Digest.String(), err)
		}
		if err := c.manifest(ctx, d, raw, "", depth+1); err != nil {
			return err
		}
	}
	blobs := parts.Layers
	if parts.Config != nil {
		blobs = append(blobs[:len(blobs):len(blobs)], *parts.Config)
	}
	if err := c.copyBlobs(ctx, blobs); err != nil {
		return fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	if err := c.dst.PutManifest(ctx, d, raw, tag); err != nil {
		return fmt.Errorf("put manifest %s: %w", d.Digest, err)
	}
	c.manifests++
	c.o.Progress.report(Event{Kind: ManifestCopied, Digest: d.Digest, Total: d.Size})
	return c.copyReferrers(ctx, d.Digest, depth)
}

func (c *copier) copyReferrers(ctx context.Context, subject digest.Digest, depth int) error {
	list, err := c.src.Referrers(ctx, subject)
	if err != nil {
		return fmt.Errorf("list referrers of %s: %w", subject, err)
	}
	for _, r := range list {
		if c.seen[r.Digest] {
			continue
		}
		d, raw, err := c.src.Manifest(ctx, r.Digest.String())
		if errors.Is(err, ErrNotFound) {
			continue // a referrers tag may list what is gone
		}
		if err != nil {
			return fmt.Errorf("fetch referrer %s: %w", r.Digest, err)
		}
		if err := c.manifest(ctx, d, raw, "", depth+1); err != nil {
			return err
		}
		c.referrers++
	}
	return nil
}

func (c *copier) copyBlobs(ctx context.Context, list []ocispec.Descriptor) error {
	seen := map[digest.Digest]bool{}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(Options{Jobs: c.o.Jobs}.jobs())
	for i, d := range list {
		if seen[d.Digest] {
			continue
		}
		seen[d.Digest] = true
		g.Go(func() error {
			if err := c.blob(ctx, d, Event{Layer: i, Layers: len(list), Digest: d.Digest, Total: d.Size}); err != nil {
				return fmt.Errorf("copy blob %s: %w", d.Digest, err)
			}
			return nil
		})
	}
	return g.Wait()
}

func (c *copier) blob(ctx context.Context, d ocispec.Descriptor, e Event) error {
	report := func(kind EventKind, n int64) {
		e.Kind, e.Read, e.OutSize = kind, n, n
		c.o.Progress.report(e)
	}
	has, err := c.dst.HasBlob(ctx, d.Digest)
	if err != nil {
		return err
	}
	if !has {
		if has, err = c.dst.Mount(ctx, d, c.src.String()); err != nil {
			return err
		}
	}
	if has {
		report(LayerReused, d.Size)
		return nil
	}
	if _, foreign := kindOf(d.MediaType); foreign {
		// Whose bytes are elsewhere has none here to copy.
		if has, err := c.src.HasBlob(ctx, d.Digest); err != nil || !has {
			return err
		}
	}
	report(LayerStarted, 0)
	err = c.dst.PutBlob(ctx, d, func() (io.ReadCloser, error) {
		rc, err := c.src.Blob(ctx, d, 0)
		if err != nil {
			return nil, err
		}
		v, err := newVerifyReader(rc, d)
		if err != nil {
			rc.Close()
			return nil, err
		}
		return readCloser{&countReader{r: v, report: func(n int64) { report(LayerRead, n) }}, rc}, nil
	})
	if err != nil {
		return err
	}
	c.blobs.Add(1)
	c.bytes.Add(d.Size)
	report(LayerDone, d.Size)
	return nil
}

type readCloser struct {
	io.Reader
	io.Closer
}

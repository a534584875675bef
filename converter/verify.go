package converter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// ErrDifferent: an artifact is not what its image says it must be.
var ErrDifferent = errors.New("the artifact differs from its image")

// Verified is an artifact that was proven to be its image.
type Verified struct {
	Platform string        `json:"platform"`
	Subject  digest.Digest `json:"subject"`
	Artifact digest.Digest `json:"artifact"`
	Layers   int           `json:"layers"`

	Converter string `json:"converter,omitempty"` // as the artifact says: the one thing of it that is not proven

	Bytes    int64     `json:"bytes"`    // of the artifact's blobs
	Profiles []Profile `json:"profiles"` // of the subject

	Image      digest.Digest   `json:"image,omitempty"`      // what ref named: the subject, or an index that it is in. None if ref named the artifact
	DiffIDs    []digest.Digest `json:"diffIDs"`              // of the tars, by the image's config: they are what was hashed
	Signatures []Signature     `json:"signatures,omitempty"` // of the artifact, if they were looked at
}

// VerifyOptions say what Verify looks at, and how.
type VerifyOptions struct {
	Platforms []ocispec.Platform
	Jobs      int // layers read at once; 0 is as for Options.Jobs
	Progress  Progress

	Image  digest.Digest // unless it is "", the image that artifacts must be of: their subject, or an index that lists it
	Judge  Judge         // of the signatures; nil is not to look at them
	Signed bool          // an artifact without a signature that Judge finds good is an error of package trust's
}

// Verify proves the artifacts of the image that ref names, or the artifact that it names itself: that the subject is there
// and is an image, that the artifact has its config and its layers in its order, and of every layer, read whole, that it
// is well formed, that its tar is the one that the image's config promises, and that its index says of the tar what a tar
// reader says; and of the image's profiles, that what is in their hot blobs is the artifact's. The first difference is an error that is
// ErrDifferent.
func Verify(ctx context.Context, p Place, ref string, o VerifyOptions) ([]Verified, error) {
	named, err := p.Resolve(ctx, ref)
	if err != nil {
		return nil, resolveError(p, ref, err)
	}
	list, err := artifactsNamed(ctx, p, named.Digest.String(), o.Platforms)
	if err != nil {
		return nil, err
	}
	of := map[digest.Digest]bool{}
	if o.Image != "" {
		subjects, err := subjectsOf(ctx, p, o.Image.String(), nil)
		if err != nil {
			return nil, err
		}
		for _, s := range subjects {
			of[s.desc.Digest] = true
		}
	}
	var done []Verified
	for _, a := range list {
		if o.Image != "" && a.manifest != nil && !of[a.manifest.Subject.Digest] {
			return done, fmt.Errorf("artifact %s: %w", a.desc.Digest, different("it is of %s, which is not %s nor in it", a.manifest.Subject.Digest, o.Image))
		}
		v, err := verify(ctx, p, a, o)
		if err == nil {
			err = verifySignatures(ctx, p, a, &v, o)
		}
		if err != nil {
			return done, fmt.Errorf("artifact %s: %w", a.desc.Digest, err)
		}
		if v.Image = o.Image; v.Image == "" && named.Digest != a.desc.Digest {
			v.Image = named.Digest
		}
		done = append(done, v)
	}
	return done, nil
}

// verifySignatures has the signatures judged, and wants a good one if that is asked for.
func verifySignatures(ctx context.Context, p Place, a attached, v *Verified, o VerifyOptions) (err error) {
	if o.Judge == nil {
		return nil
	}
	if v.Signatures, err = signaturesOf(ctx, p, a.desc, o.Judge); err != nil || !o.Signed {
		return err
	}
	var errs []error
	for _, s := range v.Signatures {
		if s.err == nil {
			return nil
		}
		errs = append(errs, s.err)
	}
	if len(errs) == 0 {
		return trust.ErrMissing
	}
	return errors.Join(errs...)
}

func different(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrDifferent, fmt.Errorf(format, args...))
}

// verify proves an artifact and the profiles of its image.
func verify(ctx context.Context, p Place, a attached, o VerifyOptions) (Verified, error) {
	v, err := verifyArtifact(ctx, p, a, o)
	if err != nil {
		return v, err
	}
	// A profile may be of another of the image's artifacts: those that cannot be used are told of when their turn comes.
	others, err := artifactsOf(ctx, p, v.Subject)
	if err != nil {
		return v, err
	}
	usable := []*artifact.Manifest{a.manifest}
	for _, other := range others {
		if other.manifest != nil {
			usable = append(usable, other.manifest)
		}
	}
	v.Profiles, err = verifyProfiles(ctx, p, v.Subject, usable)
	return v, err
}

func verifyArtifact(ctx context.Context, p Place, a attached, o VerifyOptions) (Verified, error) {
	if a.manifest == nil {
		return Verified{}, different("its manifest: %w", a.err)
	}
	m := a.manifest
	v := Verified{Platform: platformString(m.Platform), Subject: m.Subject.Digest, Artifact: a.desc.Digest, Layers: len(m.Layers), Converter: m.Converter}
	d, raw, err := p.Manifest(ctx, m.Subject.Digest.String())
	if errors.Is(err, ErrNotFound) {
		return v, different("its subject %s is not in %s", m.Subject.Digest, p)
	}
	if err != nil {
		return v, fmt.Errorf("fetch subject: %w", err)
	}
	// The subject's descriptor is the artifact's claim: load compares it with the manifest.
	if d.MediaType != m.Subject.MediaType {
		return v, different("subject %s is of type %s, not %s", d.Digest, d.MediaType, m.Subject.MediaType)
	}
	img, err := load(ctx, p, m.Subject, raw)
	if err != nil {
		if CodeOf(err) == Unknown && ctx.Err() == nil {
			return v, fmt.Errorf("subject: %w", err)
		}
		return v, different("subject: %w", err)
	}
	if err := compareManifest(m, img); err != nil {
		return v, err
	}
	v.DiffIDs = img.diffIDs
	v.Bytes, err = verifyLayers(ctx, p, m, img, o)
	return v, err
}

// compareManifest compares what the artifact's manifest says with the image.
func compareManifest(m *artifact.Manifest, img *image) error {
	switch c := img.manifest.Config; {
	case m.Config.Digest != c.Digest || m.Config.Size != c.Size || m.Config.MediaType != c.MediaType:
		return different("its config is %s (%s, %d bytes), the image's %s (%s, %d bytes)",
			m.Config.Digest, m.Config.MediaType, m.Config.Size, c.Digest, c.MediaType, c.Size)
	case platformString(m.Platform) != platformString(img.platform):
		return different("its platform is %s, the image's %s", platformString(m.Platform), platformString(img.platform))
	case !m.Created.Equal(img.created):
		return different("it says created %s, the image %s", m.Created, img.created)
	case len(m.Layers) != len(img.manifest.Layers):
		return different("it has %d layers, the image %d", len(m.Layers), len(img.manifest.Layers))
	}
	for i, l := range m.Layers {
		if src := img.manifest.Layers[i].Digest; l.Source != src {
			return different("layer %d is made from %s, the image's layer is %s", i, l.Source, src)
		}
	}
	return nil
}

// verifyLayers reads all layers, several at once, and returns the error of the first that has one.
func verifyLayers(ctx context.Context, p Place, m *artifact.Manifest, img *image, o VerifyOptions) (int64, error) {
	type proof struct {
		layer  artifact.Layer
		diffID digest.Digest
	}
	var bytes int64
	errs := make([]error, len(m.Layers))
	seen := map[proof]bool{}
	var g errgroup.Group
	g.SetLimit(Options{Jobs: o.Jobs}.jobs())
	for i, l := range m.Layers {
		key := proof{l, img.diffIDs[i]}
		if seen[key] {
			continue
		}
		seen[key] = true
		bytes += l.Size
		g.Go(func() error {
			e := Event{Platform: platformString(m.Platform), Layer: i, Layers: len(m.Layers), Digest: l.Digest, Total: l.Size}
			errs[i] = verifyLayer(ctx, p, l, img.diffIDs[i], e, o.Progress)
			return nil
		})
	}
	_ = g.Wait()
	for i, err := range errs {
		if err != nil {
			return bytes, fmt.Errorf("layer %d, %s: %w", i, m.Layers[i].Digest, err)
		}
	}
	return bytes, nil
}

func verifyLayer(ctx context.Context, p Place, l artifact.Layer, diffID digest.Digest, e Event, progress Progress) error {
	started := time.Now()
	report := func(kind EventKind, n int64) {
		e.Kind, e.Read, e.Elapsed = kind, n, time.Since(started)
		progress.report(e)
	}
	report(LayerStarted, 0)
	index, err := readIndex(ctx, p, l)
	if err != nil {
		return blobError(p, "read index", err)
	}
	rc, err := p.Blob(ctx, ocispec.Descriptor{Digest: l.Digest, Size: l.Size}, 0)
	if err != nil {
		return blobError(p, "read blob", err)
	}
	defer rc.Close()
	src := &failReader{r: rc}
	err = artifact.VerifyLayer(ctx, &countReader{r: src, report: func(n int64) { report(LayerRead, n) }}, index, l, diffID)
	switch {
	case src.err != nil && src.err != io.EOF:
		return fmt.Errorf("read blob: %w", src.err)
	case err != nil && ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return different("%w", err)
	}
	report(LayerDone, l.Size)
	return nil
}

// blobError tells a blob that is not there, or has other bytes, from a place that cannot be read.
func blobError(p Place, what string, err error) error {
	var se *sourceError
	switch {
	case errors.Is(err, ErrNotFound):
		return different("its blob is not in %s", p)
	case errors.As(err, &se) && !se.temporary, errors.Is(err, io.ErrUnexpectedEOF):
		return different("%s: %w", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// failReader keeps the error of its source apart from what is said of the bytes.
type failReader struct {
	r   io.Reader
	err error
}

func (f *failReader) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if err != nil {
		f.err = err
	}
	return n, err
}

// Package converter makes streaming artifacts: an image in, its artifact out, attached to the image as a referrer. It also
// reads them back (Inspect, Verify), lists and deletes them, and copies images together with their referrers.
//
// The principle: an image is in a Place, which is a repository of a registry or an OCI layout; both do the same few things,
// so every operation here works on both. A layer goes from the place through the decompressor and the encoder into a
// temporary file that has no name any more, and from there to the place; nothing is held in memory but buffers. The
// manifest is written last, so that a run that was interrupted leaves blobs that nothing refers to, never half an artifact.
//
// What it does not do: it never changes an image, knows no snapshotter, and does not judge whether a tar can be streamed
// (artifact does that while it encodes). It does not log: what happens on the way is told to Options.Progress.
package converter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// Options say how to convert.
type Options struct {
	Encode   artifact.EncodeOptions
	Jobs     int      // layers converted at once; 0 is one for each processor, two at least
	TempDir  string   // where converted layers wait for their push; "" is os.TempDir
	Record   *Record  // of layers converted before; nil is none
	Progress Progress // nil is silent

	Signer          trust.Signer // signs artifacts, also those that are there and that it has not signed; nil is none
	SigningOptional bool         // that it cannot is a warning

	// Reserve, unless nil, is called before a layer is converted to what is expected to have n bytes, and may wait, for room in TempDir say.
	// It returns how many bytes may be written. A layer that becomes larger is begun anew with twice as many, unless there is no more room
	// than it had. release is called once, when nothing of the conversion is left; a layer's conversion reserves nothing else meanwhile.
	Reserve func(ctx context.Context, n int64) (most int64, release func(), err error)
}

func (o Options) jobs() int {
	if o.Jobs > 0 {
		return o.Jobs
	}
	return max(2, runtime.GOMAXPROCS(0))
}

// CreateOptions say what Create converts.
type CreateOptions struct {
	Options
	Platforms []ocispec.Platform // none is every Linux platform
	Force     bool               // convert again what has an artifact already, then delete the artifact that was there
	Static    bool               // attach a static profile, too; also to what has an artifact but no such profile
}

// Status of an artifact after Create.
const (
	StatusCreated = "created"
	StatusExists  = "exists" // it was there before; nothing was done
)

// Created says what Create did for one platform.
type Created struct {
	Platform  string             `json:"platform"`
	Status    string             `json:"status"`
	Subject   ocispec.Descriptor `json:"subject"`
	Artifact  ocispec.Descriptor `json:"artifact"`
	Layers    []CreatedLayer     `json:"layers,omitempty"` // none when the artifact was there before
	Seconds   float64            `json:"seconds"`
	Signature *Signed            `json:"signature,omitempty"` // if one was asked for
	Profile   *Profile           `json:"profile,omitempty"`   // the static one, if it was made now
	Warnings  []string           `json:"warnings,omitempty"`
}

// CreatedLayer is a layer of a new artifact.
type CreatedLayer struct {
	Source     digest.Digest `json:"source"`
	SourceSize int64         `json:"sourceSize"` // bytes
	Digest     digest.Digest `json:"digest"`
	Size       int64         `json:"size"`      // of the blob, its index included
	IndexSize  int64         `json:"indexSize"` // of the index in the blob
	TarSize    int64         `json:"tarSize"`
	Chunks     int           `json:"chunks"`
	Reused     bool          `json:"reused"` // converted before: neither read nor converted now
	Seconds    float64       `json:"seconds"`
}

// Create converts the image that ref names ("" is the only image of the place) and attaches an artifact to each of its
// Linux platform manifests. What it did for the platforms before an error is returned with the error, which is an *Error
// where the image is the reason.
func Create(ctx context.Context, p Place, ref string, o CreateOptions) ([]Created, error) {
	images, err := resolveImage(ctx, p, ref, o.Platforms)
	if err != nil {
		return nil, err
	}
	var total int64
	for _, img := range images {
		total += img.bytes()
	}
	o.Progress.report(Event{Kind: ImageResolved, Total: total})
	var done []Created
	for _, img := range images {
		c, err := createOne(ctx, p, img, o)
		if err != nil {
			return done, err
		}
		done = append(done, c)
	}
	return done, nil
}

// version is that of the program.
func version() string {
	if b, ok := debug.ReadBuildInfo(); ok {
		return cmp.Or(b.Main.Version, "(devel)") // a test has none
	}
	return "(devel)"
}

func createOne(ctx context.Context, p Place, img *image, o CreateOptions) (Created, error) {
	c := Created{Platform: platformString(img.platform), Subject: bare(img.desc)}
	old, err := artifactsOf(ctx, p, img.desc.Digest)
	if err != nil {
		return c, err
	}
	if !o.Force {
		a, signature, err := has(ctx, p, img, old, o.Signer)
		if err != nil && CodeOf(err) != SigningFailed { // which sign meets, too
			return c, err
		}
		if a != nil {
			if err = c.exists(ctx, p, img, a, signature, o); !errors.Is(err, ErrDifferent) {
				return c, err
			}
			c = Created{Platform: c.Platform, Subject: c.Subject, Warnings: []string{fmt.Sprintf("another artifact is made beside %s, which was there and is not signed: %v", a.desc.Digest, err)}}
		}
	}

	started := time.Now()
	layers, err := convertLayers(ctx, p, img, o)
	if err != nil {
		return c, err
	}
	m := &artifact.Manifest{
		Subject:  c.Subject,
		Config:   img.manifest.Config,
		Platform: img.platform,
		Created:  img.created,

		Converter: fmt.Sprintf("streamctl %s (%s)", version(), o.Encode.ID()),
	}
	for i, l := range layers {
		l.encoded.Layer.Source = img.manifest.Layers[i].Digest
		m.Layers = append(m.Layers, l.encoded.Layer)
		c.Layers = append(c.Layers, l.created(img.manifest.Layers[i]))
	}
	raw, err := m.Encode()
	if err != nil {
		return c, fmt.Errorf("encode manifest of the artifact: %w", err)
	}
	c.Artifact = ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageManifest, ArtifactType: artifact.ArtifactType,
		Digest: digest.FromBytes(raw), Size: int64(len(raw)),
	}
	if err := p.PutManifest(ctx, c.Artifact, raw, ""); err != nil {
		return c, fmt.Errorf("attach artifact to %s: %w", img.desc.Digest, err)
	}
	elapsed := time.Since(started)
	c.Status, c.Seconds = StatusCreated, elapsed.Seconds()
	o.Progress.report(Event{Kind: ArtifactAttached, Platform: c.Platform, Digest: c.Artifact.Digest, Elapsed: elapsed})

	if err := c.sign(ctx, p, o, nil); err != nil { // before an old one that is signed goes
		return c, errors.Join(err, c.unsigned(ctx, p, old))
	}
	replaced := false
	for _, a := range old {
		if a.desc.Digest == c.Artifact.Digest || a.manifest != nil && !o.Force { // what others have attached stays
			continue
		}
		replaced = true
		// The new artifact is attached and good; that an old one stays is no reason to call the conversion failed.
		if _, err := deleteSigned(ctx, p, a.desc.Digest, img.desc.Digest); err != nil {
			if ctx.Err() != nil {
				return c, err
			}
			c.Warnings = append(c.Warnings, fmt.Sprintf("the artifact before, %s, stays: %v", a.desc.Digest, err))
		}
	}
	if replaced {
		warnings, err := deleteStale(ctx, p, m)
		c.Warnings = append(c.Warnings, warnings...)
		if err != nil {
			return c, err
		}
	}
	if o.Static {
		err = c.addStatic(ctx, p, img, m, o)
	}
	return c, err
}

// has returns the artifact that an image has, nil if it has none, and its signature by the signer, unless that is nil: of those whose manifests are of the image
// the first that it has signed, or else the first. Whoever may push can have attached it.
func has(ctx context.Context, p Place, img *image, list []attached, signer trust.Signer) (first *attached, signature digest.Digest, err error) {
	for i := range list {
		a := &list[i]
		if a.manifest == nil || compareManifest(a.manifest, img) != nil {
			continue
		}
		if signer == nil {
			return a, "", nil
		}
		if signature, err = signedBy(ctx, p, a.desc, signer); err != nil || signature != "" {
			return a, signature, err
		}
		if first == nil {
			first = a
		}
	}
	return first, "", nil
}

// exists is for an image that has the artifact a already, which gets what it lacks. That it is not the image's is ErrDifferent.
func (c *Created) exists(ctx context.Context, p Place, img *image, a *attached, signature digest.Digest, o CreateOptions) error {
	c.Status, c.Artifact = StatusExists, a.desc
	if signature != "" {
		c.Signature = &Signed{Platform: c.Platform, Artifact: a.desc.Digest, Status: StatusExists, Signature: signature}
	} else if err := c.sign(ctx, p, o, proof(ctx, p, *a)); err != nil {
		return err
	}
	o.Progress.report(Event{Kind: ArtifactFound, Platform: c.Platform, Digest: a.desc.Digest, Total: img.bytes()})
	if !o.Static {
		return nil
	}
	return c.addStatic(ctx, p, img, a.manifest, o)
}

// sign signs the artifact, if that is asked for, once it is proven; nil is that it was made now.
func (c *Created) sign(ctx context.Context, p Place, o CreateOptions, prove func() error) error {
	if o.Signer == nil {
		return nil
	}
	s, err := sign(ctx, p, c.Artifact, o.Signer, prove)
	if err == nil && s.Status == StatusCreated && c.Status == StatusExists {
		s.Warnings, err = rewriteHints(ctx, p, c.Subject.Digest, s.hints, false)
	}
	if err != nil && o.SigningOptional && ctx.Err() == nil && !errors.Is(err, ErrDifferent) {
		c.Warnings = append(c.Warnings, fmt.Sprintf("the artifact %s is not signed: %v", c.Artifact.Digest, err))
		return nil
	}
	s.Platform, c.Signature = c.Platform, &s
	c.Warnings = append(c.Warnings, s.Warnings...)
	return err
}

// unsigned takes the artifact away again that could not be signed, unless it was there before: the next conversion begins anew, and has its layers.
func (c *Created) unsigned(ctx context.Context, p Place, old []attached) error {
	if ctx.Err() != nil || slices.ContainsFunc(old, func(a attached) bool { return a.desc.Digest == c.Artifact.Digest }) {
		return nil
	}
	_, err := deleteSigned(ctx, p, c.Artifact.Digest, c.Subject.Digest)
	return err
}

// attachedOf is a referrer of a type that has manifests M.
type attachedOf[M any] struct {
	desc     ocispec.Descriptor
	raw      []byte
	manifest *M // nil if this release cannot read it, which err says
	err      error
}

// attached is a referrer with the artifact's type.
type attached = attachedOf[artifact.Manifest]

// artifactsOf lists the artifacts attached to the platform manifest subject. Those that this release cannot use are among
// them, with manifest nil.
func artifactsOf(ctx context.Context, p Place, subject digest.Digest) ([]attached, error) {
	return attachedTo(ctx, p, subject, artifact.ArtifactType, artifact.DecodeManifest,
		func(m *artifact.Manifest) digest.Digest { return m.Subject.Digest })
}

// attachedTo lists the referrers of subject that have artifactType.
func attachedTo[M any](ctx context.Context, p Place, subject digest.Digest, artifactType string, decode func([]byte) (*M, error), subjectOf func(*M) digest.Digest) ([]attachedOf[M], error) {
	referrers, err := p.Referrers(ctx, subject)
	if err != nil {
		return nil, fmt.Errorf("list referrers of %s: %w", subject, err)
	}
	var list []attachedOf[M]
	for _, d := range referrers {
		if d.ArtifactType != artifactType {
			continue
		}
		a := attachedOf[M]{desc: d}
		_, a.raw, err = p.Manifest(ctx, d.Digest.String())
		switch {
		case errors.Is(err, ErrNotFound):
			// A referrers tag that was not cleaned up lists what is gone. The node skips it, too.
			a.err = err
		case err != nil:
			return nil, fmt.Errorf("fetch referrer %s: %w", d.Digest, err)
		default:
			a.manifest, a.err = decode(a.raw)
		}
		if a.err == nil && subjectOf(a.manifest) != subject {
			a.manifest, a.err = nil, fmt.Errorf("%w: its subject is %s", artifact.ErrInvalid, subjectOf(a.manifest))
		}
		list = append(list, a)
	}
	return list, nil
}

// bare is d as a subject names it: what it is in every index and without any.
func bare(d ocispec.Descriptor) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}

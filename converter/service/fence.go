package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// attachTime is how long a manifest that is on its way to the registry may take to arrive when its operation is cancelled: cut off in
// the middle, it could arrive after it was taken away.
const attachTime = time.Second

// regretTime is how long who finds that its operation is not its own any more tries to take away what it has attached: nobody else knows of it.
const regretTime = 30 * time.Second

// fenced is the place of an attempt's image. Blobs are nothing until a manifest names them, so it is manifests that an attempt must not
// write when the operation is no longer its own: it shows that it is, by a write of its record, right before.
type fenced struct {
	converter.Place
	force bool // the operation replaces what is there: what takes its place is not taken away with it
	// hold is nil if the operation is the attempt's; m, unless nil, is noted as made by it.
	hold func(ctx context.Context, m *made) error
	// regret undoes m, which was written when the operation may not have been the attempt's any more, if that is for this attempt to do.
	regret func(ctx context.Context, m made) error
}

func (f fenced) PutManifest(ctx context.Context, d ocispec.Descriptor, raw []byte, tag string) error {
	m, err := f.news(ctx, d, raw)
	if err != nil {
		return err
	}
	if err := f.hold(ctx, m); err != nil {
		return err
	}
	put, cancel := late(ctx, attachTime)
	defer cancel()
	err = f.Place.PutManifest(put, d, raw, tag)
	// Between the two the process may have been stopped for any time.
	if lost := f.hold(ctx, nil); lost != nil {
		if err = errors.Join(err, lost); m != nil {
			undo, stop := context.WithTimeout(context.WithoutCancel(ctx), regretTime)
			defer stop()
			err = errors.Join(err, f.regret(undo, *m))
		}
	}
	return err
}

func (f fenced) Delete(ctx context.Context, dgst, subject digest.Digest) error {
	if err := f.hold(ctx, nil); err != nil {
		return err
	}
	return f.Place.Delete(ctx, dgst, subject)
}

// news returns the referrer d if its subject does not have it, nor an artifact for which it is a replacement. An artifact that is made beside another, which may be
// a stranger's or be of no use, replaces none.
func (f fenced) news(ctx context.Context, d ocispec.Descriptor, raw []byte) (*made, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil || m.Subject == nil {
		return nil, err
	}
	list, err := f.Referrers(ctx, m.Subject.Digest)
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(list, func(old ocispec.Descriptor) bool {
		return old.Digest == d.Digest || f.force && old.ArtifactType == d.ArtifactType && d.ArtifactType == artifact.ArtifactType
	}) {
		return nil, nil
	}
	is := &made{Subject: m.Subject.Digest, Digest: d.Digest}
	if a, err := artifact.DecodeManifest(raw); err == nil {
		is.Platform = converter.PlatformImage{Platform: a.Platform}.String()
	}
	return is, nil
}

// late returns a context that ends d after ctx.
func late(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	out, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		if !sleep(out, d) {
			return
		}
		cancel()
	})
	return out, func() {
		stop()
		cancel()
	}
}

// takeAway deletes what an operation has made; that it is not there is fine. Whatever a record says, nothing else is deleted than artifacts
// and profiles, and signatures of these.
func takeAway(ctx context.Context, p converter.Place, list []made) error {
	var errs []error
	for _, m := range slices.Backward(list) {
		d, raw, err := p.Manifest(ctx, m.Digest.String())
		if err == nil {
			err = ours(ctx, p, d, raw)
		}
		if err != nil && !errors.Is(err, converter.ErrNotFound) {
			errs = append(errs, err)
			continue
		}
		if _, err := converter.DeleteSignatures(ctx, p, m.Digest); err != nil && !errors.Is(err, converter.ErrNotOurs) {
			errs = append(errs, err)
			continue
		}
		if err := p.Delete(ctx, m.Digest, m.Subject); err != nil && !errors.Is(err, converter.ErrNotFound) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// ours is nil if d is an artifact, a profile, or a signature of one: images have signatures, too.
func ours(ctx context.Context, p converter.Place, d ocispec.Descriptor, raw []byte) error {
	name := d.Digest
	if d.ArtifactType == trust.SignatureType {
		var m ocispec.Manifest
		if err := json.Unmarshal(raw, &m); err != nil || m.Subject == nil {
			return fmt.Errorf("%s is a signature of nothing: it stays", name)
		}
		var err error
		if d, _, err = p.Manifest(ctx, m.Subject.Digest.String()); err != nil {
			return err
		}
	}
	if d.ArtifactType != artifact.ArtifactType && d.ArtifactType != artifact.ProfileType {
		return fmt.Errorf("%s is neither an artifact nor a profile, nor a signature of one: it stays", name)
	}
	return nil
}

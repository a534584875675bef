package converter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// maxSignatures of an artifact are looked at: more than nodes look at.
const maxSignatures = 100

// Judge says what an envelope is: who has signed t, as it says itself or as somebody has checked. Its error is one of package trust's.
type Judge func(ctx context.Context, t trust.Target, e trust.Envelope) (trust.Verdict, error)

// Signature is one of an artifact, and what a Judge says of it.
type Signature struct {
	Digest   digest.Digest `json:"digest"`   // of its manifest
	Envelope digest.Digest `json:"envelope"` // what is signed with what
	Type     string        `json:"mediaType"`
	Identity string        `json:"identity,omitempty"`
	Issuer   string        `json:"issuer,omitempty"`
	Signed   time.Time     `json:"signed,omitzero"`
	Expires  time.Time     `json:"expires,omitzero"`
	Warnings []string      `json:"warnings,omitempty"`
	Error    string        `json:"error,omitempty"` // why it is no good
	err      error
}

// target is the artifact as a signature is for it.
func target(p Place, d ocispec.Descriptor) trust.Target {
	return trust.Target{Repository: p.String(), Digest: d.Digest, MediaType: d.MediaType, Size: d.Size}
}

// signatures lists the signatures of a manifest.
func signatures(ctx context.Context, p Place, of digest.Digest) ([]ocispec.Descriptor, error) {
	list, err := p.Referrers(ctx, of)
	if err != nil {
		return nil, fmt.Errorf("list signatures of %s: %w", of, err)
	}
	list = slices.DeleteFunc(list, func(d ocispec.Descriptor) bool { return d.ArtifactType != trust.SignatureType })
	return list[:min(len(list), maxSignatures)], nil
}

// envelope fetches the envelope of a signature. Its error is trust.ErrInvalid if there is none to be had.
func envelope(ctx context.Context, p Place, signature, of digest.Digest) (trust.Envelope, error) {
	_, raw, err := p.Manifest(ctx, signature.String())
	if err != nil {
		return trust.Envelope{}, missing(err)
	}
	d, err := trust.EnvelopeOf(raw, of)
	if err != nil {
		return trust.Envelope{}, err
	}
	b, err := readBlob(ctx, p, d, trust.MaxEnvelope)
	if err != nil {
		return trust.Envelope{}, missing(err)
	}
	return trust.Envelope{Digest: d.Digest, MediaType: d.MediaType, Bytes: b}, nil
}

func missing(err error) error {
	var se *sourceError
	if errors.Is(err, ErrNotFound) || errors.As(err, &se) && !se.temporary {
		return fmt.Errorf("%w: %w", trust.ErrInvalid, err)
	}
	return err
}

// signaturesOf describes the signatures of the artifact d. What is wrong with one is in it; the error is that of the place.
func signaturesOf(ctx context.Context, p Place, d ocispec.Descriptor, judge Judge) ([]Signature, error) {
	list, err := signatures(ctx, p, d.Digest)
	if err != nil {
		return nil, err
	}
	found := []Signature{}
	for _, s := range list {
		got := Signature{Digest: s.Digest}
		e, err := envelope(ctx, p, s.Digest, d.Digest)
		if err != nil && !errors.Is(err, trust.ErrInvalid) {
			return found, fmt.Errorf("fetch signature %s: %w", s.Digest, err)
		}
		var v trust.Verdict
		if err == nil {
			got.Envelope, got.Type = e.Digest, e.MediaType
			v, err = judge(ctx, target(p, d), e)
		}
		if err != nil {
			got.err, got.Error = err, err.Error()
		}
		got.Identity, got.Issuer, got.Signed, got.Expires, got.Warnings = v.Identity, v.Issuer, v.Signed, v.Expires, v.Warnings
		found = append(found, got)
	}
	return found, nil
}

// Signed says what Sign did to one artifact.
type Signed struct {
	Platform  string        `json:"platform"`
	Artifact  digest.Digest `json:"artifact"`
	Status    string        `json:"status"`              // StatusCreated, or StatusExists: the signer had signed it before
	Signature digest.Digest `json:"signature,omitempty"` // of its manifest
	Warnings  []string      `json:"warnings,omitempty"`

	hints map[string]string // of a new signature
}

// Sign signs the artifacts of the image that ref names, or the artifact that it names itself. A signature by the same certificate that is good for a while yet
// is left alone. Profiles of the image that named a signature name this one.
func Sign(ctx context.Context, p Place, ref string, platforms []ocispec.Platform, signer trust.Signer) ([]Signed, error) {
	list, err := artifactsNamed(ctx, p, ref, platforms)
	if err != nil {
		return nil, err
	}
	var done []Signed
	for _, a := range list {
		if a.manifest == nil {
			return done, fmt.Errorf("artifact %s: %w", a.desc.Digest, a.err)
		}
		s, err := sign(ctx, p, a.desc, signer, proof(ctx, p, a))
		s.Platform = platformString(a.manifest.Platform)
		if err == nil && s.Status == StatusCreated {
			s.Warnings, err = rewriteHints(ctx, p, a.manifest.Subject.Digest, s.hints, false)
		}
		if err != nil {
			return done, err
		}
		done = append(done, s)
	}
	return done, nil
}

// Adopt writes into the profiles of the image's artifacts where their newest signatures are, whoever has made those: nodes read it in a list that they have
// anyway, and save a request.
func Adopt(ctx context.Context, p Place, ref string, platforms []ocispec.Platform) (warnings []string, err error) {
	list, err := artifactsNamed(ctx, p, ref, platforms)
	if err != nil {
		return nil, err
	}
	for _, a := range list {
		if a.manifest == nil {
			continue
		}
		hints, err := hintOf(ctx, p, a.desc.Digest)
		if err != nil {
			return warnings, err
		}
		w, err := rewriteHints(ctx, p, a.manifest.Subject.Digest, hints, true)
		if warnings = append(warnings, w...); err != nil {
			return warnings, err
		}
	}
	return warnings, nil
}

// sign attaches a signature to the artifact d, unless it has one by the same signer. Errors of the signer have the code SigningFailed.
func sign(ctx context.Context, p Place, d ocispec.Descriptor, signer trust.Signer, prove func() error) (Signed, error) {
	res := Signed{Artifact: d.Digest, Status: StatusExists}
	old, err := signatures(ctx, p, d.Digest)
	if err != nil {
		return res, err
	}
	d = bare(d)
	for _, s := range old {
		e, err := envelope(ctx, p, s.Digest, d.Digest)
		if err != nil && !errors.Is(err, trust.ErrInvalid) {
			return res, fmt.Errorf("fetch signature %s: %w", s.Digest, err)
		}
		if err != nil {
			continue
		}
		if signed, err := signer.Signed(ctx, target(p, d), e); err != nil {
			return res, signingFailed(ctx, err)
		} else if signed {
			res.Signature = s.Digest
			return res, nil
		}
	}
	if prove != nil {
		if err := prove(); err != nil {
			return res, fmt.Errorf("artifact %s, which was there, is not signed: %w", d.Digest, err)
		}
	}
	e, annotations, err := signer.Sign(ctx, target(p, d))
	if err != nil {
		return res, signingFailed(ctx, err)
	}
	m, raw, err := trust.Manifest(d, e, annotations)
	if err != nil {
		return res, err
	}
	blobs := map[digest.Digest][]byte{e.Digest: e.Bytes, ocispec.DescriptorEmptyJSON.Digest: ocispec.DescriptorEmptyJSON.Data}
	for dgst, b := range blobs {
		open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
		if err := p.PutBlob(ctx, ocispec.Descriptor{Digest: dgst, Size: int64(len(b))}, open); err != nil {
			return res, fmt.Errorf("push %s: %w", dgst, err)
		}
	}
	if err := p.PutManifest(ctx, m, raw, ""); err != nil {
		return res, fmt.Errorf("attach signature to %s: %w", d.Digest, err)
	}
	res.Status, res.Signature, res.hints = StatusCreated, m.Digest, trust.Hints(e.Descriptor())
	return res, nil
}

// proof proves an artifact that was found: whoever may push can have attached it, and nobody's key says that it is the image.
func proof(ctx context.Context, p Place, a attached) func() error {
	return func() error {
		_, err := verify(ctx, p, a, VerifyOptions{})
		return err
	}
}

func signingFailed(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return err
	}
	return &Error{Code: SigningFailed, Err: err}
}

// hintOf are annotations that say where the newest signature of an artifact is; nil if there is none.
func hintOf(ctx context.Context, p Place, of digest.Digest) (map[string]string, error) {
	list, err := signatures(ctx, p, of)
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(list, func(a, b ocispec.Descriptor) int {
		return strings.Compare(b.Annotations[ocispec.AnnotationCreated], a.Annotations[ocispec.AnnotationCreated]) // RFC 3339, of UTC
	})
	for _, s := range list {
		if d, ok := trust.HintOf(s.Annotations); ok {
			return trust.Hints(d), nil
		}
		_, raw, err := p.Manifest(ctx, s.Digest.String())
		if err != nil {
			continue
		}
		if d, err := trust.EnvelopeOf(raw, of); err == nil {
			return trust.Hints(d), nil
		}
	}
	return nil, nil
}

// rewriteHints has the profiles of subject say where the signature of its artifact is, as hints do: all of them, or those that say where one was.
func rewriteHints(ctx context.Context, p Place, subject digest.Digest, hints map[string]string, all bool) (warnings []string, err error) {
	if hints == nil {
		return nil, nil
	}
	list, err := p.Referrers(ctx, subject)
	if err != nil {
		return nil, fmt.Errorf("list referrers of %s: %w", subject, err)
	}
	hinted := map[digest.Digest]bool{}
	for _, d := range list {
		_, hint := trust.HintOf(d.Annotations)
		hinted[d.Digest] = d.ArtifactType == artifact.ProfileType && (all || hint)
	}
	profiles, err := profilesOf(ctx, p, subject)
	if err != nil {
		return nil, err
	}
	for _, f := range profiles {
		if f.manifest == nil || !hinted[f.desc.Digest] {
			continue
		}
		f.manifest.Hints = hints
		d, err := putProfile(ctx, p, f.manifest)
		if err != nil {
			return warnings, err
		}
		w, err := deleteProfiles(ctx, p, subject, []attachedProfile{f}, func(f attachedProfile) bool { return f.desc.Digest != d.Digest })
		if warnings = append(warnings, w...); err != nil {
			return warnings, err
		}
	}
	return warnings, nil
}

// DeleteSignatures deletes the signatures of an artifact: registries keep what refers to what is gone. It returns what it deleted, also with an error.
func DeleteSignatures(ctx context.Context, p Place, of digest.Digest) (deleted []digest.Digest, err error) {
	list, err := signatures(ctx, p, of)
	if err != nil {
		return nil, err
	}
	for _, d := range list {
		if err := p.Delete(ctx, d.Digest, of); err != nil && !errors.Is(err, ErrNotFound) {
			return deleted, fmt.Errorf("delete signature %s of %s: %w", d.Digest, of, err)
		}
		deleted = append(deleted, d.Digest)
	}
	return deleted, nil
}

// deleteSigned deletes an artifact or a profile, and its signatures before it.
func deleteSigned(ctx context.Context, p Place, dgst, subject digest.Digest) (deleted []digest.Digest, err error) {
	deleted, err = DeleteSignatures(ctx, p, dgst)
	if err != nil {
		return deleted, err
	}
	if err := p.Delete(ctx, dgst, subject); err != nil && !errors.Is(err, ErrNotFound) {
		return deleted, err
	}
	return append(deleted, dgst), nil
}

package converter

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// Of an artifact's signatures as many are looked at: to describe them more than nodes look at, and for one of a key's own more than anybody attaches by mistake.
const (
	maxSignatures = 100
	maxForeign    = 1000
)

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

// signatures lists the signatures of a manifest, limit at most.
func signatures(ctx context.Context, p Place, of digest.Digest, limit int) ([]ocispec.Descriptor, error) {
	list, err := p.Referrers(ctx, of)
	if err != nil {
		return nil, fmt.Errorf("list signatures of %s: %w", of, err)
	}
	list = slices.DeleteFunc(list, func(d ocispec.Descriptor) bool { return d.ArtifactType != trust.SignatureType })
	return list[:min(len(list), limit)], nil
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
	list, err := signatures(ctx, p, d.Digest, maxSignatures)
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
	var errs []error // one that somebody has attached does not keep the others from being signed
	for _, a := range list {
		if a.manifest == nil {
			errs = append(errs, fmt.Errorf("artifact %s: %w", a.desc.Digest, a.err))
			continue
		}
		s, err := sign(ctx, p, a.desc, signer, proof(ctx, p, a))
		s.Platform = platformString(a.manifest.Platform)
		if err == nil && s.Status == StatusCreated {
			s.Warnings, err = rewriteHints(ctx, p, a.manifest.Subject.Digest, s.hints, false)
		}
		if err != nil {
			errs = append(errs, err)
			if ctx.Err() != nil {
				break
			}
			continue
		}
		done = append(done, s)
	}
	return done, errors.Join(errs...)
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
	d = bare(d)
	var err error
	if res.Signature, err = signedBy(ctx, p, d, signer); err != nil || res.Signature != "" {
		return res, err
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

// signedBy returns the signature of the artifact d by a signer, "" if there is none. Errors of the signer have the code SigningFailed.
func signedBy(ctx context.Context, p Place, d ocispec.Descriptor, signer trust.Signer) (digest.Digest, error) {
	list, err := signatures(ctx, p, d.Digest, maxForeign)
	if err != nil {
		return "", err
	}
	for _, s := range list {
		e, err := envelope(ctx, p, s.Digest, d.Digest)
		if err != nil && !errors.Is(err, trust.ErrInvalid) {
			return "", fmt.Errorf("fetch signature %s: %w", s.Digest, err)
		}
		if err != nil {
			continue
		}
		if signed, err := signer.Signed(ctx, target(p, d), e); err != nil {
			return "", signingFailed(ctx, err)
		} else if signed {
			return s.Digest, nil
		}
	}
	return "", nil
}

// proof proves an artifact that was found: whoever may push can have attached it, and nobody's key says that it is the image. Its profiles are not signed.
func proof(ctx context.Context, p Place, a attached) func() error {
	return func() error {
		_, err := verifyArtifact(ctx, p, a, VerifyOptions{})
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
	list, err := signatures(ctx, p, of, maxForeign)
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

// ErrNotOurs: what lists name as an artifact, a profile or a signature is none, by its own bytes. It stays: in a registry without the referrers API a list is a
// tag, which whoever may push can write, and names whatever they like.
var ErrNotOurs = errors.New("not what the list of referrers calls it")

// checkReferrer is nil if the manifest dgst is, by its own bytes, a referrer of subject of one of the types. That it is not there is ErrNotFound.
func checkReferrer(ctx context.Context, p Place, dgst, subject digest.Digest, types ...string) error {
	d, raw, err := p.Manifest(ctx, dgst.String())
	if err != nil {
		return err
	}
	c, err := parseContent(raw)
	if err != nil {
		return fmt.Errorf("%w: %s stays: %w", ErrNotOurs, dgst, err)
	}
	if !slices.Contains(types, d.ArtifactType) || c.Subject == nil || c.Subject.Digest != subject {
		return fmt.Errorf("%w: %s stays: its type is %q, and its subject is not %s", ErrNotOurs, dgst, d.ArtifactType, subject)
	}
	return nil
}

// deleteReferrer deletes the manifest dgst if it is a referrer of subject of one of the types: ErrNotOurs otherwise. Before it, unless that is nil, others are
// deleted. One that cannot be read is not known to be one, and deleted is false without an error.
func deleteReferrer(ctx context.Context, p Place, dgst, subject digest.Digest, before func() error, types ...string) (deleted bool, err error) {
	err = checkReferrer(ctx, p, dgst, subject, types...)
	if err == nil && before != nil {
		err = before()
	}
	if err == nil {
		err = p.Delete(ctx, dgst, subject)
	}
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// DeleteSignatures deletes the signatures of an artifact: registries keep what refers to what is gone. It returns what it deleted, also with an error; one that is
// ErrNotOurs is told after all others were deleted.
func DeleteSignatures(ctx context.Context, p Place, of digest.Digest) (deleted []digest.Digest, err error) {
	list, err := signatures(ctx, p, of, math.MaxInt)
	if err != nil {
		return nil, err
	}
	var foreign error
	for _, d := range list {
		done, err := deleteReferrer(ctx, p, d.Digest, of, nil, trust.SignatureType)
		switch {
		case errors.Is(err, ErrNotOurs):
			foreign = cmp.Or(foreign, err)
		case err != nil:
			return deleted, fmt.Errorf("delete signature %s of %s: %w", d.Digest, of, err)
		case done:
			deleted = append(deleted, d.Digest)
		}
	}
	return deleted, foreign
}

// deleteSigned deletes an artifact or a profile, and its signatures before it. What is neither is ErrNotOurs, and told after that.
func deleteSigned(ctx context.Context, p Place, dgst, subject digest.Digest) (deleted []digest.Digest, err error) {
	var foreign error
	done, err := deleteReferrer(ctx, p, dgst, subject, func() (err error) {
		if deleted, err = DeleteSignatures(ctx, p, dgst); errors.Is(err, ErrNotOurs) {
			foreign, err = err, nil
		}
		return err
	}, artifact.ArtifactType, artifact.ProfileType)
	if done {
		deleted = append(deleted, dgst)
	}
	return deleted, cmp.Or(err, foreign)
}

package stream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/span"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// Whoever may push can attach signatures without end, and so hide a good one from who stops early: many are looked at, not all at once, for as long as a search
// may last. Each has at most trust.MaxEnvelope bytes.
const (
	maxSignatures    = 64
	signaturesAtOnce = 8
)

// vettedName is the file of an image's directory with the verdicts on its artifact, a vetted for each repository that it was found in.
const vettedName = "trust.json"

// vetted is a verdict on the signature of an artifact, with what it takes to ask again without a registry.
type vetted struct {
	Repository registryclient.Repository `json:"repository"`
	Size       int64                     `json:"size"` // of the artifact's manifest, bytes
	MediaType  string                    `json:"mediaType"`
	Envelope   []byte                    `json:"envelope"`
	Verdict    trust.Verdict             `json:"verdict"`
	Epoch      string                    `json:"epoch"`             // of the verifier, when Verify said so
	Trusted    string                    `json:"trusted,omitempty"` // that of the last time that Trusts said so, which asks for less: enough for a container, not for a pull
	Revoked    string                    `json:"revoked,omitempty"` // why it says so no more: what was found when Verdict had run out
}

// of returns what is to be verified again: the envelope, and what it is for.
func (g *vetted) of(artifact digest.Digest) (trust.Target, trust.Envelope) {
	return trust.Target{Repository: string(g.Repository), Digest: artifact, MediaType: ocispec.MediaTypeImageManifest, Size: g.Size},
		trust.Envelope{Digest: digest.FromBytes(g.Envelope), MediaType: g.MediaType, Bytes: g.Envelope}
}

// policyOf returns the policy of repo, see Options.Policy. The verifier is nil unless that is trust.Signed.
func (s *Store) policyOf(repo registryclient.Repository) (trust.Policy, trust.Verifier) {
	if s.o.Policy == nil {
		return trust.Open, nil
	}
	policy, v := s.o.Policy(repo)
	if policy != trust.Signed {
		return policy, nil
	}
	return policy, v
}

// vetting is what a search asks about the signature of one artifact.
type vetting struct {
	store      *Store
	repo       registryclient.Repository
	artifact   digest.Digest
	verifier   trust.Verifier
	known      *vetted                              // a verdict of an earlier search, nil if there is none that stands
	early      []func() (trust.Envelope, error)     // that profiles have hinted at
	signatures func() ([]ocispec.Descriptor, error) // waits for the list
}

// listed waits for the list of signatures, and says if there are none. It is called before anything is fetched of the artifact but its manifest.
func (v *vetting) listed() error {
	if v.known != nil || len(v.early) > 0 {
		return nil
	}
	list, err := v.signatures()
	if err == nil && len(list) == 0 {
		err = trust.ErrMissing
	}
	return err
}

// verdict waits for a signature that is good, and says why there is none. raw is the artifact's manifest.
func (v *vetting) verdict(ctx context.Context, raw []byte) (_ *vetted, err error) {
	ctx, end := span.Start(ctx, "signature")
	defer func() { end(err) }()
	if v.known != nil {
		return v.known, nil
	}
	t := trust.Target{Repository: string(v.repo), Digest: v.artifact, MediaType: ocispec.MediaTypeImageManifest, Size: int64(len(raw))}
	for _, envelope := range v.early {
		if e, err := envelope(); err == nil {
			if got, err := v.check(ctx, t, e); err == nil {
				return got, nil
			}
		}
	}
	list, err := v.signatures()
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, trust.ErrMissing
	}
	ctx, found := context.WithCancel(ctx)
	defer found()
	var g errgroup.Group
	g.SetLimit(signaturesAtOnce)
	n := min(len(list), maxSignatures)
	good, errs := make([]*vetted, n), make([]error, n)
	for i, d := range list[:n] {
		g.Go(func() error {
			var err error
			if good[i], err = v.signature(ctx, t, d); err == nil {
				found()
			} else {
				errs[i] = fmt.Errorf("signature %s: %w", d.Digest, err)
			}
			return nil
		})
	}
	g.Wait()
	if i := slices.IndexFunc(good, func(g *vetted) bool { return g != nil }); i >= 0 {
		return good[i], nil
	}
	slices.SortStableFunc(errs, func(a, b error) int { return cmp.Compare(said(a), said(b)) })
	return nil, errors.Join(some(append([]error{WithReason(errs[0])}, errs[1:]...), "signatures")...)
}

// said orders why signatures are no good by how little anybody can do about it who may only push, and the first gives the reason: what could not be read may be the good one; nobody
// makes one that is revoked, over, or of a wrong identity but who has a certificate of a trusted authority; everybody can attach what is a stranger's, malformed, or refers to nothing.
func said(err error) int {
	classes := []error{trust.ErrRevoked, trust.ErrExpired, trust.ErrUnchecked, trust.ErrIdentity, trust.ErrUntrusted, trust.ErrInvalid, artifact.ErrInvalid, registryclient.ErrMismatch, registryclient.ErrNotFound}
	return slices.IndexFunc(classes, func(class error) bool { return errors.Is(err, class) })
}

// some of errs are told, and how many others of what there are.
func some(errs []error, what string) []error {
	if n := len(errs); n > maxReasons {
		return append(errs[:maxReasons:maxReasons], fmt.Errorf("and %d %s more", n-maxReasons, what))
	}
	return errs
}

// signature checks the signature that d describes in a list. Where the list says where the envelope is, that is asked for at once; if it is wrong, the
// signature's manifest is.
func (v *vetting) signature(ctx context.Context, t trust.Target, d ocispec.Descriptor) (*vetted, error) {
	hint, hinted := trust.HintOf(d.Annotations)
	var errs []error
	if hinted {
		e, err := v.store.envelope(ctx, v.repo, hint)
		if err == nil {
			var got *vetted
			if got, err = v.check(ctx, t, e); err == nil {
				return got, nil
			}
		}
		errs = append(errs, err)
	}
	raw, err := v.store.o.Registry.Manifest(ctx, v.repo, d.Digest, artifact.MaxManifestSize)
	if err != nil {
		return nil, errors.Join(append(errs, err)...)
	}
	desc, err := trust.EnvelopeOf(raw, t.Digest)
	if err != nil {
		return nil, err
	}
	if hinted && desc.Digest == hint.Digest && desc.MediaType == hint.MediaType {
		return nil, errors.Join(errs...)
	}
	e, err := v.store.envelope(ctx, v.repo, desc)
	if err != nil {
		return nil, err
	}
	return v.check(ctx, t, e)
}

// envelope fetches the envelope that d describes.
func (s *Store) envelope(ctx context.Context, repo registryclient.Repository, d ocispec.Descriptor) (trust.Envelope, error) {
	b, err := s.o.Registry.Blob(ctx, repo, d.Digest, trust.MaxEnvelope)
	return trust.Envelope{Digest: d.Digest, MediaType: d.MediaType, Bytes: b}, err
}

func (v *vetting) check(ctx context.Context, t trust.Target, e trust.Envelope) (*vetted, error) {
	epoch := v.verifier.Epoch() // before: a verdict by files that change meanwhile is taken for an older one
	verdict, err := v.verifier.Verify(ctx, t, e)
	if err != nil {
		return nil, err
	}
	return &vetted{Repository: v.repo, Size: t.Size, MediaType: e.MediaType, Envelope: e.Bytes, Verdict: verdict, Epoch: epoch}, nil
}

// stands reports whether a verdict need not be asked for again at a pull.
func (g *vetted) stands(v trust.Verifier) bool {
	return g.Revoked == "" && g.Epoch == v.Epoch() && time.Now().Before(g.Verdict.Until)
}

// known returns the verdict on an artifact of repo that an earlier search has recorded, if it stands.
func (s *Store) known(repo registryclient.Repository, dgst digest.Digest, v trust.Verifier) *vetted {
	img, err := s.load(dgst.Encoded())
	if err != nil {
		return nil
	}
	for _, g := range s.vettedOf(img) {
		if g.Repository == repo && g.stands(v) {
			return g
		}
	}
	return nil
}

package notary

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/notaryproject/notation-core-go/revocation/purpose"
	"github.com/notaryproject/notation-core-go/signature"
	"github.com/notaryproject/notation-go"
	notationverifier "github.com/notaryproject/notation-go/verifier"
	"github.com/notaryproject/notation-go/verifier/trustpolicy"
	"github.com/notaryproject/notation-go/verifier/truststore"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/plain"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// maxKept is how long a verdict is kept at most, maxDoubt one with warnings: what failed and did not matter may matter when it works again.
const (
	maxKept  = 24 * time.Hour
	maxDoubt = time.Hour
)

// Verify checks e by the statement of the trust policy that applies to t.Repository, see trust.Verifier.
func (v *Verifier) Verify(ctx context.Context, t trust.Target, e trust.Envelope) (trust.Verdict, error) {
	return v.verify(ctx, t, e, func(now *trusted) notation.Verifier { return now.verifier })
}

// Trusts says if the signer of e is trusted, see trust.Verifier. A plugin that e names may be run for that.
func (v *Verifier) Trusts(ctx context.Context, t trust.Target, e trust.Envelope) error {
	_, err := v.verify(ctx, t, e, func(now *trusted) notation.Verifier { return now.signers })
	return err
}

func (v *Verifier) verify(ctx context.Context, t trust.Target, e trust.Envelope, by func(*trusted) notation.Verifier) (trust.Verdict, error) {
	if err := v.checkForm(e); err != nil {
		return trust.Verdict{}, err
	}
	now := v.now()
	if now.err != nil {
		return trust.Verdict{}, failure(trust.ErrUnchecked, now.err)
	}
	reference := t.Repository + "@" + t.Digest.String()
	statement, err := now.document.GetApplicableTrustPolicy(reference)
	if err == nil {
		err = enforces(statement)
	}
	if err != nil {
		return trust.Verdict{}, failure(trust.ErrUnchecked, err)
	}

	if err := now.known(ctx, statement, e); err != nil {
		return trust.Verdict{}, err
	}

	c := &call{}
	within, cancel := context.WithTimeout(context.WithValue(ctx, callKey{}, c), v.o.Timeout)
	defer cancel()
	desc := ocispec.Descriptor{MediaType: t.MediaType, Digest: t.Digest, Size: t.Size}
	outcome, err := by(now).Verify(within, desc, e.Bytes, notation.VerifierVerifyOptions{ArtifactReference: reference, SignatureMediaType: e.MediaType})
	if ctx.Err() != nil {
		return trust.Verdict{}, ctx.Err()
	}
	if err != nil {
		return trust.Verdict{}, classify(t, outcome, c, err)
	}
	return verdict(t, outcome, c)
}

// known refuses an envelope that names a plugin, and whose certificates end at none that the statement trusts: notation-go starts the plugin before it looks at them, and everybody can make
// an envelope. What it finds of the others, and more of these, it says itself.
func (t *trusted) known(ctx context.Context, s *trustpolicy.TrustPolicy, e trust.Envelope) error {
	content, err := parse(e)
	if err != nil {
		return err
	}
	info := &content.SignerInfo
	if _, err := info.ExtendedAttribute(notationverifier.HeaderVerificationPlugin); err != nil {
		return nil
	}
	want := truststore.TypeCA
	if info.SignedAttributes.SigningScheme == signature.SigningSchemeX509SigningAuthority {
		want = truststore.TypeSigningAuthority
	}
	for _, store := range s.TrustStores {
		kind, name, _ := strings.Cut(store, ":")
		if truststore.Type(kind) != want {
			continue
		}
		certificates, err := t.store.GetCertificates(ctx, want, name)
		if err != nil {
			return failure(trust.ErrUnchecked, err)
		}
		if _, err := signature.VerifyAuthenticity(info, certificates); err == nil {
			return nil
		}
	}
	return failure(trust.ErrUntrusted, fmt.Errorf("by %s: it names a plugin, and no certificate of the trust store is in its chain", who(info)))
}

// checkForm refuses what the caller should not have brought.
func (v *Verifier) checkForm(e trust.Envelope) error {
	switch {
	case len(e.Bytes) > trust.MaxEnvelope:
		return failure(trust.ErrInvalid, fmt.Errorf("envelope of %d bytes", len(e.Bytes)))
	case !slices.Contains(v.MediaTypes(), e.MediaType):
		return failure(trust.ErrInvalid, fmt.Errorf("envelope of media type %q", e.MediaType))
	case digest.FromBytes(e.Bytes) != e.Digest:
		return failure(trust.ErrInvalid, fmt.Errorf("envelope has other bytes than %q says", e.Digest))
	}
	return nil
}

// verdict is that of an envelope which notation-go accepts, held against what matters here once more.
func verdict(t trust.Target, outcome *notation.VerificationOutcome, c *call) (trust.Verdict, error) {
	if outcome.EnvelopeContent == nil || outcome.VerificationLevel.Enforcement[trustpolicy.TypeAuthenticity] != trustpolicy.ActionEnforce {
		return trust.Verdict{}, failure(trust.ErrUnchecked, errors.New("the trust policy enforces nothing"))
	}
	if err := isOf(t, outcome.EnvelopeContent); err != nil {
		return trust.Verdict{}, err
	}
	info := &outcome.EnvelopeContent.SignerInfo
	if err := knownAttributes(info); err != nil {
		return trust.Verdict{}, err
	}
	d := describe(info)
	now := time.Now()
	d.Until = now.Add(maxKept)
	for _, r := range outcome.VerificationResults {
		if r.Error != nil {
			d.Warnings = append(d.Warnings, plain.Cut(fmt.Sprintf("%s: %v", r.Type, r.Error), 500))
			d.Until = now.Add(maxDoubt)
		}
	}
	ends := []time.Time{info.SignedAttributes.Expiry, c.until()}
	for _, cert := range info.CertificateChain {
		ends = append(ends, cert.NotAfter)
	}
	for _, end := range ends {
		if end.After(now) && end.Before(d.Until) { // what is over did not matter: a timestamp, or the trust policy, says so
			d.Until = end
		}
	}
	return d, nil
}

// isOf says if what is signed is t.
func isOf(t trust.Target, content *signature.EnvelopeContent) error {
	var payload struct {
		TargetArtifact ocispec.Descriptor `json:"targetArtifact"`
	}
	if err := json.Unmarshal(content.Payload.Content, &payload); err != nil {
		return failure(trust.ErrInvalid, err)
	}
	if got := payload.TargetArtifact; got.Digest != t.Digest || got.Size != t.Size || got.MediaType != t.MediaType {
		return failure(trust.ErrInvalid, fmt.Errorf("it is for %q of %d bytes, media type %q, and not for %s of %d", got.Digest, got.Size, got.MediaType, t.Digest, t.Size))
	}
	return nil
}

// knownAttributes refuses critical attributes that only a plugin understands, where the envelope names none: the specification says so, notation-go 1.3.2 lets them pass.
func knownAttributes(info *signature.SignerInfo) error {
	if _, err := info.ExtendedAttribute(notationverifier.HeaderVerificationPlugin); err == nil {
		return nil // the plugin has answered for each of them
	}
	for _, a := range info.SignedAttributes.ExtendedAttributes {
		if a.Critical {
			return failure(trust.ErrUnchecked, fmt.Errorf("nobody here understands the critical attribute %q", fmt.Sprint(a.Key)))
		}
	}
	return nil
}

// classify says which failure err of notation-go is: by what it has checked, and how.
func classify(t trust.Target, outcome *notation.VerificationOutcome, c *call, err error) error {
	if outcome == nil {
		return failure(trust.ErrUnchecked, err)
	}
	info := &signature.SignerInfo{}
	if outcome.EnvelopeContent != nil {
		if err := isOf(t, outcome.EnvelopeContent); err != nil {
			return err
		}
		info = &outcome.EnvelopeContent.SignerInfo
	}
	for _, r := range outcome.VerificationResults {
		if r.Error == nil || r.Action != trustpolicy.ActionEnforce {
			continue
		}
		switch r.Type {
		case trustpolicy.TypeIntegrity:
			return failure(trust.ErrInvalid, r.Error)
		case trustpolicy.TypeAuthenticity:
			return failure(authenticity(r.Error), fmt.Errorf("by %s: %w", who(info), r.Error))
		case trustpolicy.TypeExpiry:
			return failure(trust.ErrExpired, r.Error)
		case trustpolicy.TypeAuthenticTimestamp:
			return failure(timestamp(info, c), r.Error)
		case trustpolicy.TypeRevocation:
			if dead, asked := c.revoked(purpose.CodeSigning); dead || !asked { // not asked: a plugin was, and has said no
				return failure(trust.ErrRevoked, r.Error)
			}
			return failure(trust.ErrUnchecked, r.Error)
		}
	}
	return failure(trust.ErrUnchecked, err) // a plugin
}

// authenticity: notation-go has a type for a chain that ends nowhere, types for stores that cannot be read, and none for the identity.
func authenticity(err error) error {
	var chain *signature.SignatureAuthenticityError
	var none notation.VerificationInconclusiveError // the envelope's scheme needs a kind of trust store that the statement does not have
	var store truststore.TrustStoreError
	var certificate truststore.CertificateError
	switch {
	case errors.As(err, &certificate) && errors.Is(certificate.InnerError, fs.ErrNotExist): // a store that is there and empty trusts nobody
		return trust.ErrUntrusted
	case errors.As(err, &store), errors.As(err, &certificate):
		return trust.ErrUnchecked
	case errors.As(err, &chain), errors.As(err, &none):
		return trust.ErrUntrusted
	}
	return trust.ErrIdentity
}

func timestamp(info *signature.SignerInfo, c *call) error {
	now := time.Now()
	dead, _ := c.revoked(purpose.Timestamping)
	switch outside := func(c *x509.Certificate) bool { return now.Before(c.NotBefore) || now.After(c.NotAfter) }; {
	case dead:
		return trust.ErrRevoked
	case slices.ContainsFunc(info.CertificateChain, outside):
		return trust.ErrExpired
	}
	return trust.ErrUnchecked
}

// failure is class with a reason that is safe to print.
func failure(class, err error) error {
	return fmt.Errorf("%w: %s", class, plain.Cut(err.Error(), 1000))
}

// Describe says what an envelope says of itself, Until and Warnings aside: nobody has checked it.
func Describe(e trust.Envelope) (trust.Verdict, error) {
	content, err := parse(e)
	if err != nil {
		return trust.Verdict{}, err
	}
	return describe(&content.SignerInfo), nil
}

func parse(e trust.Envelope) (*signature.EnvelopeContent, error) {
	envelope, err := signature.ParseEnvelope(e.MediaType, e.Bytes)
	if err != nil {
		return nil, failure(trust.ErrInvalid, err)
	}
	content, err := envelope.Content()
	if err != nil {
		return nil, failure(trust.ErrInvalid, err)
	}
	return content, nil
}

func describe(info *signature.SignerInfo) trust.Verdict {
	d := trust.Verdict{Scheme: string(info.SignedAttributes.SigningScheme), Signed: info.SignedAttributes.SigningTime, Expires: info.SignedAttributes.Expiry}
	if len(info.CertificateChain) > 0 {
		leaf := info.CertificateChain[0]
		d.Identity, d.Issuer = leaf.Subject.String(), leaf.Issuer.String()
	}
	return d
}

func who(info *signature.SignerInfo) string {
	d := describe(info)
	return fmt.Sprintf("%q, issued by %q", d.Identity, d.Issuer)
}

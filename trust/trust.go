// Package trust is the words in which signatures of streaming artifacts are spoken of: what is signed, the envelope, the verdict, why there is none, and how an
// envelope is stored beside an artifact. Nodes check, streamctl and the conversion service sign. Policies and rules say what must be true of an artifact before a
// node streams it.
//
// The principle: where an envelope was found proves nothing, only what is in it does. So whatever a registry says of signatures (lists, hints, manifests of
// signatures) may be wrong, and costs at most a request.
//
// The package does no I/O and knows no format of signatures: trust/notary does.
package trust

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
)

// MaxEnvelope is the size in bytes of the largest envelope that is looked at: a chain of a dozen certificates and a timestamp are 30 KB.
const MaxEnvelope = 1 << 20

// Target is what a signature is for: the manifest of an artifact, in the repository that it is asked for in.
type Target struct {
	Repository string // with its host, as in "registry.example.com/team/app"
	Digest     digest.Digest
	MediaType  string
	Size       int64 // bytes
}

// Envelope is a signature with what belongs to it: certificates, time, the descriptor of what is signed.
type Envelope struct {
	Digest    digest.Digest // of Bytes
	MediaType string        // says how Bytes is encoded: JWS, COSE
	Bytes     []byte
}

// Verdict is what is known of an envelope that is good. Its texts come out of certificates: whoever prints them makes them plain.
type Verdict struct {
	Identity string    // the subject of the signing certificate, as in "CN=build,O=Example,C=US"
	Issuer   string    // of that certificate
	Scheme   string    // notary.x509: the time is the signer's word; notary.x509.signingAuthority: it is the authority's
	Signed   time.Time // as the envelope says
	Expires  time.Time // when the signature itself ends; zero if it does not
	Until    time.Time // the verdict may be kept until then: what it rests on (expiry, certificates, revocation) is good for so long
	Warnings []string  // what failed and is only logged, because the trust policy says so
}

// Verifier checks envelopes. Its methods may be called side by side.
type Verifier interface {
	// Verify says who has signed t. Its error is ctx's, or wraps exactly one of ErrInvalid, ErrUntrusted, ErrExpired, ErrRevoked and ErrUnchecked.
	Verify(ctx context.Context, t Target, e Envelope) (Verdict, error)
	// Trusts is the part of Verify that whoever withdraws trust changes: is who has signed t somebody who is trusted for it, by what the verifier trusts now? Neither the
	// time nor revocation is asked about, nor any server. Its error is ctx's, or wraps exactly one of ErrInvalid, ErrUntrusted and ErrUnchecked.
	Trusts(ctx context.Context, t Target, e Envelope) error
	// Epoch is the same text as long as what the verifier trusts is the same. A verdict of another epoch is to be asked for again. It costs a look at some files' status.
	Epoch() string
	// ArtifactType is that of the referrers in which envelopes are.
	ArtifactType() string
	// MediaTypes are those of envelopes that Verify takes.
	MediaTypes() []string
}

// Signer signs. Its methods may be called side by side.
type Signer interface {
	// Sign signs t, whose Repository is not part of it, and says what annotations the manifest of the signature gets.
	Sign(ctx context.Context, t Target) (e Envelope, annotations map[string]string, err error)
	// Signed says if e is for t, by the certificate that Sign signs with, and neither over nor soon: then there is nothing to sign.
	Signed(ctx context.Context, t Target, e Envelope) (bool, error)
	// String is the key and the certificate, for logs and messages.
	String() string
}

// Why there is no verdict.
var (
	// ErrMissing: there is no signature.
	ErrMissing = errors.New("not signed")
	// ErrInvalid: the envelope is none, its signature is wrong, or it is for something else.
	ErrInvalid = errors.New("invalid signature")
	// ErrUntrusted: the signer is nobody who is trusted here: the certificate chain ends at no certificate of the trust store; or ErrIdentity.
	ErrUntrusted = errors.New("untrusted signature")
	// ErrIdentity is an ErrUntrusted: a trusted authority has issued the certificate, and its subject is none of the trusted identities.
	ErrIdentity = fmt.Errorf("%w: wrong identity", ErrUntrusted)
	// ErrExpired: the signature, or a certificate of the chain, is over or has not begun, by this machine's clock.
	ErrExpired = errors.New("expired signature")
	// ErrRevoked: a certificate of the chain is revoked.
	ErrRevoked = errors.New("revoked signature")
	// ErrUnchecked: nobody can say: no statement of the trust policy applies, the status of revocation is unknown, a file or a plugin is missing.
	ErrUnchecked = errors.New("signature cannot be checked")
)

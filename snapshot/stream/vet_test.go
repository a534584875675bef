package stream

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// revoking is a verifier that finds a signature to be revoked while somebody asks only whether its signer is trusted.
type revoking struct {
	trust.Verifier
	meanwhile func() error
}

func (v *revoking) Epoch() string { return "now" }

func (v *revoking) Verify(context.Context, trust.Target, trust.Envelope) (trust.Verdict, error) {
	return trust.Verdict{}, trust.ErrRevoked
}

func (v *revoking) Trusts(context.Context, trust.Target, trust.Envelope) error { return v.meanwhile() }

// TestRevokedMeanwhile: that a signature is revoked, found in the background while a container starts, is not lost by what that start finds.
func TestRevokedMeanwhile(t *testing.T) {
	img := &image{id: "image", rec: &record{Repository: "registry/app"}}
	s := &Store{o: Options{Root: t.TempDir()}, images: map[string]*image{img.id: img}, log: slog.Default()}
	if err := os.MkdirAll(s.imageDir(img.id), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.vouch(img, nil, &vetted{Repository: img.rec.Repository, Epoch: "before"}); err != nil {
		t.Fatal(err)
	}
	v := &revoking{}
	v.meanwhile = func() error { return s.verifyAgain(t.Context(), img, s.vettedOf(img)[0], v) }
	for _, name := range []string{"this start", "the next one"} {
		if err := s.stillSigned(t.Context(), img, v); !errors.Is(err, trust.ErrRevoked) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

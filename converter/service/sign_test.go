package service

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/notary"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

// broken is a signer whose key is away.
type broken struct{ trust.Signer }

func (broken) Sign(context.Context, trust.Target) (trust.Envelope, map[string]string, error) {
	return trust.Envelope{}, nil, errors.New("the key is away")
}

// TestSigned: what the service makes is signed, also what was there before, with force; when that is cancelled nothing of it stays; and a key that is away fails the operation,
// or is a warning.
func TestSigned(t *testing.T) {
	signer := trusttest.NewCA(t, "authority", nil).Issue(t, "service", trusttest.Leaf{}).Signer(t, notary.SignOptions{})
	e := newEnv(t)
	i := e.push("app", image(t, "amd64", 100_000))
	signatures := func(want int) {
		t.Helper()
		list := e.artifacts(i)
		if len(list) != 1 {
			t.Fatalf("referrers %+v", list)
		}
		artifact := i
		artifact.Digest = list[0].Digest
		if list := e.artifacts(artifact); len(list) != want || want > 0 && list[0].ArtifactType != trust.SignatureType {
			t.Errorf("the artifact has %+v, want %d signatures", list, want)
		}
	}

	fails := e.start(func(c *Config) { c.Convert.Signer = broken{signer} })
	op := await(t, fails.Service, submit(t, fails.Service, i).ID, func(op Operation) bool { return op.State.Ended() })
	if op.State != Failed || op.ErrorCode != converter.SigningFailed || !strings.Contains(op.Message, "the key is away") {
		t.Errorf("%s", show(op))
	}
	fails.stop()
	if list := e.artifacts(i); len(list) != 0 {
		t.Errorf("an unsigned artifact stays: %+v", list)
	}

	warns := e.start(func(c *Config) { c.Convert.Signer, c.Convert.SigningOptional = broken{signer}, true })
	if op := succeed(t, warns.Service, submit(t, warns.Service, i).ID); len(op.Warnings) != 1 || !strings.Contains(op.Warnings[0], "the key is away") {
		t.Errorf("%s", show(op))
	}
	warns.stop()
	signatures(0)

	s := e.start(func(c *Config) { c.Convert.Signer = signer })
	succeed(t, s.Service, submit(t, s.Service, i, func(r *Request) { r.Force = true }).ID)
	signatures(1)

	// Cancelled when the signature is on its way to the registry, it is gone with its artifact.
	other := e.push("other", image(t, "amd64", 100_000))
	puts := 0
	var artifact digest.Digest
	h := e.hold(func(r *http.Request) bool {
		if r.Method == http.MethodPut && registrytest.Manifests(r) {
			puts++ // Inject's lock is held
			artifact = digest.Digest(r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:])
		}
		return puts == 2 && r.Method == http.MethodPut
	})
	op = asked(t, s.Service, other)
	h.wait(t)
	if _, err := s.Cancel(t.Context(), op.ID, "tester"); err != nil {
		t.Fatal(err)
	}
	h.release()
	if op = await(t, s.Service, op.ID, func(op Operation) bool { return op.State.Ended() }); op.State != Canceled {
		t.Errorf("%s", show(op))
	}
	if list := e.artifacts(other); len(list) != 0 {
		t.Errorf("referrers %+v", list)
	}
	p, _, err := converter.Open(other.String(), converter.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.Manifest(t.Context(), artifact.String()); !errors.Is(err, converter.ErrNotFound) {
		t.Errorf("the signature %s: %v", artifact, err)
	}
}

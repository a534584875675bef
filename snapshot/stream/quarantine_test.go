package stream

import (
	"errors"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
)

// mountsNothing is a Mounter that has mounted nothing.
type mountsNothing struct{ Mounter }

func (mountsNothing) At(string) []string      { return nil }
func (mountsNothing) Targets(string) []string { return nil }
func (mountsNothing) Invalidate(string) error { return nil }

// TestQuarantineWithoutLedger: an image is in quarantine also if the ledger refuses to say so.
func TestQuarantineWithoutLedger(t *testing.T) {
	l, err := ledger.Open(t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	chunks, err := cache.Open(t.TempDir(), cache.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer chunks.Close()
	told := 0
	s, err := New(Options{Root: t.TempDir(), Cache: chunks, Mounter: mountsNothing{}, Trust: Trust{Ledger: l, OnProof: func(Proof) { told++ }}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.EndSearches()
	d := digest.FromString("")
	img, _, err := s.add(&record{
		Version: recordVersion, Artifact: d, Manifest: d, Repository: "registry.example/app", ChainIDs: []digest.Digest{d}, DiffIDs: []digest.Digest{d},
		Layers: []artifact.Layer{{Digest: d, IndexDigest: digest.SHA512.FromString(""), Source: d}}, // which the ledger has no name for
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.quarantine(img, 0, errors.New("a difference")); !errors.Is(err, ErrQuarantined) {
		t.Errorf("%v", err)
	}
	if err := s.Usable(img.id); !errors.Is(err, ErrQuarantined) || told != 1 {
		t.Errorf("%v, told %d times", err, told)
	}
}

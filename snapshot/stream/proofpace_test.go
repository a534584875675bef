package stream

import (
	"archive/tar"
	"bytes"
	"math"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
)

// What an image claims to have sets no other's pace, and no turn of more than a part of a deadline; zeros count as what they are to hash.
func TestProofPace(t *testing.T) {
	const hour = time.Hour
	for n, want := range []time.Duration{hour / 8, hour / 4, hour / 2, hour, hour} {
		if got := sliceOf(hour, math.MaxInt64, n); got != want {
			t.Errorf("a layer that claims all there is may take %v at try %d, want %v", got, n, want)
		}
	}
	if got := sliceOf(hour, 64<<20, 0); got != 2*time.Minute+16*time.Second {
		t.Errorf("a layer of 64 MiB may take %v", got)
	}
	if got := rateOf(1<<30, 1, hour, hour); got != proofRate {
		t.Errorf("1 GiB in an hour is read at %v", got)
	}
	// 9 GiB in the hour but an eighth, of which the image has a third.
	if got, want := rateOf(9<<30, 3, hour, hour), float64(9<<30)/(hour*7/8/3).Seconds(); got != want {
		t.Errorf("9 GiB are read at %v, want %v", got, want)
	}
	if got := rateOf(1<<30, 1, -hour, hour); got != 1<<30 {
		t.Errorf("an image that is overdue is read at %v", got)
	}
	if got := cost(artifact.Chunk{TarSize: 4 << 20, BlobSize: 400}); got != 4<<20/8 {
		t.Errorf("4 MiB of zeros count as %d bytes", got)
	}
	if got := cost(artifact.Chunk{TarSize: 4 << 20, BlobSize: 2 << 20}); got != 2<<20 {
		t.Errorf("a chunk of 2 MiB counts as %d bytes", got)
	}
}

// What is left of an image is what its layers that are not proven take to hash, by their indexes, and not what their blobs have.
func TestLeftToProve(t *testing.T) {
	const size = 8 << 20
	var tarred, made bytes.Buffer
	w := tar.NewWriter(&tarred)
	if err := w.WriteHeader(&tar.Header{Name: "zeros", Mode: 0o644, Size: size}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	enc, err := artifact.EncodeLayer(t.Context(), &made, &tarred, artifact.EncodeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	x, err := artifact.DecodeIndex(made.Bytes()[enc.IndexOffset:])
	if err != nil {
		t.Fatal(err)
	}
	l, err := ledger.Open(t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	rec := &record{DiffIDs: []digest.Digest{digest.FromString("1"), digest.FromString("2")}, Layers: []artifact.Layer{enc.Layer, enc.Layer}}
	use := &deviceUse{device: &device{indexes: []*artifact.Index{x, x}}, image: &image{rec: rec}}
	s := &Store{o: Options{Trust: Trust{Ledger: l}}}
	for proven := range 2 {
		want := int64(2-proven) * size / tarFactor
		if left, err := s.left(use); err != nil || left < want || left > want+want/100 {
			t.Errorf("%d layers are proven: %d is left, want %d: %v", proven, left, want, err)
		}
		if err := l.Prove(ledger.Proof{Key: rec.key(0)}); err != nil {
			t.Fatal(err)
		}
	}
}

// The turns of a layer that was tried before are longer only while all that wait for it were tried as often: no image has another wait for an hour because it made its own ones wait for each other.
func TestProofTurns(t *testing.T) {
	store := &Store{}
	tried := func(registry string, n int) *job {
		rec := &record{Repository: registryclient.Repository(registry + "/app"), Layers: []artifact.Layer{{Size: math.MaxInt64}}}
		return &job{image: &image{rec: rec}, attempt: attempt{n: n}}
	}
	const hour, forever = time.Hour, time.Duration(math.MaxInt64)
	for _, c := range []struct {
		name    string
		waiting []*job
		want    time.Duration
	}{
		{"nothing", nil, forever},
		{"one tried as often", []*job{tried("one", 3)}, hour},
		{"one tried more often", []*job{tried("one", 5)}, hour},
		{"one tried less often", []*job{tried("one", 3), tried("one", 1)}, hour / 4},
		{"a new one of its registry", []*job{tried("one", 3), tried("one", 0)}, hour / 8},
		{"a new one of a third registry", []*job{tried("three", 0), tried("one", 3)}, hour / 8},
		{"a new one of the other's registry, which could not begin", []*job{tried("two", 0)}, forever},
	} {
		j := tried("one", 3)
		noteWaiting(map[string]*job{"one": j, "two": tried("two", 0)}, c.waiting)
		if got := (&proofPacer{store: store, job: j}).slice(); got != c.want {
			t.Errorf("%s waits: a layer that was tried 3 times may take %v, want %v", c.name, got, c.want)
		}
	}
}

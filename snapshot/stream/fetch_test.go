package stream

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// A large index comes in parts, a small one in one request, and wrong bytes in any part are not kept.
func TestIndexComesInParts(t *testing.T) {
	registry := registrytest.Start(t, registrytest.Options{})
	repo := registryclient.Repository(registry.Host() + "/app")
	client, err := registryclient.New(registryclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	s := &Store{o: Options{Registry: client}}
	rnd := rand.NewChaCha8([32]byte{})
	const before = 1000
	for _, c := range []struct{ size, requests int }{{1, 1}, {indexPart, 1}, {indexPart + 1, 2}, {indexPart*indexParts + 1, indexParts}, {3*indexPart*indexParts + 5, indexParts}} {
		blob := make([]byte, before+c.size+500)
		rnd.Read(blob)
		index := blob[before : before+c.size]
		l := artifact.Layer{Digest: registry.PutBlob("app", blob), IndexOffset: before, IndexSize: int64(c.size), IndexDigest: digest.FromBytes(index)}
		path := filepath.Join(t.TempDir(), "index")
		registry.Reset()
		if err := s.fetchIndex(t.Context(), repo, l, 0, path); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, index) {
			t.Errorf("%d bytes: got %d others, %v", c.size, len(got), err)
		}
		if n, bytes := registry.Count(registrytest.OfBlobs); n != c.requests || bytes != int64(c.size) {
			t.Errorf("%d bytes: %d requests for %d, want %d", c.size, n, bytes, c.requests)
		}

		remove := registry.Inject(registrytest.Blobs, 1, registrytest.Flip(0))
		path = filepath.Join(t.TempDir(), "index")
		if err := s.fetchIndex(t.Context(), repo, l, 0, path); !errors.Is(err, artifact.ErrInvalid) {
			t.Errorf("%d bytes, one of them wrong: %v", c.size, err)
		}
		remove()
		if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) > 0 {
			t.Errorf("it leaves %v, %v", left, err)
		}
	}
}

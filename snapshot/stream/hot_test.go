package stream

import (
	"reflect"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// What follows the head is open at once; of an image that shares layers only what has the head is asked for.
func TestHotBlobHead(t *testing.T) {
	registry := registrytest.Start(t, registrytest.Options{})
	client, err := registryclient.New(registryclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	h := &artifact.HotHead{
		Profile: artifact.Profile{Layers: []digest.Digest{digest.FromString("an index")}, Chunks: []artifact.HotChunk{{Chunk: 3}, {Chunk: 1}}},
		Indexes: []int64{9},
	}
	raw, err := h.Encode()
	if err != nil {
		t.Fatal(err)
	}
	blob := append(raw, make([]byte, 2*hotHead)...)
	for _, shares := range []bool{false, true} {
		f := &hotFetch{store: &Store{o: Options{Registry: client}}, repo: registryclient.Repository(registry.Host() + "/app"), shares: shares}
		b := &hotBlob{fetch: f, dgst: registry.PutBlob("app", blob), size: int64(len(blob))}
		got, err := b.head(t.Context())
		if err != nil || !reflect.DeepEqual(got, h) || b.pos != h.Size() || (b.end < b.size) != shares {
			t.Errorf("shares %v: read %+v up to %d (asked for %d), %v; want %+v up to %d", shares, got, b.pos, b.end, err, h, h.Size())
		}
		b.close()
	}
}

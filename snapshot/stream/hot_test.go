package stream

import (
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// What a read waits for the hot blob follows from how long its registry takes to answer, without the time that the search for the artifact takes before.
func TestHotBlobIsTimedFromItsRequest(t *testing.T) {
	registry := registrytest.Start(t, registrytest.Options{})
	client, err := registryclient.New(registryclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	p := &artifact.Profile{Layers: []digest.Digest{digest.FromString("an index")}, Chunks: []artifact.HotChunk{{Chunk: 3}, {Chunk: 1}}}
	list, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	for _, shares := range []bool{false, true} {
		blob := append(slices.Clone(list), make([]byte, 2*hotHead)...)
		b := &hotBlob{
			store: &Store{o: Options{Registry: client}}, repo: registryclient.Repository(registry.Host() + "/app"),
			dgst: registry.PutBlob("app", blob), size: int64(len(blob)),
		}
		var found time.Time
		got, err := b.list(t.Context(), func() bool {
			found = time.Now()
			return shares
		})
		if err != nil || !slices.Equal(got.Chunks, p.Chunks) || b.pos != int64(len(list)) {
			t.Errorf("read %+v up to %d, %v; want %+v up to %d", got, b.pos, err, p, len(list))
		}
		if b.asked.Before(found) || (b.body == nil) != shares {
			t.Errorf("asked for %v before the search has ended, and open: %v", found.Sub(b.asked), b.body != nil)
		}
		b.close()
	}
}

package stream

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
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

// numbers is a body of n bytes in which each 8 say where they are.
type numbers struct{ at, n int64 }

func (r *numbers) Read(p []byte) (int, error) {
	if r.at == r.n {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), r.n-r.at)&^7]
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], uint64(r.at))
		r.at += 8
	}
	return len(p), nil
}

// TestAheadReader: what comes is what was sent, in blocks that are used again.
func TestAheadReader(t *testing.T) {
	const n = 4*aheadBlocks*aheadBlock + 800
	r := newAheadReader(&numbers{n: n})
	blocks := map[*byte]bool{}
	p := make([]byte, 1000)
	at := int64(0)
	for {
		got, err := r.Read(p[:min(len(p), 8*(1+int(at)%100))])
		if err == io.EOF {
			break
		}
		if err != nil || got%8 != 0 {
			t.Fatalf("at %d: %d bytes, %v", at, got, err)
		}
		for i := 0; i < got; i += 8 {
			if b := binary.LittleEndian.Uint64(p[i:]); b != uint64(at) {
				t.Fatalf("at %d: what was sent at %d", at, b)
			}
			at += 8
		}
		blocks[&r.block[0]] = true
	}
	if at != n || len(blocks) > aheadBlocks+3 { // those that lie ahead, and those that are filled and read
		t.Errorf("%d of %d bytes in %d blocks", at, n, len(blocks))
	}
}

// Of the indexes behind a head nothing is read that the artifact has not, or has in another size, be it here or not.
func TestTakeIndexes(t *testing.T) {
	here, missing := digest.FromString("here"), digest.FromString("missing")
	rec := &record{Layers: []artifact.Layer{{IndexDigest: here, IndexSize: 4}, {IndexDigest: missing, IndexSize: 7}}}
	for name, c := range map[string]struct {
		layers []digest.Digest
		sizes  []int64
		read   int
		want   error
	}{
		"here":             {[]digest.Digest{here}, []int64{4}, 4, nil},
		"unknown":          {[]digest.Digest{here, digest.FromString("other"), missing}, []int64{4, 100, 7}, 4, nil},
		"here, longer":     {[]digest.Digest{here, missing}, []int64{100, 7}, 0, artifact.ErrInvalid},
		"missing, longer":  {[]digest.Digest{here, missing}, []int64{4, 100}, 4, artifact.ErrInvalid},
		"missing, shorter": {[]digest.Digest{missing}, []int64{6}, 0, artifact.ErrInvalid},
	} {
		store := &Store{o: Options{Root: t.TempDir()}}
		if err := os.MkdirAll(filepath.Dir(store.indexPath(here)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(store.indexPath(here), []byte("here"), 0o600); err != nil {
			t.Fatal(err)
		}
		f := &hotFetch{store: store, indexed: make(chan struct{}), record: func() *record { return rec }}
		f.noMore = func() { close(f.indexed) }
		left := bytes.NewReader(make([]byte, 1000))
		b := &hotBlob{fetch: f, body: io.NopCloser(left), end: 1000}
		err := f.takeIndexes(b, &artifact.HotHead{Profile: artifact.Profile{Layers: c.layers}, Indexes: c.sizes})
		if read := 1000 - left.Len(); read != c.read || !errors.Is(err, c.want) || c.want == nil && err != nil {
			t.Errorf("%s: read %d bytes, %v; want %d, %v", name, read, err, c.read, c.want)
		}
		select {
		case <-f.indexed:
		default:
			t.Errorf("%s: an index is still waited for", name)
		}
	}
}

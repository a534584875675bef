package integration_test

import (
	"fmt"
	"io"
	"os"
	"path"
	"regexp"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// What the static profile of a real image must have of the chunks that a start reads, and how much of it a start must read, by bytes in the registry.
// Measured are 0.93 to 0.95, and 0.82 to 0.84 (docs/benchmarks.md).
const (
	minRecall    = 0.88
	minPrecision = 0.76
)

// TestStaticProfile compares the profile that `streamctl create --profile static` finds in an image's files with the chunks that its container reads until
// it is ready: a node that has nothing, and does not read ahead, asks for just those.
func TestStaticProfile(t *testing.T) {
	names := []string{"nginx"}
	if os.Getenv("FULL") != "" {
		names = []string{"nginx", "postgres", "node-app", "python-app"}
	}
	registry := startRegistry(t, registrytest.Options{})
	pause := registry.Host() + "/pause:1"
	pushPause(t, pause)
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			ref := registry.Host() + "/" + name + ":latest"
			pushBuilt(t, ref, name)
			run(t, "streamctl", "create", "--record", "", "--profile", "none", ref)
			chunks := readChunks(t, registry, pause, ref, "^"+name+": ready")
			run(t, "streamctl", "create", "--record", "", "--profile", "static", ref) // has its artifact: adds the profile
			found := profileChunks(t, ref)

			var read, listed, both int64
			n := 0
			for c, size := range chunks {
				read += size
				if _, ok := found[c]; ok {
					both += size
					n++
				}
			}
			for _, size := range found {
				listed += size
			}
			recall, precision := float64(both)/float64(read), float64(both)/float64(listed)
			t.Logf("read: %d chunks, %d bytes; listed: %d, %d; both: %d, %d; recall %.3f, precision %.3f", len(chunks), read, len(found), listed, n, both, recall, precision)
			if recall < minRecall || precision < minPrecision {
				t.Errorf("recall %.3f, precision %.3f; want %.2f and %.2f", recall, precision, minRecall, minPrecision)
			}
		})
	}
}

// chunkID is a chunk of an artifact's layer, which the digest of its index names.
type chunkID struct {
	layer digest.Digest
	chunk int
}

// readChunks runs a container on a node with an empty cache until it prints a line that matches, and returns the chunks that it read, with their bytes in
// the blob.
func readChunks(t *testing.T, registry *registrytest.Registry, pause, ref, ready string) map[chunkID]int64 {
	t.Helper()
	n := startNode(t, node.Options{Mode: "file", Pause: pause, Stream: []string{registry.Host() + "/*"}, Config: "read_ahead = false"})
	pullStreamed(t, registry, n, ref)
	registry.Reset()
	c, err := n.RunPod(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.WaitLine(t.Context(), regexp.MustCompile(ready)); err != nil {
		t.Fatal(err)
	}
	requests := registry.Requests()
	if err := c.Remove(t.Context()); err != nil {
		t.Error(err)
	}

	chunks := map[chunkID]int64{}
	layers := artifactIndexes(t, ref)
	for _, q := range requests {
		l, ok := layers[digest.Digest(path.Base(q.Path))]
		var begin, end int64
		if _, err := fmt.Sscanf(q.Range, "bytes=%d-%d", &begin, &end); err != nil || !ok {
			continue
		}
		for i := range l.index.NumChunks() {
			if c := l.index.Chunk(i); c.BlobOffset >= begin && c.BlobOffset+c.BlobSize <= end+1 {
				chunks[chunkID{l.IndexDigest, i}] = c.BlobSize
			}
		}
	}
	if len(chunks) == 0 {
		t.Fatal("the container read nothing")
	}
	return chunks
}

// profileChunks returns the chunks of the image's static profile, with their bytes in the blob.
func profileChunks(t *testing.T, ref string) map[chunkID]int64 {
	t.Helper()
	place, raw := onlyReferrer(t, ref, artifact.ProfileType)
	m, err := artifact.DecodeProfileManifest(raw)
	if err != nil {
		t.Fatal(err)
	}
	hot, err := place.Blob(t.Context(), m.Hot, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer hot.Close()
	profile, err := artifact.ReadHotHead(hot)
	if err != nil {
		t.Fatal(err)
	}
	sizes := map[digest.Digest]*artifact.Index{}
	for _, l := range artifactIndexes(t, ref) {
		sizes[l.IndexDigest] = l.index
	}
	chunks := map[chunkID]int64{}
	for _, c := range profile.Chunks {
		l := profile.Layers[c.Layer]
		chunks[chunkID{l, c.Chunk}] = sizes[l].Chunk(c.Chunk).BlobSize
	}
	return chunks
}

type indexedLayer struct {
	artifact.Layer
	index *artifact.Index
}

// artifactIndexes returns the layers of the image's artifact by the digests of their blobs.
func artifactIndexes(t *testing.T, ref string) map[digest.Digest]indexedLayer {
	t.Helper()
	place, raw := onlyReferrer(t, ref, artifact.ArtifactType)
	m, err := artifact.DecodeManifest(raw)
	if err != nil {
		t.Fatal(err)
	}
	layers := map[digest.Digest]indexedLayer{}
	for _, l := range m.Layers {
		rc, err := place.Blob(t.Context(), ocispec.Descriptor{Digest: l.Digest, Size: l.Size}, l.IndexOffset)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(rc)
		rc.Close()
		if err != nil {
			t.Fatal(err)
		}
		x, err := l.Index(b)
		if err != nil {
			t.Fatal(err)
		}
		layers[l.Digest] = indexedLayer{l, x}
	}
	return layers
}

// onlyReferrer returns the manifest of the image's only referrer of a type.
func onlyReferrer(t *testing.T, ref, artifactType string) (converter.Place, []byte) {
	t.Helper()
	place, tag, err := converter.Open(ref, converter.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	list, err := converter.ListReferrers(t.Context(), place, tag, nil, artifactType)
	if err != nil || len(list) != 1 {
		t.Fatalf("referrers %+v of type %s, %v, want one", list, artifactType, err)
	}
	_, raw, err := place.Manifest(t.Context(), list[0].Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	return place, raw
}

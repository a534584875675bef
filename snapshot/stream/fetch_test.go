package stream

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

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
		b := make([]byte, before+c.size+500)
		rnd.Read(b)
		index := b[before : before+c.size]
		l := artifact.Layer{Digest: registry.PutBlob("app", b), IndexOffset: before, IndexSize: int64(c.size), IndexDigest: digest.FromBytes(index)}
		s.o.Root = t.TempDir()
		path := s.indexPath(l.IndexDigest)
		if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		registry.Reset()
		if _, err := s.fetchIndex(t.Context(), blob{store: s, rec: &record{Repository: repo, Layers: []artifact.Layer{l}}}, 0); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, index) {
			t.Errorf("%d bytes: got %d others, %v", c.size, len(got), err)
		}
		if n, bytes := registry.Count(registrytest.OfBlobs); n != c.requests || bytes != int64(c.size) {
			t.Errorf("%d bytes: %d requests for %d, want %d", c.size, n, bytes, c.requests)
		}

		remove := registry.Inject(registrytest.Blobs, 1, registrytest.Flip(0))
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if _, err := s.fetchIndex(t.Context(), blob{store: s, rec: &record{Repository: repo, Layers: []artifact.Layer{l}}}, 0); !errors.Is(err, artifact.ErrInvalid) {
			t.Errorf("%d bytes, one of them wrong: %v", c.size, err)
		}
		remove()
		if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) > 0 {
			t.Errorf("it leaves %v, %v", left, err)
		}
	}
}

// Of the hosts that gave parts of a wrong index, the one is told whose part is another in a right one.
func TestWrongIndexIsOneHosts(t *testing.T) {
	mirror, registry := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
	hosts := t.TempDir()
	if err := os.Mkdir(filepath.Join(hosts, registry.Host()), 0o755); err != nil {
		t.Fatal(err)
	}
	toml := fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\"]\n", registry.URL(), mirror.URL())
	if err := os.WriteFile(filepath.Join(hosts, registry.Host(), "hosts.toml"), []byte(toml), 0o644); err != nil {
		t.Fatal(err)
	}
	client, err := registryclient.New(registryclient.Options{HostsDir: hosts})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })

	var tarred, made bytes.Buffer
	w := tar.NewWriter(&tarred)
	for i := range 12_000 {
		if err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("file-%d", i), Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	enc, err := artifact.EncodeLayer(t.Context(), &made, &tarred, artifact.EncodeOptions{ChunkSize: 512})
	if err != nil {
		t.Fatal(err)
	}
	index := made.Bytes()[enc.IndexOffset:]
	if len(index) < 2*indexPart {
		t.Fatalf("an index of %d bytes comes in one part", len(index))
	}
	for _, r := range []*registrytest.Registry{mirror, registry} {
		r.PutBlob("app", made.Bytes())
	}
	s := &Store{o: Options{Registry: client, Root: t.TempDir()}}
	if err := os.Mkdir(filepath.Join(s.o.Root, "indexes"), 0o755); err != nil {
		t.Fatal(err)
	}
	l := artifact.Layer{Digest: enc.Digest, IndexOffset: enc.IndexOffset, IndexSize: int64(len(index)), IndexDigest: digest.FromBytes(index)}
	mirror.Inject(registrytest.Blobs, 1, registrytest.Status(http.StatusNotFound)) // the registry gives this part
	mirror.Inject(registrytest.Blobs, 1, registrytest.Flip(7))
	if _, err := s.openIndex(t.Context(), blob{store: s, rec: &record{Repository: registryclient.Repository(registry.Host() + "/app"), Layers: []artifact.Layer{l}}}); err != nil {
		t.Fatal(err)
	}
	if n, _ := registry.Count(registrytest.OfBlobs); n == 0 {
		t.Fatal("all parts are the mirror's")
	}
	for _, h := range client.Hosts() {
		if told := h.Wrong.After(time.Now()); told != (h.Host == mirror.Host()) {
			t.Errorf("%+v: told %v", h, told)
		}
	}
}

// What was read of an artifact is let go of when the next has its turn.
func TestCandidatesAreLetGo(t *testing.T) {
	registry := registrytest.Start(t, registrytest.Options{})
	client, err := registryclient.New(registryclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	c := &candidates{store: &Store{o: Options{Registry: client}}, repo: registryclient.Repository(registry.Host() + "/app")}
	for _, name := range []string{"a", "b", "c"} {
		c.list = append(c.list, ocispec.Descriptor{Digest: digest.FromString(name)})
	}
	for i := range c.list {
		if _, _, err := c.at(t.Context(), i).manifest(); err == nil {
			t.Error("one that is not there is read")
		}
		for k, a := range c.begun {
			if a != nil {
				t.Errorf("artifact %d is held at artifact %d", k, i)
			}
		}
	}
}

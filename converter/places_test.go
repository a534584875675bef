package converter

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// places are the kinds of place that everything must work on; open returns the name of one that is empty.
var places = []struct {
	name string
	open func(t *testing.T) string
}{
	{"referrers API", func(t *testing.T) string { return registrytest.Start(t, registrytest.Options{}).Host() + "/team/app" }},
	{"referrers API in pages", func(t *testing.T) string {
		return registrytest.Start(t, registrytest.Options{ReferrersPage: 1, RedirectBlobs: true}).Host() + "/team/app"
	}},
	{"referrers tag", func(t *testing.T) string {
		return registrytest.Start(t, registrytest.Options{NoReferrers: true}).Host() + "/team/app"
	}},
	{"docker-registry", func(t *testing.T) string { return dockerRegistry(t, true) + "/team/app" }},
	{"OCI layout", func(t *testing.T) string { return "oci:" + filepath.Join(t.TempDir(), "layout") }},
}

func onAllPlaces(t *testing.T, f func(t *testing.T, image string)) {
	for _, p := range places {
		t.Run(p.name, func(t *testing.T) { f(t, p.open(t)) })
	}
}

// dockerRegistry runs Debian's docker-registry, which has only the referrers tag, and returns its host.
func dockerRegistry(t *testing.T, deletes bool) string {
	t.Helper()
	return registrytest.StartDistribution(t, registrytest.Distribution{Deletes: deletes})
}

// open opens an image's place.
func open(t *testing.T, image string) (Place, string) {
	t.Helper()
	p, ref, err := Open(image, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return p, ref
}

// testLayer is a layer to be: its tar and how it is stored.
type testLayer struct {
	tar       []byte
	mediaType string
	blob      []byte // what is stored; nil is the tar, compressed as mediaType says
}

const (
	dockerLayer    = "application/vnd.docker.image.rootfs.diff.tar"
	dockerGzip     = "application/vnd.docker.image.rootfs.diff.tar.gzip"
	dockerForeign  = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
	artifactConfig = "application/vnd.example.config.v1+json"
)

// tarOf makes a tar of some files whose names and content seed decides.
func tarOf(seed uint64, files int) []byte {
	rnd := rand.New(rand.NewPCG(seed, 1))
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	must(w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("d%d/", seed), Mode: 0o755}))
	for i := range files {
		data := make([]byte, rnd.IntN(200_000))
		for j := range data {
			data[j] = "abcdefgh"[rnd.IntN(8)]
		}
		must(w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("d%d/file%d", seed, i), Mode: 0o644, Size: int64(len(data)), ModTime: time.Unix(1e9, 0)}))
		_, err := w.Write(data)
		must(err)
	}
	must(w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: fmt.Sprintf("d%d/link", seed), Linkname: "file0"}))
	must(w.Close())
	return b.Bytes()
}

func gz(b []byte) []byte {
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, gzip.HuffmanOnly) // these are random letters: to look for matches takes a third of all tests' time
	if err != nil {
		panic(err)
	}
	w.Write(b)
	w.Close()
	return out.Bytes()
}

func zst(b []byte) []byte {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	return w.EncodeAll(b, nil)
}

func (l testLayer) stored() []byte {
	switch {
	case l.blob != nil:
		return l.blob
	case l.mediaType == ocispec.MediaTypeImageLayerGzip, l.mediaType == dockerGzip, l.mediaType == dockerForeign:
		return gz(l.tar)
	case l.mediaType == ocispec.MediaTypeImageLayerZstd:
		return zst(l.tar)
	}
	return l.tar
}

// testImage is a platform manifest to be; its zero fields are those of a good OCI image for linux/amd64.
type testImage struct {
	layers       []testLayer
	platform     ocispec.Platform
	docker       bool
	configType   string
	artifactType string
	edit         func(m *ocispec.Manifest, config *ocispec.Image) // before it is stored
}

func putBlob(t *testing.T, p Place, mediaType string, b []byte) ocispec.Descriptor {
	t.Helper()
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	err := p.PutBlob(t.Context(), d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil })
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func putManifest(t *testing.T, p Place, mediaType, tag string, v any) ocispec.Descriptor {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	if err := p.PutManifest(t.Context(), d, raw, tag); err != nil {
		t.Fatal(err)
	}
	return d
}

// put stores the image and returns its descriptor with its platform.
func (i testImage) put(t *testing.T, p Place, tag string) ocispec.Descriptor {
	t.Helper()
	if i.platform.OS == "" {
		i.platform = ocispec.Platform{OS: "linux", Architecture: "amd64"}
	}
	mediaType, configType := ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig
	if i.docker {
		mediaType, configType = dockerManifest, dockerConfig
	}
	if i.configType != "" {
		configType = i.configType
	}
	created := time.Date(2024, 5, 6, 7, 8, 9, 123456789, time.UTC)
	config := ocispec.Image{Created: &created, Platform: i.platform, RootFS: ocispec.RootFS{Type: "layers"}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: mediaType, ArtifactType: i.artifactType, Layers: []ocispec.Descriptor{}}
	for _, l := range i.layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(l.tar))
		m.Layers = append(m.Layers, putBlob(t, p, l.mediaType, l.stored()))
	}
	if i.edit != nil {
		i.edit(&m, &config)
	}
	raw, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	if m.Config.Digest == "" {
		m.Config = putBlob(t, p, configType, raw)
	}
	d := putManifest(t, p, mediaType, tag, m)
	d.Platform = &i.platform
	return d
}

func putIndex(t *testing.T, p Place, tag string, manifests ...ocispec.Descriptor) ocispec.Descriptor {
	t.Helper()
	return putManifest(t, p, ocispec.MediaTypeImageIndex, tag, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests,
	})
}

// layersOf makes n gzip layers.
func layersOf(seed uint64, n int) []testLayer {
	var list []testLayer
	for i := range n {
		list = append(list, testLayer{tar: tarOf(seed+uint64(i), 4), mediaType: ocispec.MediaTypeImageLayerGzip})
	}
	return list
}

// allFormats has a layer of each format that can be converted, an empty one, and one twice.
func allFormats() []testLayer {
	twice := testLayer{tar: tarOf(3, 3), mediaType: ocispec.MediaTypeImageLayerZstd}
	members := testLayer{tar: tarOf(5, 3), mediaType: ocispec.MediaTypeImageLayerGzip}
	members.blob = append(gz(members.tar[:1000]), gz(members.tar[1000:])...)
	frames := testLayer{tar: tarOf(6, 3), mediaType: ocispec.MediaTypeImageLayerZstd}
	frames.blob = append([]byte{0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 'x'}, append(zst(frames.tar[:1000]), zst(frames.tar[1000:])...)...)
	mislabelled := testLayer{tar: tarOf(7, 1), mediaType: ocispec.MediaTypeImageLayerGzip}
	mislabelled.blob = zst(mislabelled.tar)
	return []testLayer{
		{tar: tarOf(1, 5), mediaType: ocispec.MediaTypeImageLayerGzip},
		{tar: tarOf(2, 5), mediaType: ocispec.MediaTypeImageLayer},
		twice,
		{tar: make([]byte, 1024), mediaType: ocispec.MediaTypeImageLayerGzip},
		{tar: []byte{}, mediaType: ocispec.MediaTypeImageLayerGzip},
		{tar: tarOf(4, 2), mediaType: dockerLayer},
		{tar: tarOf(4, 2), mediaType: dockerGzip},
		twice,
		members,
		frames,
		mislabelled,
	}
}

// create converts and fails the test if it cannot.
func create(t *testing.T, image string, o CreateOptions) []Created {
	t.Helper()
	p, ref := open(t, image)
	done, err := Create(t.Context(), p, ref, o)
	if err != nil {
		t.Fatal(err)
	}
	return done
}

// referrers lists the artifacts attached to subject, for all that it takes an image to have one.
func referrers(t *testing.T, p Place, subject digest.Digest) []ocispec.Descriptor {
	t.Helper()
	list, err := p.Referrers(t.Context(), subject)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

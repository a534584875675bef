package attack

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"io"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// entry is a file of a tar; a name that ends in / is a directory.
type entry struct {
	name, body string
	mode       int64
}

func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Mode: e.mode, Size: int64(len(e.body)), Typeflag: tar.TypeReg, ModTime: time.Unix(1e9, 0), Format: tar.FormatUSTAR}
		if e.name[len(e.name)-1] == '/' {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// victim is an image in a repository.
type victim struct {
	repo     registryclient.Repository
	name     string // of repo, without its host
	ref      string
	manifest digest.Digest
	raw      []byte
	image    ocispec.Manifest
	tars     [][]byte
}

// push pushes an image of tars as a repository's v1.
func push(t testing.TB, reg *registrytest.Registry, name string, tars ...[]byte) *victim {
	t.Helper()
	v := &victim{repo: registryclient.Repository(reg.Host() + "/" + name), name: name, ref: reg.Host() + "/" + name + ":v1", tars: tars}
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispec.RootFS{Type: "layers"}}
	for _, b := range tars {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(b))
		v.image.Layers = append(v.image.Layers, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: reg.PutBlob(name, b), Size: int64(len(b))})
	}
	c, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	v.image.Versioned, v.image.MediaType = specs.Versioned{SchemaVersion: 2}, ocispec.MediaTypeImageManifest
	v.image.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: reg.PutBlob(name, c), Size: int64(len(c))}
	if v.raw, err = json.Marshal(v.image); err != nil {
		t.Fatal(err)
	}
	v.manifest = digest.FromBytes(v.raw)
	reg.PutManifest(name, "v1", v.image.MediaType, v.raw)
	return v
}

// content is the data device of the image: the tars end to end, each at a multiple of 512 bytes.
func (v *victim) content() (b []byte) {
	for _, t := range v.tars {
		b = append(b, t...)
		b = append(b, make([]byte, -len(b)&511)...)
	}
	return b
}

// forgery is an artifact in the making: at first the honest one.
type forgery struct {
	t     testing.TB
	of    *victim
	m     artifact.Manifest
	blobs [][]byte
	raw   func([]byte) []byte // changes the manifest's bytes; nil does not
}

func honest(t testing.TB, v *victim) *forgery {
	t.Helper()
	f := &forgery{t: t, of: v, m: artifact.Manifest{
		Subject: ocispec.Descriptor{MediaType: v.image.MediaType, Digest: v.manifest, Size: int64(len(v.raw))},
		Config:  v.image.Config, Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, Created: time.Unix(2e9, 0),
		Layers: make([]artifact.Layer, len(v.tars)),
	}, blobs: make([][]byte, len(v.tars))}
	for i, b := range v.tars {
		f.encode(i, b)
	}
	return f
}

// encode makes layer i of another tar.
func (f *forgery) encode(i int, b []byte) {
	f.t.Helper()
	var blob bytes.Buffer
	l, err := artifact.EncodeLayer(f.t.Context(), &blob, bytes.NewReader(b), artifact.EncodeOptions{ChunkSize: 4096})
	if err != nil {
		f.t.Fatal(err)
	}
	l.Source = f.of.image.Layers[i].Digest
	f.m.Layers[i], f.blobs[i] = l.Layer, blob.Bytes()
}

// The index's fields, as docs/format.md has them.
const (
	offChunks   = 20
	offDiffID   = 40
	offTable    = 72
	tableEntry  = 48
	offFrameEnd = 8
	offDigest   = 16
)

// index changes the index of layer i in its place, and what the manifest says of it.
func (f *forgery) index(i int, change func(index []byte)) {
	l := &f.m.Layers[i]
	change(f.blobs[i][l.IndexOffset:])
	l.IndexDigest, l.Digest = digest.FromBytes(f.blobs[i][l.IndexOffset:]), digest.FromBytes(f.blobs[i])
}

// table changes the chunk table of layer i, an entry for each chunk.
func (f *forgery) table(i int, change func(entries [][]byte)) {
	f.index(i, func(index []byte) {
		var entries [][]byte
		for n := range binary.LittleEndian.Uint32(index[offChunks:]) {
			entries = append(entries, index[offTable+int(n)*tableEntry:][:tableEntry])
		}
		change(entries)
	})
}

// claim has the index of layer i say that it is of the tar that the image's config lists.
func (f *forgery) claim(i int) {
	f.index(i, func(index []byte) {
		sum := sha256.Sum256(f.of.tars[i])
		copy(index[offDiffID:], sum[:])
	})
}

// put pushes the artifact and returns what a list of referrers says of it.
func (f *forgery) put(reg *registrytest.Registry) ocispec.Descriptor {
	f.t.Helper()
	for _, b := range f.blobs {
		reg.PutBlob(f.of.name, b)
	}
	raw, err := f.m.Encode()
	if err != nil {
		f.t.Fatal(err)
	}
	if f.raw != nil {
		raw = f.raw(raw)
	}
	reg.PutManifest(f.of.name, "", ocispec.MediaTypeImageManifest, raw)
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: artifact.ArtifactType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
}

// replace changes one text of the manifest.
func (f *forgery) replace(old, new string) {
	f.raw = func(b []byte) []byte {
		f.t.Helper()
		if !bytes.Contains(b, []byte(old)) {
			f.t.Fatalf("no %q in %s", old, b)
		}
		return bytes.Replace(b, []byte(old), []byte(new), 1)
	}
}

// sign attaches an envelope to the artifact d.
func sign(t testing.TB, reg *registrytest.Registry, name string, d ocispec.Descriptor, e trust.Envelope) {
	t.Helper()
	_, raw, err := trust.Manifest(d, e, nil)
	if err != nil {
		t.Fatal(err)
	}
	reg.PutBlob(name, e.Bytes)
	reg.PutBlob(name, ocispec.DescriptorEmptyJSON.Data)
	reg.PutManifest(name, "", ocispec.MediaTypeImageManifest, raw)
}

// noise is n bytes that do not compress.
func noise(n int) string {
	var b []byte
	for sum := sha256.Sum256(nil); len(b) < n; sum = sha256.Sum256(sum[:]) {
		b = append(b, hex.EncodeToString(sum[:])...)
	}
	return string(b[:n])
}

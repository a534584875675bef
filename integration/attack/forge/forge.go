// Package forge makes what somebody who may push makes of an image's artifact: bytes that are well-formed, with digests that are right, and that are not the image's.
//
// The principle: everything begins as the honest artifact of a real image, and each step changes one thing, in the bytes of the format as docs/format.md has them. So what a node
// says of it is about that one thing. What is forged lives in the registry of a test; nothing here is part of a program.
package forge

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// Entry is one of a tar.
type Entry struct {
	Name, Body string
	Mode       int64
}

// File is a regular file, or a directory if the name ends in /.
func File(name, body string, mode int64) Entry { return Entry{name, body, mode} }

// Tar returns a tar of entries.
func Tar(t testing.TB, entries ...Entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.Name, Mode: e.Mode, Size: int64(len(e.Body)), Typeflag: tar.TypeReg, ModTime: time.Unix(1e9, 0), Format: tar.FormatUSTAR}
		if e.Name[len(e.Name)-1] == '/' {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.Body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Image is one in a repository.
type Image struct {
	Name     string // of the repository, without its host
	Ref      string
	Manifest digest.Digest
	Tars     [][]byte // of its layers

	raw   []byte // of the manifest
	image ocispec.Manifest
}

// Before returns a tar with entries before those of b.
func Before(t testing.TB, b []byte, entries ...Entry) []byte {
	t.Helper()
	const trailer = 1024
	more := Tar(t, entries...)
	return slices.Concat(more[:len(more)-trailer], b)
}

// Of returns an image that is in a repository of reg as ref.
func Of(t testing.TB, reg *registrytest.Registry, ref string, img v1.Image) *Image {
	t.Helper()
	name, _, _ := strings.Cut(strings.TrimPrefix(ref, reg.Host()+"/"), ":")
	v := &Image{Name: name, Ref: ref}
	layers, err := img.Layers()
	if err == nil {
		v.raw, err = img.RawManifest()
	}
	if err == nil {
		err = json.Unmarshal(v.raw, &v.image)
	}
	if err != nil {
		t.Fatal(err)
	}
	v.Manifest = digest.FromBytes(v.raw)
	for _, l := range layers {
		r, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		r.Close()
		if err != nil {
			t.Fatal(err)
		}
		v.Tars = append(v.Tars, b)
	}
	return v
}

// Push pushes an image of tars as a repository's v1.
func Push(t testing.TB, reg *registrytest.Registry, name string, tars ...[]byte) *Image {
	t.Helper()
	v := &Image{Name: name, Ref: reg.Host() + "/" + name + ":v1", Tars: tars}
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
	v.Manifest = digest.FromBytes(v.raw)
	reg.PutManifest(name, "v1", v.image.MediaType, v.raw)
	return v
}

// Content is the data device of the image: the tars end to end, each at a multiple of 512 bytes.
func (v *Image) Content() (b []byte) {
	for _, t := range v.Tars {
		b = append(b, t...)
		b = append(b, make([]byte, -len(b)&511)...)
	}
	return b
}

// Artifact is one in the making.
type Artifact struct {
	testing.TB
	M     artifact.Manifest
	Blobs [][]byte // of the layers

	of  *Image
	raw func([]byte) []byte // changes the manifest's bytes; nil does not
}

// Honest is the image's own artifact.
func Honest(t testing.TB, v *Image) *Artifact {
	t.Helper()
	f := &Artifact{TB: t, of: v, M: artifact.Manifest{
		Subject: ocispec.Descriptor{MediaType: v.image.MediaType, Digest: v.Manifest, Size: int64(len(v.raw))},
		Config:  v.image.Config, Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, Created: time.Unix(1e9, 0), // before what is forged
		Layers: make([]artifact.Layer, len(v.Tars)),
	}, Blobs: make([][]byte, len(v.Tars))}
	for i, b := range v.Tars {
		f.Encode(i, b)
	}
	return f
}

// Encode makes layer i of another tar.
func (f *Artifact) Encode(i int, b []byte) {
	f.Helper()
	var blob bytes.Buffer
	l, err := artifact.EncodeLayer(f.Context(), &blob, bytes.NewReader(b), artifact.EncodeOptions{ChunkSize: 4096})
	if err != nil {
		f.Fatal(err)
	}
	l.Source = f.of.image.Layers[i].Digest
	f.M.Layers[i], f.Blobs[i] = l.Layer, blob.Bytes()
}

// The index's fields, as docs/format.md has them.
const (
	OffChunks = 20 // how many there are, 4 bytes
	offDiffID = 40
	offTable  = 72

	tableEntry  = 48
	OffFrameEnd = 8  // of an entry of the table: where the chunk's frame ends in the blob, 8 bytes
	OffDigest   = 16 // of an entry: of the chunk's bytes, 32 bytes
)

// Index changes the index of layer i in its place, and what the manifest says of it.
func (f *Artifact) Index(i int, change func(index []byte)) {
	l := &f.M.Layers[i]
	change(f.Blobs[i][l.IndexOffset:])
	l.IndexDigest, l.Digest = digest.FromBytes(f.Blobs[i][l.IndexOffset:]), digest.FromBytes(f.Blobs[i])
}

// Table changes the chunk table of layer i, an entry for each chunk.
func (f *Artifact) Table(i int, change func(entries [][]byte)) {
	f.Index(i, func(index []byte) {
		var entries [][]byte
		for n := range binary.LittleEndian.Uint32(index[OffChunks:]) {
			entries = append(entries, index[offTable+int(n)*tableEntry:][:tableEntry])
		}
		change(entries)
	})
}

// Claim has the index of layer i say that it is of the tar that the image's config lists.
func (f *Artifact) Claim(i int) {
	f.Index(i, func(index []byte) {
		sum := sha256.Sum256(f.of.Tars[i])
		copy(index[offDiffID:], sum[:])
	})
}

// Target is what a signature of an artifact is for.
func Target(d ocispec.Descriptor) trust.Target {
	return trust.Target{Digest: d.Digest, MediaType: d.MediaType, Size: d.Size}
}

// Put pushes the artifact and returns what a list of referrers says of it.
func (f *Artifact) Put(reg *registrytest.Registry) ocispec.Descriptor {
	f.Helper()
	for _, b := range f.Blobs {
		reg.PutBlob(f.of.Name, b)
	}
	raw, err := f.M.Encode()
	if err != nil {
		f.Fatal(err)
	}
	if f.raw != nil {
		raw = f.raw(raw)
	}
	reg.PutManifest(f.of.Name, "", ocispec.MediaTypeImageManifest, raw)
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: artifact.ArtifactType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
}

// DataRequests counts the requests for the data of layer i that reg has seen since it was reset: those for its index are none.
func (f *Artifact) DataRequests(reg *registrytest.Registry, i int) int {
	l := f.M.Layers[i]
	n, _ := reg.Count(func(q registrytest.Request) bool {
		var first int64
		fmt.Sscanf(q.Range, "bytes=%d-", &first)
		return strings.HasSuffix(q.Path, l.Digest.String()) && first < l.IndexOffset
	})
	return n
}

// Replace changes one text of the manifest.
func (f *Artifact) Replace(old, new string) {
	f.raw = func(b []byte) []byte {
		f.Helper()
		if !bytes.Contains(b, []byte(old)) {
			f.Fatalf("no %q in %s", old, b)
		}
		return bytes.Replace(b, []byte(old), []byte(new), 1)
	}
}

// Sign attaches an envelope to the artifact d.
func Sign(t testing.TB, reg *registrytest.Registry, name string, d ocispec.Descriptor, e trust.Envelope) {
	t.Helper()
	_, raw, err := trust.Manifest(d, e, nil)
	if err != nil {
		t.Fatal(err)
	}
	reg.PutBlob(name, e.Bytes)
	reg.PutBlob(name, ocispec.DescriptorEmptyJSON.Data)
	reg.PutManifest(name, "", ocispec.MediaTypeImageManifest, raw)
}

// Noise is n bytes that do not compress.
func Noise(n int) string {
	var b []byte
	for sum := sha256.Sum256(nil); len(b) < n; sum = sha256.Sum256(sum[:]) {
		b = append(b, hex.EncodeToString(sum[:])...)
	}
	return string(b[:n])
}

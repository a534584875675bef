package converter

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// programTar is a layer with a script and its interpreter, each in chunks of its own, and in between what no start reads.
func programTar(t *testing.T) []byte {
	t.Helper()
	rnd := rand.NewChaCha8([32]byte{1})
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range []struct {
		name, begin string
		size        int
	}{
		{"bin/interpreter", "neither ELF nor a script", 300 << 10}, {"usr/share/unused", "", 400 << 10},
		{"app/run", "#!/bin/interpreter\n", 200 << 10}, {"usr/share/unused2", "", 300 << 10},
	} {
		data := make([]byte, f.size)
		rnd.Read(data)
		copy(data, f.begin)
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: 0o755, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// programImage runs the script, which a layer above makes the command by a symlink in PATH.
func programImage(t *testing.T) testImage {
	t.Helper()
	var link bytes.Buffer
	w := tar.NewWriter(&link)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: "sbin/run", Linkname: "/app/run"}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return testImage{
		layers: []testLayer{{tar: programTar(t), mediaType: ocispec.MediaTypeImageLayerGzip}, {tar: link.Bytes(), mediaType: ocispec.MediaTypeImageLayerGzip}},
		edit:   func(_ *ocispec.Manifest, config *ocispec.Image) { config.Config.Entrypoint = []string{"run"} },
	}
}

// TestStatic: create attaches the profile of a start, once, whatever was there before, and the same in every place.
func TestStatic(t *testing.T) {
	var digests []digest.Digest
	onAllPlaces(t, func(t *testing.T, image string) {
		p, _ := open(t, image+":v1")
		d := programImage(t).put(t, p, "v1")
		with := CreateOptions{Static: true}
		if create(t, image+":v1", CreateOptions{}); len(referrers(t, p, d.Digest)) != 1 {
			t.Fatalf("referrers of an image without a profile: %+v", referrers(t, p, d.Digest))
		}
		c := create(t, image+":v1", with)[0]
		if c.Status != StatusExists || c.Profile == nil || len(c.Warnings) > 0 {
			t.Fatalf("what had no profile: %+v", c)
		}
		digests = append(digests, c.Profile.Digest)
		if again := create(t, image+":v1", with)[0]; again.Profile != nil || len(again.Warnings) > 0 {
			t.Errorf("what has one: %+v", again)
		}
		if forced := create(t, image+":v1", CreateOptions{Static: true, Force: true})[0]; forced.Profile == nil || forced.Profile.Digest != c.Profile.Digest {
			t.Errorf("made again: %+v", forced.Profile)
		}
		if n := len(referrers(t, p, d.Digest)); n != 2 {
			t.Errorf("%d referrers, want the artifact and the profile", n)
		}
		if _, err := Verify(t.Context(), p, "v1", VerifyOptions{}); err != nil {
			t.Error(err)
		}
		checkProgram(t, p, c)
	})
	slices.Sort(digests)
	if len(slices.Compact(digests)) != 1 {
		t.Errorf("profiles %v, want the same everywhere", digests)
	}
}

// checkProgram holds the profile of programImage against the files that it must have.
func checkProgram(t *testing.T, p Place, c Created) {
	t.Helper()
	rc, err := p.Blob(t.Context(), ocispec.Descriptor{Digest: c.Profile.Hot, Size: c.Profile.Size}, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	hot, err := artifact.ReadHotHead(rc)
	if err != nil {
		t.Fatal(err)
	}
	_, raw, err := p.Manifest(t.Context(), c.Artifact.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	m, err := artifact.DecodeManifest(raw)
	if err != nil {
		t.Fatal(err)
	}
	layers, err := indexesOf(t.Context(), p, m, &hot.Profile)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	entries := layers[0].index.Entries()
	defer entries.Close()
	for {
		e, err := entries.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		first, last := layers[0].index.Find(e.DataOffset), layers[0].index.Find(e.DataOffset+e.DataSize-1)
		n := 0
		for i := first; i <= last; i++ {
			if slices.Contains(hot.Chunks, artifact.HotChunk{Layer: 0, Chunk: i}) {
				n++
			}
		}
		if n > 0 {
			got = append(got, e.Name)
			if n != last-first+1 {
				t.Errorf("%d of the %d chunks of %s are listed", n, last-first+1, e.Name)
			}
		}
	}
	if want := []string{"bin/interpreter", "app/run"}; !slices.Equal(got, want) {
		t.Errorf("the profile has chunks of %q, want %q", got, want)
	}
	// In order of use: the script says what its interpreter is.
	if first := layers[0].index.Chunk(hot.Chunks[0].Chunk); first.TarOffset < 700<<10 {
		t.Errorf("the first chunk begins at %d, want one of the script", first.TarOffset)
	}
}

// TestStaticOfAnotherRelease: a hot blob of another version is as good as none, and is replaced.
func TestStaticOfAnotherRelease(t *testing.T) {
	image := "oci:" + filepath.Join(t.TempDir(), "l")
	p, _ := open(t, image+":v1")
	d := programImage(t).put(t, p, "v1")
	good := create(t, image+":v1", CreateOptions{Static: true})[0].Profile
	hot, err := readBlob(t.Context(), p, ocispec.Descriptor{Digest: good.Hot, Size: good.Size}, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	hot[16]++ // the version
	m := &artifact.ProfileManifest{Subject: d, Source: artifact.ProfileStatic, Hot: putBlob(t, p, artifact.HotMediaType, hot)}
	raw, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Delete(t.Context(), good.Digest, d.Digest); err != nil {
		t.Fatal(err)
	}
	if err := p.PutManifest(t.Context(), ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(raw), Size: int64(len(raw))}, raw, ""); err != nil {
		t.Fatal(err)
	}
	if list, err := Inspect(t.Context(), p, "v1", nil, nil); err != nil || len(list) != 1 || len(list[0].Profiles) != 0 {
		t.Errorf("inspect: %+v, %v, want no profile", list, err)
	}
	if again := create(t, image+":v1", CreateOptions{Static: true})[0]; again.Profile == nil || again.Profile.Digest != good.Digest {
		t.Errorf("made anew: %+v, want %s", again.Profile, good.Digest)
	}
	if n := len(referrers(t, p, d.Digest)); n != 2 {
		t.Errorf("%d referrers, want the artifact and the new profile", n)
	}
}

// TestNoStatic: an image whose start cannot be followed gets its artifact, and a warning.
func TestNoStatic(t *testing.T) {
	image := places[0].open(t) + ":v1"
	p, _ := open(t, image)
	img := programImage(t)
	img.edit = func(_ *ocispec.Manifest, config *ocispec.Image) { config.Config.Cmd = []string{"/not/there"} }
	d := img.put(t, p, "v1")
	c := create(t, image, CreateOptions{Static: true})[0]
	if c.Status != StatusCreated || c.Profile != nil || len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], "no static profile") {
		t.Errorf("%+v", c)
	}
	if n := len(referrers(t, p, d.Digest)); n != 1 {
		t.Errorf("%d referrers", n)
	}
}

// TestStaticOfHugeIndexes: the indexes of an artifact that somebody else has made are not read beyond what a node would take.
func TestStaticOfHugeIndexes(t *testing.T) {
	for name, layer := range map[string]func(t *testing.T, p Place) artifact.Layer{
		"its indexes have more than 512 MiB": func(*testing.T, Place) artifact.Layer { // nor asked for: they are not there
			return artifact.Layer{Digest: digest.FromString("blob"), IndexDigest: digest.FromString("index"), Size: 200<<20 + 1, IndexOffset: 1, IndexSize: 200 << 20}
		},
		"its headers have more than 1024 MiB": func(t *testing.T, p Place) artifact.Layer {
			const chunks = 100
			blob := append(make([]byte, chunks), emptyIndex(chunks, chunks*artifact.MaxChunkSize)...)
			d := putBlob(t, p, artifact.LayerMediaType, blob)
			return artifact.Layer{Digest: d.Digest, Size: d.Size, IndexOffset: chunks, IndexSize: d.Size - chunks, IndexDigest: digest.FromBytes(blob[chunks:])}
		},
	} {
		t.Run(name, func(t *testing.T) {
			image := places[0].open(t) + ":v1"
			p, _ := open(t, image)
			img := programImage(t)
			img.layers = append(img.layers, img.layers[1])
			d := img.put(t, p, "v1")
			made := create(t, image, CreateOptions{})[0]
			m := manifestOf(t, p, made)
			if err := p.Delete(t.Context(), made.Artifact.Digest, d.Digest); err != nil {
				t.Fatal(err)
			}
			for i, l := range m.Layers {
				m.Layers[i] = layer(t, p)
				m.Layers[i].Source = l.Source
			}
			attachForged(t, p, m)
			c := create(t, image, CreateOptions{Static: true})[0]
			if c.Status != StatusExists || c.Profile != nil || len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], name) {
				t.Errorf("%+v", c)
			}
		})
	}
}

// emptyIndex is an index of chunks that are as large as they may be, each with a frame of a byte, and of a tar that is said to be all headers.
func emptyIndex(chunks int, tarSize uint64) []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, 0x184D2A5E)
	b = le.AppendUint32(b, uint32(64+48*chunks))
	b = le.AppendUint32(append(b, "tarindex"...), 1)
	b = le.AppendUint32(b, uint32(chunks))
	b = le.AppendUint64(le.AppendUint64(b, tarSize), tarSize)
	b = append(b, make([]byte, 32)...)
	for i := range uint64(chunks) {
		b = le.AppendUint64(le.AppendUint64(b, (i+1)*artifact.MaxChunkSize), i+1)
		b = append(b, make([]byte, 32)...)
	}
	return b
}

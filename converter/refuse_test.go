package converter

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestRefused: what cannot be converted says why, with Azure's codes, and has no artifact afterwards.
func TestRefused(t *testing.T) {
	windows := ocispec.Platform{OS: "windows", Architecture: "amd64"}
	one := layersOf(1, 1)
	retyped := func(mediaType string) []testLayer { return []testLayer{{tar: one[0].tar, mediaType: mediaType}} }
	tests := []struct {
		name string
		img  testImage
		code Code
		says string
	}{
		{"Windows", testImage{layers: one, platform: windows}, UnsupportedPlatform, "windows/amd64"},
		{"no architecture", testImage{layers: one, platform: ocispec.Platform{OS: "linux"}}, UnsupportedPlatform, "linux/"},
		{"helm chart", testImage{layers: one, configType: "application/vnd.cncf.helm.config.v1+json"}, ImageNotRunnable, "helm"},
		{"empty config", testImage{layers: one, configType: ocispec.MediaTypeEmptyJSON}, ImageNotRunnable, "empty"},
		{"unknown layer", testImage{layers: retyped("application/vnd.in-toto+json")}, UnsupportedMediaType, "in-toto"},
		{"unknown compression", testImage{layers: retyped("application/vnd.oci.image.layer.v1.tar+xz")}, UnsupportedMediaType, "+xz"},
		{"encrypted layer", testImage{layers: retyped("application/vnd.oci.image.layer.v1.tar+gzip+encrypted")}, UnsupportedMediaType, "encrypted"},
		{"foreign layer", testImage{layers: one, edit: func(m *ocispec.Manifest, _ *ocispec.Image) {
			m.Layers[0].MediaType, m.Layers[0].Digest = dockerForeign, digest.FromString("elsewhere")
		}}, UnsupportedMediaType, "distributable"},
		{"an artifact of ours", testImage{layers: one, artifactType: artifact.ArtifactType}, UnsupportedArtifactType, "streaming artifact"},
		{"an artifact of Azure's", testImage{layers: one, artifactType: "application/vnd.azure.artifact.streaming.v1"}, UnsupportedArtifactType, "streaming artifact"},
		{"too few diffIDs", testImage{layers: layersOf(1, 2), edit: func(_ *ocispec.Manifest, c *ocispec.Image) {
			c.RootFS.DiffIDs = c.RootFS.DiffIDs[:1]
		}}, ImageNotRunnable, "2 layers, its config 1 diffIDs"},
		{"config that is not there", testImage{layers: one, edit: func(m *ocispec.Manifest, _ *ocispec.Image) {
			m.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromString("gone"), Size: 4}
		}}, ResourceNotFound, "config"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			// A registry that looks into nothing: real ones refuse some of these at the push.
			p, _ := open(t, registrytest.Start(t, registrytest.Options{}).Host()+"/app:v1")
			d := tt.img.put(t, p, "v1")
			_, err := Create(t.Context(), p, "v1", CreateOptions{})
			var e *Error
			if !errors.As(err, &e) || e.Code != tt.code || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), tt.code.Message()) {
				t.Errorf("got %v, want %s with %q", err, tt.code, tt.says)
			}
			if list := referrers(t, p, d.Digest); len(list) != 0 {
				t.Errorf("referrers %+v", list)
			}
		})
	}

	t.Run("index of Windows and attestations", func(t *testing.T) {
		p, _ := open(t, registrytest.Start(t, registrytest.Options{}).Host()+"/app:v1")
		attestation := testImage{layers: retyped("application/vnd.in-toto+json")}.put(t, p, "")
		attestation.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
		putIndex(t, p, "v1", testImage{layers: one, platform: windows}.put(t, p, ""), attestation)
		_, err := Create(t.Context(), p, "v1", CreateOptions{})
		if CodeOf(err) != NoSupportedPlatformFound || !strings.Contains(err.Error(), "windows/amd64") {
			t.Error(err)
		}
	})
	t.Run("artifact by its digest", func(t *testing.T) {
		image := registrytest.Start(t, registrytest.Options{}).Host() + "/app:v1"
		p, _ := open(t, image)
		testImage{layers: one}.put(t, p, "v1")
		c := create(t, image, CreateOptions{})[0]
		if _, err := Create(t.Context(), p, c.Artifact.Digest.String(), CreateOptions{}); CodeOf(err) != UnsupportedArtifactType {
			t.Error(err)
		}
	})
	t.Run("foreign layer whose bytes are there", func(t *testing.T) {
		image := registrytest.Start(t, registrytest.Options{}).Host() + "/app:v1"
		p, _ := open(t, image)
		testImage{docker: true, layers: retyped(dockerForeign)}.put(t, p, "v1")
		create(t, image, CreateOptions{})
	})
}

// TestHostile: images that lie or are damaged are errors that say so, and have no artifact afterwards.
func TestHostile(t *testing.T) {
	good := tarOf(1, 4)
	stored := func(mediaType string, b []byte) testImage {
		return testImage{layers: append(layersOf(8, 1), testLayer{tar: good, mediaType: mediaType, blob: b})}
	}
	edit := func(f func(m *ocispec.Manifest, c *ocispec.Image)) testImage {
		return testImage{layers: layersOf(8, 2), edit: f}
	}
	corrupt := gz(good)
	corrupt[len(corrupt)/2] ^= 0xff
	badTar := bytes.Clone(good)
	copy(badTar[148:156], "9999999\x00") // the first header's checksum
	lying := testImage{layers: []testLayer{{tar: badTar, mediaType: ocispec.MediaTypeImageLayer}}}
	tests := []struct {
		name string
		img  testImage
		says string
	}{
		{"gzip cut short", stored(ocispec.MediaTypeImageLayerGzip, gz(good)[:5000]), "unexpected EOF"},
		{"gzip header cut short", stored(ocispec.MediaTypeImageLayerGzip, gz(good)[:5]), "EOF"},
		{"gzip with other bytes", stored(ocispec.MediaTypeImageLayerGzip, corrupt), "layer 1"},
		{"bytes after the gzip stream", stored(ocispec.MediaTypeImageLayerGzip, append(gz(good), "trailing bytes"...)), "header"},
		{"zstd cut short", stored(ocispec.MediaTypeImageLayerZstd, zst(good)[:5000]), "layer 1"},
		{"zstd frame of a huge window", stored(ocispec.MediaTypeImageLayerZstd, []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xf8, 0, 0, 0}), "layer 1"},
		{"gzip called a plain tar", stored(ocispec.MediaTypeImageLayer, gz(good)), "layer 1"},
		{"tar with a bad checksum", lying, "layer 0"},
		{"tar cut short", testImage{layers: []testLayer{{tar: good[:len(good)/2], mediaType: ocispec.MediaTypeImageLayerGzip}}}, "layer 0"},
		{"other diffID", edit(func(_ *ocispec.Manifest, c *ocispec.Image) { c.RootFS.DiffIDs[1] = digest.FromString("x") }), "config says"},
		{"swapped diffIDs", edit(func(_ *ocispec.Manifest, c *ocispec.Image) {
			d := c.RootFS.DiffIDs
			d[0], d[1] = d[1], d[0]
		}), "config says"},
		{"layer size too small", edit(func(m *ocispec.Manifest, _ *ocispec.Image) { m.Layers[1].Size -= 100 }), "longer than"},
		{"layer size too large", edit(func(m *ocispec.Manifest, _ *ocispec.Image) { m.Layers[1].Size += 100 }), "ended after"},
		{"negative layer size", edit(func(m *ocispec.Manifest, _ *ocispec.Image) { m.Layers[1].Size = -1 }), "size of -1"},
		{"layer digest that is none", edit(func(m *ocispec.Manifest, _ *ocispec.Image) { m.Layers[1].Digest = "sha256:../../x" }), "layer 1"},
		{"layer digest of another kind", edit(func(m *ocispec.Manifest, _ *ocispec.Image) { m.Layers[1].Digest = digest.SHA512.FromString("x") }), "SHA-256"},
		{"layer that is not there", edit(func(m *ocispec.Manifest, _ *ocispec.Image) { m.Layers[1].Digest = digest.FromString("x") }), "not found"},
		{"config of a huge size", edit(func(m *ocispec.Manifest, _ *ocispec.Image) {
			m.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromString("x"), Size: 1 << 40}
		}), "not accepted"},
		{"too many layers", edit(func(m *ocispec.Manifest, _ *ocispec.Image) {
			for range artifact.MaxLayers {
				m.Layers = append(m.Layers, m.Layers[0])
			}
		}), "layers"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, _ := open(t, registrytest.Start(t, registrytest.Options{}).Host()+"/app:v1")
			d := tt.img.put(t, p, "v1")
			_, err := Create(t.Context(), p, "v1", CreateOptions{})
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, want it to say %q", err, tt.says)
			}
			if list := referrers(t, p, d.Digest); len(list) != 0 {
				t.Errorf("referrers %+v", list)
			}
		})
	}
}

// TestHostileLayout: a layout may hold anything in the place of its files; none of it is waited for.
func TestHostileLayout(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "l")
	p, _ := open(t, "oci:"+dir)
	d := testImage{layers: layersOf(1, 2)}.put(t, p, "v1")
	_, raw, err := p.Manifest(t.Context(), "v1")
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"blobs/sha256/" + m.Layers[1].Digest.Encoded(), "blobs/sha256/" + m.Config.Digest.Encoded(), "blobs/sha256/" + d.Digest.Encoded(), "index.json"} {
		path = filepath.Join(dir, path)
		for name, put := range map[string]func() error{
			"FIFO":      func() error { return unix.Mkfifo(path, 0o600) },
			"directory": func() error { return os.Mkdir(path, 0o700) },
			"device":    func() error { return os.Symlink("/dev/zero", path) },
		} {
			if err := os.Rename(path, path+".kept"); err != nil {
				t.Fatal(err)
			}
			if err := put(); err != nil {
				t.Fatal(err)
			}
			if _, err := Create(t.Context(), p, "v1", CreateOptions{}); err == nil || !strings.Contains(err.Error(), "not a regular file") {
				t.Errorf("%s in the place of %s: got %v", name, path, err)
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(path+".kept", path); err != nil {
				t.Fatal(err)
			}
		}
	}
	create(t, "oci:"+dir+":v1", CreateOptions{})
}

// TestHostileRegistry: a registry that changes bytes on the way is caught.
func TestHostileRegistry(t *testing.T) {
	for name, fault := range map[string]registrytest.Fault{
		"flipped": registrytest.Flip(20_000), "cut short": registrytest.Truncate(20_000),
	} {
		t.Run(name, func(t *testing.T) {
			r := registrytest.Start(t, registrytest.Options{})
			p, _ := open(t, r.Host()+"/app:v1")
			d := testImage{layers: []testLayer{{tar: tarOf(1, 5), mediaType: ocispec.MediaTypeImageLayer}}}.put(t, p, "v1")
			r.Inject(registrytest.Blobs, -1, fault)
			if _, err := Create(t.Context(), p, "v1", CreateOptions{}); err == nil {
				t.Error("created")
			}
			if list := referrers(t, p, d.Digest); len(list) != 0 {
				t.Errorf("referrers %+v", list)
			}
		})
	}
}

// TestHostileIndex: indexes are followed so far and no further.
func TestHostileIndex(t *testing.T) {
	start := func(t *testing.T) (*registrytest.Registry, Place) {
		r := registrytest.Start(t, registrytest.Options{})
		p, _ := open(t, r.Host()+"/app:v1")
		return r, p
	}
	refuse := func(t *testing.T, p Place, says string) {
		t.Helper()
		_, err := Create(t.Context(), p, "v1", CreateOptions{})
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("got %v, want it to say %q", err, says)
		}
	}
	t.Run("nested", func(t *testing.T) {
		_, p := start(t)
		d := testImage{layers: layersOf(1, 1)}.put(t, p, "")
		for range maxIndexDepth {
			d = putIndex(t, p, "v1", d)
		}
		if _, err := Create(t.Context(), p, "v1", CreateOptions{}); err != nil {
			t.Errorf("%d deep: %v", maxIndexDepth, err)
		}
		putIndex(t, p, "v1", d)
		refuse(t, p, "indexes")
	})
	t.Run("cyclic", func(t *testing.T) {
		// A digest cannot lie in what it is the digest of; a registry that does not care answers anything to it.
		r, p := start(t)
		child := digest.FromString("child")
		raw := `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageIndex + `","manifests":[{"mediaType":"` + ocispec.MediaTypeImageIndex + `","digest":"` + child.String() + `","size":1}]}`
		r.Inject(registrytest.Manifests, -1, registrytest.Answer(ocispec.MediaTypeImageIndex, raw))
		refuse(t, p, "does not match")
	})
	t.Run("lists itself by name", func(t *testing.T) {
		_, p := start(t)
		d := testImage{layers: layersOf(1, 1)}.put(t, p, "")
		inner := putIndex(t, p, "", d)
		putIndex(t, p, "v1", inner, inner, d, inner)
		done, err := Create(t.Context(), p, "v1", CreateOptions{})
		if err != nil || len(done) != 1 {
			t.Errorf("%v, %+v", err, done)
		}
	})
	t.Run("too many", func(t *testing.T) {
		r, p := start(t)
		index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
		for i := range maxManifests + 1 {
			index.Manifests = append(index.Manifests, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes([]byte{byte(i), byte(i >> 8)}), Size: 1})
		}
		r.Inject(registrytest.Manifests, -1, registrytest.Answer(ocispec.MediaTypeImageIndex, marshal(t, index)))
		refuse(t, p, "more than 1000")
	})
	t.Run("too large", func(t *testing.T) {
		r, p := start(t)
		r.Inject(registrytest.Manifests, -1, registrytest.Answer(ocispec.MediaTypeImageIndex, `{"x":"`+strings.Repeat("x", maxManifestSize)+`"}`))
		refuse(t, p, "not accepted")
	})
	t.Run("lying size", func(t *testing.T) {
		_, p := start(t)
		d := testImage{layers: layersOf(1, 1)}.put(t, p, "")
		d.Size++
		putIndex(t, p, "v1", d)
		refuse(t, p, "its descriptor says")
	})
	t.Run("lying type", func(t *testing.T) {
		_, p := start(t)
		d := testImage{layers: layersOf(1, 1)}.put(t, p, "")
		d.MediaType = dockerManifest
		putIndex(t, p, "v1", d)
		refuse(t, p, string(UnsupportedMediaType))
	})
	t.Run("not JSON", func(t *testing.T) {
		r, p := start(t)
		r.Inject(registrytest.Manifests, -1, registrytest.Answer(ocispec.MediaTypeImageIndex, "<html>"))
		refuse(t, p, "parse manifest")
	})
}

// TestVerifyReader pins what a blob's reader does with too little, too much and other bytes.
func TestVerifyReader(t *testing.T) {
	d := ocispec.Descriptor{Digest: digest.FromString("hello"), Size: 5}
	for body, ok := range map[string]bool{"hello": true, "hell": false, "hello!": false, "jello": false, "": false} {
		for _, r := range []io.Reader{strings.NewReader(body), iotest.OneByteReader(strings.NewReader(body))} {
			v, err := newVerifyReader(r, d)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(v); (err == nil) != ok {
				t.Errorf("%q: read %q, %v", body, got, err)
			}
		}
	}
	for _, d := range []ocispec.Descriptor{{Digest: "sha256:zz", Size: 1}, {Digest: digest.FromString(""), Size: -1}, {}} {
		if _, err := newVerifyReader(strings.NewReader(""), d); err == nil {
			t.Errorf("%+v is accepted", d)
		}
	}
}

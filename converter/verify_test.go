package converter

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

func marshal(t *testing.T, v any) string {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

// verifyDiffers runs Verify on what ref names and wants a difference that says so.
func verifyDiffers(t *testing.T, p Place, ref, says string) {
	t.Helper()
	_, err := Verify(t.Context(), p, ref, VerifyOptions{})
	if !errors.Is(err, ErrDifferent) || !strings.Contains(err.Error(), says) {
		t.Errorf("got %v, want a difference that says %q", err, says)
	}
}

// isNotSigned wants the artifact that ref names, and whoever has attached, not to be signed.
func isNotSigned(t *testing.T, p Place, ref string) {
	t.Helper()
	if _, err := Sign(t.Context(), p, ref, nil, noSigner{t}); err == nil {
		t.Error("it is signed")
	}
}

// noSigner must not be asked to sign.
type noSigner struct{ t *testing.T }

func (s noSigner) Sign(context.Context, trust.Target) (e trust.Envelope, annotations map[string]string, err error) {
	s.t.Error("what was not proven is to be signed")
	return e, nil, nil
}

func (s noSigner) Signed(context.Context, trust.Target, trust.Envelope) (bool, error) {
	return false, nil
}
func (s noSigner) String() string { return "nobody" }

// TestVerifyFlipped: a byte changed anywhere in a layer's blob is found, and so is one missing.
func TestVerifyFlipped(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "l")
	p, _ := open(t, "oci:"+dir+":v1")
	testImage{layers: layersOf(1, 3)}.put(t, p, "v1")
	c := create(t, "oci:"+dir+":v1", CreateOptions{})[0]
	l := c.Layers[1]
	path := filepath.Join(dir, "blobs", "sha256", l.Digest.Encoded())
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, 5, 1000, l.Size / 2, l.Size - l.IndexSize - 1, l.Size - l.IndexSize, l.Size - l.IndexSize + 9, l.Size - l.IndexSize/2, l.Size - 1} {
		t.Run(fmt.Sprint("byte ", off, " of ", l.Size), func(t *testing.T) {
			bad := bytes.Clone(good)
			bad[off] ^= 0x10
			if err := os.WriteFile(path, bad, 0o644); err != nil {
				t.Fatal(err)
			}
			verifyDiffers(t, p, "v1", "layer 1, "+l.Digest.String())
		})
	}
	for name, bad := range map[string][]byte{"cut short": good[:len(good)-1], "longer": append(bytes.Clone(good), 0), "empty": {}} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(path, bad, 0o644); err != nil {
				t.Fatal(err)
			}
			verifyDiffers(t, p, "v1", "layer 1")
		})
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	verifyDiffers(t, p, "v1", "not in oci:")
	if err := os.WriteFile(path, good, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(t.Context(), p, "v1", VerifyOptions{}); err != nil {
		t.Errorf("put right again: %v", err)
	}
}

// TestVerifyForged: artifacts whose parts are all well formed, and which are not the image's.
func TestVerifyForged(t *testing.T) {
	image := "oci:" + filepath.Join(t.TempDir(), "l")
	p, _ := open(t, image)
	layers := layersOf(1, 2)
	img := testImage{layers: layers}
	d := img.put(t, p, "v1")
	other := testImage{layers: layersOf(5, 2)}
	otherDesc := other.put(t, p, "other")
	c := create(t, image+":v1", CreateOptions{})[0]
	evil := create(t, image+":other", CreateOptions{})[0]
	forge := func(change func(m *artifact.Manifest)) string {
		m := manifestOf(t, p, c)
		change(m)
		return attachForged(t, p, m).String()
	}
	evilLayers := manifestOf(t, p, evil).Layers
	tests := []struct {
		name, says string
		change     func(m *artifact.Manifest)
	}{
		{"another image's layer", "layer 0", func(m *artifact.Manifest) {
			src := m.Layers[0].Source
			m.Layers[0] = evilLayers[0]
			m.Layers[0].Source = src
		}},
		{"swapped layers", "layer 0", func(m *artifact.Manifest) { m.Layers[0], m.Layers[1] = m.Layers[1], m.Layers[0] }},
		{"swapped layers that say otherwise", "layer 0", func(m *artifact.Manifest) {
			m.Layers[0], m.Layers[1] = m.Layers[1], m.Layers[0]
			m.Layers[0].Source, m.Layers[1].Source = m.Layers[1].Source, m.Layers[0].Source
		}},
		{"a layer less", "1 layers, the image 2", func(m *artifact.Manifest) { m.Layers = m.Layers[:1] }},
		{"a layer more", "3 layers, the image 2", func(m *artifact.Manifest) { m.Layers = append(m.Layers, m.Layers[0]) }},
		{"another subject", "its config", func(m *artifact.Manifest) { m.Subject = bare(otherDesc) }},
		{"a subject that is not there", "is not in", func(m *artifact.Manifest) { m.Subject.Digest = digest.FromString("x") }},
		{"a subject of another type", "is of type", func(m *artifact.Manifest) { m.Subject.MediaType = dockerManifest }},
		{"another config", "its config", func(m *artifact.Manifest) {
			m.Config = manifestOf(t, p, evil).Config
			m.Config.Digest = digest.FromString("x")
		}},
		{"another platform", "its platform", func(m *artifact.Manifest) { m.Platform.Architecture = "arm64" }},
		{"another index digest", "layer 1", func(m *artifact.Manifest) { m.Layers[1].IndexDigest = digest.FromString("x") }},
		{"another index offset", "layer 1", func(m *artifact.Manifest) {
			m.Layers[1].IndexOffset--
			m.Layers[1].IndexSize++
		}},
		{"another size", "layer 1", func(m *artifact.Manifest) {
			m.Layers[1].Size++
			m.Layers[1].IndexSize++
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ref := forge(tt.change)
			verifyDiffers(t, p, ref, tt.says)
			isNotSigned(t, p, ref)
		})
	}

	t.Run("a layer like it but for one name", func(t *testing.T) {
		ref := forge(func(m *artifact.Manifest) { m.Layers[0] = lie(t, p, layers[0].tar, m.Layers[0].Source) })
		verifyDiffers(t, p, ref, "layer 0")
		isNotSigned(t, p, ref)
	})
	if _, err := Verify(t.Context(), p, c.Artifact.Digest.String(), VerifyOptions{}); err != nil {
		t.Errorf("the honest one: %v", err)
	}
	// All the forged ones are attached to the image: verifying the image finds one of them.
	if list := referrers(t, p, d.Digest); len(list) < 5 {
		t.Errorf("%d referrers", len(list))
	}
	verifyDiffers(t, p, "v1", "artifact sha256:")
}

// attachForged attaches an artifact.
func attachForged(t *testing.T, p Place, m *artifact.Manifest) digest.Digest {
	t.Helper()
	raw, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	if err := p.PutManifest(t.Context(), d, raw, ""); err != nil {
		t.Fatal(err)
	}
	return d.Digest
}

// lie stores a layer like a tar but for one name, which says that it is made from source.
func lie(t *testing.T, p Place, honest []byte, source digest.Digest) artifact.Layer {
	t.Helper()
	var blob bytes.Buffer
	liar := bytes.Clone(honest)
	i := bytes.Index(liar, []byte("file0"))
	copy(liar[i:], "filex")
	fixChecksum(liar[i/512*512:])
	enc, err := artifact.EncodeLayer(t.Context(), &blob, bytes.NewReader(liar), artifact.EncodeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	putBlob(t, p, artifact.LayerMediaType, blob.Bytes())
	enc.Layer.Source = source
	return enc.Layer
}

// fixChecksum computes a tar header's checksum again.
func fixChecksum(h []byte) {
	copy(h[148:156], "        ")
	sum := 0
	for _, b := range h[:512] {
		sum += int(b)
	}
	copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
}

// TestVerifyListedElsewhere: a registry that lists another image's artifact as the image's is caught.
func TestVerifyListedElsewhere(t *testing.T) {
	image := dockerRegistry(t, true) + "/app"
	p, _ := open(t, image+":v1")
	d := testImage{layers: layersOf(1, 1)}.put(t, p, "v1")
	testImage{layers: layersOf(5, 1)}.put(t, p, "other")
	evil := create(t, image+":other", CreateOptions{})[0]
	entry := evil.Artifact
	putManifest(t, p, ocispec.MediaTypeImageIndex, referrersTag(d.Digest), map[string]any{
		"schemaVersion": 2, "mediaType": ocispec.MediaTypeImageIndex, "manifests": []ocispec.Descriptor{entry},
	})
	verifyDiffers(t, p, "v1", "its subject is")
	// Such an artifact is no reason not to make the image's own.
	if c := create(t, image+":v1", CreateOptions{})[0]; c.Status != StatusCreated {
		t.Errorf("%+v", c)
	}
	if _, err := Verify(t.Context(), p, "other", VerifyOptions{}); err != nil {
		t.Errorf("the other image's artifact: %v", err)
	}
}

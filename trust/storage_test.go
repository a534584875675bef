package trust

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestManifestOfASignature(t *testing.T) {
	subject := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("artifact"), Size: 8,
		ArtifactType: "application/x", Annotations: map[string]string{"a": "b"}}
	e := Envelope{Digest: digest.FromString("envelope"), MediaType: "application/jose+json", Bytes: []byte("envelope")}
	desc, raw, err := Manifest(subject, e, map[string]string{"io.cncf.notary.x509chain.thumbprint#S256": `["00"]`})
	if err != nil {
		t.Fatal(err)
	}
	if desc.Digest != digest.FromBytes(raw) || desc.Size != int64(len(raw)) || desc.ArtifactType != SignatureType {
		t.Errorf("descriptor %+v of %d bytes", desc, len(raw))
	}
	// What notation-go and oras push but for the hints: the fields and their order, the subject bare.
	want := `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",` +
		`"config":{"mediaType":"application/vnd.cncf.notary.signature","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},` +
		`"layers":[{"mediaType":"application/jose+json","digest":"` + e.Digest.String() + `","size":8}],` +
		`"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + subject.Digest.String() + `","size":8},` +
		`"annotations":{"io.cncf.notary.x509chain.thumbprint#S256":"[\"00\"]","streaming.signature.digest":"` + e.Digest.String() +
		`","streaming.signature.size":"8","streaming.signature.type":"application/jose+json"}}`
	if string(raw) != want {
		t.Errorf("got  %s\nwant %s", raw, want)
	}

	got, err := EnvelopeOf(raw, subject.Digest)
	if err != nil || got.Digest != e.Digest || got.Size != 8 || got.MediaType != e.MediaType {
		t.Errorf("EnvelopeOf: %+v, %v", got, err)
	}
	if hint, ok := HintOf(desc.Annotations); !ok || hint.Digest != e.Digest || hint.Size != 8 || hint.MediaType != e.MediaType {
		t.Errorf("HintOf: %+v, %v", hint, ok)
	}
}

func TestRefusedManifestsOfSignatures(t *testing.T) {
	subject := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("artifact"), Size: 8}
	e := Envelope{Digest: digest.FromString("envelope"), MediaType: "application/cose", Bytes: []byte("envelope")}
	_, good, err := Manifest(subject, e, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(m *ocispec.Manifest){
		"of another artifact":  func(m *ocispec.Manifest) { m.Subject.Digest = digest.FromString("another") },
		"without a subject":    func(m *ocispec.Manifest) { m.Subject = nil },
		"without an envelope":  func(m *ocispec.Manifest) { m.Layers = nil },
		"two envelopes":        func(m *ocispec.Manifest) { m.Layers = append(m.Layers, m.Layers[0]) },
		"too large":            func(m *ocispec.Manifest) { m.Layers[0].Size = MaxEnvelope + 1 },
		"of no bytes":          func(m *ocispec.Manifest) { m.Layers[0].Size = 0 },
		"less than none":       func(m *ocispec.Manifest) { m.Layers[0].Size = -1 },
		"no media type":        func(m *ocispec.Manifest) { m.Layers[0].MediaType = "" },
		"sha512":               func(m *ocispec.Manifest) { m.Layers[0].Digest = digest.Digest("sha512:" + strings.Repeat("ab", 64)) },
		"digest of upper case": func(m *ocispec.Manifest) { m.Layers[0].Digest = digest.Digest("sha256:" + strings.Repeat("AB", 32)) },
		"digest cut short":     func(m *ocispec.Manifest) { m.Layers[0].Digest = m.Layers[0].Digest[:40] },
		"digest that is a path": func(m *ocispec.Manifest) {
			m.Layers[0].Digest = digest.Digest("sha256:../" + strings.Repeat("a", 61))
		},
	} {
		var m ocispec.Manifest
		if err := json.Unmarshal(good, &m); err != nil {
			t.Fatal(err)
		}
		change(&m)
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if d, err := EnvelopeOf(b, subject.Digest); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %+v, %v", name, d, err)
		}
	}
	for name, b := range map[string][]byte{"nothing": nil, "no JSON": []byte("<html>"), "a list without end": []byte(`{"layers":[` + strings.Repeat(`{},`, 1<<16) + `{}]}`)} {
		if _, err := EnvelopeOf(b, subject.Digest); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := Manifest(subject, Envelope{Digest: e.Digest, MediaType: e.MediaType, Bytes: make([]byte, MaxEnvelope+1)}, nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("an envelope that nodes refuse is stored: %v", err)
	}
}

func TestHints(t *testing.T) {
	good := Hints(ocispec.Descriptor{MediaType: "application/cose", Digest: digest.FromString("envelope"), Size: 8})
	if _, ok := HintOf(good); !ok {
		t.Fatalf("%v is no hint", good)
	}
	for name, change := range map[string]func(h map[string]string){
		"none":      func(h map[string]string) { clear(h) },
		"no digest": func(h map[string]string) { delete(h, HintDigest) },
		"no type":   func(h map[string]string) { delete(h, HintType) },
		"no size":   func(h map[string]string) { delete(h, HintSize) },
		"no number": func(h map[string]string) { h[HintSize] = "8 bytes" },
		"large":     func(h map[string]string) { h[HintSize] = "1048577" },
		"sha512":    func(h map[string]string) { h[HintDigest] = "sha512:" + strings.Repeat("ab", 64) },
	} {
		h := maps.Clone(good)
		change(h)
		if d, ok := HintOf(h); ok {
			t.Errorf("%s: %+v", name, d)
		}
	}
}

func TestClasses(t *testing.T) {
	if !errors.Is(ErrIdentity, ErrUntrusted) || errors.Is(ErrUntrusted, ErrIdentity) {
		t.Error("a wrong identity is untrusted, and not the other way round")
	}
}

func FuzzSignatureManifest(f *testing.F) {
	subject := digest.FromString("artifact")
	e := Envelope{Digest: digest.FromString("envelope"), MediaType: "application/jose+json", Bytes: []byte("envelope")}
	_, good, err := Manifest(ocispec.Descriptor{MediaType: "m", Digest: subject, Size: 8}, e, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(bytes.Replace(good, []byte(`"layers"`), []byte(`"LAYERS"`), 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := EnvelopeOf(b, subject)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if hint, ok := HintOf(Hints(d)); !ok || hint.Digest != d.Digest || hint.Size != d.Size || hint.MediaType != d.MediaType {
			t.Fatalf("%+v, as a hint %+v", d, hint)
		}
	})
}

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

// signingWorld is a registry with an image, a key, and notation's directory that trusts it.
type signingWorld struct {
	registry            *registrytest.Registry
	image, dir          string
	keyFile, certFile   string
	otherKey, otherCert string // of another authority
}

func newSigningWorld(t *testing.T, o registrytest.Options) *signingWorld {
	t.Helper()
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	w := &signingWorld{registry: registrytest.Start(t, o)}
	w.image = w.registry.Host() + "/team/app:v1"
	putImage(t, w.image, "linux/amd64")
	ca := trusttest.NewCA(t, "authority", nil)
	w.dir = trusttest.NewDir(t, ca, trusttest.Statement{Name: "team", Scopes: []string{w.registry.Host() + "/team/app"}, Identities: []string{"x509.subject:" + trusttest.Subject("build")}})
	w.keyFile, w.certFile = ca.Issue(t, "build", trusttest.Leaf{}).Files(t, t.TempDir())
	w.otherKey, w.otherCert = trusttest.NewCA(t, "other", nil).Issue(t, "build", trusttest.Leaf{}).Files(t, t.TempDir())
	keys, err := json.Marshal(map[string]any{"default": "build", "keys": []any{map[string]string{"name": "build", "keyPath": w.keyFile, "certPath": w.certFile}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.dir, "signingkeys.json"), keys, 0o600); err != nil {
		t.Fatal(err)
	}
	return w
}

// referrersOf lists the referrers of a manifest beside image.
func referrersOf(t *testing.T, image string, of digest.Digest) []ocispec.Descriptor {
	t.Helper()
	p, _, err := converter.Open(image, converter.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	list, err := p.Referrers(t.Context(), of)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func parsed[T any](t *testing.T, s string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(s), &v); err != nil {
		t.Fatalf("%v: %s", err, s)
	}
	return v
}

// TestSigning: an artifact is signed when it is made, or later; signatures are shown, checked, copied and deleted with it.
func TestSigning(t *testing.T) {
	for name, o := range map[string]registrytest.Options{"referrers API": {}, "tag schema": {NoReferrers: true}} {
		t.Run(name, func(t *testing.T) {
			w := newSigningWorld(t, o)
			stdout, _ := succeed(t, "create", w.image, "--sign-key", w.keyFile, "--sign-cert", w.certFile, "--signature-format", "cose", "-o", "json")
			made := parsed[createResult](t, stdout).Artifacts[0]
			if made.Signature == nil || made.Signature.Status != converter.StatusCreated {
				t.Fatalf("created %+v", made)
			}
			list := referrersOf(t, w.image, made.Artifact.Digest)
			if len(list) != 1 || list[0].ArtifactType != trust.SignatureType || list[0].Digest != made.Signature.Signature {
				t.Fatalf("referrers of the artifact: %+v", list)
			}
			if hint, ok := trust.HintOf(list[0].Annotations); !ok || hint.MediaType != "application/cose" {
				t.Errorf("hint %+v of %v", hint, list[0].Annotations)
			}

			stdout, stderr := succeed(t, "verify", w.image, "--signed", "--notation-dir", w.dir)
			if !strings.Contains(stdout, trusttest.Subject("build")+`", whom the trust policy trusts`) || !strings.Contains(stderr, "without its digest") {
				t.Errorf("verify: %s%s", stdout, stderr)
			}
			stdout, _ = succeed(t, "inspect", w.image)
			if !strings.Contains(stdout, trusttest.Subject("build")) || !strings.Contains(stdout, "not checked") {
				t.Errorf("inspect: %s", stdout)
			}
			// What is signed is not signed again, by the same command or another; by another key it is.
			stdout, _ = succeed(t, "create", w.image, "--sign", "build", "--notation-dir", w.dir, "-o", "json")
			if s := parsed[createResult](t, stdout).Artifacts[0].Signature; s == nil || s.Status != converter.StatusExists {
				t.Errorf("signed again: %s", stdout)
			}
			stdout, _ = succeed(t, "sign", w.image, "--notation-dir", w.dir)
			if !strings.Contains(stdout, "was signed before") {
				t.Errorf("sign: %s", stdout)
			}
			succeed(t, "sign", w.image, "--sign-key", w.otherKey, "--sign-cert", w.otherCert)
			if list := referrersOf(t, w.image, made.Artifact.Digest); len(list) != 2 {
				t.Fatalf("referrers of the artifact: %+v", list)
			}
			succeed(t, "verify", w.image, "--signed", "--notation-dir", w.dir) // one that is trusted is enough

			// A copy has them, and so has a layout.
			layout := "oci:" + t.TempDir() + ":v1"
			succeed(t, "cp", w.image, layout)
			stdout, _ = succeed(t, "verify", layout, "--signed", "--notation-dir", w.dir, "--scope", w.registry.Host()+"/team/app")
			if strings.Count(stdout, " signature ") != 2 {
				t.Errorf("verify of the copy: %s", stdout)
			}

			stdout, _ = succeed(t, "delete", w.image)
			if strings.Count(stdout, "deleted") < 3 {
				t.Errorf("deleted %s", stdout)
			}
			if list := referrersOf(t, w.image, made.Artifact.Digest); len(list) != 0 {
				t.Errorf("signatures of nothing: %+v", list)
			}
		})
	}
}

// TestForceKeepsSigned: a conversion that replaces an artifact signs the new one before the old one goes, and takes the old one's signature with it.
func TestForceKeepsSigned(t *testing.T) {
	w := newSigningWorld(t, registrytest.Options{})
	sign := []string{"--sign", "", "--notation-dir", w.dir, "-o", "json"}
	stdout, _ := succeed(t, append([]string{"create", w.image, "--chunk-size", "64KiB"}, sign...)...)
	old := parsed[createResult](t, stdout).Artifacts[0]
	var order []string
	w.registry.Inject(func(r *http.Request) bool {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") || r.Method == http.MethodDelete {
			order = append(order, r.Method)
		}
		return false
	}, 1, registrytest.Status(http.StatusTeapot))
	stdout, _ = succeed(t, append([]string{"create", w.image, "--force"}, sign...)...)
	made := parsed[createResult](t, stdout).Artifacts[0]
	if made.Artifact.Digest == old.Artifact.Digest || made.Signature == nil || made.Signature.Status != converter.StatusCreated {
		t.Fatalf("%+v", made)
	}
	if got := strings.Join(order, " "); !strings.HasPrefix(got, "PUT PUT DELETE DELETE") {
		t.Errorf("manifests: %s; want the artifact, its signature, and then the old ones gone", got)
	}
	if list := referrersOf(t, w.image, old.Artifact.Digest); len(list) != 0 {
		t.Errorf("the old one's signatures stay: %+v", list)
	}
	succeed(t, "verify", w.image, "--signed", "--notation-dir", w.dir)
}

// TestNotSigned: what has no signature that counts is refused, with the reason; and a key that does not sign leaves nothing half done.
func TestNotSigned(t *testing.T) {
	w := newSigningWorld(t, registrytest.Options{})
	refused := func(want string, args ...string) {
		t.Helper()
		if status, _, stderr := streamctl(t, args...); status != 1 || !strings.Contains(stderr, want) {
			t.Errorf("%q: status %d, %s; want %s", args, status, stderr, want)
		}
	}
	succeed(t, "create", w.image)
	verify := []string{"verify", w.image, "--signed", "--notation-dir", w.dir}
	refused("not signed", verify...)
	succeed(t, "sign", w.image, "--sign-key", w.otherKey, "--sign-cert", w.otherCert)
	refused("untrusted signature", verify...)
	stdout, _ := succeed(t, "inspect", w.image, "-o", "json")
	list := parsed[struct{ Artifacts []converter.Inspection }](t, stdout).Artifacts[0].Signatures
	if len(list) != 1 || list[0].Identity != trusttest.Subject("build") {
		t.Errorf("signatures %+v", list)
	}
	refused("no such file", "create", w.image, "--sign-key", w.keyFile+"x", "--sign-cert", w.certFile)
	refused("unknown", "sign", w.image, "--notation-dir", w.dir, "--key", "unknown")
	refused("trustpolicy.json", "verify", w.image, "--signed", "--notation-dir", t.TempDir())

	// A signature whose envelope is gone, or is of another artifact, counts for nothing.
	p, _, err := converter.Open(w.image, converter.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	d := list[0]
	_, raw, err := p.Manifest(t.Context(), d.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	succeed(t, "create", w.image, "--force", "--chunk-size", "64KiB")
	stdout, _ = succeed(t, "inspect", w.image, "-o", "json")
	now := parsed[struct{ Artifacts []converter.Inspection }](t, stdout).Artifacts[0]
	forged := strings.ReplaceAll(string(raw), parsed[ocispec.Manifest](t, string(raw)).Subject.Digest.String(), now.Artifact.String())
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(forged), Size: int64(len(forged))}
	if err := p.PutManifest(t.Context(), desc, []byte(forged), ""); err != nil {
		t.Fatal(err)
	}
	refused("invalid signature", verify...)
}

// TestSignedBesideOthers: an artifact and a profile that somebody has attached, and nobody can read, keep no other artifact from being signed.
func TestSignedBesideOthers(t *testing.T) {
	for _, kind := range []string{artifact.ArtifactType, artifact.ProfileType} {
		t.Run(kind, func(t *testing.T) {
			w := newSigningWorld(t, registrytest.Options{})
			p, ref, err := converter.Open(w.image, converter.OpenOptions{})
			if err != nil {
				t.Fatal(err)
			}
			subject, err := p.Resolve(t.Context(), ref)
			if err != nil {
				t.Fatal(err)
			}
			stdout, _ := succeed(t, "create", w.image, "-o", "json")
			made := parsed[createResult](t, stdout).Artifacts[0].Artifact.Digest
			d, honest, err := p.Manifest(t.Context(), made.String())
			if err != nil {
				t.Fatal(err)
			}
			succeed(t, "delete", w.image) // it comes behind the other
			raw, err := json.Marshal(ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: kind, Config: ocispec.DescriptorEmptyJSON, Layers: []ocispec.Descriptor{}, Subject: &subject})
			if err != nil {
				t.Fatal(err)
			}
			bad := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
			empty := func() (io.ReadCloser, error) {
				return io.NopCloser(bytes.NewReader(ocispec.DescriptorEmptyJSON.Data)), nil
			}
			if err := errors.Join(p.PutBlob(t.Context(), ocispec.DescriptorEmptyJSON, empty), p.PutManifest(t.Context(), bad, raw, ""), p.PutManifest(t.Context(), d, honest, "")); err != nil {
				t.Fatal(err)
			}
			status, stdout, stderr := streamctl(t, "sign", w.image, "--sign-key", w.keyFile, "--sign-cert", w.certFile)
			if refused := kind == artifact.ArtifactType; refused != (status == 1) || refused != strings.Contains(stderr, bad.Digest.String()) {
				t.Errorf("status %d, %s", status, stderr)
			}
			if list := referrersOf(t, w.image, made); len(list) != 1 || !strings.Contains(stdout, list[0].Digest.String()) {
				t.Errorf("signatures %+v, said %s", list, stdout)
			}
		})
	}
}

// TestAdopt: profiles name the signature, whoever made it, and name the next one when that is made.
func TestAdopt(t *testing.T) {
	w := newSigningWorld(t, registrytest.Options{})
	subject := putImage(t, w.image, "linux/amd64")
	stdout, _ := succeed(t, "create", w.image, "-o", "json")
	made := parsed[createResult](t, stdout).Artifacts[0]
	p, _, err := converter.Open(w.image, converter.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, raw, err := p.Manifest(t.Context(), made.Artifact.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	m, err := artifact.DecodeManifest(raw)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(&artifact.Profile{Layers: []digest.Digest{m.Layers[0].IndexDigest}, Chunks: []artifact.HotChunk{{}}})
	if err != nil {
		t.Fatal(err)
	}
	record := filepath.Join(t.TempDir(), "record")
	if err := os.WriteFile(record, b, 0o600); err != nil {
		t.Fatal(err)
	}
	succeed(t, "profile", "push", w.image, record)
	hint := func() (hint ocispec.Descriptor, ok bool) {
		t.Helper()
		n := 0
		for _, d := range referrersOf(t, w.image, subject) {
			if d.ArtifactType == artifact.ProfileType {
				n++
				hint, ok = trust.HintOf(d.Annotations)
			}
		}
		if n != 1 {
			t.Fatalf("%d profiles", n)
		}
		return hint, ok
	}
	succeed(t, "sign", w.image, "--sign-key", w.otherKey, "--sign-cert", w.otherCert, "--sign-expiry", "24h")
	if h, ok := hint(); ok {
		t.Fatalf("hint %+v, and nobody wanted one", h)
	}
	succeed(t, "sign", "--adopt", w.image)
	first, ok := hint()
	if !ok {
		t.Fatal("the profile does not say where the signature is")
	}
	succeed(t, "verify", w.image)
	for _, d := range referrersOf(t, w.image, made.Artifact.Digest) {
		if h, _ := trust.HintOf(d.Annotations); h.Digest != first.Digest {
			t.Errorf("the profile says %s, the signature is %s", first.Digest, h.Digest)
		}
	}
	succeed(t, "sign", w.image, "--sign-key", w.keyFile, "--sign-cert", w.certFile)
	if next, ok := hint(); !ok || next.Digest == first.Digest {
		t.Errorf("the profile still says %+v", next)
	}
	succeed(t, "profile", "push", w.image, record)
	if _, ok := hint(); !ok {
		t.Error("the next profile says nothing")
	}
}

// TestSubject: an artifact named by its own digest says itself whose it is; --subject does not take its word.
func TestSubject(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	host := registrytest.Start(t, registrytest.Options{}).Host()
	subject, other := putImage(t, host+"/team/app:v1", "linux/amd64"), putImageOf(t, host+"/team/app:v2", "linux/amd64", "other")
	stdout, _ := succeed(t, "create", host+"/team/app:v1", "-o", "json")
	made := parsed[createResult](t, stdout).Artifacts[0]
	name := host + "/team/app@" + made.Artifact.Digest.String()
	stdout, stderr := succeed(t, "verify", name, "--subject", subject.String(), "-o", "json")
	got := parsed[struct{ Verified []converter.Verified }](t, stdout).Verified[0]
	if got.Image != subject || len(got.DiffIDs) != 2 || strings.Contains(stderr, "warning") {
		t.Errorf("verified %+v, %s", got, stderr)
	}
	for of, want := range map[string]string{other.String(): "is not", digest.FromString("nothing").String(): "not found"} {
		if status, _, stderr := streamctl(t, "verify", name, "--subject", of); status != 1 || !strings.Contains(stderr, want) {
			t.Errorf("--subject %s: status %d, %s", of, status, stderr)
		}
	}
	stdout, stderr = succeed(t, "verify", host+"/team/app@"+subject.String())
	if !strings.Contains(stdout, "are those of "+subject.String()) || strings.Contains(stderr, "warning") {
		t.Errorf("by digest: %s%s", stdout, stderr)
	}
}

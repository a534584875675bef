package converter

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// signed attaches a signature of the manifest d.
func signed(t *testing.T, p Place, d ocispec.Descriptor, text string) ocispec.Descriptor {
	subject := bare(d)
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/vnd.example.signature", Subject: &subject}
	m.SchemaVersion = 2
	m.Config = putBlob(t, p, ocispec.MediaTypeEmptyJSON, []byte("{}"))
	m.Layers = []ocispec.Descriptor{putBlob(t, p, "text/plain", []byte(text))}
	return putManifest(t, p, ocispec.MediaTypeImageManifest, "", m)
}

// TestCopy takes an index with artifacts, a profile, a signature of the index and one of an artifact from place to place, round all
// kinds of them, and finds everything as it was.
func TestCopy(t *testing.T) {
	first := places[0].open(t) + ":v1"
	p, _ := open(t, first)
	amd := testImage{layers: layersOf(1, 2)}.put(t, p, "")
	arm := testImage{layers: layersOf(1, 3), platform: ocispec.Platform{OS: "linux", Architecture: "arm64"}}.put(t, p, "")
	top := putIndex(t, p, "v1", amd, arm)
	done := create(t, first, CreateOptions{})
	signed(t, p, top, "of the index")
	signed(t, p, done[0].Artifact, "of an artifact")
	attach(t, p, "v1", twoLayers(manifestOf(t, p, done[0])), artifact.ProfileRecorded, time.Unix(1e9, 0))

	all := func(p Place) (list []digest.Digest) {
		for _, d := range []ocispec.Descriptor{top, amd, arm, done[0].Artifact, done[1].Artifact} {
			for _, r := range referrers(t, p, d.Digest) {
				list = append(list, r.Digest)
			}
		}
		slices.Sort(list)
		return list
	}
	want := all(p)
	if len(want) != 5 {
		t.Fatalf("%d referrers, want 5", len(want))
	}
	src := p
	for i, place := range append(places[1:], places[0]) {
		dst, tag := open(t, place.open(t)+":copy")
		ref := "copy"
		if i == 0 {
			ref = "v1"
		}
		c, err := Copy(t.Context(), src, ref, dst, tag, CopyOptions{})
		if err != nil {
			t.Fatalf("to %s: %v", place.name, err)
		}
		if c.Digest != top.Digest || c.Manifests != 8 || c.Referrers != 5 {
			t.Errorf("to %s: %+v", place.name, c)
		}
		if d, _, err := dst.Manifest(t.Context(), "copy"); err != nil || d.Digest != top.Digest {
			t.Errorf("to %s: %v, %v", place.name, d, err)
		}
		if got := all(dst); !slices.Equal(got, want) {
			t.Errorf("to %s: referrers %v, want %v", place.name, got, want)
		}
		if v, err := Verify(t.Context(), dst, "copy", VerifyOptions{}); err != nil || len(v[0].Profiles) != 1 {
			t.Errorf("to %s: %v, %+v", place.name, err, v)
		}
		// What is there is not copied again.
		if c, err = Copy(t.Context(), src, ref, dst, tag, CopyOptions{}); err != nil || c.Blobs != 0 {
			t.Errorf("again to %s: %+v, %v", place.name, c, err)
		}
		src = dst
	}
}

// TestCopyMounts: within a registry no bytes travel.
func TestCopyMounts(t *testing.T) {
	host := dockerRegistry(t, true)
	src, _ := open(t, host+"/one:v1")
	testImage{layers: layersOf(1, 2)}.put(t, src, "v1")
	create(t, host+"/one:v1", CreateOptions{})
	dst, tag := open(t, host+"/two:v1")
	c, err := Copy(t.Context(), src, "v1", dst, tag, CopyOptions{})
	if err != nil || c.Blobs != 0 || c.Manifests != 2 {
		t.Errorf("%+v, %v", c, err)
	}
	if _, err := Verify(t.Context(), dst, "v1", VerifyOptions{}); err != nil {
		t.Error(err)
	}
}

// TestCopyDamaged: other bytes than a digest says are not passed on.
func TestCopyDamaged(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "src")
	src, _ := open(t, "oci:"+dir+":v1")
	img := testImage{layers: layersOf(1, 1)}
	img.put(t, src, "v1")
	blob := img.layers[0].stored()
	path := filepath.Join(dir, "blobs", "sha256", digest.FromBytes(blob).Encoded())
	blob = bytes.Clone(blob)
	blob[len(blob)/2] ^= 1
	if err := os.WriteFile(path, blob, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, place := range []string{registrytest.Start(t, registrytest.Options{}).Host() + "/app:v1", "oci:" + filepath.Join(t.TempDir(), "dst") + ":v1"} {
		dst, tag := open(t, place)
		if c, err := Copy(t.Context(), src, "v1", dst, tag, CopyOptions{}); err == nil {
			t.Errorf("to %s: %+v", place, c)
		}
		if has, err := dst.HasBlob(t.Context(), digest.FromBytes(img.layers[0].stored())); has || err != nil {
			t.Errorf("to %s: the blob is there (%v)", place, err)
		}
		if _, _, err := dst.Manifest(t.Context(), "v1"); err == nil {
			t.Errorf("to %s: the manifest is there", place)
		}
	}
}

// TestOrdinaryImage: the tools that everybody has take the artifact for an image.
func TestOrdinaryImage(t *testing.T) {
	host := dockerRegistry(t, true)
	p, _ := open(t, host+"/app:v1")
	testImage{layers: allFormats()}.put(t, p, "v1")
	c := create(t, host+"/app:v1", CreateOptions{})[0]
	name := host + "/app@" + c.Artifact.Digest.String()
	tool := func(t *testing.T, name string, args ...string) []byte {
		bin, err := exec.LookPath(name)
		if err != nil {
			t.Skipf("%s is not in $PATH", name)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		out, err := exec.CommandContext(ctx, bin, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %q: %v\n%s", name, args, err, out)
		}
		return out
	}
	arrived := func(t *testing.T, place string) {
		p, ref := open(t, place)
		if d, _, err := p.Manifest(t.Context(), ref); err != nil || d.Digest != c.Artifact.Digest {
			t.Errorf("%s: %v, %v; want %s", place, d.Digest, err, c.Artifact.Digest)
		}
	}
	t.Run("crane copy", func(t *testing.T) {
		tool(t, "crane", "copy", name, host+"/copied:crane")
		arrived(t, host+"/copied:crane")
	})
	t.Run("crane export", func(t *testing.T) {
		out := filepath.Join(t.TempDir(), "out.tar")
		tool(t, "crane", "export", name, out)
		b, err := os.ReadFile(out)
		if err != nil || !bytes.Contains(b, []byte("d1/file0")) || !bytes.Contains(b, []byte("d6/file0")) {
			t.Errorf("exported %d bytes, %v", len(b), err)
		}
	})
	t.Run("skopeo copy", func(t *testing.T) {
		tool(t, "skopeo", "copy", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false", "docker://"+name, "docker://"+host+"/copied:skopeo")
		arrived(t, host+"/copied:skopeo")
	})
	t.Run("skopeo copy to a layout", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "out")
		tool(t, "skopeo", "copy", "--preserve-digests", "--src-tls-verify=false", "docker://"+name, "oci:"+dir+":v1")
		arrived(t, "oci:"+dir+":v1")
	})
	t.Run("layout of skopeo's", func(t *testing.T) {
		// Not of all formats: skopeo compresses again what begins with a skippable frame.
		testImage{layers: layersOf(1, 2)}.put(t, p, "plain")
		dir := filepath.Join(t.TempDir(), "in")
		tool(t, "skopeo", "copy", "--src-tls-verify=false", "docker://"+host+"/app:plain", "oci:"+dir+":v1")
		create(t, "oci:"+dir, CreateOptions{})
		if out := tool(t, "skopeo", "inspect", "oci:"+dir+":v1"); !bytes.Contains(out, []byte("amd64")) {
			t.Errorf("%s", out)
		}
	})
}

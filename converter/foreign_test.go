package converter

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/notary"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

// TestNotOurs: where the list of referrers is a tag, whoever may push can have it name anything. An image that it calls an artifact, a profile or a signature is not
// deleted for that, whatever else is.
func TestNotOurs(t *testing.T) {
	image := dockerRegistry(t, true) + "/app"
	p, _ := open(t, image+":v1")
	victim := testImage{layers: layersOf(5, 1)}.put(t, p, "production")
	d := testImage{layers: layersOf(1, 1)}.put(t, p, "v1")
	lie := func(of digest.Digest, types ...string) {
		t.Helper()
		list := referrers(t, p, of)
		for _, typ := range types {
			entry := bare(victim)
			entry.ArtifactType = typ
			list = append([]ocispec.Descriptor{entry}, list...)
		}
		putManifest(t, p, ocispec.MediaTypeImageIndex, referrersTag(of), ocispec.Index{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: list,
		})
	}
	there := func(what string) {
		t.Helper()
		if _, _, err := p.Manifest(t.Context(), victim.Digest.String()); err != nil {
			t.Fatalf("%s: the image that is named production: %v", what, err)
		}
	}
	for n, remove := range map[string]func() ([]digest.Digest, error){
		"artifacts": func() ([]digest.Digest, error) { return DeleteArtifacts(t.Context(), p, "v1", nil) },
		"referrers": func() ([]digest.Digest, error) { return DeleteReferrers(t.Context(), p, d.Digest) },
	} {
		lie(d.Digest, artifact.ArtifactType)
		c := create(t, image+":v1", CreateOptions{})[0]
		if there(n + ", create"); c.Status != StatusCreated || len(c.Warnings) == 0 {
			t.Errorf("%s: %+v", n, c)
		}
		lie(d.Digest, artifact.ArtifactType, artifact.ProfileType)
		lie(c.Artifact.Digest, trust.SignatureType)
		if deleted, err := DeleteSignatures(t.Context(), p, c.Artifact.Digest); !errors.Is(err, ErrNotOurs) || len(deleted) != 0 {
			t.Errorf("%s: deleted signatures %v, %v", n, deleted, err)
		}
		there(n + ", signatures")
		deleted, err := remove()
		if there(n); !errors.Is(err, ErrNotOurs) || !slices.Equal(deleted, []digest.Digest{c.Artifact.Digest}) {
			t.Errorf("%s: deleted %v, %v", n, deleted, err)
		}
	}
}

// TestAttachedByOthers: of an image to which a stranger has attached what looks like its artifact, our own is made if it is to be signed, and that alone is signed. What is
// not even of the image is no artifact for anybody.
func TestAttachedByOthers(t *testing.T) {
	signer := trusttest.NewCA(t, "authority", nil).Issue(t, "build", trusttest.Leaf{}).Signer(t, notary.SignOptions{})
	image := registrytest.Start(t, registrytest.Options{}).Host() + "/app"
	p, _ := open(t, image+":v1")
	img := testImage{layers: layersOf(1, 2)}
	d := img.put(t, p, "v1")
	honest := create(t, image+":v1", CreateOptions{})[0]
	m := manifestOf(t, p, honest)
	m.Layers[0] = lie(t, p, img.layers[0].tar, m.Layers[0].Source)
	lying := attachForged(t, p, m)
	m.Layers = m.Layers[:1]
	less := attachForged(t, p, m)
	if err := p.Delete(t.Context(), honest.Artifact.Digest, d.Digest); err != nil {
		t.Fatal(err)
	}

	planned := func(s trust.Signer) digest.Digest {
		t.Helper()
		list, err := Plan(t.Context(), p, "v1", CreateOptions{Options: Options{Signer: s}})
		if err != nil || len(list) != 1 {
			t.Fatalf("%+v, %v", list, err)
		}
		return list[0].Artifact
	}
	if got := planned(nil); got != lying {
		t.Errorf("without a signature the artifact is %s, want %s", got, lying)
	}
	if got := planned(signer); got != "" {
		t.Errorf("unsigned, %s counts", got)
	}
	for n, o := range []Options{{Signer: signer}, {Signer: signer, SigningOptional: true}} {
		c := create(t, image+":v1", CreateOptions{Options: o})[0]
		if want := []string{StatusCreated, StatusExists}[n]; c.Status != want || c.Artifact.Digest != honest.Artifact.Digest || c.Signature == nil || c.Signature.Status != want || len(c.Warnings) != 1-n {
			t.Errorf("%+v, want %s, %s", c, want, honest.Artifact.Digest)
		}
	}
	if got := planned(signer); got != honest.Artifact.Digest {
		t.Errorf("the artifact is %s, want ours", got)
	}
	for _, a := range []digest.Digest{lying, less} {
		if list := referrers(t, p, a); len(list) != 0 {
			t.Errorf("%s is signed: %+v", a, list)
		}
		if _, _, err := p.Manifest(t.Context(), a.String()); err != nil {
			t.Errorf("what others have attached: %v", err)
		}
	}

	// With the one alone that is not of the image.
	for _, a := range []digest.Digest{lying, honest.Artifact.Digest} {
		if err := p.Delete(t.Context(), a, d.Digest); err != nil {
			t.Fatal(err)
		}
	}
	if got := planned(nil); got != "" {
		t.Errorf("one that lacks a layer counts: %s", got)
	}
	if c := create(t, image+":v1", CreateOptions{})[0]; c.Status != StatusCreated || c.Artifact.Digest != honest.Artifact.Digest {
		t.Errorf("%+v", c)
	}
}

// TestManySignatures: a hundred signatures of others keep nobody from finding that an artifact is signed, and all of them go with it.
func TestManySignatures(t *testing.T) {
	signer := trusttest.NewCA(t, "authority", nil).Issue(t, "build", trusttest.Leaf{}).Signer(t, notary.SignOptions{})
	image := registrytest.Start(t, registrytest.Options{}).Host() + "/app"
	p, _ := open(t, image+":v1")
	testImage{layers: layersOf(1, 1)}.put(t, p, "v1")
	c := create(t, image+":v1", CreateOptions{Options: Options{Signer: signer}})[0]
	const junk = maxSignatures + 20
	for n := range junk {
		e := trusttest.Envelope("application/jose+json", fmt.Appendf(nil, `{"n":%d}`, n))
		m, raw, err := trust.Manifest(bare(c.Artifact), e, nil)
		if err != nil {
			t.Fatal(err)
		}
		putBlob(t, p, e.MediaType, e.Bytes)
		if err := p.PutManifest(t.Context(), m, raw, ""); err != nil {
			t.Fatal(err)
		}
	}
	// The registry lists them by their digests: ours is somewhere.
	again := create(t, image+":v1", CreateOptions{Options: Options{Signer: signer}})[0]
	if again.Signature == nil || again.Signature.Status != StatusExists || again.Signature.Signature != c.Signature.Signature {
		t.Errorf("%+v", again.Signature)
	}
	list := referrers(t, p, c.Artifact.Digest)
	if len(list) != junk+1 {
		t.Errorf("%d signatures", len(list))
	}
	deleted, err := DeleteSignatures(t.Context(), p, c.Artifact.Digest)
	if err != nil || len(deleted) != junk+1 {
		t.Errorf("deleted %d, %v", len(deleted), err)
	}
	if left := referrers(t, p, c.Artifact.Digest); len(left) != 0 {
		t.Errorf("left are %d", len(left))
	}
}

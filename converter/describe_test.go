package converter

import (
	"errors"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// small makes n layers of a file.
func small(seed uint64, n int) (list []testLayer) {
	for i := range n {
		list = append(list, testLayer{tar: tarOf(seed+uint64(i), 1), mediaType: ocispec.MediaTypeImageLayerGzip})
	}
	return list
}

// TestDescribe describes an index, an image, and what is none.
func TestDescribe(t *testing.T) {
	image := "oci:" + filepath.Join(t.TempDir(), "l")
	p, _ := open(t, image+":v1")
	amd := testImage{layers: small(1, 2)}.put(t, p, "amd")
	arm := testImage{layers: small(5, 1), platform: ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}}.put(t, p, "")
	win := testImage{layers: small(7, 1), platform: ocispec.Platform{OS: "windows", Architecture: "amd64"}}.put(t, p, "")
	attestation := testImage{layers: small(8, 1)}.put(t, p, "")
	attestation.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	putIndex(t, p, "v1", amd, arm, win, attestation)

	d, err := Describe(t.Context(), p, "v1")
	if err != nil {
		t.Fatal(err)
	}
	var platforms []string
	for _, img := range d.Platforms {
		platforms = append(platforms, img.String())
		if len(img.Layers) == 0 || img.Size() == 0 {
			t.Errorf("%s has no layers: %+v", img, img)
		}
	}
	if want := []string{"linux/amd64", "linux/arm64/v8", "windows/amd64"}; !slices.Equal(platforms, want) {
		t.Errorf("platforms %v, want %v", platforms, want)
	}
	if want := time.Date(2024, 5, 6, 7, 8, 9, 123456789, time.UTC); !d.Created.Equal(want) || d.Subject != "" {
		t.Errorf("created %v, want %v; subject %q", d.Created, want, d.Subject)
	}
	if !d.Platforms[1].Wanted([]ocispec.Platform{{OS: "linux", Architecture: "arm64"}}) || d.Platforms[0].Wanted([]ocispec.Platform{{OS: "linux", Architecture: "arm64"}}) {
		t.Error("of linux/arm64 it wants others")
	}

	one, err := Describe(t.Context(), p, "amd")
	if err != nil || len(one.Platforms) != 1 || !reflect.DeepEqual(one.Platforms[0], d.Platforms[0]) {
		t.Errorf("alone it is %+v, %v, want %+v", one, err, d.Platforms[0])
	}
	c := create(t, image+":amd", CreateOptions{})[0]
	made, err := Describe(t.Context(), p, c.Artifact.Digest.String())
	if err != nil || made.Subject != amd.Digest || len(made.Platforms) != 0 || made.Desc.ArtifactType != artifact.ArtifactType {
		t.Errorf("the artifact is %+v, %v", made, err)
	}
	testImage{layers: small(1, 1), configType: artifactConfig}.put(t, p, "chart")
	if chart, err := Describe(t.Context(), p, "chart"); err != nil || len(chart.Platforms) != 0 || chart.Subject != "" {
		t.Errorf("a chart is %+v, %v", chart, err)
	}
	if got, err := Describe(t.Context(), p, "v9"); !errors.Is(err, ErrNotFound) {
		t.Errorf("nothing is %+v, %v", got, err)
	}
}

// TestMapStart maps an image without a profile, with one, and with a better one.
func TestMapStart(t *testing.T) {
	image := "oci:" + filepath.Join(t.TempDir(), "l")
	p, _ := open(t, image+":v1")
	d := testImage{layers: layersOf(1, 2)}.put(t, p, "v1")
	if got, err := MapStart(t.Context(), p, d.Digest); !errors.Is(err, ErrNotFound) {
		t.Errorf("without an artifact: %+v, %v", got, err)
	}
	c := create(t, image+":v1", CreateOptions{})[0]
	m := manifestOf(t, p, c)
	got, err := MapStart(t.Context(), p, d.Digest)
	if err != nil || got.Artifact != c.Artifact.Digest || got.Profile != "" || len(got.Layers) != 2 || len(got.Layers[0].Hot)+len(got.Layers[1].Hot) != 0 {
		t.Fatalf("without a profile: %+v, %v", got, err)
	}
	profile := twoLayers(m)
	attach(t, p, "v1", profile, artifact.ProfileRecorded, time.Time{})
	static := twoLayers(m)
	static.Chunks = static.Chunks[:1]
	attach(t, p, "v1", static, artifact.ProfileStatic, time.Time{})

	if got, err = MapStart(t.Context(), p, d.Digest); err != nil || got.Profile != artifact.ProfileRecorded {
		t.Fatalf("with two: %+v, %v", got, err)
	}
	layers, err := indexesOf(t.Context(), p, m, &artifact.Profile{Layers: []digest.Digest{m.Layers[0].IndexDigest, m.Layers[1].IndexDigest}})
	if err != nil {
		t.Fatal(err)
	}
	at := func(layer, first, last int) Range {
		x := layers[layer].index
		from, to := x.Chunk(first), x.Chunk(last)
		return Range{from.TarOffset, to.TarOffset + to.TarSize - from.TarOffset}
	}
	// The profile lists chunks 2 and 0 of the second layer, and 0, 3 and 2 of the first.
	for i, want := range [][]Range{{at(0, 0, 0), at(0, 2, 3)}, {at(1, 0, 0), at(1, 2, 2)}} {
		l := got.Layers[i]
		if !reflect.DeepEqual(l.Hot, want) {
			t.Errorf("layer %d: hot %v, want %v", i, l.Hot, want)
		}
		if l.TarSize != c.Layers[i].TarSize || l.Chunks != c.Layers[i].Chunks || l.Source != c.Layers[i].Source {
			t.Errorf("layer %d is %+v, want %+v", i, l, c.Layers[i])
		}
	}
}

// TestDeleteReferrers deletes what is ours of an image that is gone, and the list of it, and leaves what is others'.
func TestDeleteReferrers(t *testing.T) {
	onAllPlaces(t, func(t *testing.T, image string) {
		p, _ := open(t, image+":v1")
		var signature ocispec.Descriptor
		for i, signed := range []bool{true, false} {
			d := testImage{layers: small(uint64(10*i+1), 1)}.put(t, p, "v1")
			c := create(t, image+":v1", CreateOptions{})[0]
			profile := &artifact.Profile{Layers: []digest.Digest{manifestOf(t, p, c).Layers[0].IndexDigest}, Chunks: []artifact.HotChunk{{Layer: 0, Chunk: 0}}}
			attach(t, p, "v1", profile, artifact.ProfileRecorded, time.Time{})
			if signed {
				subject := bare(d)
				config := putBlob(t, p, ocispec.MediaTypeEmptyJSON, []byte("{}"))
				signature = putManifest(t, p, ocispec.MediaTypeImageManifest, "", ocispec.Manifest{
					Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/vnd.example.signature",
					Config: config, Layers: []ocispec.Descriptor{}, Subject: &subject,
				})
			}
			if err := p.Delete(t.Context(), d.Digest, ""); err != nil {
				t.Fatal(err)
			}
			deleted, err := DeleteReferrers(t.Context(), p, d.Digest)
			if err != nil || len(deleted) != 2 {
				t.Fatalf("deleted %v, %v", deleted, err)
			}
			if _, _, err := p.Manifest(t.Context(), c.Artifact.Digest.String()); !errors.Is(err, ErrNotFound) {
				t.Errorf("the artifact is still there: %v", err)
			}
			left := referrers(t, p, d.Digest)
			if signed && (len(left) != 1 || left[0].Digest != signature.Digest) || !signed && len(left) != 0 {
				t.Errorf("left are %+v", left)
			}
			if r, ok := p.(*registry); ok && !signed {
				// Only docker-registry takes a tag away with its manifest.
				if index, _, err := r.readReferrersTag(t.Context(), d.Digest); !errors.Is(err, ErrNotFound) && len(index.Manifests) > 0 {
					t.Errorf("its list is %+v, %v", index, err)
				}
			}
			if again, err := DeleteReferrers(t.Context(), p, d.Digest); err != nil || len(again) != 0 {
				t.Errorf("again: %v, %v", again, err)
			}
		}
	})
}

// TestNoEmptyLists: in docker-registry nothing is left of an image that is deleted with its artifact.
func TestNoEmptyLists(t *testing.T) {
	image := dockerRegistry(t, true) + "/app"
	p, _ := open(t, image+":v1")
	d := testImage{layers: small(1, 1)}.put(t, p, "v1")
	create(t, image+":v1", CreateOptions{})
	if _, err := DeleteReferrers(t.Context(), p, d.Digest); err != nil {
		t.Fatal(err)
	}
	if index, _, err := p.(*registry).readReferrersTag(t.Context(), d.Digest); !errors.Is(err, ErrNotFound) {
		t.Errorf("its list is there: %+v, %v", index, err)
	}
}

// TestReferrersTagBesideAPI: notation's sign writes the referrers tag whatever the registry has. What is deleted there is taken out of it, so that it can be written again; what is others' stays.
func TestReferrersTagBesideAPI(t *testing.T) {
	image := registrytest.Start(t, registrytest.Options{}).Host() + "/app:v1"
	p, _ := open(t, image)
	d := testImage{layers: small(1, 1)}.put(t, p, "v1")
	ours := create(t, image, CreateOptions{})[0].Artifact.Digest
	list := func() (digests []digest.Digest) {
		index, _, err := p.(*registry).readReferrersTag(t.Context(), d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range index.Manifests {
			digests = append(digests, m.Digest)
		}
		return digests
	}
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, of := range []digest.Digest{ours, d.Digest} { // another's is any that is there
		m, _, err := p.Manifest(t.Context(), of.String())
		if err != nil {
			t.Fatal(err)
		}
		index.Manifests = append(index.Manifests, bare(m))
	}
	putManifest(t, p, ocispec.MediaTypeImageIndex, referrersTag(d.Digest), index)
	if got := list(); len(got) != 2 {
		t.Fatalf("the tag has %v", got)
	}
	if _, err := DeleteArtifacts(t.Context(), p, "v1", nil); err != nil {
		t.Fatal(err)
	}
	if got := list(); len(got) != 1 || got[0] != d.Digest {
		t.Errorf("after %s was deleted the tag has %v", ours, got)
	}
}

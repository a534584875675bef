package converter

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// manifestOf returns the artifact's manifest.
func manifestOf(t *testing.T, p Place, c Created) *artifact.Manifest {
	t.Helper()
	_, raw, err := p.Manifest(t.Context(), c.Artifact.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	m, err := artifact.DecodeManifest(raw)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// attach attaches a profile and fails the test if it cannot.
func attach(t *testing.T, p Place, ref string, profile *artifact.Profile, source string, created time.Time) Profile {
	t.Helper()
	got, warnings, err := AttachProfile(t.Context(), p, ref, profile, source, created, Options{})
	if err != nil || len(warnings) > 0 {
		t.Fatalf("attach profile: %v, %v", err, warnings)
	}
	return got
}

// twoLayers is a profile of both layers of the artifact, there and back.
func twoLayers(m *artifact.Manifest) *artifact.Profile {
	return &artifact.Profile{
		Layers: []digest.Digest{m.Layers[1].IndexDigest, m.Layers[0].IndexDigest},
		Chunks: []artifact.HotChunk{{Layer: 0, Chunk: 2}, {Layer: 1, Chunk: 0}, {Layer: 0, Chunk: 0}, {Layer: 1, Chunk: 3}, {Layer: 1, Chunk: 2}},
	}
}

// TestAttachProfile attaches profiles of several sources, again and anew, and reads the hot blob with nothing of ours but the chunk table.
func TestAttachProfile(t *testing.T) {
	onAllPlaces(t, func(t *testing.T, image string) {
		p, _ := open(t, image+":v1")
		img := testImage{layers: layersOf(1, 2)}
		d := img.put(t, p, "v1")
		c := create(t, image+":v1", CreateOptions{})[0]
		m := manifestOf(t, p, c)
		profile := twoLayers(m)
		at := time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC)
		got := attach(t, p, "v1", profile, artifact.ProfileRecorded, at)
		if got.Chunks != 5 || got.Source != artifact.ProfileRecorded || !got.Created.Equal(at) {
			t.Errorf("attached %+v", got)
		}

		layers, err := indexesOf(t.Context(), p, m, profile)
		if err != nil {
			t.Fatal(err)
		}
		var want []byte
		for _, h := range profile.Chunks {
			at := layers[h.Layer].index.Chunk(h.Chunk)
			want = append(want, img.layers[1-h.Layer].tar[at.TarOffset:at.TarOffset+at.TarSize]...)
		}
		hot, err := readBlob(t.Context(), p, ocispec.Descriptor{Digest: got.Hot, Size: got.Size}, 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		dec, err := zstd.NewReader(nil)
		if err != nil {
			t.Fatal(err)
		}
		defer dec.Close()
		if tar, err := dec.DecodeAll(hot, nil); err != nil || !bytes.Equal(tar, want) {
			t.Errorf("the hot blob is not the chunks in their order (%v)", err)
		}
		back, err := artifact.ReadHotHead(bytes.NewReader(hot))
		if err != nil || !reflect.DeepEqual(back.Chunks, profile.Chunks) {
			t.Fatalf("its head is %+v, %v", back, err)
		}
		indexes := hot[back.Size():back.Frames()]
		for i, l := range back.Layers {
			if got := digest.FromBytes(indexes[:back.Indexes[i]]); got != l {
				t.Errorf("its copy of the index %s is %s", l, got)
			}
			indexes = indexes[back.Indexes[i]:]
		}
		if len(back.Layers) != len(m.Layers) || !slices.Equal(back.Layers[:len(profile.Layers)], profile.Layers) {
			t.Errorf("its layers are %v, want all of the artifact's, the profile's %v first", back.Layers, profile.Layers)
		}

		if again := attach(t, p, "v1", profile, artifact.ProfileRecorded, at); !reflect.DeepEqual(again, got) {
			t.Errorf("the same again: %+v, want %+v", again, got)
		}
		learned := attach(t, p, "v1", profile, artifact.ProfileLearned, at)
		profile.Chunks = profile.Chunks[:2]
		newer := attach(t, p, "v1", profile, artifact.ProfileRecorded, at)
		list, err := Inspect(t.Context(), p, "v1", nil, nil)
		if err != nil || len(list) != 1 {
			t.Fatalf("inspect: %v, %+v", err, list)
		}
		if has := list[0].Profiles; len(has) != 2 || newer.Chunks != 2 {
			t.Errorf("profiles %+v, want the learned and the newer of the recorded", has)
		}
		if _, _, err := p.Manifest(t.Context(), got.Digest.String()); !errors.Is(err, ErrNotFound) {
			t.Errorf("the older one is still there (%v)", err)
		}
		done, err := Verify(t.Context(), p, "v1", VerifyOptions{})
		if err != nil || len(done) != 1 || len(done[0].Profiles) != 2 {
			t.Errorf("verify: %v, %+v", err, done)
		}

		deleted, err := DeleteArtifacts(t.Context(), p, "v1", nil)
		if err != nil || len(deleted) != 3 || len(referrers(t, p, d.Digest)) != 0 {
			t.Errorf("deleted %v, %v; left are %+v", deleted, err, referrers(t, p, d.Digest))
		}
		if _, _, err := p.Manifest(t.Context(), learned.Digest.String()); !errors.Is(err, ErrNotFound) {
			t.Errorf("the learned one is still there (%v)", err)
		}
	})
}

// TestProfileOfPlatform: of an index's images a profile goes to the one that it was made of, and to none if that is not there.
func TestProfileOfPlatform(t *testing.T) {
	image := "oci:" + filepath.Join(t.TempDir(), "l") + ":v1"
	p, _ := open(t, image)
	amd := testImage{layers: layersOf(1, 2)}.put(t, p, "")
	arm := testImage{layers: layersOf(5, 2), platform: ocispec.Platform{OS: "linux", Architecture: "arm64"}}.put(t, p, "")
	putIndex(t, p, "v1", amd, arm)
	done := create(t, image, CreateOptions{})
	profile := twoLayers(manifestOf(t, p, done[1]))
	got := attach(t, p, "v1", profile, artifact.ProfileRecorded, time.Time{})
	if got.Created != nil {
		t.Errorf("created %s, want no time", got.Created)
	}
	if len(referrers(t, p, amd.Digest)) != 1 || len(referrers(t, p, arm.Digest)) != 2 {
		t.Errorf("amd64 has the referrers %+v, arm64 %+v", referrers(t, p, amd.Digest), referrers(t, p, arm.Digest))
	}
	// It does not survive an artifact with other chunks.
	other := CreateOptions{Force: true, Options: Options{Encode: artifact.EncodeOptions{ChunkSize: 64 << 10}}}
	create(t, image, other)
	if list := referrers(t, p, arm.Digest); len(list) != 1 {
		t.Errorf("after another conversion arm64 has %+v", list)
	}
	if _, _, err := AttachProfile(t.Context(), p, "v1", profile, artifact.ProfileRecorded, time.Time{}, Options{}); !errors.Is(err, ErrNotFound) {
		t.Errorf("a profile of an artifact that is gone: %v", err)
	}
}

// TestBadProfile: what lists chunks that are not there, or none, is not attached, and a damaged layer gives no hot blob.
func TestBadProfile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "l")
	p, _ := open(t, "oci:"+dir)
	d := testImage{layers: layersOf(1, 2)}.put(t, p, "v1")
	m := manifestOf(t, p, create(t, "oci:"+dir+":v1", CreateOptions{})[0])
	refused := func(what string, profile *artifact.Profile) {
		t.Helper()
		if _, _, err := AttachProfile(t.Context(), p, "v1", profile, artifact.ProfileStatic, time.Time{}, Options{}); err == nil {
			t.Errorf("%s: attached", what)
		}
		if list := referrers(t, p, d.Digest); len(list) != 1 {
			t.Errorf("%s: referrers %+v", what, list)
		}
	}
	refused("no chunks", &artifact.Profile{})
	profile := twoLayers(m)
	profile.Chunks[4].Chunk = 1000
	refused("no such chunk", profile)

	path := filepath.Join(dir, "blobs", "sha256", m.Layers[1].Digest.Encoded())
	blob, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	blob[20] ^= 1
	if err := os.WriteFile(path, blob, 0o644); err != nil {
		t.Fatal(err)
	}
	refused("a damaged layer", twoLayers(m))
}

// TestVerifyProfile: a hot blob with anything else in it than the artifact's frames is a difference.
func TestVerifyProfile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "l")
	p, _ := open(t, "oci:"+dir)
	testImage{layers: layersOf(1, 2)}.put(t, p, "v1")
	other := testImage{layers: layersOf(5, 2)}
	other.put(t, p, "other")
	m := manifestOf(t, p, create(t, "oci:"+dir+":v1", CreateOptions{})[0])
	foreign := twoLayers(manifestOf(t, p, create(t, "oci:"+dir+":other", CreateOptions{})[0]))
	profile := twoLayers(m)
	good := attach(t, p, "v1", profile, artifact.ProfileStatic, time.Time{})
	path := func(dgst digest.Digest) string { return filepath.Join(dir, "blobs", "sha256", dgst.Encoded()) }
	hot, err := os.ReadFile(path(good.Hot))
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int{0, 20, 40, 100, len(hot) / 2, len(hot) - 1} {
		t.Run(fmt.Sprint("byte ", off), func(t *testing.T) {
			bad := bytes.Clone(hot)
			bad[off] ^= 1
			if err := os.WriteFile(path(good.Hot), bad, 0o644); err != nil {
				t.Fatal(err)
			}
			verifyDiffers(t, p, "v1", "profile "+good.Digest.String())
		})
	}
	if err := os.Remove(path(good.Hot)); err != nil {
		t.Fatal(err)
	}
	verifyDiffers(t, p, "v1", "is not in oci:")

	// Well formed, with the right digests, and wrong.
	forge := func(name string, b []byte) {
		t.Run(name, func(t *testing.T) {
			pm := &artifact.ProfileManifest{Subject: m.Subject, Source: artifact.ProfileStatic, Hot: putBlob(t, p, artifact.HotMediaType, b)}
			raw, err := pm.Encode()
			if err != nil {
				t.Fatal(err)
			}
			d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
			if err := p.PutManifest(t.Context(), d, raw, ""); err != nil {
				t.Fatal(err)
			}
			verifyDiffers(t, p, "v1", "profile "+d.Digest.String())
			if err := p.Delete(t.Context(), d.Digest, m.Subject.Digest); err != nil {
				t.Fatal(err)
			}
		})
	}
	if err := p.Delete(t.Context(), good.Digest, m.Subject.Digest); err != nil {
		t.Fatal(err)
	}
	intact, err := artifact.ReadHotHead(bytes.NewReader(hot))
	if err != nil {
		t.Fatal(err)
	}
	// head is that of a hot blob without indexes.
	head := func(profile *artifact.Profile) []byte {
		h := &artifact.HotHead{Profile: *profile, Indexes: make([]int64, len(profile.Layers))}
		b, err := h.Encode()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	frames := hot[intact.Frames():]
	wrong := bytes.Clone(hot)
	wrong[intact.Size()+intact.Indexes[0]-1] ^= 1
	forge("another index", wrong)
	forge("longer", append(bytes.Clone(hot), 0))
	forge("shorter", hot[:len(hot)-1])
	forge("of another image", append(head(foreign), frames...))
	swapped := twoLayers(m)
	swapped.Chunks[0], swapped.Chunks[1] = swapped.Chunks[1], swapped.Chunks[0]
	forge("another order", append(head(swapped), frames...))
	swapped.Chunks[0].Chunk = 5000
	forge("no such chunk", append(head(swapped), frames...))
	if _, err := Verify(t.Context(), p, "v1", VerifyOptions{}); err != nil {
		t.Errorf("without them: %v", err)
	}
}

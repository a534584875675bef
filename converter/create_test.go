package converter

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestCreate converts an image of all formats and looks at what is there then with nothing of ours but the manifest.
func TestCreate(t *testing.T) {
	onAllPlaces(t, func(t *testing.T, image string) {
		p, _ := open(t, image+":v1")
		img := testImage{layers: allFormats()}
		d := img.put(t, p, "v1")
		done := create(t, image+":v1", CreateOptions{})
		if len(done) != 1 || done[0].Status != StatusCreated || done[0].Platform != "linux/amd64" {
			t.Fatalf("created %+v", done)
		}

		list := referrers(t, p, d.Digest)
		if len(list) != 1 || list[0].Digest != done[0].Artifact.Digest || list[0].ArtifactType != artifact.ArtifactType {
			t.Fatalf("referrers %+v", list)
		}
		if list[0].Annotations[artifact.AnnotationArch] != "amd64" {
			t.Errorf("referrer has annotations %v", list[0].Annotations)
		}
		_, raw, err := p.Manifest(t.Context(), list[0].Digest.String())
		if err != nil {
			t.Fatal(err)
		}
		var m ocispec.Manifest
		if err := json.Unmarshal(raw, &m); err != nil {
			t.Fatal(err)
		}
		if m.Subject == nil || m.Subject.Digest != d.Digest || m.Subject.Size != d.Size || m.Subject.MediaType != d.MediaType {
			t.Errorf("subject %+v, want %+v", m.Subject, d)
		}
		if m.Annotations[ocispec.AnnotationCreated] != "2024-05-06T07:08:09.123456789Z" {
			t.Errorf("created %s", m.Annotations[ocispec.AnnotationCreated])
		}
		if len(m.Layers) != len(img.layers) {
			t.Fatalf("%d layers, want %d", len(m.Layers), len(img.layers))
		}
		dec, err := zstd.NewReader(nil)
		if err != nil {
			t.Fatal(err)
		}
		defer dec.Close()
		for i, l := range m.Layers {
			blob, err := readBlob(t.Context(), p, l, 1<<30)
			if err != nil {
				t.Fatal(err)
			}
			tar, err := dec.DecodeAll(blob, nil)
			if err != nil || !bytes.Equal(tar, img.layers[i].tar) {
				t.Errorf("layer %d is not the image's (%v)", i, err)
			}
		}
		if _, err := Verify(t.Context(), p, "v1", VerifyOptions{}); err != nil {
			t.Error(err)
		}
	})
}

func TestCreateDocker(t *testing.T) {
	onAllPlaces(t, func(t *testing.T, image string) {
		p, _ := open(t, image+":v1")
		img := testImage{docker: true, layers: []testLayer{{tar: tarOf(1, 5), mediaType: dockerGzip}, {tar: tarOf(2, 5), mediaType: dockerLayer}}}
		d := img.put(t, p, "v1")
		// By digest, too, an image is itself.
		if done := create(t, image+"@"+d.Digest.String(), CreateOptions{}); done[0].Subject.MediaType != dockerManifest {
			t.Errorf("subject %+v", done[0].Subject)
		}
		if done := create(t, image+":v1", CreateOptions{}); done[0].Status != StatusExists {
			t.Errorf("%+v", done)
		}
		if _, err := Verify(t.Context(), p, "v1", VerifyOptions{}); err != nil {
			t.Error(err)
		}
	})
}

// TestCreateIndex: every Linux platform, two of them deep in another index; what else is in an index is left alone.
func TestCreateIndex(t *testing.T) {
	onAllPlaces(t, func(t *testing.T, image string) {
		p, _ := open(t, image+":v1")
		put := func(seed uint64, platform ocispec.Platform) ocispec.Descriptor {
			return testImage{layers: layersOf(seed, 2), platform: platform}.put(t, p, "")
		}
		amd := put(10, ocispec.Platform{OS: "linux", Architecture: "amd64"})
		arm := put(20, ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"})
		armv7 := put(30, ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v7"})
		s390 := put(40, ocispec.Platform{OS: "linux", Architecture: "s390x"})
		windows := put(50, ocispec.Platform{OS: "windows", Architecture: "amd64"})
		s390.Platform = nil // an index need not say
		attestation := testImage{layers: []testLayer{{tar: []byte("{}"), mediaType: "application/vnd.in-toto+json"}}}.put(t, p, "")
		attestation.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
		chart := testImage{layers: layersOf(60, 1), configType: "application/vnd.cncf.helm.config.v1+json"}.put(t, p, "")
		chart.Platform = nil
		inner := putIndex(t, p, "", armv7, s390)
		top := putIndex(t, p, "v1", amd, attestation, windows, inner, arm, chart, amd)

		platforms := func(done []Created) (list []string) {
			for _, c := range done {
				list = append(list, c.Platform+" "+c.Status)
			}
			return list
		}
		only := []ocispec.Platform{{OS: "linux", Architecture: "arm64"}}
		got := platforms(create(t, image+":v1", CreateOptions{Platforms: only}))
		if want := []string{"linux/arm64/v8 created"}; !slices.Equal(got, want) {
			t.Errorf("narrowed: %q, want %q", got, want)
		}
		got = platforms(create(t, image+":v1", CreateOptions{}))
		want := []string{"linux/amd64 created", "linux/arm/v7 created", "linux/s390x created", "linux/arm64/v8 exists"}
		if !slices.Equal(got, want) {
			t.Errorf("all: %q, want %q", got, want)
		}
		for _, d := range []ocispec.Descriptor{windows, attestation, chart, inner, top} {
			if list := referrers(t, p, d.Digest); len(list) != 0 {
				t.Errorf("%+v has referrers %+v", d, list)
			}
		}
		list, err := ListReferrers(t.Context(), p, "v1", nil, artifact.ArtifactType)
		if err != nil || len(list) != 4 {
			t.Errorf("list of the index: %v, %+v", err, list)
		}
		if list, err = ListReferrers(t.Context(), p, "v1", only, ""); err != nil || len(list) != 1 || list[0].Subject != arm.Digest {
			t.Errorf("list of the index for arm64: %v, %+v", err, list)
		}
		done, err := Verify(t.Context(), p, "v1", VerifyOptions{})
		if err != nil || len(done) != 4 {
			t.Errorf("verify: %v, %+v", err, done)
		}

		_, err = Create(t.Context(), p, "v1", CreateOptions{Platforms: []ocispec.Platform{{OS: "linux", Architecture: "riscv64"}}})
		if CodeOf(err) != NoSupportedPlatformFound {
			t.Errorf("a platform that is not there: %v", err)
		}
		// Deleting narrows, too, and takes nothing else.
		if deleted, err := DeleteArtifacts(t.Context(), p, "v1", only); err != nil || len(deleted) != 1 {
			t.Errorf("delete: %v, %v", err, deleted)
		}
		if len(referrers(t, p, arm.Digest)) != 0 || len(referrers(t, p, amd.Digest)) != 1 {
			t.Error("delete took others than asked for")
		}
		if _, _, err := p.Manifest(t.Context(), arm.Digest.String()); err != nil {
			t.Errorf("the image after delete: %v", err)
		}
	})
}

// TestDeterministic: two conversions, one with other numbers of workers, give the same bytes in different places.
func TestDeterministic(t *testing.T) {
	var digests []digest.Digest
	for i, o := range []CreateOptions{
		{Options: Options{Jobs: 1, Encode: artifact.EncodeOptions{Workers: 1}}},
		{Options: Options{Jobs: 7, Encode: artifact.EncodeOptions{Workers: 5}}},
	} {
		image := places[i*4].open(t) + ":v1"
		p, _ := open(t, image)
		testImage{layers: allFormats()}.put(t, p, "v1")
		digests = append(digests, create(t, image, o)[0].Artifact.Digest)
	}
	if digests[0] != digests[1] {
		t.Errorf("artifacts %s and %s", digests[0], digests[1])
	}
}

func TestForce(t *testing.T) {
	onAllPlaces(t, func(t *testing.T, image string) {
		p, _ := open(t, image+":v1")
		d := testImage{layers: layersOf(1, 2)}.put(t, p, "v1")
		first := create(t, image+":v1", CreateOptions{})[0]

		// The same bytes again are the same artifact, which must not be deleted as its own predecessor.
		again := create(t, image+":v1", CreateOptions{Force: true})[0]
		if again.Status != StatusCreated || again.Artifact.Digest != first.Artifact.Digest || again.Layers[0].Reused {
			t.Errorf("again: %+v", again)
		}
		if list := referrers(t, p, d.Digest); len(list) != 1 {
			t.Errorf("referrers after the same again: %+v", list)
		}

		other := CreateOptions{Force: true, Options: Options{Encode: artifact.EncodeOptions{ChunkSize: 64 << 10}}}
		second := create(t, image+":v1", other)[0]
		if len(second.Warnings) != 0 {
			t.Error(second.Warnings)
		}
		list := referrers(t, p, d.Digest)
		if len(list) != 1 || list[0].Digest != second.Artifact.Digest || second.Artifact.Digest == first.Artifact.Digest {
			t.Errorf("referrers %+v after %s and %s", list, first.Artifact.Digest, second.Artifact.Digest)
		}
		if _, _, err := p.Manifest(t.Context(), first.Artifact.Digest.String()); !errors.Is(err, ErrNotFound) {
			t.Errorf("the first artifact is still there (%v)", err)
		}
		if _, err := Verify(t.Context(), p, "v1", VerifyOptions{}); err != nil {
			t.Error(err)
		}
	})
}

// TestReferrersKept: making and deleting our artifact leaves the referrers of others where they are.
func TestReferrersKept(t *testing.T) {
	onAllPlaces(t, func(t *testing.T, image string) {
		p, _ := open(t, image+":v1")
		d := testImage{layers: layersOf(1, 1)}.put(t, p, "v1")
		sign := func(text string) digest.Digest {
			m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/vnd.example.signature", Subject: &d}
			m.SchemaVersion = 2
			m.Config = putBlob(t, p, ocispec.MediaTypeEmptyJSON, []byte("{}"))
			m.Layers = []ocispec.Descriptor{putBlob(t, p, "text/plain", []byte(text))}
			return putManifest(t, p, ocispec.MediaTypeImageManifest, "", m).Digest
		}
		before := []digest.Digest{sign("one"), sign("two")}
		create(t, image+":v1", CreateOptions{})
		if n := len(referrers(t, p, d.Digest)); n != 3 {
			t.Fatalf("%d referrers, want 3", n)
		}
		if _, err := DeleteArtifacts(t.Context(), p, "v1", nil); err != nil {
			t.Fatal(err)
		}
		for _, s := range before {
			if !slices.ContainsFunc(referrers(t, p, d.Digest), func(r ocispec.Descriptor) bool { return r.Digest == s }) {
				t.Errorf("signature %s is lost", s)
			}
			if _, _, err := p.Manifest(t.Context(), s.String()); err != nil {
				t.Error(err)
			}
		}
		if _, err := DeleteArtifacts(t.Context(), p, "v1", nil); !errors.Is(err, ErrNotFound) {
			t.Errorf("deleting nothing: %v", err)
		}
		create(t, image+":v1", CreateOptions{})
		if _, err := Verify(t.Context(), p, "v1", VerifyOptions{}); err != nil {
			t.Errorf("made again: %v", err)
		}
	})
}

// TestAtOnce: several who convert the same image at the same time, as several processes, make one artifact.
func TestAtOnce(t *testing.T) {
	onAllPlaces(t, func(t *testing.T, image string) {
		p, _ := open(t, image+":v1")
		d := testImage{layers: layersOf(1, 3)}.put(t, p, "v1")
		record := NewRecord(t.TempDir())
		var g errgroup.Group
		for range 4 {
			own, ref := open(t, image+":v1")
			g.Go(func() error {
				_, err := Create(t.Context(), own, ref, CreateOptions{Options: Options{Record: record}})
				return err
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		if list := referrers(t, p, d.Digest); len(list) != 1 {
			t.Errorf("referrers %+v", list)
		}
		if _, err := Verify(t.Context(), p, "v1", VerifyOptions{}); err != nil {
			t.Error(err)
		}
	})
}

// TestStaleReferrersTag: an entry of a manifest that somebody deleted past the tag does not keep new ones out.
func TestStaleReferrersTag(t *testing.T) {
	image := dockerRegistry(t, true) + "/app:v1"
	p, _ := open(t, image)
	d := testImage{layers: layersOf(1, 1)}.put(t, p, "v1")
	first := create(t, image, CreateOptions{})[0]
	if err := p.Delete(t.Context(), first.Artifact.Digest, ""); err != nil {
		t.Fatal(err)
	}
	if n := len(referrers(t, p, d.Digest)); n != 1 {
		t.Fatalf("the tag has %d entries, want the stale one", n)
	}
	second := create(t, image, CreateOptions{Options: Options{Encode: artifact.EncodeOptions{ChunkSize: 32 << 10}}})[0]
	if list := referrers(t, p, d.Digest); second.Status != StatusCreated || len(list) != 1 || list[0].Digest != second.Artifact.Digest {
		t.Errorf("%+v, referrers %+v", second, list)
	}
}

// TestNoDelete: a registry that deletes nothing is told of by --force, and does not keep the new artifact from being used.
func TestNoDelete(t *testing.T) {
	image := dockerRegistry(t, false) + "/app:v1"
	p, _ := open(t, image)
	d := testImage{layers: layersOf(1, 1)}.put(t, p, "v1")
	create(t, image, CreateOptions{})
	c := create(t, image, CreateOptions{Force: true, Options: Options{Encode: artifact.EncodeOptions{ChunkSize: 64 << 10}}})[0]
	if len(c.Warnings) != 1 {
		t.Errorf("warnings %q, want one", c.Warnings)
	}
	if list := referrers(t, p, d.Digest); len(list) != 1 || list[0].Digest != c.Artifact.Digest {
		t.Errorf("referrers %+v", list)
	}
	_, err := DeleteArtifacts(t.Context(), p, "v1", nil)
	if err == nil || !strings.Contains(err.Error(), "REGISTRY_STORAGE_DELETE_ENABLED") || !strings.Contains(err.Error(), "belongs to its image no more") {
		t.Errorf("delete: %v", err)
	}
	if list := referrers(t, p, d.Digest); len(list) != 0 {
		t.Errorf("referrers after delete: %+v", list)
	}
}

// TestSharedLayers: a layer that was converted is not read again, neither in the repository nor, where the registry mounts
// blobs, in another one of it.
func TestSharedLayers(t *testing.T) {
	host := dockerRegistry(t, true)
	dir := t.TempDir()
	o := CreateOptions{Options: Options{Record: NewRecord(dir)}}
	base := layersOf(1, 2)
	reused := func(image string, layers []testLayer) (list []bool) {
		p, _ := open(t, image)
		testImage{layers: layers}.put(t, p, "v1")
		o := o
		var read atomic.Int64
		o.Progress = func(e Event) {
			if e.Kind == LayerRead {
				read.Add(1)
			}
		}
		done := create(t, image, o)
		for _, l := range done[0].Layers {
			list = append(list, l.Reused)
		}
		if !slices.Contains(list, false) && read.Load() != 0 {
			t.Errorf("%s: layers were read", image)
		}
		if _, err := Verify(t.Context(), p, "v1", VerifyOptions{}); err != nil {
			t.Error(err)
		}
		return list
	}
	if got := reused(host+"/one:v1", base); !slices.Equal(got, []bool{false, false}) {
		t.Errorf("first image: %v", got)
	}
	if got := reused(host+"/one:v1", append(slices.Clone(base), layersOf(9, 1)...)); !slices.Equal(got, []bool{true, true, false}) {
		t.Errorf("second image, same repository: %v", got)
	}
	if got := reused(host+"/two:v1", base); !slices.Equal(got, []bool{true, true}) {
		t.Errorf("other repository: %v", got)
	}
	if got := reused(dockerRegistry(t, true)+"/one:v1", base); !slices.Equal(got, []bool{false, false}) {
		t.Errorf("other registry: %v", got)
	}
	if got := reused("oci:"+filepath.Join(t.TempDir(), "l")+":v1", base); !slices.Equal(got, []bool{false, false}) {
		t.Errorf("layout: %v", got)
	}

	// Other parameters give other blobs, and a damaged record is none.
	o.Encode.ChunkSize = 64 << 10
	if got := reused(host+"/three:v1", base); !slices.Equal(got, []bool{false, false}) {
		t.Errorf("other chunk size: %v", got)
	}
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() {
			err = os.Truncate(path, info.Size()/2)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := reused(host+"/four:v1", base); !slices.Equal(got, []bool{false, false}) {
		t.Errorf("damaged record: %v", got)
	}
}

// TestSourceFails: a layer whose source breaks off is read again; one that keeps breaking off is an error.
func TestSourceFails(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	image := r.Host() + "/app:v1"
	p, _ := open(t, image)
	d := testImage{layers: layersOf(1, 2)}.put(t, p, "v1")
	remove := r.Inject(registrytest.Blobs, -1, registrytest.Reset(10_000))
	_, err := Create(t.Context(), p, "v1", CreateOptions{})
	if err == nil || len(referrers(t, p, d.Digest)) != 0 {
		t.Fatalf("a source that always breaks off: %v", err)
	}
	remove()
	r.Inject(func(q *http.Request) bool { return registrytest.Blobs(q) && q.Method == "GET" }, 1, registrytest.Reset(10_000))
	create(t, image, CreateOptions{Options: Options{Jobs: 1}})
	if _, err := Verify(t.Context(), p, "v1", VerifyOptions{}); err != nil {
		t.Error(err)
	}
}

// TestInterrupted: a conversion that is cancelled at any of its steps attaches nothing and leaves no file, and the next one
// succeeds.
func TestInterrupted(t *testing.T) {
	onAllPlaces(t, func(t *testing.T, image string) {
		p, _ := open(t, image+":v1")
		d := testImage{layers: layersOf(1, 3)}.put(t, p, "v1")
		for _, kind := range []EventKind{LayerStarted, LayerRead, LayerPushing, LayerDone} {
			ctx, cancel := context.WithCancel(t.Context())
			dir := t.TempDir()
			o := CreateOptions{Options: Options{Jobs: 2, TempDir: dir, Progress: func(e Event) {
				if e.Kind == kind && e.Layer == 1 {
					cancel()
				}
			}}}
			started := time.Now()
			_, err := Create(ctx, p, "v1", o)
			if !errors.Is(err, context.Canceled) {
				t.Errorf("at %d: %v, want cancelled", kind, err)
			}
			if took := time.Since(started); took > 10*time.Second {
				t.Errorf("at %d: took %s to end", kind, took)
			}
			if list := referrers(t, p, d.Digest); len(list) != 0 {
				t.Errorf("at %d: referrers %+v", kind, list)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
				t.Errorf("at %d: left %v, %v", kind, left, err)
			}
		}
		create(t, image+":v1", CreateOptions{})
		if _, err := Verify(t.Context(), p, "v1", VerifyOptions{}); err != nil {
			t.Error(err)
		}
		if l, ok := p.(*layout); ok {
			files, err := filepath.Glob(filepath.Join(l.dir, "blobs", "sha256", ".new-*"))
			if err != nil || len(files) != 0 {
				t.Errorf("left in the layout: %v, %v", files, err)
			}
		}
	})
}

// TestBasicAuth: credentials come from docker's config.json, and do not go where blobs are redirected to.
func TestBasicAuth(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{RedirectBlobs: true})
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	r.RequireBasic("me", "secret")
	image := r.Host() + "/app:v1"
	p, _ := open(t, image)
	if _, err := Create(t.Context(), p, "v1", CreateOptions{}); err == nil || CodeOf(err) == ResourceNotFound {
		t.Errorf("without credentials: %v", err)
	}
	config := `{"auths":{"` + r.Host() + `":{"username":"me","password":"secret"}}}`
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	p, _ = open(t, image)
	testImage{layers: layersOf(1, 2)}.put(t, p, "v1")
	create(t, image, CreateOptions{})
	if _, err := Verify(t.Context(), p, "v1", VerifyOptions{}); err != nil {
		t.Error(err)
	}
}

// TestTLS: certificates are verified unless that is forbidden.
func TestTLS(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{TLS: true, RedirectBlobs: true})
	image := r.Host() + "/app:v1"
	p, _ := open(t, image)
	if _, err := Create(t.Context(), p, "v1", CreateOptions{}); err == nil || CodeOf(err) == ResourceNotFound {
		t.Errorf("with a certificate that nobody signed: %v", err)
	}
	p, ref, err := Open(image, OpenOptions{Registry: RegistryOptions{Insecure: true}})
	if err != nil {
		t.Fatal(err)
	}
	testImage{layers: layersOf(1, 2)}.put(t, p, "v1")
	if _, err := Create(t.Context(), p, ref, CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(t.Context(), p, ref, VerifyOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := Inspect(t.Context(), p, ref, nil, nil); err != nil {
		t.Error(err)
	}
}

func TestNotThere(t *testing.T) {
	onAllPlaces(t, func(t *testing.T, image string) {
		p, _ := open(t, image+":v1")
		testImage{layers: layersOf(1, 1)}.put(t, p, "v1")
		for _, ref := range []string{"v2", digest.FromString("nothing").String()} {
			if _, err := Create(t.Context(), p, ref, CreateOptions{}); CodeOf(err) != ResourceNotFound || !errors.Is(err, ErrNotFound) {
				t.Errorf("create %s: %v", ref, err)
			}
			if _, err := Inspect(t.Context(), p, ref, nil, nil); !errors.Is(err, ErrNotFound) {
				t.Errorf("inspect %s: %v", ref, err)
			}
		}
		if _, err := Inspect(t.Context(), p, "v1", nil, nil); !errors.Is(err, ErrNotFound) {
			t.Errorf("inspect without an artifact: %v", err)
		}
	})
}

// TestInspectWithoutRanges: a registry that knows no ranges costs time, not the answer.
func TestInspectWithoutRanges(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	p, _ := open(t, r.Host()+"/app:v1")
	testImage{layers: layersOf(1, 2)}.put(t, p, "v1")
	create(t, r.Host()+"/app:v1", CreateOptions{})
	r.Reset()
	if _, err := Inspect(t.Context(), p, "v1", nil, nil); err != nil {
		t.Error(err)
	}
	_, ranged := r.Count(registrytest.OfBlobs)
	r.Inject(registrytest.Blobs, -1, registrytest.IgnoreRange())
	r.Reset()
	if _, err := Inspect(t.Context(), p, "v1", nil, nil); err != nil {
		t.Error(err)
	}
	if _, whole := r.Count(registrytest.OfBlobs); ranged >= whole/10 {
		t.Errorf("%d bytes read with ranges, %d without", ranged, whole)
	}
}

func TestInspect(t *testing.T) {
	onAllPlaces(t, func(t *testing.T, image string) {
		p, _ := open(t, image+":v1")
		img := testImage{layers: allFormats()}
		d := img.put(t, p, "v1")
		c := create(t, image+":v1", CreateOptions{})[0]
		for _, ref := range []string{"v1", d.Digest.String(), c.Artifact.Digest.String()} {
			list, err := Inspect(t.Context(), p, ref, nil, nil)
			if err != nil || len(list) != 1 {
				t.Fatalf("inspect %s: %v, %+v", ref, err, list)
			}
			got := list[0]
			if got.Subject != d.Digest || got.Artifact != c.Artifact.Digest || got.Platform != "linux/amd64" || len(got.Layers) != len(img.layers) {
				t.Errorf("%+v", got)
			}
			for i, l := range got.Layers {
				want := c.Layers[i]
				if l.TarSize != int64(len(img.layers[i].tar)) || l.DiffID != digest.FromBytes(img.layers[i].tar) ||
					l.SourceSize != int64(len(img.layers[i].stored())) || l.Chunks != want.Chunks || l.Size != want.Size {
					t.Errorf("layer %d: %+v, created as %+v", i, l, want)
				}
			}
		}
	})
}

package registrytest_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// What another client pushes, it gets back: both ways to keep blobs, both ways to find referrers, redirected or not.
func TestPushAndPull(t *testing.T) {
	for _, o := range []registrytest.Options{{}, {RedirectBlobs: true, NoReferrers: true}} {
		for _, dir := range []string{"", t.TempDir()} {
			o.Dir = dir
			r := registrytest.Start(t, o)
			ref, err := name.NewTag(r.Host() + "/a/b:c")
			if err != nil {
				t.Fatal(err)
			}
			image, err := random.Image(1000, 3)
			if err != nil {
				t.Fatal(err)
			}
			push(t, ref, image)
			desc, err := remote.Get(ref)
			if err != nil {
				t.Fatal(err)
			}
			artifact := mutate.Subject(mutate.Annotations(image, map[string]string{"a": "b"}).(v1.Image), desc.Descriptor).(v1.Image)
			push(t, ref.Context().Tag("artifact"), artifact)

			back, err := desc.Image()
			if err != nil {
				t.Fatal(err)
			}
			layers, err := back.Layers()
			if err != nil || len(layers) != 3 {
				t.Fatalf("got %d layers, %v", len(layers), err)
			}
			for _, l := range layers {
				rc, err := l.Compressed() // verified as it is read
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, rc); err != nil {
					t.Errorf("%+v: %v", o, err)
				}
				rc.Close()
			}
			index, err := remote.Referrers(ref.Context().Digest(desc.Digest.String()))
			if err != nil {
				t.Fatal(err)
			}
			manifest, err := index.IndexManifest()
			if err != nil {
				t.Fatal(err)
			}
			want, err := artifact.Digest()
			if err != nil {
				t.Fatal(err)
			}
			if len(manifest.Manifests) != 1 || manifest.Manifests[0].Digest != want {
				t.Errorf("%+v: got referrers %v, want %v", o, manifest.Manifests, want)
			}
		}
	}
}

func push(t *testing.T, ref name.Reference, image v1.Image) {
	t.Helper()
	if err := remote.Write(ref, image); err != nil {
		t.Fatal(err)
	}
}

func TestRecord(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	body := []byte("0123456789")
	path := "/v2/a/b/blobs/" + r.PutBlob("a/b", body).String()
	get := func(rng string) string {
		t.Helper()
		req, err := http.NewRequest(http.MethodGet, r.URL()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if rng != "" {
			req.Header.Set("Range", rng)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return "no answer"
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return fmt.Sprint(resp.StatusCode, " ", string(b), " ", err)
	}
	want := func(got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	want(get("bytes=2-4"), "206 234 <nil>")
	r.Inject(registrytest.Blobs, 1, registrytest.Flip(1))
	r.Inject(registrytest.Blobs, 1, registrytest.Reset(3))
	r.Inject(registrytest.Blobs, 1, registrytest.Truncate(4))
	r.Inject(registrytest.Blobs, 1, registrytest.IgnoreRange())
	r.Inject(registrytest.Blobs, 1, registrytest.Status(418))
	remove := r.Inject(registrytest.Blobs, -1, registrytest.Status(500))
	want(get("bytes=2-4"), "206 224 <nil>") // '3' ^ 1 is '2'
	want(get(""), "200 012 unexpected EOF")
	want(get(""), "200 0123 <nil>")
	want(get("bytes=2-4"), "200 0123456789 <nil>")
	want(get(""), "418  <nil>")
	want(get(""), "500  <nil>")
	remove()
	want(get(""), "200 0123456789 <nil>")

	var got []string
	for _, q := range r.Requests() {
		got = append(got, fmt.Sprintf("%s %d %d", q.Range, q.Status, q.Bytes))
	}
	want(strings.Join(got, "; "), "bytes=2-4 206 3; bytes=2-4 206 3;  200 3;  200 4; bytes=2-4 200 10;  418 0;  500 0;  200 10")
	if n, bytes := r.Count(registrytest.OfBlobs, func(q registrytest.Request) bool { return q.Status == 206 }); n != 2 || bytes != 6 {
		t.Errorf("counted %d requests and %d bytes, want 2 and 6", n, bytes)
	}
	r.Reset()
	if n, _ := r.Count(); n != 0 {
		t.Errorf("%d requests after Reset", n)
	}
}

// Blobs on disk outlive the registry, for tests that restart it.
func TestDirIsKept(t *testing.T) {
	dir := t.TempDir()
	r, err := registrytest.Run(registrytest.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	dgst := r.PutBlob("a", []byte("x"))
	r.Close()
	r.Close() // twice does no harm
	again := registrytest.Start(t, registrytest.Options{Dir: dir})
	for d, want := range map[digest.Digest]int{dgst: 200, digest.FromString("y"): 404} {
		resp, err := http.Get(again.URL() + "/v2/a/blobs/" + d.String())
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("got status %d, want %d", resp.StatusCode, want)
		}
	}
}

// TestSubject: a registry with the referrers API says that it has seen the subject of a manifest, and one without must not: others write the referrers tag by that.
func TestSubject(t *testing.T) {
	subject := digest.FromString("an image")
	for o, want := range map[registrytest.Options]string{{}: subject.String(), {NoReferrers: true}: ""} {
		r := registrytest.Start(t, o)
		for body, want := range map[string]string{
			`{"schemaVersion":2,"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + subject.String() + `","size":8}}`: want,
			`{"schemaVersion":2}`: "",
		} {
			req, err := http.NewRequest(http.MethodPut, r.URL()+"/v2/a/manifests/"+digest.FromString(body).String(), strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if got := resp.Header.Get("OCI-Subject"); resp.StatusCode != http.StatusCreated || got != want {
				t.Errorf("%+v: %s: status %d, OCI-Subject %q, want %q", o, body, resp.StatusCode, got, want)
			}
		}
	}
}

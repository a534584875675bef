package converter

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

func TestIsReferrersTag(t *testing.T) {
	hex := strings.Repeat("0a", 32)
	for tag, want := range map[string]bool{
		"sha256-" + hex: true, "sha256-" + hex + ".sig": true, "sha512-" + hex + hex: true,
		"sha256-" + hex[1:]: false, "sha256": false, "sha256-": false, "latest": false, "1.0-" + hex: false, "": false, hex: false,
	} {
		if got := IsReferrersTag(tag); got != want {
			t.Errorf("IsReferrersTag(%q) = %v", tag, got)
		}
	}
}

// TestTags lists tags, of which what an artifact needs is none, and resolves them.
func TestTags(t *testing.T) {
	onAllPlaces(t, func(t *testing.T, image string) {
		p, _ := open(t, image+":v1")
		if tags, err := p.Tags(t.Context()); !errors.Is(err, ErrNotFound) {
			t.Errorf("of a place that does not exist: %v, %v", tags, err)
		}
		d := testImage{layers: small(1, 1)}.put(t, p, "v2")
		testImage{layers: small(1, 1)}.put(t, p, "v1")
		create(t, image+":v1", CreateOptions{})
		if tags, err := p.Tags(t.Context()); err != nil || !slices.Equal(tags, []string{"v1", "v2"}) {
			t.Errorf("tags %v, %v", tags, err)
		}
		for _, ref := range []string{"v1", "v2", d.Digest.String()} {
			got, err := p.Resolve(t.Context(), ref)
			if err != nil || got.Digest != d.Digest || got.Size != d.Size || got.MediaType != d.MediaType {
				t.Errorf("%s is %+v, %v, want %+v", ref, got, err, d)
			}
		}
		for _, ref := range []string{"v3", "sha256:" + strings.Repeat("1", 64)} {
			if got, err := p.Resolve(t.Context(), ref); !errors.Is(err, ErrNotFound) {
				t.Errorf("%s is %+v, %v", ref, got, err)
			}
		}
	})
}

// TestResolveWithoutHead: what a registry does not say to a HEAD it says to a GET; one that fails is not asked twice.
func TestResolveWithoutHead(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	p, _ := open(t, reg.Host()+"/app:v1")
	d := testImage{layers: small(1, 1)}.put(t, p, "v1")
	head := func(req *http.Request) bool { return req.Method == http.MethodHead && registrytest.Manifests(req) }
	for name, fault := range map[string]registrytest.Fault{
		"no HEAD": registrytest.Status(http.StatusMethodNotAllowed), "no digest": registrytest.AnswerHeader("Docker-Content-Digest", ""),
	} {
		remove := reg.Inject(head, -1, fault)
		if got, err := p.Resolve(t.Context(), "v1"); err != nil || got.Digest != d.Digest {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		remove()
	}
	reg.Reset()
	reg.Inject(head, -1, registrytest.Status(http.StatusForbidden))
	if got, err := p.Resolve(t.Context(), "v1"); err == nil || errors.Is(err, ErrNotFound) {
		t.Errorf("refused: %+v, %v", got, err)
	}
	if n, _ := reg.Count(func(q registrytest.Request) bool {
		return q.Method == http.MethodGet && strings.Contains(q.Path, "/manifests/")
	}); n != 0 {
		t.Errorf("%d GETs after a HEAD that was refused", n)
	}
}

// TestLongLists lists more names than are on a page: with links to the next, without, and from a registry that always gives all.
func TestLongLists(t *testing.T) {
	const n = namesPage + 5
	manifest := []byte(`{"schemaVersion":2}`)
	for name, o := range map[string]registrytest.Options{"linked": {NamesPage: 400}, "cut off": {}, "all": {NamesPage: 2 * n}} {
		t.Run(name, func(t *testing.T) {
			reg := registrytest.Start(t, o)
			var tags, repositories []string
			for i := range n {
				tags = append(tags, fmt.Sprintf("t%05d", i))
				repositories = append(repositories, fmt.Sprintf("r/%05d", i))
				reg.PutManifest("app", tags[i], ocispec.MediaTypeImageManifest, manifest)
			}
			p, _ := open(t, reg.Host()+"/app")
			if got, err := p.Tags(t.Context()); err != nil || !slices.Equal(got, tags) {
				t.Errorf("%d tags of %d, %v", len(got), n, err)
			}
			if o.NamesPage == 0 {
				return // go-containerregistry's has no order of repositories
			}
			for _, r := range repositories {
				reg.PutManifest(r, "v1", ocispec.MediaTypeImageManifest, manifest)
			}
			want := append([]string{"app"}, repositories...)
			if got, err := Catalog(t.Context(), reg.Host(), RegistryOptions{}); err != nil || !slices.Equal(got, want) {
				t.Errorf("%d repositories of %d, %v", len(got), len(want), err)
			}
		})
	}
}

// TestCatalog lists repositories, and tells a registry that does not from one that fails.
func TestCatalog(t *testing.T) {
	catalog := func(req *http.Request) bool { return req.URL.Path == "/v2/_catalog" }
	hosts := map[string]string{
		"registrytest": registrytest.Start(t, registrytest.Options{}).Host(), "docker-registry": dockerRegistry(t, true),
	}
	for name, host := range hosts {
		t.Run(name, func(t *testing.T) {
			for _, repo := range []string{"team/b", "a", "team/a"} {
				p, _ := open(t, host+"/"+repo)
				testImage{layers: small(1, 1)}.put(t, p, "v1")
			}
			got, err := Catalog(t.Context(), host, RegistryOptions{})
			if err != nil || !slices.Equal(got, []string{"a", "team/a", "team/b"}) {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
	reg := registrytest.Start(t, registrytest.Options{})
	reg.RequireToken(registrytest.TokenOptions{})
	if _, err := Catalog(t.Context(), reg.Host(), RegistryOptions{}); err != nil {
		t.Errorf("with a token: %v", err)
	}
	for _, status := range []int{http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed} {
		reg.Inject(catalog, 1, registrytest.Status(status))
		if got, err := Catalog(t.Context(), reg.Host(), RegistryOptions{}); !errors.Is(err, ErrNoCatalog) {
			t.Errorf("%d: %v, %v", status, got, err)
		}
	}
	reg.Inject(catalog, 1, registrytest.Status(http.StatusTeapot)) // any that is not tried again
	if got, err := Catalog(t.Context(), reg.Host(), RegistryOptions{}); err == nil || errors.Is(err, ErrNoCatalog) {
		t.Errorf("a registry that fails: %v, %v", got, err)
	}
}

// TestReferrersAPIStaysKnown: a registry has the referrers API also if one of its pages cannot be read.
func TestReferrersAPIStaysKnown(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{ReferrersPage: 1})
	p, _, err := Open(reg.Host()+"/app", OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	subject := putIndex(t, p, "v1")
	attach := func(name string) {
		t.Helper()
		putManifest(t, p, ocispec.MediaTypeImageManifest, "", ocispec.Manifest{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/x-test",
			Config: ocispec.DescriptorEmptyJSON, Layers: []ocispec.Descriptor{}, Subject: &subject, Annotations: map[string]string{"name": name},
		})
	}
	attach("one")
	attach("two")
	remove := reg.Inject(func(r *http.Request) bool { return registrytest.Referrers(r) && r.URL.Query().Has("from") }, -1, registrytest.AnswerStatus(http.StatusForbidden))
	if list, err := p.Referrers(t.Context(), subject.Digest); err == nil {
		t.Errorf("%d referrers, and no error", len(list))
	}
	remove()
	reg.Reset()
	attach("three")
	if n, _ := reg.Count(func(q registrytest.Request) bool { return strings.Contains(q.Path, "/referrers/") }); n > 1 { // go-containerregistry asks once for itself
		t.Errorf("%d requests for what is known", n)
	}
}

package registryclient

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// wantReferrers asks for the referrers of subject and wants those, in any order, with so many requests.
func wantReferrers(t testing.TB, c *Client, r *registrytest.Registry, repo Repository, subject digest.Digest, requests int, want ...digest.Digest) {
	t.Helper()
	r.Reset()
	found, err := c.Referrers(t.Context(), repo, subject, artifactType)
	if err != nil {
		t.Fatal(err)
	}
	got := map[digest.Digest]bool{}
	for _, d := range found {
		got[d.Digest] = d.ArtifactType == artifactType
	}
	for _, d := range want {
		if !got[d] {
			t.Errorf("%s is not among the referrers %v", d, found)
		}
	}
	if len(found) != len(want) {
		t.Errorf("got %d referrers, want %d", len(found), len(want))
	}
	wantRequests(t, r, requests)
}

func TestReferrersAPI(t *testing.T) {
	for name, o := range map[string]registrytest.Options{"filtering": {}, "not filtering": {NoFilter: true}} {
		t.Run(name, func(t *testing.T) {
			r := registrytest.Start(t, o)
			subject, artifact := put(t, r, artifactType)
			_, other := put(t, r, "application/vnd.example.other")
			c := newClient(t, Options{})
			wantReferrers(t, c, r, repoOf(r), subject, 1, artifact)
			if got, want := r.Requests()[0].Query, "artifactType=application%2Fvnd.example.artifact.v1"; got != want {
				t.Errorf("got query %q, want %q", got, want)
			}
			wantReferrers(t, c, r, repoOf(r), other, 1) // none; and that is not remembered:
			b := mustJSON(t, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: artifactType,
				Config: ocispec.DescriptorEmptyJSON, Subject: &ocispec.Descriptor{Digest: other}})
			late := r.PutManifest("team/app", "", ocispec.MediaTypeImageManifest, b)
			wantReferrers(t, c, r, repoOf(r), other, 1, late)
		})
	}
}

// Several types are one request, whether the registry filters or not, and on the tag schema too.
func TestReferrersOfTwoTypes(t *testing.T) {
	const second, third = "application/vnd.example.second", "application/vnd.example.third"
	for name, o := range map[string]registrytest.Options{"API": {}, "not filtering": {NoFilter: true}, "tag schema": {NoReferrers: true}} {
		t.Run(name, func(t *testing.T) {
			r := registrytest.Start(t, o)
			subject, first := put(t, r, artifactType)
			list := []ocispec.Descriptor{{Digest: first, ArtifactType: artifactType}}
			for _, kind := range []string{second, third} {
				b := mustJSON(t, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: kind,
					Config: ocispec.DescriptorEmptyJSON, Subject: &ocispec.Descriptor{Digest: subject}})
				list = append(list, ocispec.Descriptor{Digest: r.PutManifest("team/app", "", ocispec.MediaTypeImageManifest, b), ArtifactType: kind})
			}
			want := 1
			if o.NoReferrers {
				tag := strings.Replace(subject.String(), ":", "-", 1)
				r.PutManifest("team/app", tag, ocispec.MediaTypeImageIndex, mustJSON(t, ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: list}))
				want = 2
			}
			r.Reset()
			found, err := newClient(t, Options{}).Referrers(t.Context(), repoOf(r), subject, artifactType, second)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]digest.Digest{}
			for _, d := range found {
				got[d.ArtifactType] = d.Digest
			}
			if len(found) != 2 || got[artifactType] != first || got[second] != list[1].Digest {
				t.Errorf("got %v, want %v", found, list[:2])
			}
			wantRequests(t, r, want)
		})
	}
}

func TestReferrersPages(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{ReferrersPage: 3})
	subject, artifact := put(t, r, artifactType)
	want := []digest.Digest{artifact}
	for i := range 7 {
		b := mustJSON(t, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: artifactType,
			Config: ocispec.DescriptorEmptyJSON, Subject: &ocispec.Descriptor{Digest: subject}, Annotations: map[string]string{"i": fmt.Sprint(i)}})
		want = append(want, r.PutManifest("team/app", "", ocispec.MediaTypeImageManifest, b))
	}
	c := newClient(t, Options{})
	wantReferrers(t, c, r, repoOf(r), subject, 3, want...)
}

// A list without end is an error, not "none", and has an end for us: in pages, in bytes, with the caller's time, and at once if a page links to itself.
func TestReferrersWithoutEnd(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	subject, _ := put(t, r, "application/vnd.example.other")
	empty := `{"manifests":[]}`
	var stop context.CancelFunc
	for name, tc := range map[string]struct {
		link  string // %d is the number of the next page
		body  string
		pages int
		stop  int // the page with which the caller's time is up
	}{
		"to itself":  {`<?n=1>; rel="next"`, empty, 2, 0},
		"pages":      {`<?n=%d>; rel="next"`, empty, maxReferrersPages, 0},
		"bytes":      {`<?n=%d>; rel="next"`, empty + strings.Repeat(" ", maxReferrersPage-len(empty)), maxReferrersBytes/maxReferrersPage + 1, 0},
		"time is up": {`<?n=%d>; rel="next"`, empty, 50, 50},
	} {
		pages := 0
		remove := r.Inject(registrytest.Referrers, -1, func(*registrytest.Registry, http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				if pages++; pages == tc.stop {
					defer stop()
				}
				w.Header().Set("Link", strings.Replace(tc.link, "%d", fmt.Sprint(pages), 1))
				w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
				w.Write([]byte(tc.body))
			})
		})
		var ctx context.Context
		ctx, stop = context.WithCancel(t.Context())
		_, err := newClient(t, Options{Budget: time.Minute, Stall: 20 * time.Second}).Referrers(ctx, repoOf(r), subject, artifactType)
		stop()
		remove()
		if err == nil || errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "no "+artifactType+" among them") {
			t.Errorf("%s: got error %v, want one that says what was looked for", name, err)
		}
		if pages != tc.pages {
			t.Errorf("%s: %d pages, want %d", name, pages, tc.pages)
		}
	}
}

// What is looked for is found behind any number of signatures, and without reading those where the registry filters.
func TestReferrersAmongSignatures(t *testing.T) {
	const second, signature = "application/vnd.example.second", "application/vnd.example.signature"
	for name, tc := range map[string]struct {
		o        registrytest.Options
		requests int
	}{
		"filtering":     {registrytest.Options{ReferrersPage: 2}, 3},                      // the first page and one list for each type
		"not filtering": {registrytest.Options{ReferrersPage: 2, NoFilter: true}, 1 + 46}, // as far as the page that it is on
	} {
		t.Run(name, func(t *testing.T) {
			r := registrytest.Start(t, tc.o)
			subject, _ := put(t, r, signature)
			attach := func(kind string, i int) digest.Digest {
				return r.PutManifest("team/app", "", ocispec.MediaTypeImageManifest, mustJSON(t, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest,
					ArtifactType: kind, Config: ocispec.DescriptorEmptyJSON, Subject: &ocispec.Descriptor{Digest: subject}, Annotations: map[string]string{"i": fmt.Sprint(i)}}))
			}
			for i := range 99 {
				attach(signature, i)
			}
			want := []digest.Digest{attach(artifactType, 3), attach(second, 0)} // the first comes late in the list, which is sorted by digest
			r.Reset()
			found, err := newClient(t, Options{Budget: time.Minute, Stall: 20 * time.Second}).Referrers(t.Context(), repoOf(r), subject, artifactType, second)
			if err != nil || len(found) != 2 || !slices.Contains(want, found[0].Digest) || !slices.Contains(want, found[1].Digest) {
				t.Errorf("got %v, %v, want %v", found, err, want)
			}
			wantRequests(t, r, tc.requests)
		})
	}
}

// The first contact with a registry that has only the tag schema costs a second request; whatever is asked later does not, but for
// repositories that have no tag: one host name may stand for several registries.
func TestReferrersTagSchema(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{NoReferrers: true})
	subject, artifact := put(t, r, artifactType)
	c := newClient(t, Options{})
	repo := repoOf(r)
	wantReferrers(t, c, r, repo, subject, 2) // none yet; and that is not remembered:
	putTag(t, r, "team/app", subject, artifact)
	wantReferrers(t, c, r, repo, subject, 1, artifact)
	wantReferrers(t, c, r, repo, digest.FromString("x"), 1)

	other := Repository(r.Host() + "/team/other")
	wantReferrers(t, c, r, other, subject, 2)
	wantReferrers(t, c, r, other, subject, 1)
	r.PutManifest("team/third", "", ocispec.MediaTypeImageManifest, []byte("{}"))
	putTag(t, r, "team/third", subject, artifact)
	wantReferrers(t, c, r, Repository(r.Host()+"/team/third"), subject, 1, artifact)
}

func putTag(t testing.TB, r *registrytest.Registry, repo string, subject, artifact digest.Digest) {
	t.Helper()
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{
		{MediaType: "application/vnd.example", Digest: artifact, ArtifactType: artifactType, Size: 7},
		{MediaType: "application/vnd.example", Digest: artifact, Size: 7},                                          // does not tell its type
		{MediaType: "application/vnd.example", Digest: artifact, ArtifactType: artifactType, Size: -1},             // nonsense
		{MediaType: "application/vnd.example", Digest: artifact, ArtifactType: "application/vnd.other", Size: 100}, // another
	}}
	r.PutManifest(repo, strings.Replace(subject.String(), ":", "-", 1), index.MediaType, mustJSON(t, index))
}

// What else registries without the API have been seen to answer.
func TestReferrersUnsupported(t *testing.T) {
	for name, fault := range map[string]registrytest.Fault{
		"400": registrytest.Status(400), "404": registrytest.Status(404), "405": registrytest.Status(405), "406": registrytest.Status(406),
		"501": registrytest.Status(501), "front page": registrytest.Answer("text/html", "<html>"),
		"404 of the manifest": func(*registrytest.Registry, http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(404)
				w.Write([]byte(`{"errors":[{"code":"MANIFEST_UNKNOWN"}]}`))
			})
		},
	} {
		r := registrytest.Start(t, registrytest.Options{NoReferrers: true})
		r.Inject(registrytest.Referrers, -1, fault)
		subject, artifact := put(t, r, artifactType)
		putTag(t, r, "team/app", subject, artifact)
		c := newClient(t, Options{})
		t.Run(name, func(t *testing.T) {
			wantReferrers(t, c, r, repoOf(r), subject, 2, artifact)
			again := 1
			if name == "404 of the manifest" || name == "front page" {
				again = 2 // it may have the API for others
			}
			wantReferrers(t, c, r, repoOf(r), subject, again, artifact)
		})
	}
}

func TestReferrersFail(t *testing.T) {
	for name, tc := range map[string]struct {
		fault registrytest.Fault
		ok    bool
	}{
		"401":       {registrytest.Status(401), false},
		"403":       {registrytest.Status(403), false},
		"503":       {registrytest.Status(503), false},
		"503 once":  {registrytest.Status(503), true},
		"no JSON":   {registrytest.Answer(ocispec.MediaTypeImageIndex, "<html>"), false},
		"no index":  {registrytest.Answer(ocispec.MediaTypeImageIndex, `{"mediaType":"application/vnd.oci.image.manifest.v1+json"}`), false},
		"too large": {registrytest.Answer(ocispec.MediaTypeImageIndex, `{"manifests":[]}`+strings.Repeat(" ", maxReferrersPage)), false},
	} {
		r := registrytest.Start(t, registrytest.Options{})
		subject, _ := put(t, r, artifactType)
		times := -1
		if tc.ok {
			times = 1
		}
		r.Inject(registrytest.Any, times, tc.fault)
		c := newClient(t, Options{Budget: 300 * time.Millisecond})
		if found, err := c.Referrers(t.Context(), repoOf(r), subject, artifactType); (err == nil) != tc.ok || errors.Is(err, ErrNotFound) {
			t.Errorf("%s: got %d, %v, want success %v", name, len(found), err, tc.ok)
		}
	}
}

// A page of referrers takes memory for those that are looked for, not for how many empty ones fit into it.
func TestReferrersMemory(t *testing.T) {
	page := func(entry string) []byte {
		return []byte(`{"manifests":[` + strings.Repeat(entry+",", maxReferrersPage/(len(entry)+1)-10) + entry + `]}`)
	}
	empty := page(`{}`)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if found, err := parseReferrers(empty, []string{artifactType}); err != nil || len(found) > 0 {
		t.Errorf("empty entries: got %d, %v, want none", len(found), err)
	}
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > 32<<20 {
		t.Errorf("%d bytes were allocated for a page of %d", got, len(empty))
	}
	for _, entry := range []string{`1`, `{"artifactType":"` + artifactType + `","digest":"` + digest.FromString("x").String() + `"}`} {
		if found, err := parseReferrers(page(entry), []string{artifactType}); err == nil {
			t.Errorf("many %s: got %d, want an error", entry, len(found))
		}
	}
}

func TestReferrersOfMirrors(t *testing.T) {
	mirror, origin := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
	subject, artifact := put(t, origin, artifactType)
	toml := fmt.Sprintf("server = %q\n[host.%q]\n", origin.URL(), mirror.URL())
	c := newClient(t, Options{HostsDir: hostsDir(t, domain, toml)})
	const repo = domain + "/team/app"
	// The mirror has none, which says nothing.
	wantReferrers(t, c, origin, repo, subject, 1, artifact)
	// The mirror has something else, which says nothing of what is looked for and is of use beside it.
	const second = "application/vnd.example.second"
	b := mustJSON(t, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: second,
		Config: ocispec.DescriptorEmptyJSON, Subject: &ocispec.Descriptor{Digest: subject}})
	other := mirror.PutManifest("team/app", "", ocispec.MediaTypeImageManifest, b)
	for _, at := range []*registrytest.Registry{mirror, origin} { // then the registry has both
		found, err := c.Referrers(t.Context(), repo, subject, artifactType, second)
		if err != nil || len(found) != 2 || found[0].Digest != other || found[1].Digest != artifact {
			t.Errorf("got %v, %v, want %s and %s", found, err, other, artifact)
		}
		at.PutManifest("team/app", "", ocispec.MediaTypeImageManifest, b)
	}
	// The mirror has all that is looked for.
	put(t, mirror, artifactType)
	wantReferrers(t, c, origin, repo, subject, 0, artifact)
	// The mirror is down; the registry itself has none, and that is the answer, at once.
	mirror.Close()
	start := time.Now()
	for range 3 {
		wantReferrers(t, c, origin, repo, artifact, 1)
	}
	if d := time.Since(start); d > time.Second {
		t.Errorf("took %v", d)
	}
}

func FuzzParseReferrers(f *testing.F) {
	f.Add([]byte(`{"manifests":[{"digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":1,"artifactType":"` + artifactType + `"}]}`))
	f.Add([]byte(`{"mediaType":"x","manifests":null}`))
	f.Add([]byte(`{"manifests":[{"digest":"sha256:xx","size":-1,"artifactType":"` + artifactType + `"}]}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		found, err := parseReferrers(b, []string{artifactType})
		if err != nil && (found != nil || temporary(err)) {
			t.Errorf("got %v with %v", found, err)
		}
		for _, d := range found {
			if d.Digest.Validate() != nil || d.Size < 0 || d.ArtifactType != artifactType {
				t.Errorf("let %+v through", d)
			}
		}
		if err == nil && !json.Valid(b) {
			t.Error("read what is no JSON")
		}
	})
}

func TestNextPage(t *testing.T) {
	for link, want := range map[string]string{
		`</v2/a/referrers/x?n=2&last=y>; rel="next"`:           "n=2&last=y",
		`<https://h/v2/a?b=c>;rel=next`:                        "b=c",
		`<?p=1>; rel="prev", <?p=3>; title="a, b"; rel="next"`: "p=3",
		`<?p=1>; rel="prev",<?p=3>; REL=next`:                  "p=3",
		`</x>; rel="next"`:                                     "",
		`<?p=1>`:                                               "",
		`<?p=1>; rel="last"`:                                   "",
		`?p=1; rel="next"`:                                     "",
		`<`:                                                    "",
		`>?<; rel="next"`:                                      "",
	} {
		if got, ok := nextPage(http.Header{"Link": {link}}); got != want || ok != (want != "") {
			t.Errorf("%s: got %q, %v, want %q", link, got, ok, want)
		}
	}
}

func FuzzNextPage(f *testing.F) {
	f.Add(`</v2/a/referrers/x?n=2&last=y>; rel="next"`)
	f.Add(`<?p=1>; rel="prev", <?p=3>; rel="next"`)
	f.Add(`<a>,<b>,<c?d>;rel=next`)
	f.Fuzz(func(t *testing.T, s string) {
		query, ok := nextPage(http.Header{"Link": {s}})
		if ok && (query == "" || !strings.Contains(s, query)) {
			t.Errorf("%q: got %q", s, query)
		}
	})
}

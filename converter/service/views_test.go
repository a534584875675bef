package service

import (
	"errors"
	"net/http"
	"reflect"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestViews looks at an index with artifacts, at an image without, and at all of their repository.
func TestViews(t *testing.T) {
	onRegistries(t, func(t *testing.T, w *world) {
		amd, arm := image(t, "amd64", 1000, 200_000), image(t, "arm64", 2000)
		both := w.push("team/app", "v1", index(amd, arm))
		w.push("team/app", "latest", index(amd, arm))
		plain := w.push("team/app", "v2", created(t, 7, 3000))
		op := w.profiled(both)

		info, err := w.Image(t.Context(), w.host, "team/app", "v1")
		if err != nil {
			t.Fatal(err)
		}
		if info.Image != both || info.Tag != "v1" || len(info.Platforms) != 2 || info.Last == nil || info.Last.ID != op.ID || info.Subject != "" {
			t.Errorf("image %+v", info)
		}
		p := info.Platforms[0]
		if p.Platform != "linux/amd64" || len(p.Layers) != 2 || p.Size != p.Layers[0].Size+p.Layers[1].Size || len(p.Referrers) != 2 || p.Streaming == nil {
			t.Fatalf("platform %+v", p)
		}
		s := p.Streaming
		if s.Artifact != op.Artifacts[0].Digest || s.Profile != artifact.ProfileRecorded || len(s.Layers) != 2 || s.Size <= s.Index || s.Index == 0 {
			t.Errorf("streaming %+v", s)
		}
		// The profile is of the first chunk.
		l := s.Layers[0]
		if l.Source != p.Layers[0].Digest || len(l.Hot) != 1 || l.Hot[0].Off != 0 || l.Hot[0].Len == 0 || l.Hot[0].Len > l.TarSize || len(s.Layers[1].Hot) != 0 {
			t.Errorf("layers %+v", s.Layers)
		}
		if place := w.place("team/app"); place != nil {
			alone, err := Describe(t.Context(), place, Image{Registry: w.host, Repository: "team/app"}, "v1")
			if alone.Last = info.Last; err != nil || !reflect.DeepEqual(alone, info) {
				t.Errorf("alone it is %+v, %v, want %+v", alone, err, info)
			}
		}
		if a, err := w.Image(t.Context(), w.host, "team/app", s.Artifact.String()); err != nil || a.Subject != p.Digest || a.Tag != "" || len(a.Platforms) != 0 {
			t.Errorf("the artifact is %+v, %v", a, err)
		}
		for ref, want := range map[string]error{"v9": ErrNotFound, "sha256:" + strings.Repeat("1", 64): ErrNotFound, "a b": ErrInvalid, "": ErrInvalid} {
			if got, err := w.Image(t.Context(), w.host, "team/app", ref); !errors.Is(err, want) {
				t.Errorf("%q: %+v, %v", ref, got, err)
			}
		}

		tags, err := w.Tags(t.Context(), w.host, "team/app")
		if err != nil || len(tags) != 3 {
			t.Fatalf("tags %+v, %v", tags, err)
		}
		got := map[string]TagInfo{}
		for _, tag := range tags {
			got[tag.Name] = tag
		}
		if got["v1"].Digest != both.Digest || !got["v1"].Streaming || !got["latest"].Streaming || got["v2"].Streaming || got["v2"].Digest != plain.Digest {
			t.Errorf("tags %+v", tags)
		}
		if tags[0].Name != "v2" || tags[0].Created.IsZero() {
			t.Errorf("the newest is %+v", tags[0])
		}

		use, err := w.Storage(t.Context(), w.host, "team/app")
		if err != nil || use.Images != 2 || use.Artifacts != 2 || use.ArtifactBytes < s.Size || use.ProfileBytes == 0 || use.Partial {
			t.Errorf("storage %+v, %v", use, err)
		}
		var size int64
		for _, p := range info.Platforms {
			size += p.Size
		}
		if v2, err := w.Image(t.Context(), w.host, "team/app", "v2"); err != nil || use.ImageBytes != size+v2.Platforms[0].Size || v2.Platforms[0].Streaming != nil {
			t.Errorf("images take %d bytes, %v; v1 %d, v2 %+v", use.ImageBytes, err, size, v2)
		}
		if done, err := w.Verify(t.Context(), both); err != nil || len(done) != 2 {
			t.Errorf("verify: %+v, %v", done, err)
		}
		if done, err := w.Verify(t.Context(), plain); !errors.Is(err, ErrNotFound) {
			t.Errorf("verify without artifacts: %+v, %v", done, err)
		}
		list, err := w.Repositories(t.Context(), w.host, "eam")
		if err != nil || len(list) != 1 || list[0].Name != "team/app" || list[0].Tags != 3 || list[0].Settings.Active {
			t.Errorf("repositories %+v, %v", list, err)
		}
		if list, err := w.Repositories(t.Context(), w.host, "none"); err != nil || len(list) != 0 {
			t.Errorf("repositories %+v, %v", list, err)
		}
	})
}

// TestViewsOfWhatIsNot: what does not exist is ErrNotFound, and what cannot be asked is ErrUnavailable.
func TestViewsOfWhatIsNot(t *testing.T) {
	w := newWorld(t)
	i := w.push("app", "v1", image(t, "amd64", 1000))
	for name, f := range map[string]func(registry, repository string) error{
		"Tags":    func(r, n string) error { _, err := w.Tags(t.Context(), r, n); return err },
		"Image":   func(r, n string) error { _, err := w.Image(t.Context(), r, n, "v1"); return err },
		"Resolve": func(r, n string) error { _, err := w.Resolve(t.Context(), r, n, "v1"); return err },
		"Storage": func(r, n string) error { _, err := w.Storage(t.Context(), r, n); return err },
		"Verify":  func(r, n string) error { _, err := w.Verify(t.Context(), Image{r, n, i.Digest}); return err },
		"DeleteArtifacts": func(r, n string) error {
			_, err := w.DeleteArtifacts(t.Context(), Image{r, n, i.Digest}, "carol")
			return err
		},
	} {
		for _, c := range []struct {
			registry, repository string
			want                 error
		}{{"elsewhere.example.com", "app", ErrNotFound}, {w.host, "none", ErrNotFound}, {w.host, "app:v1", ErrInvalid}} {
			if err := f(c.registry, c.repository); !errors.Is(err, c.want) {
				t.Errorf("%s of %s/%s: %v, want %v", name, c.registry, c.repository, err, c.want)
			}
		}
		remove := w.reg.Inject(registrytest.Any, -1, registrytest.Status(http.StatusForbidden))
		if err := f(w.host, "app"); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s of a registry that refuses: %v", name, err)
		}
		remove()
	}
	// One that was proven wrong is told from one that is not there.
	if err := placeError(converter.ErrDifferent); !errors.Is(err, converter.ErrDifferent) || errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}

// TestPlaceKept: whoever asks a repository again does not ask for a token again.
func TestPlaceKept(t *testing.T) {
	w := newWorld(t)
	w.push("app", "v1", image(t, "amd64", 1000))
	w.reg.RequireToken(registrytest.TokenOptions{})
	for range 3 {
		if _, err := w.Resolve(t.Context(), w.host, "app", "v1"); err != nil {
			t.Fatal(err)
		}
	}
	tokens, _ := w.reg.Count(func(q registrytest.Request) bool { return strings.HasPrefix(q.Path, "/token") })
	if tokens != 1 {
		t.Errorf("%d tokens, want 1", tokens)
	}
}

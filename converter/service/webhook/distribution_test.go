package webhook

import (
	"context"
	"errors"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestDistribution: a real registry tells of a push and a deletion, once more what was not noted, and nothing of layers.
func TestDistribution(t *testing.T) {
	events := make(chan service.Event, 100)
	first := true // the registry sends one delivery at a time
	server := httptest.NewServer(handler(t, handle(func(_ context.Context, e service.Event) error {
		if first {
			first = false
			return errors.New("not now")
		}
		events <- e
		return nil
	}), Source{Name: "registry", Kind: "distribution", Registry: "registry.example.com", Header: "Authorization", Secret: []byte(secret)}))
	defer server.Close()
	host := registrytest.StartDistribution(t, registrytest.Distribution{
		Deletes: true, Notify: server.URL + "/hooks/registry", Authorization: "Bearer " + secret,
	})
	image, err := random.Image(1000, 2)
	if err != nil {
		t.Fatal(err)
	}
	hash, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.ParseReference(host + "/team/app:v1")
	if err != nil {
		t.Fatal(err)
	}
	next := func() service.Event {
		t.Helper()
		select {
		case e := <-events:
			if e.ID == "" {
				t.Errorf("no ID: %+v", e)
			}
			e.ID = ""
			return e
		case <-time.After(30 * time.Second):
			t.Fatal("the registry tells nothing")
			return service.Event{}
		}
	}
	if err := remote.Write(tag, image); err != nil {
		t.Fatal(err)
	}
	want := service.Event{Registry: "registry.example.com", Repository: "team/app", Tag: "v1", Digest: digest.Digest(hash.String()), Source: "distribution"}
	if got := next(); got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if err := remote.Delete(tag.Context().Digest(hash.String())); err != nil {
		t.Fatal(err)
	}
	want.Kind, want.Tag = service.Deleted, ""
	if got := next(); got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	want.Tag, want.Digest = "v1", "" // which named it
	if got := next(); got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if len(events) > 0 {
		t.Errorf("also %+v", <-events)
	}
}

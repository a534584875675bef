package rest

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/client"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestClient does with a client all that there is to do with an image of two platforms.
func TestClient(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	image := w.push("team/app", "v1", "amd64", "arm64")
	owner, reader := w.client(access.Owner), w.client(access.Reader)

	registries, err := reader.Registries(ctx)
	if err != nil || len(registries) != 1 || registries[0].Name != w.host {
		t.Errorf("registries %+v, %v", registries, err)
	}
	resolved, err := reader.Resolve(ctx, "", "team/app", "v1")
	if err != nil || resolved != image {
		t.Fatalf("v1 is %v (%v), want %v", resolved, err, image)
	}

	op, existed, err := owner.Submit(ctx, service.Request{Image: image, Tag: "v1"})
	if err != nil || existed || op.Image != image || op.Tag != "v1" || op.By != "a owner" {
		t.Fatalf("submitted %+v, %t, %v", op, existed, err)
	}
	var states []service.State
	last := service.Operation{}
	op, err = reader.Follow(ctx, op.ID, func(o service.Operation) {
		if o.Progress.Percent < last.Progress.Percent || o.Progress.Bytes < last.Progress.Bytes {
			t.Errorf("progress goes back from %+v to %+v", last.Progress, o.Progress)
		}
		last = o
		if len(states) == 0 || states[len(states)-1] != o.State {
			states = append(states, o.State)
		}
	})
	if err != nil || op.State != service.Succeeded || len(op.Artifacts) != 2 || op.Progress.Percent != 100 || op.Progress.Bytes != op.Progress.Total || states[len(states)-1] != service.Succeeded {
		t.Fatalf("%+v, %v, after %v", op, err, states)
	}
	if again, err := reader.Operation(ctx, op.ID); err != nil || again.ID != op.ID || again.State != op.State {
		t.Errorf("operation %+v, %v", again, err)
	}
	if again, err := reader.Last(ctx, image); err != nil || again.ID != op.ID {
		t.Errorf("last %+v, %v", again, err)
	}
	for _, c := range []struct {
		filter service.Filter
		want   int
	}{
		{service.Filter{}, 1}, {service.Filter{Registry: w.host, Repository: "team/app", Digest: image.Digest, States: []service.State{service.Failed, service.Succeeded}, Limit: 5}, 1},
		{service.Filter{Repository: "team"}, 0}, {service.Filter{States: []service.State{service.Running}}, 0}, {service.Filter{Digest: digest.FromString("x")}, 0},
	} {
		if list, err := reader.Operations(ctx, c.filter); err != nil || len(list) != c.want {
			t.Errorf("%+v: %d operations (%v), want %d", c.filter, len(list), err, c.want)
		}
	}

	info, err := reader.Image(ctx, w.host, "team/app", "v1")
	if err != nil || len(info.Platforms) != 2 || info.Platforms[0].Streaming == nil || len(info.Platforms[0].Layers) != 2 || info.Last == nil || info.Last.ID != op.ID {
		t.Fatalf("image %+v, %v", info, err)
	}
	var manifests struct{ Manifests []manifest }
	w.ask(access.Reader, "GET", "/v1/registries/_/repositories/team/app/_images/v1/_artifacts?artifactType="+artifact.ArtifactType, "").read(t, 200, &manifests)
	if len(manifests.Manifests) != 2 || manifests.Manifests[0].Subject != info.Platforms[0].Digest || manifests.Manifests[0].Digest != info.Platforms[0].Streaming.Artifact {
		t.Errorf("manifests %+v", manifests)
	}
	tags, err := reader.Tags(ctx, w.host, "team/app")
	if err != nil || len(tags) != 1 || tags[0].Name != "v1" || tags[0].Digest != image.Digest || !tags[0].Streaming {
		t.Errorf("tags %+v, %v", tags, err)
	}
	repositories, err := reader.Repositories(ctx, w.host, "ap")
	if err != nil || len(repositories) != 1 || repositories[0].Name != "team/app" || repositories[0].Settings.Active {
		t.Errorf("repositories %+v, %v", repositories, err)
	}
	storage, err := reader.Storage(ctx, w.host, "team/app")
	if err != nil || storage == (service.StorageInfo{}) {
		t.Errorf("storage %+v, %v", storage, err)
	}
	verified, err := w.client(access.Writer).Verify(ctx, image)
	if err != nil || len(verified) != 2 {
		t.Errorf("verified %+v, %v", verified, err)
	}

	set, err := owner.SetSettings(ctx, service.Settings{Registry: w.host, Repository: "team/*", Active: true, Rules: service.Rules{Platforms: []string{"linux/amd64"}, MinSize: 1 << 30, Keep: 3}}, false)
	if err != nil || set.By != "a owner" || set.Rules.Keep != 3 {
		t.Errorf("settings %+v, %v", set, err)
	}
	for _, of := range []func() (service.Settings, error){
		func() (service.Settings, error) { return reader.Settings(ctx, "", "team/app") },
		func() (service.Settings, error) {
			all, err := reader.AllSettings(ctx, "")
			if len(all) != 1 {
				t.Fatalf("settings %+v, %v", all, err)
			}
			return all[0], err
		},
	} {
		if s, err := of(); err != nil || !s.Active || s.Repository != "team/*" || s.Rules.MinSize != 1<<30 || !slices.Equal(s.Rules.Platforms, []string{"linux/amd64"}) {
			t.Errorf("settings %+v, %v", s, err)
		}
	}

	if err := owner.ForgetSettings(ctx, w.host, "team/*"); err != nil {
		t.Error(err)
	}
	if err := owner.ForgetSettings(ctx, w.host, "team/*"); !errors.Is(err, service.ErrNotFound) {
		t.Errorf("settings that are not there: %v", err)
	}
	if s, err := reader.Settings(ctx, "", "team/app"); err != nil || s.Active || s.Repository != "team/app" {
		t.Errorf("settings %+v, %v", s, err)
	}

	t.Run("errors", func(t *testing.T) { clientErrors(t, w, op) })

	deleted, err := owner.DeleteArtifacts(ctx, image, "")
	if err != nil || len(deleted) != 2 {
		t.Errorf("deleted %v, %v", deleted, err)
	}
	if info, err = reader.Image(ctx, w.host, "team/app", image.Digest.String()); err != nil || info.Platforms[0].Streaming != nil || info.Platforms[1].Streaming != nil {
		t.Errorf("image %+v, %v", info, err)
	}
	if e := w.lastAudit(); e["action"] != "delete" || e["outcome"] != "ok" || e["target"] != image.Digest.String() {
		t.Errorf("audited as %v", e)
	}
}

// clientErrors: what the client returns is what the service returned, for errors.Is and converter.CodeOf. op has succeeded.
func clientErrors(t *testing.T, w *world, op service.Operation) {
	ctx := t.Context()
	_, _, exists := w.client(access.Owner).Submit(ctx, service.Request{Image: op.Image})
	_, ended := w.client(access.Owner).Cancel(ctx, op.ID, "")
	_, none := w.client(access.Reader).Resolve(ctx, w.host, "team/app", "v9")
	_, invalid := w.client(access.Reader).Resolve(ctx, w.host, "Team", "v9")
	_, denied := w.client(access.Reader).Cancel(ctx, op.ID, "")
	_, unseen := w.client(access.None).Operation(ctx, op.ID)
	_, unnamed := w.client(access.Reader).Tags(ctx, w.host, "")
	for _, c := range []struct {
		name   string
		err    error
		want   error
		status int
	}{
		{"exists", exists, service.ErrExists, 409}, {"ended", ended, service.ErrNotRunning, 409}, {"none", none, service.ErrNotFound, 404},
		{"invalid", invalid, service.ErrInvalid, 400}, {"denied", denied, nil, 403}, {"unseen", unseen, service.ErrNotFound, 404}, {"unnamed", unnamed, service.ErrInvalid, 0},
	} {
		var e *client.Error
		if is := errors.As(c.err, &e); is != (c.status != 0) || is && (e.Status != c.status || e.Correlation == "" || !strings.Contains(e.Error(), " Correlation ID: "+e.Correlation)) {
			t.Errorf("%s: %v", c.name, c.err)
		}
		for _, is := range []error{service.ErrExists, service.ErrNotRunning, service.ErrNotFound, service.ErrInvalid, service.ErrUnavailable, converter.ErrDifferent} {
			if errors.Is(c.err, is) != (is == c.want) {
				t.Errorf("%s: that %q is %q must be %t", c.name, c.err, is, is == c.want)
			}
		}
	}
}

// stall lets one layer of an image wait until the returned function is called.
func (w *world) stall(image service.Image) (on func()) {
	w.t.Helper()
	info, err := w.svc.Image(w.t.Context(), image.Registry, image.Repository, image.Digest.String())
	if err != nil {
		w.t.Fatal(err)
	}
	layer := info.Platforms[0].Layers[0].Digest.String()
	return w.registry.Inject(func(r *http.Request) bool {
		return r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/blobs/"+layer)
	}, -1, registrytest.Stall(10))
}

// TestFollow: who follows a conversion does so through a restart of everything in the middle of it.
func TestFollow(t *testing.T) {
	w := newWorld(t)
	image := w.push("team/app", "v1", "amd64")
	on := w.stall(image)
	op, _, err := w.client(access.Writer).Submit(t.Context(), service.Request{Image: image})
	if err != nil {
		t.Fatal(err)
	}
	again, existed, err := w.client(access.Writer).Submit(t.Context(), service.Request{Image: image})
	if err != nil || !existed || again.ID != op.ID {
		t.Errorf("asked for twice: %+v, %t, %v", again, existed, err)
	}
	restarted, attempt := false, 0
	ended, err := w.client(access.Reader).Follow(t.Context(), op.ID, func(o service.Operation) {
		if o.State != service.Running || restarted {
			attempt = max(attempt, o.Attempt)
			return
		}
		restarted = true
		w.stop()
		on()
		w.start()
	})
	if err != nil || ended.State != service.Succeeded || ended.ID != op.ID || !restarted || attempt < 2 {
		t.Errorf("%+v, %v, restarted: %t, attempt %d", ended, err, restarted, attempt)
	}
}

// TestCancel cancels a conversion that runs.
func TestCancel(t *testing.T) {
	w := newWorld(t)
	image := w.push("team/app", "v1", "amd64")
	defer w.stall(image)()
	c := w.client(access.Writer)
	op, _, err := c.Submit(t.Context(), service.Request{Image: image})
	if err != nil {
		t.Fatal(err)
	}
	asked := false
	op, err = c.Follow(t.Context(), op.ID, func(o service.Operation) {
		if o.State != service.Running || asked {
			return
		}
		asked = true
		if o, err := c.Cancel(t.Context(), op.ID, ""); err != nil || !o.Cancel && o.State != service.Canceled {
			t.Errorf("%+v, %v", o, err)
		}
	})
	if err != nil || op.State != service.Canceled || op.CancelBy != "a writer" || !asked {
		t.Errorf("%+v, %v", op, err)
	}
	if e := w.lastAudit(); e["action"] != "cancel" || e["target"] != op.ID || e["outcome"] != "ok" {
		t.Errorf("audited as %v", e)
	}
}

// TestVerify: a difference is found, and said in both ways to ask; the reading ends with who asked.
func TestVerify(t *testing.T) {
	w := newWorld(t)
	image := w.push("team/app", "v1", "amd64")
	c := w.client(access.Writer)
	op, _, err := c.Submit(t.Context(), service.Request{Image: image})
	if err == nil {
		op, err = c.Follow(t.Context(), op.ID, nil)
	}
	if err != nil || op.State != service.Succeeded {
		t.Fatalf("%+v, %v", op, err)
	}
	path := "/v1/registries/_/repositories/team/app/_images/v1/_artifacts:verify"
	var proven struct{ Artifacts []converter.Verified }
	if w.ask(access.Writer, "POST", path, "").read(t, 200, &proven); len(proven.Artifacts) != 1 || proven.Artifacts[0].Artifact != op.Artifacts[0].Digest {
		t.Errorf("proven: %+v", proven)
	}

	info, err := c.Image(t.Context(), w.host, "team/app", "v1")
	if err != nil {
		t.Fatal(err)
	}
	layer := info.Platforms[0].Streaming.Layers[0].Digest.String()
	read := make(chan struct{}, 100)
	ofLayer := func(r *http.Request) bool {
		found := r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/blobs/"+layer)
		if found {
			read <- struct{}{}
		}
		return found
	}
	good := w.registry.Inject(ofLayer, -1, registrytest.Flip(20))
	if _, err := c.Verify(t.Context(), image); !errors.Is(err, converter.ErrDifferent) {
		t.Errorf("a flipped byte: %v", err)
	}
	if a := w.ask(access.Writer, "POST", path, ""); a.status != 409 || a.code() != "ARTIFACT_DIFFERS" {
		t.Errorf("a flipped byte: %d %s", a.status, a.body)
	}
	good()

	for len(read) > 0 {
		<-read
	}
	w.registry.Inject(ofLayer, -1, registrytest.Stall(20))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		_, err := c.Verify(ctx, image)
		ended <- err
	}()
	<-read
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	// The server waits for its requests when it ends: for ever, did the reading not end.
}

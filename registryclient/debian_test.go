package registryclient

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

func send(t *testing.T, method, url, contentType string, body []byte) *http.Response {
	t.Helper()
	req, err := http.NewRequest(method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, _ := io.ReadAll(resp.Body); resp.StatusCode/100 != 2 {
		t.Fatalf("%s %s: %s %s", method, url, resp.Status, b)
	}
	return resp
}

func TestDebiansDockerRegistry(t *testing.T) {
	addr := registrytest.StartDistribution(t, registrytest.Distribution{})
	base, repo := "http://"+addr+"/v2/team/app", Repository(addr+"/team/app")
	putBlob := func(b []byte) digest.Digest {
		dgst := digest.FromBytes(b)
		location := send(t, http.MethodPost, base+"/blobs/uploads/", "", nil).Header.Get("Location")
		send(t, http.MethodPut, location+"&digest="+dgst.String(), "application/octet-stream", b)
		return dgst
	}
	putManifest := func(ref, mediaType string, v any) ocispec.Descriptor {
		b := mustJSON(t, v)
		desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b)), ArtifactType: artifactType}
		if ref == "" {
			ref = desc.Digest.String()
		}
		send(t, http.MethodPut, base+"/manifests/"+ref, mediaType, b)
		return desc
	}
	data := noise(1 << 20)
	config := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: putBlob([]byte("{}")), Size: 2}
	layer := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerZstd, Digest: putBlob(data), Size: int64(len(data))}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{layer}}
	m.SchemaVersion = 2
	subject := putManifest("latest", m.MediaType, m)
	m.Subject, m.ArtifactType = &subject, artifactType
	artifact := putManifest("", m.MediaType, m)

	c := newClient(t, Options{Budget: 20 * time.Second, Stall: 10 * time.Second})
	ctx := t.Context()
	desc, _, err := c.Resolve(ctx, string(repo)+":latest")
	if err != nil || desc.Digest != subject.Digest || desc.MediaType != m.MediaType {
		t.Errorf("resolve: got %+v, %v", desc, err)
	}
	requests := func(f func()) int64 {
		before := c.Stats().Requests
		f()
		return c.Stats().Requests - before
	}
	referrers := func(want ...digest.Digest) func() {
		return func() {
			t.Helper()
			found, err := c.Referrers(ctx, repo, subject.Digest, artifactType)
			var got []digest.Digest
			for _, d := range found {
				got = append(got, d.Digest)
			}
			if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("got referrers %v, %v, want %v", got, err, want)
			}
		}
	}
	if n := requests(referrers()); n != 2 {
		t.Errorf("first contact took %d requests, want 2", n)
	}
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{artifact}}
	index.SchemaVersion = 2
	putManifest(strings.Replace(subject.Digest.String(), ":", "-", 1), index.MediaType, index)
	if n := requests(referrers(artifact.Digest)); n != 1 {
		t.Errorf("the next contact took %d requests, want 1", n)
	}
	if _, err := c.Manifest(ctx, repo, artifact.Digest, artifact.Size); err != nil {
		t.Error(err)
	}
	n := requests(func() {
		b, err := readRange(ctx, c, repo, layer.Digest, 1000, 100_000, 0)
		if err != nil || !bytes.Equal(b, data[1000:101_000]) {
			t.Errorf("range: got %d bytes, %v", len(b), err)
		}
		if b, err := readRange(ctx, c, repo, layer.Digest, 1<<20-1, 1, 0); err != nil || !bytes.Equal(b, data[1<<20-1:]) {
			t.Errorf("last byte: got %d bytes, %v", len(b), err)
		}
	})
	if n != 2 {
		t.Errorf("two ranges took %d requests", n)
	}
}

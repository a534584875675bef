package converter

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestStalled: a registry that accepts requests and does not answer, or stops in the middle, fails instead of being waited for.
func TestStalled(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	source, _ := open(t, reg.Host()+"/app:v1")
	layers := layersOf(1, 1)
	img := testImage{layers: layers}.put(t, source, "v1")
	impatient := func(stall time.Duration) Place {
		p, _, err := Open(reg.Host()+"/app:v1", OpenOptions{Registry: RegistryOptions{Stall: stall}})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	layer := digest.FromBytes(layers[0].stored())
	upload := func(req *http.Request) bool { return req.Method == http.MethodPost }
	for name, c := range map[string]struct {
		match func(*http.Request) bool
		after int64
		do    func(p Place) error
	}{
		"no header":       {registrytest.Any, -1, func(p Place) error { _, err := p.Resolve(t.Context(), "v1"); return err }},
		"half a manifest": {registrytest.Manifests, 10, func(p Place) error { _, _, err := p.Manifest(t.Context(), "v1"); return err }},
		"half a list": {func(req *http.Request) bool { return req.URL.Path == "/v2/app/tags/list" }, 10, func(p Place) error {
			_, err := p.Tags(t.Context())
			return err
		}},
		"no upload": {upload, -1, func(p Place) error {
			b := []byte("a blob")
			return p.PutBlob(t.Context(), ocispec.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))}, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil })
		}},
	} {
		remove := reg.Inject(c.match, -1, registrytest.Stall(c.after))
		var network net.Error
		if err := c.do(impatient(30 * time.Millisecond)); !errors.As(err, &network) || !strings.Contains(err.Error(), "has not said anything") {
			t.Errorf("%s: %v", name, err)
		}
		remove()
	}

	// A layer is read again.
	reg.Reset()
	reads := func(q *http.Request) bool {
		return q.Method == http.MethodGet && strings.HasSuffix(q.URL.Path, layer.String())
	}
	reg.Inject(reads, 1, registrytest.Stall(100))
	if _, err := Create(t.Context(), impatient(2*time.Second), img.Digest.String(), CreateOptions{}); err != nil {
		t.Error(err)
	}
	if n, _ := reg.Count(func(q registrytest.Request) bool {
		return q.Method == http.MethodGet && strings.HasSuffix(q.Path, layer.String())
	}); n != 2 {
		t.Errorf("the layer was read %d times, want 2", n)
	}
}

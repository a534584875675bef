package converter

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/time/rate"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestPlan: a plan says of each platform what Create then does, and costs no layer's bytes; the events of Create add up to it.
func TestPlan(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	image := r.Host() + "/app:v1"
	p, _ := open(t, image)
	twice := layersOf(1, 2)
	twice = append(twice, twice[0])
	amd := testImage{layers: twice}.put(t, p, "")
	arm := testImage{layers: layersOf(20, 1), platform: ocispec.Platform{OS: "linux", Architecture: "arm64"}}.put(t, p, "")
	amd.Platform, arm.Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"}, &ocispec.Platform{OS: "linux", Architecture: "arm64"}
	putIndex(t, p, "v1", amd, arm)
	done := create(t, image, CreateOptions{Platforms: []ocispec.Platform{*amd.Platform}})
	r.Reset()
	list, err := Plan(t.Context(), p, "v1", CreateOptions{})
	if err != nil || len(list) != 2 {
		t.Fatalf("%+v, %v", list, err)
	}
	var total int64
	for i, want := range []struct {
		platform string
		subject  ocispec.Descriptor
		artifact ocispec.Descriptor
		layers   int
	}{{"linux/amd64", amd, done[0].Artifact, 3}, {"linux/arm64", arm, ocispec.Descriptor{}, 1}} {
		if got := list[i]; got.Platform != want.platform || got.Subject.Digest != want.subject.Digest || got.Artifact != want.artifact.Digest || got.Layers != want.layers || got.Bytes == 0 {
			t.Errorf("%+v, want %+v", got, want)
		}
		total += list[i].Bytes
	}
	if want := done[0].Layers[0].SourceSize + done[0].Layers[1].SourceSize; list[0].Bytes != want {
		t.Errorf("%d bytes, want %d: the same layer once", list[0].Bytes, want)
	}
	if _, bytes := r.Count(registrytest.OfBlobs); bytes > 10_000 {
		t.Errorf("a plan has read %d bytes of blobs", bytes)
	}
	if _, err := Plan(t.Context(), p, "nothing", CreateOptions{}); CodeOf(err) != ResourceNotFound {
		t.Errorf("no image: %v", err)
	}

	var mu sync.Mutex
	var sum, resolved int64
	create(t, image, CreateOptions{Options: Options{Progress: func(e Event) {
		mu.Lock()
		defer mu.Unlock()
		switch e.Kind {
		case ImageResolved:
			resolved += e.Total
		case LayerDone, LayerReused, ArtifactFound:
			sum += e.Total
		}
	}}})
	if resolved != total || sum != total {
		t.Errorf("resolved %d, done %d, planned %d", resolved, sum, total)
	}
}

// TestReserve: a layer that is not in the record is converted in room that was reserved for it, and gives it back, also when it fails.
func TestReserve(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	image := r.Host() + "/app:v1"
	p, _ := open(t, image)
	testImage{layers: layersOf(1, 3)}.put(t, p, "v1")
	var mu sync.Mutex
	var asked, inUse, most int
	o := CreateOptions{Options: Options{Record: NewRecord(t.TempDir()), Reserve: func(_ context.Context, n int64) (int64, func(), error) {
		mu.Lock()
		defer mu.Unlock()
		if asked++; n <= 0 {
			t.Errorf("%d bytes", n)
		}
		inUse++
		most = max(most, inUse)
		return n, func() {
			mu.Lock()
			defer mu.Unlock()
			inUse--
		}, nil
	}}}
	remove := r.Inject(func(q *http.Request) bool { return q.Method == http.MethodPost }, -1, registrytest.Status(http.StatusForbidden))
	if _, err := Create(t.Context(), p, "v1", o); err == nil || asked == 0 || inUse != 0 {
		t.Errorf("a registry that takes nothing: %v, %d reserved, %d in use", err, asked, inUse)
	}
	remove()
	asked = 0
	create(t, image, o)
	if asked != 3 || inUse != 0 {
		t.Errorf("%d reserved, %d in use", asked, inUse)
	}
	refused := errors.New("no room")
	o.Reserve = func(context.Context, int64) (int64, func(), error) { return 0, nil, refused }
	if got := create(t, r.Host()+"/app:v1", o); got[0].Status != StatusExists {
		t.Errorf("%+v", got)
	}
	o.Force = true
	if _, err := Create(t.Context(), p, "v1", o); !errors.Is(err, refused) {
		t.Errorf("without room: %v", err)
	}
}

// TestOutgrown: a layer that becomes much larger than its source is begun anew with more room, and fails where there is no more.
func TestOutgrown(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	image := r.Host() + "/app:v1"
	p, _ := open(t, image)
	random := make([]byte, 100_000)
	rand.NewChaCha8([32]byte{}).Read(random)
	text := bytes.Repeat(random, 8) // in a window larger than a chunk it is said once
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := w.WriteHeader(&tar.Header{Name: "text", Mode: 0o644, Size: int64(len(text))}); err != nil {
		t.Fatal(err)
	}
	w.Write(text)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	blob := z.EncodeAll(layer.Bytes(), nil)
	testImage{layers: []testLayer{{tar: layer.Bytes(), blob: blob, mediaType: ocispec.MediaTypeImageLayerZstd}}}.put(t, p, "v1")
	var rooms []int64
	inUse := 0
	limit := int64(math.MaxInt64)
	o := CreateOptions{Options: Options{Reserve: func(_ context.Context, n int64) (int64, func(), error) {
		n = min(n, limit)
		rooms = append(rooms, n)
		inUse++
		return n, func() { inUse-- }, nil
	}}}
	create(t, image, o)
	if len(rooms) < 2 || inUse != 0 {
		t.Fatalf("rooms of %d bytes, %d in use", rooms, inUse)
	}
	for n := range rooms[1:] {
		if rooms[n+1] != 2*rooms[n] {
			t.Errorf("rooms of %d bytes", rooms)
		}
	}
	limit, o.Force = rooms[0]+1, true
	if _, err := Create(t.Context(), p, "v1", o); err == nil || !strings.Contains(err.Error(), fmt.Sprint(limit)) || inUse != 0 {
		t.Errorf("got %v, %d in use, want an error with the %d bytes that there are", err, inUse, limit)
	}
}

// TestLimiter: no request, in whichever way it is made, is sent before its turn. This limiter gives five.
func TestLimiter(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	image := r.Host() + "/app:v1"
	unlimited, _ := open(t, image)
	testImage{layers: layersOf(1, 5)}.put(t, unlimited, "v1")
	sent := &counter{RoundTripper: remote.DefaultTransport}
	p, ref, err := Open(image, OpenOptions{Registry: RegistryOptions{Transport: sent, Limiter: rate.NewLimiter(0, 5)}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour) // the sixth's turn never comes
	defer cancel()
	if _, err := Create(ctx, p, ref, CreateOptions{}); err == nil {
		t.Error("five requests are enough")
	}
	if n := sent.n.Load(); n != 5 {
		t.Errorf("%d requests", n)
	}
}

type counter struct {
	http.RoundTripper
	n atomic.Int64
}

func (c *counter) RoundTrip(r *http.Request) (*http.Response, error) {
	c.n.Add(1)
	return c.RoundTripper.RoundTrip(r)
}

package service

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// Variables that make this program a process of the service, with their values.
const (
	childNATS     = "TEST_SERVICE_NATS"
	childRegistry = "TEST_SERVICE_REGISTRY"
)

func TestMain(m *testing.M) {
	if os.Getenv(childNATS) != "" {
		if err := child(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// child runs a process of the service until SIGTERM.
func child() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	conn, err := nats.Connect(os.Getenv(childNATS), nats.MaxReconnects(-1))
	if err != nil {
		return err
	}
	defer conn.Close()
	c := shortLease(conn, os.Getenv(childRegistry))
	c.Name = "child"
	s, err := New(ctx, c)
	if err != nil {
		return err
	}
	return s.Run(ctx)
}

// shortLease is a configuration whose processes are soon found dead.
func shortLease(conn *nats.Conn, registry string) Config {
	return Config{
		Conn: conn, Registries: []Registry{NewRegistry(registry, converter.RegistryOptions{}, 0)},
		Convert: converter.Options{Jobs: 1}, Lease: 2 * time.Second,
	}
}

// env is a registry and a NATS server.
type env struct {
	t        *testing.T
	registry *registrytest.Registry
	nats     string
}

func newEnv(t *testing.T) *env {
	t.Helper()
	return &env{t, registrytest.Start(t, registrytest.Options{}), startNATS(t)}
}

// startNATS runs a NATS server until the test ends, and returns its URL.
func startNATS(t *testing.T) string {
	t.Helper()
	return startServer(t, &server.Options{Host: "127.0.0.1", Port: -1, JetStream: true, StoreDir: t.TempDir(), NoSigs: true}).ClientURL()
}

func startServer(t *testing.T, o *server.Options) *server.Server {
	t.Helper()
	n, err := server.NewServer(o)
	if err != nil {
		t.Fatal(err)
	}
	go n.Start()
	t.Cleanup(func() {
		n.Shutdown()
		n.WaitForShutdown()
	})
	if !n.ReadyForConnections(time.Minute) {
		t.Fatal("the NATS server does not start")
	}
	return n
}

func (e *env) connect() *nats.Conn {
	e.t.Helper()
	conn, err := nats.Connect(e.nats, nats.MaxReconnects(-1))
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(conn.Close)
	return conn
}

// process is a Service that runs.
type process struct {
	*Service
	stop func() // gracefully
}

// start runs a process of the service until the test ends. Its lease is too long for a test: what it has stays its own until it hands it back.
func (e *env) start(change ...func(*Config)) process {
	e.t.Helper()
	c := shortLease(e.connect(), e.registry.Host())
	c.Lease = time.Hour
	for _, f := range change {
		f(&c)
	}
	return run(e.t, c)
}

// startIdle runs a process that answers, and converts nothing.
func (e *env) startIdle(change ...func(*Config)) process {
	e.t.Helper()
	c := shortLease(e.connect(), e.registry.Host())
	c.Lease, c.Limits.Conversions = time.Hour, 1
	for _, f := range change {
		f(&c)
	}
	return run(e.t, c, func(s *Service) { s.room.conversions.TryAcquire(1) })
}

func run(t *testing.T, c Config, prepare ...func(*Service)) process {
	t.Helper()
	if testing.Verbose() {
		c.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	s, err := New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range prepare {
		f(s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return process{s, stop}
}

// image is a one-platform image whose layers have so many random bytes.
func image(t *testing.T, architecture string, sizes ...int64) v1.Image {
	t.Helper()
	img, err := mutate.ConfigFile(mutate.MediaType(empty.Image, types.OCIManifestSchema1), &v1.ConfigFile{OS: "linux", Architecture: architecture, RootFS: v1.RootFS{Type: "layers"}})
	if err != nil {
		t.Fatal(err)
	}
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	for _, n := range sizes {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		err := w.WriteHeader(&tar.Header{Name: "random", Mode: 0o644, Size: n})
		if err == nil {
			_, err = io.CopyN(w, rand.Reader, n)
		}
		if err == nil {
			err = w.Close()
		}
		if err == nil {
			img, err = mutate.AppendLayers(img, static.NewLayer(b.Bytes(), types.OCIUncompressedLayer))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return img
}

// index puts an image for amd64 and one for arm64 together.
func index(amd, arm v1.Image) v1.ImageIndex {
	return mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: amd, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}},
		mutate.IndexAddendum{Add: arm, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64"}}})
}

// push pushes an image to repository:v1 and forgets the requests.
func (e *env) push(repository string, img remote.Taggable) Image {
	e.t.Helper()
	tag, err := name.NewTag(e.registry.Host() + "/" + repository + ":v1")
	if err != nil {
		e.t.Fatal(err)
	}
	var h v1.Hash
	switch img := img.(type) {
	case v1.Image:
		if err = remote.Write(tag, img); err == nil {
			h, err = img.Digest()
		}
	case v1.ImageIndex:
		if err = remote.WriteIndex(tag, img); err == nil {
			h, err = img.Digest()
		}
	}
	if err != nil {
		e.t.Fatal(err)
	}
	e.registry.Reset()
	return Image{e.registry.Host(), repository, digest.Digest(h.String())}
}

// layers returns the digests of an image's layers.
func layers(t *testing.T, img v1.Image) (list []string) {
	t.Helper()
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers {
		list = append(list, l.Digest.String())
	}
	return list
}

// artifacts lists the referrers of an image and of its platforms.
func (e *env) artifacts(i Image) []converter.Referrer {
	e.t.Helper()
	p, _, err := converter.Open(i.String(), converter.OpenOptions{})
	if err != nil {
		e.t.Fatal(err)
	}
	list, err := converter.ListReferrers(context.Background(), p, i.Digest.String(), nil, "")
	if err != nil {
		e.t.Fatal(err)
	}
	return list
}

// verify fails unless each platform of an image has one artifact, which is good.
func (e *env) verify(i Image, platforms int) {
	e.t.Helper()
	if list := e.artifacts(i); len(list) != platforms || list[0].ArtifactType != artifact.ArtifactType {
		e.t.Errorf("%s has referrers %+v, want %d", i, list, platforms)
	}
	p, _, err := converter.Open(i.String(), converter.OpenOptions{})
	if err != nil {
		e.t.Fatal(err)
	}
	if got, err := converter.Verify(e.t.Context(), p, i.Digest.String(), converter.VerifyOptions{}); err != nil || len(got) != platforms {
		e.t.Errorf("verify %s: %+v, %v", i, got, err)
	}
}

// once fails if the layer was read more than once since the image was pushed, or other than so many blobs were pushed.
func (e *env) once(layer string, blobs int) {
	e.t.Helper()
	read, _ := e.registry.Count(func(q registrytest.Request) bool {
		return q.Method == http.MethodGet && strings.HasSuffix(q.Path, "/blobs/"+layer)
	})
	pushed, _ := e.registry.Count(func(q registrytest.Request) bool {
		return q.Method == http.MethodPut && strings.Contains(q.Path, "/blobs/uploads/")
	})
	if read != 1 || pushed != blobs {
		e.t.Errorf("layer %s was read %d times, want once; %d blobs were pushed, want %d", layer, read, pushed, blobs)
	}
}

// held are requests that are not answered.
type held struct {
	reached chan struct{} // closed when there is one
	release func()        // answers them, and all others
}

// hold lets requests that match wait until release, or until their clients leave.
func (e *env) hold(match func(*http.Request) bool) *held {
	released, reached := make(chan struct{}), make(chan struct{})
	once := sync.OnceFunc(func() { close(reached) })
	remove := e.registry.Inject(match, -1, func(_ *registrytest.Registry, next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			once()
			body, err := io.ReadAll(req.Body) // or the server does not see that the client leaves
			if err != nil {
				return
			}
			select {
			case <-req.Context().Done():
			case <-released:
				if req.Context().Err() == nil {
					req.Body = io.NopCloser(bytes.NewReader(body))
					next.ServeHTTP(w, req)
				}
			}
		})
	})
	h := &held{reached, sync.OnceFunc(func() {
		remove()
		close(released)
	})}
	e.t.Cleanup(h.release)
	return h
}

func (h *held) wait(t *testing.T) {
	t.Helper()
	select {
	case <-h.reached:
	case <-time.After(time.Minute):
		t.Fatal("no such request within a minute")
	}
}

// reads matches the GET of a blob.
func reads(dgst string) func(*http.Request) bool {
	return func(r *http.Request) bool {
		return r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/blobs/"+dgst)
	}
}

// attaches matches the PUT of a manifest.
func attaches(r *http.Request) bool {
	return r.Method == http.MethodPut && registrytest.Manifests(r)
}

// submit asks for a conversion that was not asked for.
func submit(t *testing.T, s *Service, i Image, change ...func(*Request)) Operation {
	t.Helper()
	r := Request{Image: i, By: "test"}
	for _, f := range change {
		f(&r)
	}
	op, existed, err := s.Submit(t.Context(), r)
	if err != nil || existed {
		t.Fatalf("Submit: %s, %v, %v", show(op), existed, err)
	}
	return op
}

// await watches an operation until want is true of it.
func await(t *testing.T, s *Service, id string, want func(Operation) bool) Operation {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	changes, err := s.Watch(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	var last Operation
	for op := range changes {
		if last = op; want(op) {
			return op
		}
	}
	t.Fatalf("operation %s is not what was waited for", show(last))
	return last
}

// show prints an operation whole: its String is the image's.
func show(op Operation) string {
	raw, err := json.Marshal(op)
	if err != nil {
		return err.Error()
	}
	return string(raw)
}

func in(states ...State) func(Operation) bool {
	return func(op Operation) bool { return slices.Contains(states, op.State) }
}

// succeed waits for an operation's success.
func succeed(t *testing.T, s *Service, id string) Operation {
	t.Helper()
	return await(t, s, id, in(Succeeded))
}

// TestSubmit: the same image asked for by many at once, of two processes, is one operation; what has an artifact is not converted again,
// unless that is asked for.
func TestSubmit(t *testing.T) {
	e := newEnv(t)
	i := e.push("team/app", image(t, "amd64", 100_000, 50_000))
	processes := []process{e.start(), e.start()}
	type answer struct {
		op      Operation
		existed bool
	}
	answers := make(chan answer, 20)
	var asking sync.WaitGroup
	for n := range cap(answers) {
		asking.Go(func() {
			op, existed, err := processes[n%2].Submit(t.Context(), Request{Image: i, By: fmt.Sprint(n)})
			if errors.Is(err, ErrExists) { // it was that fast
				return
			}
			if err != nil {
				t.Error(err)
			}
			answers <- answer{op, existed}
		})
	}
	asking.Wait()
	close(answers)
	made := 0
	var id string
	for a := range answers {
		if !a.existed {
			made++
		}
		if id == "" {
			id = a.op.ID
		}
		if a.op.ID != id {
			t.Errorf("operations %s and %s", id, a.op.ID)
		}
	}
	if made != 1 {
		t.Errorf("%d of the answers say that they made the operation, want 1", made)
	}
	op := succeed(t, processes[0].Service, id)
	if op.Progress.Percent != 100 || op.Progress.Bytes != op.Progress.Total || op.Progress.Total < 150_000 || op.Attempt != 1 || op.End.Before(op.Start) || len(op.Artifacts) != 1 || op.Artifacts[0].Existed {
		t.Error(show(op))
	}
	e.verify(i, 1)

	for _, p := range processes {
		if _, _, err := p.Submit(t.Context(), Request{Image: i}); !errors.Is(err, ErrExists) {
			t.Errorf("asked for what is there: %v", err)
		}
	}
	again := submit(t, processes[1].Service, i, func(r *Request) { r.Force = true })
	if again.ID == id {
		t.Error("a conversion with force is the old operation")
	}
	succeed(t, processes[0].Service, again.ID)
	e.verify(i, 1)
	if last, err := processes[1].Last(t.Context(), i); err != nil || last.ID != again.ID {
		t.Errorf("the last operation is %s, %v", show(last), err)
	}
	list, err := processes[0].Operations(t.Context(), Filter{Repository: "team/app", States: []State{Succeeded}})
	if err != nil || len(list) != 2 || list[0].ID != again.ID {
		t.Errorf("operations %+v, %v", list, err)
	}
	if st := processes[0].Stats(); st.Operations[Succeeded] != 2 || st.Waiting != 0 {
		t.Errorf("%+v", st)
	}
}

// TestRefused: what cannot be is said before anything is queued, and what fails later is an operation that says why.
func TestRefused(t *testing.T) {
	e := newEnv(t)
	s := e.start()
	img := image(t, "amd64", 10_000)
	i := e.push("app", img)
	windows := image(t, "amd64", 10)
	config, err := windows.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS = "windows"
	if windows, err = mutate.ConfigFile(windows, config); err != nil {
		t.Fatal(err)
	}
	var refused *converter.Error
	for name, c := range map[string]struct {
		r    Request
		want func(error) bool
	}{
		"no registry":    {Request{Image: Image{"elsewhere.example.com", "app", i.Digest}}, func(err error) bool { return errors.Is(err, ErrNotFound) }},
		"no image":       {Request{Image: Image{i.Registry, "app", digest.FromString("x")}}, func(err error) bool { return errors.Is(err, ErrNotFound) }},
		"bad repository": {Request{Image: Image{i.Registry, "A B", i.Digest}}, func(err error) bool { return errors.Is(err, ErrInvalid) }},
		"other's":        {Request{Image: Image{i.Registry, "app:x-suffix", i.Digest}}, func(err error) bool { return errors.Is(err, ErrInvalid) }},
		"bad digest":     {Request{Image: Image{i.Registry, "app", "sha256:1"}}, func(err error) bool { return errors.Is(err, ErrInvalid) }},
		"bad platform":   {Request{Image: i, Platforms: []string{"linux"}}, func(err error) bool { return errors.Is(err, ErrInvalid) }},
		"windows":        {Request{Image: e.push("windows", windows)}, func(err error) bool { return errors.As(err, &refused) && refused.Code == converter.UnsupportedPlatform }},
		"other platform": {Request{Image: i, Platforms: []string{"linux/arm64"}}, func(err error) bool { return errors.As(err, &refused) && refused.Code == converter.UnsupportedPlatform }},
	} {
		if _, _, err := s.Submit(t.Context(), c.r); err == nil || !c.want(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	remove := e.registry.Inject(registrytest.Any, -1, registrytest.Status(http.StatusServiceUnavailable))
	if _, _, err := s.Submit(t.Context(), Request{Image: i}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("a registry that is down: %v", err)
	}
	remove()
	if list, err := s.Operations(t.Context(), Filter{}); err != nil || len(list) != 0 {
		t.Errorf("operations %+v, %v", list, err)
	}
	for _, id := range []string{"", "x", "a.b", "6f9619ff-8b86-4011-b42d-00c04fc964ff", "{6f9619ff-8b86-4011-b42d-00c04fc964ff}"} {
		if _, err := s.Operation(t.Context(), id); !errors.Is(err, ErrNotFound) {
			t.Errorf("operation %q: %v", id, err)
		}
	}

	// What a store is asked by is signed, and whoever has it may read.
	remove = e.registry.Inject(reads(layers(t, img)[0]), -1, func(*registrytest.Registry, http.Handler) http.Handler {
		return http.RedirectHandler("s3://store/blob?X-Amz-Signature=secret\u202e", http.StatusTemporaryRedirect)
	})
	if op := await(t, s.Service, submit(t, s.Service, i).ID, in(Failed)); !strings.Contains(op.Message, "s3://store/blob") || strings.Contains(op.Message, "secret") {
		t.Error(show(op))
	}
	remove()
	e.registry.Inject(reads(layers(t, img)[0]), -1, registrytest.Flip(600))
	op := await(t, s.Service, submit(t, s.Service, i).ID, in(Failed))
	if op.ErrorCode != converter.Unknown || op.Message == "" || op.End.IsZero() || op.Progress.Percent == 100 {
		t.Error(show(op))
	}
	if _, err := s.Cancel(t.Context(), op.ID, "test"); !errors.Is(err, ErrNotRunning) {
		t.Errorf("cancel what has failed: %v", err)
	}
	if list := e.artifacts(i); len(list) != 0 {
		t.Errorf("referrers %+v", list)
	}
}

// TestTwoPlatforms: the progress of an index is that of all its platforms, and what was attached before is said to be.
func TestTwoPlatforms(t *testing.T) {
	e := newEnv(t)
	s := e.start()
	i := e.push("app", index(image(t, "amd64", 100_000), image(t, "arm64", 200_000)))
	op := succeed(t, s.Service, submit(t, s.Service, i, func(r *Request) { r.Platforms = []string{"linux/amd64"} }).ID)
	if len(op.Artifacts) != 1 || op.Artifacts[0].Platform != "linux/amd64" || op.Progress.Total > 150_000 {
		t.Error(show(op))
	}
	op = succeed(t, s.Service, submit(t, s.Service, i).ID)
	if len(op.Artifacts) != 2 || !op.Artifacts[0].Existed || op.Artifacts[1].Existed || op.Progress.Total < 300_000 {
		t.Error(show(op))
	}
	e.verify(i, 2)
}

// startChild runs another process of the service, this program, until the test ends.
func (e *env) startChild() *exec.Cmd {
	e.t.Helper()
	c := exec.Command(os.Args[0])
	c.Env = append(os.Environ(), childNATS+"="+e.nats, childRegistry+"="+e.registry.Host())
	c.Stdout, c.Stderr = e.t.Output(), e.t.Output()
	if err := c.Start(); err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() {
		if c.ProcessState == nil {
			c.Process.Kill()
			c.Wait()
		}
	})
	return c
}

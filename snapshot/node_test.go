package snapshot

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// testNode is a node's parts with real mounts, a real cache and a registry of its own. Its root outlives restart.
type testNode struct {
	t      testing.TB
	reg    *registrytest.Registry
	root   string
	mode   fs.Mode
	images *stream.Store
	mounts *fs.Server
	chunks *cache.Cache
	sn     *Snapshotter
	log    *logBuffer
	stop   func()

	// Of stream.Options:
	retryAfter, quiet time.Duration
	background        int64
	budget            time.Duration // of registryclient.Options
	hosts             string        // likewise
	limit             int64         // of cache.Options
	noReadAhead       bool
	onForget          func()
	elsewhere         func(context.Context, []digest.Digest) ([]registryclient.Repository, error)
	policy            func(registryclient.Repository) (trust.Policy, trust.Verifier)

	pushed   []testImage
	starts   chan stream.Start // that were told of
	deadline time.Duration     // of proofs; 0: nothing is proven
	proofs   chan stream.Proof
	ledger   *ledger.Ledger
	unpack   func(ctx context.Context, l Layer, into func(do func([]mount.Mount) error) error) error // of the Snapshotter
	wait     time.Duration                                                                           // likewise; 0: as it is
	pullWait time.Duration                                                                           // of stream.Options
}

// logBuffer counts the lines that operators would see.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) lines() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Count(l.b.Bytes(), []byte("\n"))
}

func newTestNode(t testing.TB) *testNode { return newTestNodeMode(t, fs.ModeFile) }

func newTestNodeMode(t testing.TB, mode fs.Mode) *testNode {
	return newTestNodeWith(t, func(n *testNode) { n.mode = mode })
}

// newTestNodeWith makes one with what set says.
func newTestNodeWith(t testing.TB, set func(*testNode)) *testNode {
	n := &testNode{t: t, reg: registrytest.Start(t, registrytest.Options{}), root: t.TempDir(), mode: fs.ModeFile, log: &logBuffer{}, retryAfter: time.Nanosecond, quiet: time.Second, budget: 2 * time.Second, starts: make(chan stream.Start, 1000)}
	set(n)
	n.start()
	t.Cleanup(func() { n.stop() })
	return n
}

// start starts the node's parts, as the daemon does.
func (n *testNode) start() {
	n.t.Helper()
	check := func(err error) {
		if err != nil {
			n.t.Helper()
			n.t.Fatal(err)
		}
	}
	mounts, err := fs.New(fs.Options{Dir: filepath.Join(n.root, "devices"), Mode: n.mode})
	check(err)
	n.mounts = mounts
	chunks, err := cache.Open(filepath.Join(n.root, "cache"), cache.Options{Limit: n.limit, OnLie: func(index digest.Digest, chunk int, err error) { n.images.Lied(index, chunk, err) }})
	check(err)
	n.chunks = chunks
	client, err := registryclient.New(registryclient.Options{Budget: n.budget, HostsDir: n.hosts})
	check(err)
	trust := stream.Trust{}
	if n.deadline > 0 {
		n.ledger, err = ledger.Open(filepath.Join(n.root, "trust"), nil)
		check(err)
		n.proofs = make(chan stream.Proof, 100)
		trust = stream.Trust{Ledger: n.ledger, Deadline: n.deadline, OnProof: func(p stream.Proof) { n.proofs <- p }}
	}
	n.images, err = stream.New(stream.Options{
		Trust: trust,
		Root:  n.root, Registry: client, Cache: chunks, Mounter: mounts,
		Allow: func(r registryclient.Repository) error {
			if r == registryclient.Repository(n.reg.Host()+"/unlisted") {
				return errors.New("it is not listed")
			}
			return nil
		},
		Policy:     n.policy,
		Timeout:    5 * time.Second,
		PullWait:   n.pullWait,
		RetryAfter: n.retryAfter,
		StartQuiet: n.quiet,
		Elsewhere:  n.elsewhere,
		Background: n.background, NoReadAhead: n.noReadAhead,
		OnForget: func() {
			if n.onForget != nil {
				n.onForget()
			}
		},
	})
	check(err)
	n.images.OnStart = func(s stream.Start) { n.starts <- s }
	n.sn, err = New(n.root, n.images, slog.New(slog.NewTextHandler(n.log, nil)), nil)
	check(err)
	n.sn.Unpack = n.unpack
	if n.wait > 0 {
		n.sn.Wait = n.wait
	}
	n.stop = func() {
		n.sn.Close()
		n.images.Close()
		mounts.Close()
		if err := chunks.Close(); err != nil {
			n.t.Error(err)
		}
		client.Close()
	}
}

// restart ends the parts and starts them again over the same files.
func (n *testNode) restart() {
	n.t.Helper()
	n.stop()
	n.start()
}

// testImage is an image in the registry.
type testImage struct {
	ref      string
	manifest digest.Digest
	chainIDs []digest.Digest
	layers   []ocispec.Descriptor
}

// push pushes an image with the layers' tars as repository:tag.
func (n *testNode) push(image string, tars ...[]byte) testImage {
	n.t.Helper()
	img := v1.Image(empty.Image)
	for _, b := range tars {
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil })
		if err != nil {
			n.t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			n.t.Fatal(err)
		}
	}
	cf, err := img.ConfigFile()
	if err != nil {
		n.t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture = "linux", "amd64"
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		n.t.Fatal(err)
	}
	ref := n.reg.Host() + "/" + image
	r, err := name.ParseReference(ref)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := remote.Write(r, img); err != nil {
		n.t.Fatal(err)
	}
	h, err := img.Digest()
	if err != nil {
		n.t.Fatal(err)
	}
	m, err := img.Manifest()
	if err != nil {
		n.t.Fatal(err)
	}
	pushed := testImage{ref: ref, manifest: digest.Digest(h.String())}
	var diffIDs []digest.Digest
	for i, d := range cf.RootFS.DiffIDs {
		diffIDs = append(diffIDs, digest.Digest(d.String()))
		l := m.Layers[i]
		pushed.layers = append(pushed.layers, ocispec.Descriptor{MediaType: string(l.MediaType), Digest: digest.Digest(l.Digest.String()), Size: l.Size})
	}
	pushed.chainIDs = identity.ChainIDs(diffIDs)
	n.pushed = append(n.pushed, pushed)
	return pushed
}

// relabel pushes img, of repo, with another config and so another manifest, and returns its digest. Its layers, and so its chain IDs, are the same.
func (n *testNode) relabel(repo string, img testImage) testImage {
	n.t.Helper()
	r, err := name.NewDigest(n.reg.Host() + "/" + repo + "@" + img.manifest.String())
	if err != nil {
		n.t.Fatal(err)
	}
	old, err := remote.Image(r)
	if err != nil {
		n.t.Fatal(err)
	}
	cf, err := old.ConfigFile()
	if err != nil {
		n.t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.Author = "mallory"
	other, err := mutate.ConfigFile(old, cf)
	if err != nil {
		n.t.Fatal(err)
	}
	h, err := other.Digest()
	if err == nil {
		err = remote.Write(r.Context().Tag("other"), other)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	img.ref, img.manifest = r.Context().Tag("other").String(), digest.Digest(h.String())
	return img
}

// convert attaches the image's artifact.
func (n *testNode) convert(img testImage) {
	n.t.Helper()
	p, ref, err := converter.Open(img.ref, converter.OpenOptions{})
	if err != nil {
		n.t.Fatal(err)
	}
	if _, err := converter.Create(context.Background(), p, ref, converter.CreateOptions{}); err != nil {
		n.t.Fatal(err)
	}
}

// labels are what containerd passes for layer i.
func (img testImage) labels(i int) snapshots.Opt { return img.labelsOf(i, img.manifest.String()) }

// labelsOf are those for layer i of an image with another manifest.
func (img testImage) labelsOf(i int, manifest string) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{
		"containerd.io/snapshot.ref":                 img.chainIDs[i].String(),
		"containerd.io/snapshot/cri.image-ref":       img.ref,
		"containerd.io/snapshot/cri.manifest-digest": manifest,
	})
}

// dataRequests counts ranged reads of layer data: indexes lie at their blobs' ends, so what begins at 0 is data.
func (n *testNode) dataRequests() int {
	got, _ := n.reg.Count(registrytest.OfBlobs, func(q registrytest.Request) bool {
		return q.Method == http.MethodGet && len(q.Range) > 8 && q.Range[:8] == "bytes=0-"
	})
	return got
}

type file struct{ name, body string }

// tarOf makes a layer's tar: names that end in / are directories.
func tarOf(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: 0o755, Size: int64(len(f.body)), Typeflag: tar.TypeReg, ModTime: time.Unix(1e9, 0)}
		if f.name[len(f.name)-1] == '/' {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, f.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// threeLayers are a base, a change with a whiteout, and a top.
func threeLayers(t testing.TB) [][]byte {
	return [][]byte{
		tarOf(t, file{"etc/", ""}, file{"etc/base", "from the base"}, file{"etc/gone", "deleted above"}),
		tarOf(t, file{"etc/", ""}, file{"etc/.wh.gone", ""}, file{"etc/middle", "from the middle"}),
		tarOf(t, file{"top", "from the top"}),
	}
}

func testContext() context.Context { return namespaces.WithNamespace(context.Background(), "test") }

// prepareAll prepares the image's layers from first on, as containerd does, on top of parent, and returns the name of the top snapshot.
func (n *testNode) prepareAll(img testImage, first int, parent string) string {
	n.t.Helper()
	for i := first; i < len(img.chainIDs); i++ {
		parent = n.prepareStreamed(img, i, parent)
	}
	return parent
}

func (n *testNode) prepareStreamed(img testImage, i int, parent string) string {
	n.t.Helper()
	ctx := testContext()
	mounts, err := n.sn.Prepare(ctx, fmt.Sprintf("extract-%d %s %d", i, img.chainIDs[i], time.Now().UnixNano()), parent, img.labels(i))
	if !isAlreadyExists(err) {
		n.t.Fatalf("Prepare of layer %d: got %v, %v, want ErrAlreadyExists; log:\n%s", i, mounts, err, n.log.b.String())
	}
	name := ""
	filter := fmt.Sprintf(`labels."containerd.io/snapshot.ref"==%s,parent==%q`, img.chainIDs[i], parent)
	if err := n.sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Kind == snapshots.KindCommitted && info.Labels[snapshots.LabelSnapshotRef] == img.chainIDs[i].String() {
			if name != "" {
				n.t.Errorf("layer %d: containerd takes %s or %s", i, name, info.Name)
			}
			name = info.Name
		}
		return nil
	}, filter); err != nil {
		n.t.Fatal(err)
	}
	if name == "" {
		n.t.Fatalf("layer %d: no committed snapshot answers containerd's filter %s", i, filter)
	}
	return name
}

// untar unpacks regular files and directories.
func untar(t testing.TB, root string, b []byte) {
	t.Helper()
	for r := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return
		}
		path := filepath.Join(root, h.Name)
		if err == nil && h.Typeflag == tar.TypeDir {
			err = os.MkdirAll(path, 0o755)
		} else if err == nil {
			var body []byte
			if body, err = io.ReadAll(r); err == nil {
				err = os.WriteFile(path, body, 0o644)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

package main

import (
	"context"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot"
)

// unpackTest has an image of two layers in some registries, and containerd's stores with what a pull of it from each of them leaves where it is streamed: manifest and config.
type unpackTest struct {
	t       *testing.T
	img     v1.Image
	regs    []*registrytest.Registry
	cs      content.Store
	is      images.Store
	applier diff.Applier
	u       *unpacker
}

func newUnpackTest(t *testing.T, registries int) *unpackTest {
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	blobs, err := local.NewStore(t.TempDir())
	check(err)
	b, err := bolt.Open(filepath.Join(t.TempDir(), "meta.db"), 0o600, nil)
	check(err)
	t.Cleanup(func() { b.Close() })
	db := metadata.NewDB(b, blobs, nil)
	check(db.Init(t.Context()))
	reg, err := registryclient.New(registryclient.Options{})
	check(err)
	t.Cleanup(func() { reg.Close() })
	x := &unpackTest{t: t, cs: db.ContentStore(), is: metadata.NewImageStore(db)}
	x.applier = apply.NewFileSystemApplier(x.cs)
	x.u = &unpacker{from: (&node{reg: reg}).readBlob, head: time.Second}
	for range registries {
		x.regs = append(x.regs, registrytest.Start(t, registrytest.Options{}))
	}
	slices.SortFunc(x.regs, func(a, b *registrytest.Registry) int { return strings.Compare(a.Host(), b.Host()) })
	x.img = pushImage(t, x.ref(0), 3<<20, 2)
	for i := range registries {
		ref, err := name.ParseReference(x.ref(i))
		check(err)
		check(remote.Write(ref, x.img))
		_, err = x.is.Create(x.ctx(), images.Image{Name: x.ref(i), Target: x.put(x.img.RawManifest())})
		check(err)
	}
	x.put(x.img.RawConfigFile())
	return x
}

func (x *unpackTest) ctx() context.Context { return namespaces.WithNamespace(x.t.Context(), "test") }

func (x *unpackTest) ref(i int) string { return x.regs[i].Host() + "/app:v1" }

func (x *unpackTest) put(b []byte, err error) ocispec.Descriptor {
	x.t.Helper()
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(b), Size: int64(len(b))}
	if err == nil {
		err = content.WriteBlob(x.ctx(), x.cs, d.Digest.String(), strings.NewReader(string(b)), d)
	}
	if err != nil {
		x.t.Fatal(err)
	}
	return d
}

// layer is the layer n, which was streamed for the image of a registry and is unpacked for a pull of that of another, if that is not negative.
func (x *unpackTest) layer(n, streamed, pulled int) snapshot.Layer {
	x.t.Helper()
	m, err := x.img.Manifest()
	if err != nil {
		x.t.Fatal(err)
	}
	cf, err := x.img.ConfigFile()
	if err != nil {
		x.t.Fatal(err)
	}
	var diffIDs []digest.Digest
	for _, d := range cf.RootFS.DiffIDs[:n+1] {
		diffIDs = append(diffIDs, digest.Digest(d.String()))
	}
	manifest, err := x.img.Digest()
	if err != nil {
		x.t.Fatal(err)
	}
	l := snapshot.Layer{Number: n}
	l.Source.Ref = x.regs[streamed].Host() + "/app@" + manifest.String()
	l.Source.Layer = ocispec.Descriptor{MediaType: string(m.Layers[n].MediaType), Digest: digest.Digest(m.Layers[n].Digest.String()), Size: m.Layers[n].Size}
	l.Source.DiffID = diffIDs[n]
	l.ChainID = identity.ChainID(diffIDs)
	if pulled >= 0 {
		l.Ref, l.Manifest = x.ref(pulled), digest.Digest(manifest.String())
	}
	return l
}

// unpack unpacks l, and returns the registries that were asked for it, in that order.
func (x *unpackTest) unpack(l snapshot.Layer) (asked []int) {
	x.t.Helper()
	for _, reg := range x.regs {
		reg.Reset()
	}
	var order []string
	from := x.u.from
	x.u.from = func(ctx context.Context, ref string, d ocispec.Descriptor, w io.Writer) error {
		order = append(order, ref)
		return from(ctx, ref, d, w)
	}
	defer func() { x.u.from = from }()
	files := x.t.TempDir()
	err := x.u.unpackFrom(x.ctx(), x.cs, x.applier, holders(x.ctx(), x.cs, x.is, l), func(do func([]mount.Mount) error) error {
		return do([]mount.Mount{{Type: "bind", Source: files, Options: []string{"rw", "rbind"}}})
	})
	if err != nil {
		x.t.Fatal(err)
	}
	if list, err := filepath.Glob(files + "/*"); err != nil || len(list) != 1 {
		x.t.Errorf("unpacked %q, %v", list, err)
	}
	for _, ref := range order {
		asked = append(asked, slices.IndexFunc(x.regs, func(reg *registrytest.Registry) bool { return strings.HasPrefix(ref, reg.Host()+"/") }))
	}
	return asked
}

// TestUnpackOrder: the layer is asked for where its pull comes from, then elsewhere, and last where the artifact was that must not be used. Who is silent, or drips, is left for the next at once, for all layers, and is
// waited for if nobody else gives it. What containerd has, nobody is asked for.
func TestUnpackOrder(t *testing.T) {
	if unix.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	all := func(*http.Request) bool { return true }
	for name, c := range map[string]struct {
		streamed, pulled int
		faults           map[int]registrytest.Fault
		want             [2][]int
	}{
		"a pull":                {0, 2, nil, [2][]int{{2}, {2}}},
		"a start":               {0, -1, nil, [2][]int{{1}, {1}}},
		"of another registry":   {2, -1, nil, [2][]int{{0}, {0}}},
		"silent":                {0, 1, map[int]registrytest.Fault{1: registrytest.Stall(-1)}, [2][]int{{1, 2}, {2}}},
		"silent in the middle":  {0, 1, map[int]registrytest.Fault{1: registrytest.Stall(1 << 20)}, [2][]int{{1, 2}, {2}}},
		"drips":                 {0, 1, map[int]registrytest.Fault{1: registrytest.Throttle(1<<10, 20*time.Millisecond)}, [2][]int{{1, 2}, {2}}},
		"away":                  {0, 1, map[int]registrytest.Fault{1: registrytest.Status(http.StatusNotFound)}, [2][]int{{1, 2}, {1, 2}}},
		"slow, and nobody else": {0, 1, map[int]registrytest.Fault{0: registrytest.Status(http.StatusNotFound), 1: registrytest.Delay(2 * time.Second), 2: registrytest.Status(http.StatusNotFound)}, [2][]int{{1, 2, 0, 0, 1}, {2, 0, 0, 1}}},
	} {
		t.Run(name, func(t *testing.T) {
			x := newUnpackTest(t, 3)
			for i, fault := range c.faults {
				x.regs[i].Inject(all, -1, fault)
			}
			began := time.Now()
			for n := range 2 {
				if got := x.unpack(x.layer(n, c.streamed, c.pulled)); !slices.Equal(got, c.want[n]) {
					t.Errorf("layer %d: asked %v, want %v", n, got, c.want[n])
				}
			}
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("it took %v", took)
			}
			if got := x.unpack(x.layer(0, c.streamed, c.pulled)); len(got) > 0 {
				t.Errorf("%v were asked for what containerd has", got)
			}
		})
	}
}

package snapshot

import (
	"context"
	"errors"
	iofs "io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

func isAlreadyExists(err error) bool { return errdefs.IsAlreadyExists(err) }

// inMounts mounts a snapshot's mounts and runs f in them.
func inMounts(t testing.TB, mounts []mount.Mount, f func(root string)) {
	t.Helper()
	root := t.TempDir()
	if err := mount.All(mounts, root); err != nil {
		t.Fatalf("mount %+v: %v", mounts, err)
	}
	defer func() {
		if err := mount.UnmountAll(root, 0); err != nil {
			t.Error(err)
		}
	}()
	f(root)
}

func wantFiles(t testing.TB, root string, want map[string]string) {
	t.Helper()
	for name, body := range want {
		got, err := os.ReadFile(filepath.Join(root, name))
		if body == "" {
			if !errors.Is(err, iofs.ErrNotExist) {
				t.Errorf("%s: got %q, %v, want none", name, got, err)
			}
		} else if err != nil || string(got) != body {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, body)
		}
	}
}

var threeLayersMerged = map[string]string{
	"etc/base": "from the base", "etc/middle": "from the middle", "top": "from the top", "etc/gone": "",
}

func TestStreamed(t *testing.T) {
	for _, mode := range []fs.Mode{fs.ModeFile, fs.ModeLoop, fs.ModeTree} {
		t.Run(string(mode), func(t *testing.T) {
			n := newTestNodeMode(t, mode)
			img := n.push("app", threeLayers(t)...)
			n.convert(img)
			n.reg.Reset()
			top := n.prepareAll(img, 0, "")
			if got := n.dataRequests(); got != 0 {
				t.Errorf("the pull made %d requests for layer data, want none", got)
			}
			// Referrers and manifest, artifact and config, three indexes: no request twice, whatever the number of Prepares.
			if got, _ := n.reg.Count(); got != 4+3 {
				t.Errorf("the pull made %d requests, want 7: %+v", got, n.reg.Requests())
			}
			ctx := testContext()
			mounts, err := n.sn.Prepare(ctx, "container", top)
			if err != nil {
				t.Fatal(err)
			}
			inMounts(t, mounts, func(root string) {
				wantFiles(t, root, threeLayersMerged)
				if err := os.WriteFile(filepath.Join(root, "etc/base"), []byte("written"), 0o644); err != nil {
					t.Error(err)
				}
			})
			view, err := n.sn.View(ctx, "view", top)
			if err != nil {
				t.Fatal(err)
			}
			inMounts(t, view, func(root string) { wantFiles(t, root, threeLayersMerged) })
			if lines := n.log.lines(); lines != 0 {
				t.Errorf("a streamed pull logged %d lines:\n%s", lines, n.log.b.String())
			}
		})
	}
}

// A lower chain that is there already, unpacked for another image, does not keep the rest from being streamed.
func TestStreamedOnUnpackedBase(t *testing.T) {
	n := newTestNode(t)
	tars := threeLayers(t)
	img := n.push("app", tars...)
	n.convert(img)
	ctx := testContext()
	mounts, err := n.sn.Prepare(ctx, "unpack", "")
	if err != nil {
		t.Fatal(err)
	}
	inMounts(t, mounts, func(root string) {
		if err := os.WriteFile(filepath.Join(root, "unpacked"), nil, 0o644); err != nil {
			t.Error(err)
		}
	})
	if err := n.sn.Commit(ctx, "base", "unpack"); err != nil {
		t.Fatal(err)
	}
	top := n.prepareAll(img, 1, "base")
	mounts, err = n.sn.Prepare(ctx, "container", top)
	if err != nil {
		t.Fatal(err)
	}
	inMounts(t, mounts, func(root string) { wantFiles(t, root, threeLayersMerged) })
}

// Layers unpacked above a streamed one, as for an image whose base has an artifact.
func TestUnpackedOnStreamed(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...)
	n.convert(img)
	top := n.prepareAll(img, 0, "")
	ctx := testContext()
	for i, name := range []string{"first", "second"} {
		key := "unpack " + name
		mounts, err := n.sn.Prepare(ctx, key, top)
		if err != nil {
			t.Fatal(err)
		}
		inMounts(t, mounts, func(root string) {
			if err := os.WriteFile(filepath.Join(root, name), []byte(name), 0o644); err != nil {
				t.Error(err)
			}
			if i == 1 {
				if err := os.Remove(filepath.Join(root, "etc/base")); err != nil {
					t.Error(err)
				}
			}
		})
		if err := n.sn.Commit(ctx, name, key); err != nil {
			t.Fatal(err)
		}
		top = name
	}
	view, err := n.sn.View(ctx, "view", top)
	if err != nil {
		t.Fatal(err)
	}
	inMounts(t, view, func(root string) {
		wantFiles(t, root, map[string]string{"first": "first", "second": "second", "top": "from the top", "etc/base": "", "etc/gone": ""})
	})
}

// After a restart, without a registry, what was read before is still there, and the image can be mounted.
func TestRestart(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...)
	n.convert(img)
	top := n.prepareAll(img, 0, "")
	ctx := testContext()
	mounts, err := n.sn.Prepare(ctx, "container", top)
	if err != nil {
		t.Fatal(err)
	}
	inMounts(t, mounts, func(root string) { wantFiles(t, root, threeLayersMerged) })
	n.reg.Close()
	n.restart()
	if mounts, err = n.sn.Mounts(ctx, "container"); err != nil {
		t.Fatal(err)
	}
	inMounts(t, mounts, func(root string) { wantFiles(t, root, threeLayersMerged) })
}

func TestRemove(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...)
	n.convert(img)
	ctx := testContext()
	for range 2 { // what was removed can be pulled again
		names := []string{""}
		for i := range img.chainIDs {
			names = append(names, n.prepareStreamed(img, i, names[i]))
		}
		if _, err := n.sn.Prepare(ctx, "container", names[3]); err != nil {
			t.Fatal(err)
		}
		if err := n.sn.Remove(ctx, names[3]); !errdefs.IsFailedPrecondition(err) {
			t.Fatalf("removing a parent: got %v, want ErrFailedPrecondition", err)
		}
		if err := n.sn.Remove(ctx, "container"); err != nil {
			t.Fatal(err)
		}
		for i := 3; i > 0; i-- {
			if err := n.sn.Remove(ctx, names[i]); err != nil {
				t.Fatal(err)
			}
		}
		for _, d := range []string{"snapshots", "images", "indexes"} {
			if left, err := os.ReadDir(filepath.Join(n.root, d)); err != nil || len(left) != 0 {
				t.Errorf("%s: %v left, %v", d, left, err)
			}
		}
		mounted, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(mounted), filepath.Join(n.root, "snapshots")) {
			t.Error("a removed snapshot is still mounted")
		}
	}
}

// Every failure on the way to an artifact ends in a plain snapshot, and in one line of log however many layers there are.
func TestFallback(t *testing.T) {
	good := func(t *testing.T, n *testNode) testImage {
		img := n.push("app", threeLayers(t)...)
		n.convert(img)
		return img
	}
	cases := map[string]func(t *testing.T, n *testNode) testImage{
		"no artifact": func(t *testing.T, n *testNode) testImage { return n.push("app", threeLayers(t)...) },
		"not listed": func(t *testing.T, n *testNode) testImage {
			img := n.push("unlisted", threeLayers(t)...)
			n.convert(img)
			return img
		},
		"registry fails": func(t *testing.T, n *testNode) testImage {
			img := good(t, n)
			n.reg.Inject(registrytest.Any, -1, registrytest.Status(500))
			return img
		},
		"registry is away": func(t *testing.T, n *testNode) testImage {
			img := good(t, n)
			n.reg.Close()
			return img
		},
		"index is damaged": func(t *testing.T, n *testNode) testImage {
			img := good(t, n)
			n.reg.Inject(registrytest.Blobs, -1, registrytest.Flip(10))
			return img
		},
		"registry stalls": func(t *testing.T, n *testNode) testImage {
			img := good(t, n)
			n.reg.Inject(registrytest.Referrers, -1, registrytest.Stall(-1))
			return img
		},
		"artifact is no artifact": func(t *testing.T, n *testNode) testImage {
			img := n.push("app", threeLayers(t)...)
			n.reg.PutManifest("app", "", "application/vnd.oci.image.manifest.v1+json", []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","artifactType":"`+artifact.ArtifactType+
				`","config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[],"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"`+
				img.manifest.String()+`","size":1}}`))
			return img
		},
		"chain of another image": func(t *testing.T, n *testNode) testImage {
			img := good(t, n)
			img.chainIDs = n.push("other", tarOf(t, file{"other", "x"}), tarOf(t, file{"y", "y"}), tarOf(t, file{"z", "z"})).chainIDs
			return img
		},
		"containerd refuses a layer": func(t *testing.T, n *testNode) testImage {
			img := n.push("app", tarOf(t, file{"a", "a"}), tarOf(t, file{"b", "b"}, file{".wh.b", ""}), tarOf(t, file{"c", ""}))
			n.convert(img)
			return img
		},
		"labels are garbage": func(t *testing.T, n *testNode) testImage {
			img := good(t, n)
			img.manifest, img.ref = "sha256:short", "::"
			return img
		},
		"no labels": func(t *testing.T, n *testNode) testImage {
			img := good(t, n)
			img.manifest, img.ref = "", ""
			return img
		},
	}
	for name, setUp := range cases {
		t.Run(name, func(t *testing.T) {
			n := newTestNode(t)
			img := setUp(t, n)
			ctx := testContext()
			parent := ""
			for i := range img.chainIDs {
				key := "extract " + img.chainIDs[i].String()
				mounts, err := n.sn.Prepare(ctx, key, parent, img.labels(i))
				if err != nil || len(mounts) == 0 {
					t.Fatalf("Prepare of layer %d: got %v, %v, want mounts for a normal pull", i, mounts, err)
				}
				parent = img.chainIDs[i].String()
				if err := n.sn.Commit(ctx, parent, key); err != nil {
					t.Fatal(err)
				}
			}
			if got := n.log.lines(); got != 1 {
				t.Errorf("%d lines logged, want 1:\n%s", got, n.log.b.String())
			}
		})
	}
}

// containerd prepares under locks of its own, but its transfer service and its CRI do not hold the same.
func TestPrepareConcurrently(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...)
	n.convert(img)
	n.reg.Reset()
	ctx := testContext()
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if _, err := n.sn.Prepare(ctx, "extract "+string(rune('a'+i)), "", img.labels(0)); !isAlreadyExists(err) {
				t.Errorf("got %v, want ErrAlreadyExists", err)
			}
		}()
	}
	wg.Wait()
	if got, _ := n.reg.Count(); got != 7 {
		t.Errorf("20 pulls at once made %d requests, want 7", got)
	}
	committed := 0
	if err := n.sn.Walk(ctx, func(_ context.Context, _ snapshots.Info) error { committed++; return nil }); err != nil {
		t.Fatal(err)
	}
	if committed != 3 {
		t.Errorf("20 pulls at once made %d snapshots, want 3", committed)
	}
}

// The same layer twice in a chain, and an image of many layers.
func TestManyLayers(t *testing.T) {
	n := newTestNode(t)
	base := tarOf(t, file{"a", "a"})
	tars := [][]byte{base, tarOf(t, file{".wh.a", ""}), base}
	for i := range 117 {
		tars = append(tars, tarOf(t, file{"n", string(rune(i + 'a'))}))
	}
	img := n.push("many", tars...)
	n.convert(img)
	top := n.prepareAll(img, 0, "")
	mounts, err := n.sn.Prepare(testContext(), "container", top)
	if err != nil {
		t.Fatal(err)
	}
	inMounts(t, mounts, func(root string) {
		wantFiles(t, root, map[string]string{"a": "a", "n": string(rune(116 + 'a'))})
	})
}

package snapshot

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// at has f push images to reg.
func (n *testNode) at(reg *registrytest.Registry, f func()) {
	was := n.reg
	n.reg = reg
	defer func() { n.reg = was }()
	f()
}

// layersOf are the layers of the artifact that img is streamed by.
func (n *testNode) layersOf(img testImage) []artifact.Layer {
	n.t.Helper()
	id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
	if err != nil {
		n.t.Fatal(err)
	}
	var rec struct {
		Layers []artifact.Layer `json:"layers"`
	}
	b, err := os.ReadFile(filepath.Join(n.root, "images", id, "image.json"))
	if err == nil {
		err = json.Unmarshal(b, &rec)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	return rec.Layers
}

// until waits for what comes sooner or later.
func (n *testNode) until(what string, f func() bool) {
	n.t.Helper()
	late, tick := time.After(time.Minute), time.NewTicker(5*time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-tick.C:
		case <-late:
			n.t.Fatalf("not in time: %s; log:\n%s", what, n.log.b.String())
		}
	}
}

// dripping starts a container of an image in a registry of its own, and waits until the proof of its upper layer has begun, which comes n bytes every 100 ms.
func (n *testNode) dripping(size, drops int) {
	n.t.Helper()
	reg := registrytest.Start(n.t, registrytest.Options{})
	var img testImage
	n.at(reg, func() {
		tars := [][]byte{tarOf(n.t, file{"small", fmt.Sprint(size)}), tarOf(n.t, file{"large", noise(uint64(size), size)})}
		img = n.push("slow", tars...)
		n.attachTars(img, tars, func(_ int, index []byte, _ digest.Digest) []byte { return index })
	})
	top := n.prepareAll(img, 0, "")
	upper := n.layersOf(img)[1].Digest.String()
	reg.Inject(func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, upper) }, -1, registrytest.Throttle(drops, 100*time.Millisecond))
	reg.Reset()
	wantFiles(n.t, n.container("of "+img.ref, top), map[string]string{"small": fmt.Sprint(size)})
	n.until("the proof of a slow layer begins", func() bool {
		asked, _ := reg.Count(func(q registrytest.Request) bool { return strings.HasSuffix(q.Path, upper) })
		return asked > 0
	})
}

// honest has a container run of an image of two layers, which are to be proven.
func (n *testNode) honest() {
	n.t.Helper()
	img := n.push("app", tarOf(n.t, file{"base", big("base")}), tarOf(n.t, file{"program", big("good")}))
	n.convert(img)
	wantFiles(n.t, n.container("container", n.prepareAll(img, 0, "")), map[string]string{"base": big("base")})
}

// TestOneRegistryDrips: a registry that gives the layers of its images a byte at a time keeps no layer of another registry unproven.
func TestOneRegistryDrips(t *testing.T) {
	n := provingNode(t, fs.ModeFile)
	n.budget = time.Hour
	n.restart()
	n.dripping(100_000, 1)
	n.next(stream.Proven) // its small layer
	n.honest()
	n.next(stream.Proven)
	n.next(stream.Proven)
	if s := n.images.Proofs(); s.Waiting != 1 || s.Proven != 3 {
		t.Errorf("the slow layer is proven, too: %+v", s)
	}
}

// TestRegistriesDrip: as many of them as layers are proven side by side do not, either: their layers, which do come, make room for those that wait.
func TestRegistriesDrip(t *testing.T) {
	n := provingNode(t, fs.ModeFile)
	n.deadline, n.budget = 16*time.Second, time.Hour
	n.restart()
	for size := range 2 {
		n.dripping(1500_000+size, 2<<10) // longer than anybody waits here
		n.next(stream.Proven)            // its small layer
	}
	n.honest()
	n.next(stream.Proven)
	n.next(stream.Proven)
}

// TestSlowLayersTakeTurns: layers of one registry that have made each other wait, and so had ever longer turns, make room for one that was not tried yet as they did at first.
func TestSlowLayersTakeTurns(t *testing.T) {
	n := provingNode(t, fs.ModeFile)
	n.deadline, n.budget = 12*time.Second, time.Hour // the first turn takes 1.5 s, the fourth 12 s
	n.restart()
	tars := [][]byte{tarOf(t, file{"small", "small"}), tarOf(t, file{"large", noise(1, 1500_000)}), tarOf(t, file{"other", noise(2, 1500_000)})}
	img := n.push("slow", tars...)
	n.attachTars(img, tars, func(_ int, index []byte, _ digest.Digest) []byte { return index })
	top := n.prepareAll(img, 0, "")
	layers := n.layersOf(img)
	slow := func(path string) bool {
		return strings.HasSuffix(path, layers[1].Digest.String()) || strings.HasSuffix(path, layers[2].Digest.String())
	}
	n.reg.Inject(func(r *http.Request) bool { return slow(r.URL.Path) }, -1, registrytest.Throttle(2<<10, 100*time.Millisecond))
	n.reg.Reset()
	wantFiles(t, n.container("slow container", top), map[string]string{"small": "small"})
	n.until("one of them has its fourth turn", func() bool {
		turns, _ := n.reg.Count(func(q registrytest.Request) bool { return slow(q.Path) })
		return turns == 7
	})
	n.honest()
	late := time.After(n.deadline / 2) // the turn has begun, and would be over after as long again
	for proven := 0; proven < 2; {
		select {
		case p := <-n.proofs:
			if p.Kind == stream.Proven && strings.Contains(p.Image, "/app@") {
				proven++
			}
		case <-late:
			t.Fatalf("%d layers are proven when half of the time is over; log:\n%s", proven, n.log.b.String())
		}
	}
}

// behind has n ask a mirror first, which passes on what n's registry gives, with other bytes for the image's own layers.
func (n *testNode) behind(img testImage, wrong func(b []byte)) {
	n.t.Helper()
	origin, err := url.Parse(n.reg.URL())
	if err != nil {
		n.t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(origin)
	proxy.ModifyResponse = func(resp *http.Response) error {
		dgst := filepath.Base(resp.Request.URL.Path)
		if resp.StatusCode/100 != 2 || !slices.ContainsFunc(img.layers, func(l ocispec.Descriptor) bool { return l.Digest.String() == dgst }) {
			return nil
		}
		b, err := io.ReadAll(resp.Body)
		if err == nil {
			wrong(b)
			resp.Body = io.NopCloser(bytes.NewReader(b))
		}
		return err
	}
	mirror := httptest.NewServer(proxy)
	n.t.Cleanup(mirror.Close)
	n.hosts = n.t.TempDir()
	dir := filepath.Join(n.hosts, n.reg.Host())
	toml := fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n", n.reg.URL(), mirror.URL)
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(toml), 0o644)); err != nil {
		n.t.Fatal(err)
	}
}

// TestProofBehindAMirror: where the image's own layers are what an artifact is judged by, a mirror that gives others is asked once, and then the registry.
func TestProofBehindAMirror(t *testing.T) {
	for name, wrong := range map[string]func(b []byte){
		"damaged layers": func(b []byte) { b[len(b)/2] ^= 1 },
		"other tars":     func(b []byte) { clear(b) },
	} {
		for _, honest := range []bool{true, false} {
			kind := "forged"
			if honest {
				kind = "honest"
			}
			t.Run(name+" "+kind, func(t *testing.T) {
				n := provingNode(t, fs.ModeFile)
				tars := honestLayers(t)
				img := n.push("app", tars...)
				evil := slices.Clone(tars)
				if !honest {
					evil[1] = tarOf(t, file{"program", big("evil")}, file{"other", big("same")})
				}
				n.attachTars(img, evil, func(i int, index []byte, _ digest.Digest) []byte { return claim(index, digest.FromBytes(tars[i])) })
				n.behind(img, wrong)
				n.restart()
				top := n.prepareAll(img, 0, "")
				blobs := map[string]bool{}
				for _, l := range n.layersOf(img) {
					blobs[l.Digest.String()] = true
				}
				n.reg.Inject(func(r *http.Request) bool { return blobs[filepath.Base(r.URL.Path)] }, -1, registrytest.Status(http.StatusNotFound))
				wantFiles(t, n.container("container", top), map[string]string{"base": big("base")})
				if !honest {
					if p := n.next(stream.Quarantined); p.Layer != 1 {
						t.Errorf("told of %+v", p)
					}
					return
				}
				n.next(stream.Proven)
				n.next(stream.Proven)
			})
		}
	}
}

// TestZerosBehindALie: where an index claims far more than the image's own layer has, that is what shows the lie, and what the artifact has is not read for it: it may be zeros for hours.
func TestZerosBehindALie(t *testing.T) {
	n := provingNode(t, fs.ModeFile)
	tars := honestLayers(t)
	img := n.push("app", tars...)
	evil := slices.Clone(tars)
	evil[1] = tarOf(t, file{"program", big("evil")}, file{"zeros", strings.Repeat("\x00", 64<<20)})
	n.attachTars(img, evil, func(i int, index []byte, _ digest.Digest) []byte { return claim(index, digest.FromBytes(tars[i])) })
	top := n.prepareAll(img, 0, "")
	upper := n.layersOf(img)[1].Digest.String()
	n.reg.Inject(func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, upper) }, -1, registrytest.Stall(-1))
	wantFiles(t, n.container("container", top), map[string]string{"base": big("base")})
	if p := n.next(stream.Quarantined); p.Layer != 1 {
		t.Errorf("told of %+v", p)
	}
}

// TestALieIsProvenByItsChunk: a chunk that was seen to lie is read again, and nothing else of its layer, which its registry may not give.
func TestALieIsProvenByItsChunk(t *testing.T) {
	n := provingNode(t, fs.ModeFile)
	n.quiet = time.Hour // no first start is over
	n.restart()
	const large = 200_000
	files := []file{{"large", noise(1, large)}, {"dir/", ""}, {"dir/program", "in one chunk with its header"}}
	honest := tarOf(t, files...)
	setuid := bytes.Clone(honest)
	at := 512 + (large+511)/512*512 + 512 // of dir/program
	copy(setuid[at+100:], "0004755\x00")
	fixChecksum(setuid[at:])
	img := n.push("app", honest)
	n.attachTars(img, [][]byte{honest}, withHeaders(t, setuid))
	n.reg.Inject(func(r *http.Request) bool { return strings.HasPrefix(r.Header.Get("Range"), "bytes=0-") }, -1, registrytest.Stall(-1))
	root := n.container("container", n.prepareAll(img, 0, ""))
	if b, err := os.ReadFile(filepath.Join(root, "dir/program")); !errors.Is(err, unix.EIO) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if p := n.next(stream.Quarantined); !strings.Contains(p.Evidence.Why, "header") {
		t.Errorf("why: %s", p.Evidence.Why)
	}
}

// TestMountedOnAFullDisk: when an image was mounted first counts though it could not be written down, which is done later.
func TestMountedOnAFullDisk(t *testing.T) {
	n := provingNode(t, fs.ModeFile)
	n.deadline, n.budget = 3*time.Second, 100*time.Millisecond
	n.restart()
	img := n.push("app", tarOf(t, file{"base", big("base")}), tarOf(t, file{"program", big("good")}))
	n.convert(img)
	top := n.prepareAll(img, 0, "")
	id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
	if err != nil {
		t.Fatal(err)
	}
	back := n.reg.Inject(registrytest.Blobs, -1, registrytest.Status(http.StatusServiceUnavailable))
	dir := filepath.Join(n.root, "images", id)
	if err := errors.Join(unix.Mount(dir, dir, "", unix.MS_BIND, ""), unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")); err != nil {
		t.Fatal(err)
	}
	writable := func() { unix.Unmount(dir, unix.MNT_DETACH) }
	t.Cleanup(writable)
	n.container("container", top)
	n.next(stream.Overdue)
	if _, err := os.Stat(filepath.Join(dir, "mounted")); err == nil {
		t.Fatal("it was written")
	}
	writable()
	n.until("the first mount is written down", func() bool {
		_, err := os.Stat(filepath.Join(dir, "mounted"))
		return err == nil
	})
	back()
	n.next(stream.Proven)
	n.next(stream.Proven)
}

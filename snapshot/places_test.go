package snapshot

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// deleted has a registry know a repository no more, from now on.
func deleted(reg *registrytest.Registry, repo string) {
	reg.Inject(func(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, "/v2/"+repo+"/") }, -1, registrytest.Status(http.StatusNotFound))
}

// TestPulledFirst: somebody else's copy of an image is pulled first, in a repository that they delete afterwards. What runs from the image's own repository reads on, is proven, and does over restarts.
func TestPulledFirst(t *testing.T) {
	lower, upper := tarOf(t, file{"base", big("base")}), tarOf(t, file{"program", big("good")})
	files := map[string]string{"base": big("base"), "program": big("good")}
	for name, push := range map[string]func(n *testNode) (mallory, own testImage){
		"the same artifact": func(n *testNode) (mallory, own testImage) {
			mallory, own = n.push("mallory", lower, upper).converted(n), n.push("own", lower, upper)
			raw, err := n.artifactOf(mallory).Encode()
			if err != nil {
				t.Fatal(err)
			}
			n.reg.PutManifest("own", "", ocispec.MediaTypeImageManifest, raw)
			return mallory, own
		},
		"the same chain": func(n *testNode) (mallory, own testImage) {
			return n.relabel("mallory", n.push("mallory", lower, upper)).converted(n), n.push("own", lower, upper).converted(n)
		},
	} {
		for _, restart := range []bool{false, true} {
			t.Run(name+map[bool]string{true: " restarted"}[restart], func(t *testing.T) {
				n := provingNode(t, fs.ModeFile)
				mallory, own := push(n)
				top := n.prepareAll(mallory, 0, "")
				if name == "the same artifact" { // on another parent, say
					if id, _, err := n.images.Find(testContext(), own.ref, own.manifest); err != nil || !strings.Contains(top, id) {
						t.Fatalf("found %s for %s: %v", id, top, err)
					}
				} else if got := n.prepareAll(own, 0, ""); got != top {
					t.Fatalf("%s and %s: the second pull is not of the first's snapshot", top, got)
				}
				if restart {
					n.restart()
				}
				deleted(n.reg, "mallory")
				wantFiles(t, n.container("container", top), files)
				n.next(stream.Proven)
				n.next(stream.Proven)
			})
		}
	}
}

// TestSharedBasePulledFirst: the same with an image that has no artifact, and is unpacked on a base that somebody else's image has brought.
func TestSharedBasePulledFirst(t *testing.T) {
	n := provingNode(t, fs.ModeFile)
	base := tarOf(t, file{"base", big("base")})
	mallory := n.push("mallory", base).converted(n)
	own := n.push("own", base, tarOf(t, file{"program", "good"}))
	top := n.prepareAll(mallory, 0, "")
	if _, err := n.sn.Prepare(testContext(), "extract", top, own.labels(1)); err != nil {
		t.Fatal(err)
	}
	deleted(n.reg, "mallory")
	wantFiles(t, n.container("container", top), map[string]string{"base": big("base")})
	n.next(stream.Proven)
}

// TestPulledFirstAndDrips: the registry of the repository that was pulled first drips; what it does not give in a while comes from the other.
func TestPulledFirstAndDrips(t *testing.T) {
	n := provingNode(t, fs.ModeFile)
	drips := registrytest.Start(t, registrytest.Options{})
	lower, upper := tarOf(t, file{"base", big("base")}), tarOf(t, file{"program", noise(1, 300_000)})
	var mallory testImage
	n.at(drips, func() { mallory = n.push("mallory", lower, upper).converted(n) })
	own := n.push("own", lower, upper).converted(n)
	top := n.prepareAll(mallory, 0, "")
	n.prepareAll(own, 0, "")
	drips.Inject(registrytest.Blobs, -1, registrytest.Throttle(1, 100*time.Millisecond))
	n.reg.Inject(registrytest.Blobs, -1, registrytest.Throttle(100_000, time.Millisecond))
	wantFiles(t, n.container("container", top), map[string]string{"base": big("base"), "program": noise(1, 300_000)})
	n.next(stream.Proven)
	n.next(stream.Proven)
}

// TestElsewhere: who knows of pulls that nobody here was told of is asked where else an image is, when no repository gives a blob, and what it says is kept.
func TestElsewhere(t *testing.T) {
	asked := 0
	n := provingNode(t, fs.ModeFile)
	n.elsewhere = func(_ context.Context, chainIDs []digest.Digest) ([]registryclient.Repository, error) {
		asked++
		if len(chainIDs) != 2 {
			t.Errorf("asked for %q", chainIDs)
		}
		return []registryclient.Repository{registryclient.Repository(n.reg.Host() + "/unlisted"), registryclient.Repository(n.reg.Host() + "/own")}, nil
	}
	n.restart()
	lower, upper := tarOf(t, file{"base", big("base")}), tarOf(t, file{"program", big("good")})
	mallory := n.push("mallory", lower, upper).converted(n)
	n.push("own", lower, upper).converted(n)
	top := n.prepareAll(mallory, 0, "")
	deleted(n.reg, "mallory")
	n.reg.Reset()
	wantFiles(t, n.container("container", top), map[string]string{"base": big("base"), "program": big("good")})
	if asked != 1 {
		t.Errorf("asked %d times", asked)
	}
	if got, _ := n.reg.Count(func(q registrytest.Request) bool { return strings.Contains(q.Path, "/unlisted/") }); got != 0 {
		t.Errorf("%d requests to what is not listed", got)
	}
	if list, err := n.images.Origins(); err != nil || len(list) != 2 {
		t.Errorf("origins: %v, %v", list, err)
	}
}

// TestPulledFirstOfMany: somebody else has the image in more repositories than are kept of it, pulled before the image's own or after it. When they are gone the own one is read, also where it has to be asked for
// among all of them; and later pulls of more do not take that away.
func TestPulledFirstOfMany(t *testing.T) {
	lower, upper := tarOf(t, file{"base", big("base")}), tarOf(t, file{"program", big("good")}, file{"later", noise(1, 300_000)})
	for name, c := range map[string]struct{ before, after, elsewhere int }{
		"before it":     {before: 40},
		"after it":      {after: 40, elsewhere: 1},
		"and elsewhere": {before: 40, after: 40, elsewhere: 100},
	} {
		t.Run(name, func(t *testing.T) {
			n := provingNode(t, fs.ModeFile)
			repo := func(i int) string { return fmt.Sprintf("%s/mallory%d", n.reg.Host(), i) }
			own := n.reg.Host() + "/own"
			var list []registryclient.Repository
			for i := range c.elsewhere {
				list = append(list, registryclient.Repository(repo(i)))
			}
			if c.elsewhere > 0 {
				list = slices.Insert(list, len(list)/2, registryclient.Repository(own))
			}
			n.elsewhere = func(context.Context, []digest.Digest) ([]registryclient.Repository, error) { return list, nil }
			n.restart()
			mallory := n.push("mallory", lower, upper).converted(n)
			n.push("own", lower, upper).converted(n)
			top := n.prepareAll(mallory, 0, "")
			id := n.artifacts(mallory)[0].Digest.Encoded()
			pull := func(from, to int) {
				t.Helper()
				for i := from; i < to; i++ {
					if err := n.images.Pulled(id, repo(i)+":latest"); err != nil {
						t.Fatal(err)
					}
				}
			}
			pull(0, c.before)
			if err := n.images.Pulled(id, own+":latest"); err != nil {
				t.Fatal(err)
			}
			pull(c.before, c.before+c.after)
			n.reg.Inject(func(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, "/v2/mallory") }, -1, registrytest.Status(http.StatusNotFound))
			root := n.container("container", top)
			wantFiles(t, root, map[string]string{"base": big("base"), "program": big("good")})
			pull(200, 240)
			wantFiles(t, root, map[string]string{"base": big("base"), "program": big("good"), "later": noise(1, 300_000)})
			n.next(stream.Proven)
			n.next(stream.Proven)
			if list, err := n.images.Origins(); err != nil || len(list) != 16 || !slices.ContainsFunc(list, func(o stream.Origin) bool { return o.Repository == registryclient.Repository(own) }) {
				t.Errorf("origins: %v, %v", list, err)
			}
		})
	}
}

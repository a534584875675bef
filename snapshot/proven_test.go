package snapshot

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// Of what is fetched to be proven, and is a lie, nothing stays but that it is one; the pull is normal.
func TestProvenInVain(t *testing.T) {
	n := newTestNodeWith(t, func(n *testNode) {
		n.deadline = time.Hour
		n.policy = func(registryclient.Repository) (trust.Policy, trust.Verifier) { return trust.Proven, nil }
	})
	img, _ := n.pushForged("app")
	if _, err := n.sn.Prepare(testContext(), "extract", "", img.labels(0)); err != nil {
		t.Fatalf("no normal pull: %v", err)
	}
	if left := n.filesIn("images", "indexes"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	if _, bad := n.ledger.Count(); bad != 1 {
		t.Errorf("%d in quarantine", bad)
	}
	if _, _, err := n.images.Find(testContext(), img.ref, img.manifest); reason.Of(err) != reason.Tampered {
		t.Errorf("found again: %v", err)
	}
}

// What the policy open has let in starts under proven once all of it is proven, and is no base of another pull before.
func TestTightenedToProven(t *testing.T) {
	for _, lies := range []bool{false, true} {
		t.Run(fmt.Sprintf("lies %v", lies), func(t *testing.T) {
			var strict atomic.Bool
			n := newTestNodeWith(t, func(n *testNode) {
				n.deadline = time.Hour
				n.policy = func(registryclient.Repository) (trust.Policy, trust.Verifier) {
					if strict.Load() {
						return trust.Proven, nil
					}
					return trust.Open, nil
				}
			})
			var img testImage
			if lies {
				img, _ = n.pushForged("app")
			} else {
				img = n.push("app", threeLayers(t)...).converted(n)
			}
			top := n.prepareAll(img, 0, "")
			id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
			if err != nil {
				t.Fatal(err)
			}
			strict.Store(true)
			n.restart() // which reads the configuration
			if n.images.Usable(id) == nil {
				t.Error("it serves another pull")
			}
			_, err = n.sn.Prepare(testContext(), "container", top)
			if errors.Is(err, stream.ErrQuarantined) != lies || (err != nil) != lies {
				t.Errorf("a container starts: %v", err)
			}
			if proven, bad := n.ledger.Count(); lies && bad != 1 || !lies && (bad != 0 || proven != len(img.chainIDs)) {
				t.Errorf("%d proven, %d in quarantine", proven, bad)
			}
			if err := n.images.Usable(id); (err != nil) != lies {
				t.Errorf("usable: %v", err)
			}
		})
	}
}

// TestProofsAddUp: of an image that does not come within pull_wait the layers that came stay proven, over restarts, and the next search fetches those alone that are not: that it was pulled in the normal way once does not mean each time.
func TestProofsAddUp(t *testing.T) {
	policy := trust.Open
	n := newTestNodeWith(t, func(n *testNode) {
		n.deadline, n.budget, n.pullWait = time.Hour, time.Hour, 10*time.Second
		n.policy = func(registryclient.Repository) (trust.Policy, trust.Verifier) { return policy, nil }
	})
	img := n.push("app", tarOf(t, file{"lower", noise(1, 100_000)}), tarOf(t, file{"upper", noise(2, 100_000)})).converted(n)
	layers := n.layersOf(img) // which begins no proof
	policy = trust.Proven
	n.restart()
	isData := func(layer int, path, bytes string) bool {
		return strings.HasSuffix(path, layers[layer].Digest.String()) && strings.HasPrefix(bytes, "bytes=0-")
	}
	faster := n.reg.Inject(func(r *http.Request) bool { return isData(1, r.URL.Path, r.Header.Get("Range")) }, -1, registrytest.Throttle(1, 100*time.Millisecond))
	if _, _, err := n.images.Find(testContext(), img.ref, img.manifest); reason.Of(err) != reason.Timeout {
		t.Fatalf("%v", err)
	}
	if proven, _ := n.ledger.Count(); proven != 1 {
		t.Errorf("%d layers are proven, want 1", proven)
	}
	faster()
	n.restart() // or the failure might stand
	n.reg.Reset()
	if _, _, err := n.images.Find(testContext(), img.ref, img.manifest); err != nil {
		t.Fatal(err)
	}
	lower, _ := n.reg.Count(func(q registrytest.Request) bool { return isData(0, q.Path, q.Range) })
	upper, _ := n.reg.Count(func(q registrytest.Request) bool { return isData(1, q.Path, q.Range) })
	if lower > 0 || upper == 0 {
		t.Errorf("%d requests for what was proven, %d for the other layer", lower, upper)
	}
}

// Whoever attaches lies without end has a few of them fetched at a pull, and the pull is a normal one; none is fetched twice.
func TestManyLies(t *testing.T) {
	n := newTestNodeWith(t, func(n *testNode) {
		n.deadline = time.Hour
		n.policy = func(registryclient.Repository) (trust.Policy, trust.Verifier) { return trust.Proven, nil }
	})
	lower, honest := tarOf(t, file{"base", big("base")}), tarOf(t, file{"program", big("good")})
	img := n.push("app", lower, honest)
	for i := range 6 {
		evil := tarOf(t, file{"program", big(fmt.Sprint("evil", i))})
		n.attachTars(img, [][]byte{lower, evil}, func(layer int, index []byte, diffID digest.Digest) []byte {
			if layer == 1 {
				diffID = digest.FromBytes(honest)
			}
			return claim(index, diffID)
		})
	}
	for i, want := range []int{4, 6, 6} {
		if _, _, err := n.images.Find(testContext(), img.ref, img.manifest); reason.Of(err) != reason.Tampered {
			t.Errorf("pull %d: %v", i, err)
		}
		if _, bad := n.ledger.Count(); bad != want {
			t.Errorf("after pull %d, %d are in quarantine, want %d", i, bad, want)
		}
		n.restart() // or the failure might stand
	}
	if left := n.filesIn("images", "indexes"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

package snapshot

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// pushDripping pushes an image of two layers to a registry of its own, with an artifact whose data that gives a byte at a time as long as drips says. Nobody's patience ends it.
func (n *testNode) pushDripping(drips *atomic.Bool) (img testImage) {
	n.t.Helper()
	reg := registrytest.Start(n.t, registrytest.Options{})
	n.at(reg, func() {
		tars := [][]byte{tarOf(n.t, file{"base", noise(1, 100_000)}), tarOf(n.t, file{"top", noise(2, 100_000)})}
		img = n.push("slow", tars...)
		n.attachTars(img, tars, func(_ int, index []byte, _ digest.Digest) []byte { return index })
	})
	reg.Inject(func(r *http.Request) bool {
		return drips.Load() && strings.HasPrefix(r.Header.Get("Range"), "bytes=0-")
	}, -1, registrytest.Throttle(1, 100*time.Millisecond))
	return img
}

// TestPullEndsItsWait: what must be proven and comes from a registry that drips holds its pull up for pull_wait, once for all of its layers, and is a normal pull then, of which no file stays. As long at most, containerd's
// garbage collection waits for it, and another pull for that.
func TestPullEndsItsWait(t *testing.T) {
	var drips atomic.Bool
	drips.Store(true)
	n := newTestNodeWith(t, func(n *testNode) {
		n.deadline, n.budget, n.pullWait, n.retryAfter = time.Hour, time.Hour, 10*time.Second, 0
		n.policy = func(registryclient.Repository) (trust.Policy, trust.Verifier) { return trust.Proven, nil }
	})
	img := n.pushDripping(&drips)
	good := n.push("app", threeLayers(t)...).converted(n)
	c := newContainerd(t, n)
	ctx := testContext()
	slow, collected, other := make(chan error, 1), make(chan error, 1), make(chan error, 1)
	began := time.Now()
	go func() {
		_, err := c.sn.Prepare(ctx, "extract-1 lower", "", img.labels(0), root)
		slow <- err
	}()
	n.until("the search has begun", func() bool {
		n.sn.mu.Lock()
		defer n.sn.mu.Unlock()
		return n.sn.finds > 0
	})
	c.pull(ctx, good, 0)
	garbage := namespaces.WithNamespace(ctx, "garbage")
	if _, err := c.sn.Prepare(garbage, "garbage", ""); err != nil {
		t.Fatal(err)
	}
	if err := c.sn.Remove(garbage, "garbage"); err != nil {
		t.Fatal(err)
	}
	if len(slow) > 0 {
		t.Fatal("the other pull has waited: the test shows nothing")
	}
	go func() {
		_, err := c.db.GarbageCollect(ctx)
		collected <- err
	}()
	go func() {
		_, err := c.sn.Prepare(ctx, "extract-2 other", good.chainIDs[0].String(), good.labels(1), root)
		other <- err
	}()
	timeout := time.After(time.Minute)
	for what, result := range map[string]chan error{"the pull": slow, "the collection": collected, "the other pull": other} {
		select {
		case err := <-result:
			if took := time.Since(began); err != nil && !errdefs.IsAlreadyExists(err) || took > 3*n.pullWait {
				t.Errorf("%s, after %v: %v", what, took, err)
			}
		case <-timeout:
			t.Fatalf("%s waits for a registry that drips", what)
		}
	}
	if took := time.Since(began); took < n.pullWait {
		t.Errorf("it has waited for %v", took)
	}
	began = time.Now()
	if err := c.sn.Commit(ctx, img.chainIDs[0].String(), "extract-1 lower", root); err != nil {
		t.Fatal(err)
	}
	if _, err := c.sn.Prepare(ctx, "extract-3 upper", img.chainIDs[0].String(), img.labels(1), root); err != nil || time.Since(began) > n.pullWait/2 {
		t.Errorf("the next layer, after %v: %v", time.Since(began), err)
	}
	if _, _, err := n.images.Find(ctx, img.ref, img.manifest); reason.Of(err) != reason.Timeout || !strings.Contains(err.Error(), "pull_wait") {
		t.Errorf("why: %v", err)
	}
	if left := n.filesIn("images"); len(left) == 0 || slices.ContainsFunc(left, func(f string) bool { return !strings.Contains(f, n.artifacts(good)[0].Digest.Encoded()) }) {
		t.Errorf("left: %q", left)
	}
}

// TestStartEndsItsWait: a container on an image that must be proven now, from a registry that drips, has the image's own layers unpacked when half of its wait is over. What waits holds up neither the removal of the
// image's snapshots nor others.
func TestStartEndsItsWait(t *testing.T) {
	var strict, drips atomic.Bool
	n := newTestNodeWith(t, func(n *testNode) {
		n.deadline, n.budget, n.wait = time.Hour, time.Hour, 20*time.Second
		n.policy = func(registryclient.Repository) (trust.Policy, trust.Verifier) {
			if strict.Load() {
				return trust.Proven, nil
			}
			return trust.Open, nil
		}
	})
	asked := n.unpacks()
	unpack := n.unpack
	n.unpack = func(ctx context.Context, l Layer, into func(func([]mount.Mount) error) error) error {
		_, repo, _ := strings.Cut(l.Source.Ref, "/")
		l.Source.Ref = n.reg.Host() + "/" + repo
		return unpack(ctx, l, into)
	}
	img := n.pushDripping(&drips)
	n.push("slow", tarOf(t, file{"base", noise(1, 100_000)}), tarOf(t, file{"top", noise(2, 100_000)})) // the same, elsewhere
	top, again := n.prepareAll(img, 0, ""), n.prepareAll(n.push("app", threeLayers(t)...).converted(n), 0, "")
	strict.Store(true)
	drips.Store(true)
	n.restart()
	result := make(chan error, 1)
	began := time.Now()
	go func() {
		_, err := n.sn.Prepare(testContext(), "container", top)
		result <- err
	}()
	n.container("other", again)
	n.until("the proof has begun", func() bool {
		n.sn.vetting.mu.Lock()
		defer n.sn.vetting.mu.Unlock()
		return len(n.sn.vetting.locks) > 0
	})
	ctx, cancel := context.WithTimeout(testContext(), n.wait/4)
	defer cancel()
	unlock, err := n.sn.mountMu.lock(ctx, n.id(top)) // as its removal does
	if err != nil {
		t.Fatal("a removal has waited for the proof")
	}
	unlock()
	if len(result) > 0 || time.Since(began) > n.wait/2 {
		t.Fatal("that has waited for the proof")
	}
	if err := <-result; err != nil || time.Since(began) > n.wait {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
	if list := asked(); len(list) != 2 {
		t.Errorf("unpacked: %+v", list)
	}
}

// id is the directory's name of a snapshot.
func (n *testNode) id(name string) string {
	n.t.Helper()
	sn, err := n.sn.streamedBase(testContext(), name)
	if err != nil || sn == nil {
		n.t.Fatal(sn, err)
	}
	return sn.id
}

// TestUnpackEndsItsWait: who waits for layers that are unpacked is told in time to try again, and finds them there once they are. At most two are unpacked at a time, whatever comes before that.
func TestUnpackEndsItsWait(t *testing.T) {
	n := provingNode(t, fs.ModeFile)
	asked := n.unpacks()
	unpack := n.unpack
	var fetched, inside, most atomic.Int32
	end := make(chan struct{})
	finish := sync.OnceFunc(func() { close(end) })
	t.Cleanup(finish)
	n.unpack = func(ctx context.Context, l Layer, into func(func([]mount.Mount) error) error) error {
		if l.Number == 2 {
			fetched.Add(1)
		}
		return unpack(ctx, l, func(do func([]mount.Mount) error) error {
			return into(func(mounts []mount.Mount) error {
				if l.Number == 2 {
					most.Store(max(most.Load(), inside.Add(1)))
					defer inside.Add(-1)
					<-end
				}
				return do(mounts)
			})
		})
	}
	n.wait = 3 * time.Second
	n.restart()
	var all sync.WaitGroup
	tops := map[string]string{}
	for i := range 3 {
		img, _ := n.pushForged(fmt.Sprint("app", i), tarOf(t, file{fmt.Sprint(i), "one more"}))
		tops[fmt.Sprint(i)] = n.prepareAll(img, 0, "")
	}
	wantFiles(t, n.container("in vain", tops["0"]), map[string]string{"program": big("evil")})
	n.next(stream.Quarantined) // the lie is in all of them
	start := func(key string) error {
		_, err := n.sn.Prepare(testContext(), "container "+key, tops[key])
		return err
	}
	for key := range tops {
		all.Go(func() {
			began := time.Now()
			if err := start(key); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "try again") || time.Since(began) > 10*n.wait {
				t.Errorf("%s, after %v: %v", key, time.Since(began), err)
			}
		})
	}
	late := time.AfterFunc(time.Minute, finish)
	all.Wait()
	if !late.Stop() {
		t.Fatal("they wait for what does not come")
	}
	n.until("all are begun", func() bool { return fetched.Load() == 3 && inside.Load() == unpacksAtOnce })
	finish()
	for key := range tops {
		n.until("unpacked", func() bool { return start(key) == nil })
	}
	if most.Load() != unpacksAtOnce {
		t.Errorf("%d at a time", most.Load())
	}
	if got := len(asked()); got != 5 {
		t.Errorf("%d layers were unpacked, want the two that they share and three, each once", got)
	}
}

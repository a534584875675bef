package integration_test

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// gate lets a request pass once it is open, or to nowhere if its client goes first.
func gate(open chan struct{}) registrytest.Fault {
	return func(_ *registrytest.Registry, next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			select {
			case <-open:
				next.ServeHTTP(w, r)
			case <-r.Context().Done():
			}
		})
	}
}

// blobsOf are requests for blobs of a repository.
func blobsOf(repo string) func(r *http.Request) bool {
	return func(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, "/v2/"+repo+"/blobs/") }
}

// TestDripHoldsNobody: under proven, the pull of an image whose registry drips is a normal one when pull_wait is over, and containerd's garbage collection, another image's pull and its container wait no longer.
func TestDripHoldsNobody(t *testing.T) {
	registry, drips := startRegistry(t, registrytest.Options{}), startRegistry(t, registrytest.Options{})
	pause, good, slow, other := registry.Host()+"/pause:1", registry.Host()+"/good:v1", drips.Host()+"/slow:v1", registry.Host()+"/other:v1"
	pushPause(t, pause)
	pushSmall(t, good, 61)
	pushSmall(t, other, 62)
	img := pushSmall(t, slow, 63)
	for _, ref := range []string{good, slow} {
		run(t, "streamctl", "create", "--record", "", "--profile", "none", ref)
	}
	const wait = 10 * time.Second
	n := startNode(t, node.Options{Pause: pause, Stream: []string{registry.Host() + "/good", drips.Host() + "/*"}, Config: "pull_wait = \"10s\"\nresolve_timeout = \"10s\"\ntrust_default = \"proven\"\n"})
	if err := n.Pull(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	artifact, _, _ := artifactOf(t, drips, "slow")
	data := func(r *http.Request) bool {
		for _, l := range artifact.Layers {
			if strings.HasSuffix(r.URL.Path, l.Digest.String()) && strings.HasPrefix(r.Header.Get("Range"), "bytes=0-") {
				return true
			}
		}
		return false
	}
	drips.Inject(data, -1, registrytest.Throttle(1, 100*time.Millisecond))
	began := time.Now()
	var pull sync.WaitGroup
	pull.Go(func() {
		if err := n.Pull(t.Context(), slow); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took < wait {
			t.Errorf("the pull has taken %v: nothing drips", took)
		}
	})
	eventually(t, "the slow pull has begun", func() bool {
		got, _ := drips.Count(func(q registrytest.Request) bool { return strings.Contains(q.Path, "/blobs/") })
		return got > 0
	})
	if _, err := n.Ctr(t.Context(), "images", "rm", "--sync", other); err != nil {
		t.Error(err)
	}
	checkSums(t, runPod(t, n, good), 61)
	if took := time.Since(began); took > 4*wait {
		t.Errorf("a collection, a pull and a container have taken %v beside one that drips", took)
	}
	pull.Wait()
	if got := wholeLayers(t, drips, img); got == 0 {
		t.Error("the pull of what drips was no normal one")
	}
	checkSums(t, runPod(t, n, slow), 63)
}

// TestUnpackOutlivesItsPull: a pull that waits for its base's layers is told to try again, and they are there when it does: containerd's garbage collection takes nothing of them meanwhile, though the pull's lease is over.
func TestUnpackOutlivesItsPull(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	pause, mallory, above, other := registry.Host()+"/pause:1", registry.Host()+"/mallory/app:v1", registry.Host()+"/victim/above:v1", registry.Host()+"/other:v1"
	pushPause(t, pause)
	img := pushSmall(t, mallory, 64)
	attachLie(t, registry, "mallory/app", img, "")
	pushAbove(t, mallory, above)
	pushSmall(t, other, 65)
	n := startNode(t, node.Options{Pause: pause, Stream: []string{registry.Host() + "/mallory/*"}, Config: "pull_wait = \"2s\"\n"})
	inQuarantine(t, n, mallory)
	if err := n.Pull(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	defer registry.Inject(blobsOf("mallory/app"), -1, registrytest.Status(http.StatusNotFound))()
	open := make(chan struct{})
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	upper := "/" + m.Layers[1].Digest.String() // the lower one is the other image's, too
	defer registry.Inject(func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, upper) }, -1, gate(open))()
	registry.Reset()
	if err := n.Pull(t.Context(), above); err == nil || !strings.Contains(err.Error(), "try again") {
		t.Errorf("a pull whose base cannot be had in time: %v", err)
	}
	if _, err := n.Ctr(t.Context(), "images", "rm", "--sync", other); err != nil { // and all garbage
		t.Error(err)
	}
	close(open)
	eventually(t, "the layer is unpacked that was on its way", func() bool { // what is above may have gone with the pull's manifest, which says where it is
		done, err := filepath.Glob(filepath.Join(n.Dir, "s/snapshots/*/unpacked/usage"))
		return err == nil && len(done) >= 2
	})
	checkSums(t, runPod(t, n, above), 64)
	if got := wholeLayers(t, registry, img); got != len(m.Layers)-1 {
		t.Errorf("%d downloads of %d layers, the lowest of which was here", got, len(m.Layers))
	}
}

// TestUnpackedOnALyingBase: a layer that containerd has unpacked on a base whose artifact lies of a directory has the lie's mode for it, until the lie is found: then it is unpacked once more, and has what its image says.
func TestUnpackedOnALyingBase(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	pause, mallory, above := registry.Host()+"/pause:1", registry.Host()+"/mallory/app:v1", registry.Host()+"/victim/above:v1"
	pushPause(t, pause)
	attachLie(t, registry, "mallory/app", pushSmall(t, mallory, 68), "")
	pushFileAbove(t, mallory, above, "data/small/above")
	for _, pull := range []node.Pull{node.Transfer, node.Local} {
		t.Run(string(pull), func(t *testing.T) {
			n := startNode(t, node.Options{Pull: pull, Pause: pause, Stream: []string{registry.Host() + "/mallory/*"}})
			check := func(want os.FileMode) {
				t.Helper()
				dir := tempDir(t)
				if err := n.Mount(t.Context(), above, dir); err != nil {
					t.Fatal(err)
				}
				info, err := os.Stat(filepath.Join(dir, "data/small"))
				if err != nil {
					t.Error(err)
				} else if got := info.Mode().Perm(); got != want {
					t.Errorf("data/small has mode %v, want %v", got, want)
				}
				if b, err := os.ReadFile(filepath.Join(dir, "data/small/above")); err != nil || string(b) != "above" {
					t.Errorf("%q, %v", b, err)
				}
				if err := n.Unmount(t.Context(), dir); err != nil {
					t.Error(err)
				}
			}
			for _, ref := range []string{mallory, above} {
				if err := n.Pull(t.Context(), ref); err != nil {
					t.Fatal(err)
				}
			}
			check(0o777)
			inQuarantine(t, n, mallory)
			check(0o755)
		})
	}
}

// TestQuarantinedBaseOfASilentRegistry: where mallory's registry gives nothing any more, silently, images that stand on what lied have its layers soon, from where they come from themselves.
func TestQuarantinedBaseOfASilentRegistry(t *testing.T) {
	registry, evil := startRegistry(t, registrytest.Options{}), startRegistry(t, registrytest.Options{})
	if registry.Host() < evil.Host() { // by their names mallory's come first
		registry, evil = evil, registry
	}
	pause, mallory, above, same := registry.Host()+"/pause:1", evil.Host()+"/mallory/app:v1", registry.Host()+"/victim/above:v1", registry.Host()+"/victim/app:v1"
	pushPause(t, pause)
	img := pushSmall(t, mallory, 66)
	attachLie(t, evil, "mallory/app", img, "")
	pushSmall(t, same, 66)
	pushAbove(t, same, above)
	copies := []string{}
	for _, name := range []string{"/a", "/b", "/c"} { // more of the same, in the way of a start
		copies = append(copies, evil.Host()+name+":v1")
		run(t, "crane", "copy", mallory, evil.Host()+name+":v1")
	}
	n := startNode(t, node.Options{Pause: pause, Stream: []string{registry.Host() + "/*", evil.Host() + "/*"}})
	inQuarantine(t, n, mallory)
	for _, ref := range append(copies, same) {
		if err := n.Pull(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
	}
	evil.Inject(registrytest.Any, -1, registrytest.Stall(-1))
	evil.Reset()
	began := time.Now()
	checkSums(t, runPod(t, n, above), 66)
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers {
		if got, _ := evil.Count(func(q registrytest.Request) bool { return strings.HasSuffix(q.Path, l.Digest.String()) }); got > 0 {
			t.Errorf("the silent registry was asked %d times for a layer of a pull from another one", got)
		}
	}
	checkSums(t, runPod(t, n, same), 66)
	if took := time.Since(began); took > 45*time.Second {
		t.Errorf("it took %v", took)
	}
}

// TestUnpackedInSafeMode: in a safe mode that can open no streamed image, what was streamed starts with its own layers, and so does what is pulled on it.
func TestUnpackedInSafeMode(t *testing.T) {
	for _, policy := range []string{"open", "proven"} {
		t.Run(policy, func(t *testing.T) {
			registry := startRegistry(t, registrytest.Options{})
			pause, ref, above := registry.Host()+"/pause:1", registry.Host()+"/app:v1", registry.Host()+"/above:v1"
			pushPause(t, pause)
			img := pushSmall(t, ref, 67)
			run(t, "streamctl", "create", "--record", "", "--profile", "none", ref)
			pushAbove(t, ref, above)
			n := startNode(t, node.Options{Pause: pause, Stream: []string{registry.Host() + "/app"}, Config: "trust_default = \"" + policy + "\"\n"})
			pullStreamed(t, registry, n, ref)
			if err := n.StopSnapshotter(); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(n.CacheDir(), n.CacheDir()+".away"); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(n.CacheDir(), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			for i := range 4 {
				if err := n.StartSnapshotter(t.Context()); (err == nil) != (i == 3) {
					t.Fatalf("start %d: %v", i, err)
				}
			}
			registry.Reset()
			checkSums(t, runPod(t, n, above), 67)
			checkSums(t, runPod(t, n, ref), 67)
			if got := wholeLayers(t, registry, img); got == 0 {
				t.Error("no layer was fetched: this is no safe mode")
			}
			if _, err := n.Crictl(t.Context(), "rmi", ref); err != nil {
				t.Error(err)
			}
		})
	}
}

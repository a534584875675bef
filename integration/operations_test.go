package integration_test

import (
	"encoding/base64"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// The rows of the table in docs/operations.md that no other test shows.

// eventually polls until ok, for at most a minute.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	within(t, time.Minute, what, ok)
}

func within(t *testing.T, most time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(most); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, most)
		}
	}
}

// sumIn runs a container of Small's image that reads what is at or below path, and compares.
func sumIn(t *testing.T, n *node.Node, ref string, seed uint64, path string) {
	t.Helper()
	out, err := n.Run(t.Context(), ref, nil, "/guest", "sum", path)
	if err != nil {
		t.Fatal(err)
	}
	checkSumsBelow(t, out, seed, path)
}

// TestOutage takes the registry away. New containers read what is cached, also after a restart of the daemon, which needs no registry either;
// a read of what is not cached waits, and goes on when the registry is back.
func TestOutage(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref := registry.Host() + "/app:v1"
	pushSmall(t, ref, 60)
	run(t, "streamctl", "create", "--record", "", ref)
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			n := startNode(t, node.Options{Mode: mode, Stream: []string{registry.Host() + "/*"}})
			pullStreamed(t, registry, n, ref)
			sumIn(t, n, ref, 60, "/data/small")
			back := registry.Inject(registrytest.Any, -1, registrytest.Reset(-1))
			defer back()
			registry.Reset()
			sumIn(t, n, ref, 60, "/data/small")
			if err := n.StopSnapshotter(); err != nil {
				t.Fatal(err)
			}
			if err := n.StartSnapshotter(t.Context()); err != nil {
				t.Fatal(err)
			}
			sumIn(t, n, ref, 60, "/data/small")
			if got := registry.Requests(); len(got) > 0 {
				t.Errorf("%d requests for what is cached, the first %s %s", len(got), got[0].Method, got[0].Path)
			}

			done := make(chan struct{})
			go func() {
				defer close(done)
				sumIn(t, n, ref, 60, "/data")
			}()
			eventually(t, "the read is tried again", func() bool { return len(registry.Requests()) >= 3 })
			select {
			case <-done:
				t.Fatal("the container ended without its registry")
			default:
			}
			back()
			<-done
		})
	}
}

// TestDamagedCache changes and deletes the chunk cache's files. Containers see the right bytes, fetched again.
func TestDamagedCache(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref := registry.Host() + "/app:v1"
	pushSmall(t, ref, 61)
	run(t, "streamctl", "create", "--record", "", ref)
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			n := startNode(t, node.Options{Mode: mode, Stream: []string{registry.Host() + "/*"}})
			pullStreamed(t, registry, n, ref)
			sumIn(t, n, ref, 61, "/data")
			for _, damage := range []struct {
				name string
				do   func(t *testing.T, file string)
			}{
				{"nothing", func(*testing.T, string) {}},
				{"flipped", flipBytes},
				{"deleted", func(t *testing.T, file string) {
					if err := os.Remove(file); err != nil {
						t.Fatal(err)
					}
				}},
			} {
				if err := n.StopSnapshotter(); err != nil {
					t.Fatal(err)
				}
				files := cacheFiles(t, n)
				if len(files) == 0 {
					t.Fatal("the cache has no files")
				}
				for _, file := range files {
					damage.do(t, file)
				}
				if err := n.StartSnapshotter(t.Context()); err != nil {
					t.Fatal(err)
				}
				registry.Reset()
				sumIn(t, n, ref, 61, "/data")
				if requests, _ := registry.Count(registrytest.OfBlobs); (requests > 0) != (damage.name != "nothing") {
					t.Errorf("%s: %d requests for blobs", damage.name, requests)
				}
			}
			for _, file := range cacheFiles(t, n) { // under the running daemon
				if err := os.Remove(file); err != nil {
					t.Fatal(err)
				}
			}
			sumIn(t, n, ref, 61, "/data")
		})
	}
}

// cacheFiles lists the files of the node's chunk cache.
func cacheFiles(t *testing.T, n *node.Node) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(n.CacheDir(), "sha256-*/*"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// flipBytes inverts a bit in each 16 KiB of a file of chunks, where there is one. Maps stay: without its map a layer is fetched anew, and nothing
// is found out about its chunks.
func flipBytes(t *testing.T, name string) {
	t.Helper()
	if base := filepath.Base(name); base != "data" && base != "whole" {
		return
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	for i := 0; i < len(b) && err == nil; i += 16 << 10 {
		if b[i] != 0 { // a hole stays one: the disk may be full
			_, err = f.WriteAt([]byte{b[i] ^ 1}, int64(i))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestStreamedLater: an image that was pulled in full, because there was no artifact or the snapshotter had no credentials, is streamed by the
// next pull after it was removed, without a restart of the daemon.
func TestStreamedLater(t *testing.T) {
	for name, c := range map[string]struct {
		before, after func(t *testing.T, registry *registrytest.Registry, ref string)
	}{
		"converted later": {
			before: func(*testing.T, *registrytest.Registry, string) {},
			after: func(t *testing.T, _ *registrytest.Registry, ref string) {
				run(t, "streamctl", "create", "--record", "", ref)
			},
		},
		"credentials later": {
			before: func(t *testing.T, registry *registrytest.Registry, ref string) {
				run(t, "streamctl", "create", "--record", "", ref)
				registry.RequireBasic("me", "secret")
			},
			after: func(t *testing.T, registry *registrytest.Registry, _ string) {
				login(t, registry.Host(), "me:secret")
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("DOCKER_CONFIG", tempDir(t)) // what the snapshotter reads
			registry := startRegistry(t, registrytest.Options{})
			ref := registry.Host() + "/app:v1"
			img := pushSmall(t, ref, 62)
			c.before(t, registry, ref)
			n := startNode(t, node.Options{Stream: []string{registry.Host() + "/*"}})
			pull := func() (layers int) {
				registry.Reset()
				if _, err := n.Crictl(t.Context(), "pull", "--creds", "me:secret", ref); err != nil { // containerd's own credentials
					t.Fatal(err)
				}
				defer func() {
					if _, err := n.Crictl(t.Context(), "rmi", ref); err != nil {
						t.Fatal(err)
					}
				}()
				sumIn(t, n, ref, 62, "/data")
				return wholeLayers(t, registry, img)
			}
			if got := pull(); got == 0 {
				t.Fatal("no layer was downloaded: that was not a normal pull")
			}
			c.after(t, registry, ref)
			eventually(t, "a pull that streams", func() bool { return pull() == 0 })
		})
	}
}

// login writes docker's config.json.
func login(t *testing.T, host, userPassword string) {
	t.Helper()
	text := fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, host, base64.StdEncoding.EncodeToString([]byte(userPassword)))
	if err := os.WriteFile(filepath.Join(os.Getenv("DOCKER_CONFIG"), "config.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// wholeLayers counts the downloads of img's layers, from one repository if that is named.
func wholeLayers(t *testing.T, registry *registrytest.Registry, img v1.Image, repository ...string) (n int) {
	t.Helper()
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range registry.Requests() {
		for _, l := range m.Layers {
			if registrytest.OfBlobs(q) && q.Bytes > 0 && path.Base(q.Path) == l.Digest.String() && (len(repository) == 0 || strings.HasPrefix(q.Path, "/v2/"+repository[0]+"/")) {
				n++
			}
		}
	}
	return n
}

// TestNotAnnotated: a containerd that does not tell the snapshotter which image it pulls gets a normal pull, for each way to pull.
func TestNotAnnotated(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref := registry.Host() + "/app:v1"
	img := pushSmall(t, ref, 63)
	run(t, "streamctl", "create", "--record", "", ref)
	// Without the second key containerd would use the transfer service, which this file does not configure, and fail all pulls.
	for pull, replace := range map[node.Pull][2]string{
		node.Transfer: {`enable_remote_snapshot_annotations = "true"`, ``},
		node.Local:    {`disable_snapshot_annotations = false`, "disable_snapshot_annotations = true\n  use_local_image_pull = true"},
	} {
		t.Run(string(pull), func(t *testing.T) {
			n := startNode(t, node.Options{Pull: pull, Stream: []string{registry.Host() + "/*"}})
			name := filepath.Join(n.Dir, "conf.d/streaming-snapshotter.toml")
			good, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			for _, streams := range []bool{false, true} {
				text := string(good)
				if !streams {
					if text = strings.Replace(text, replace[0], replace[1], 1); text == string(good) {
						t.Fatalf("%s has no %q", name, replace[0])
					}
				}
				if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
				if err := n.RestartContainerd(t.Context(), false); err != nil {
					t.Fatal(err)
				}
				registry.Reset()
				if err := n.Pull(t.Context(), ref); err != nil {
					t.Fatal(err)
				}
				if got := wholeLayers(t, registry, img); (got == 0) != streams {
					t.Errorf("%d downloads of layers, streams: %v", got, streams)
				}
				sumIn(t, n, ref, 63, "/data")
				if _, err := n.Crictl(t.Context(), "rmi", ref); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestDaemonRestarted restarts the daemon under its supervisor, asked and killed, while a container reads: that goes on, and
// a container that is started meanwhile waits for the daemon. TestResume is the long form.
func TestDaemonRestarted(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref := registry.Host() + "/app:v1"
	pushSmall(t, ref, 65)
	run(t, "streamctl", "create", "--record", "", ref)
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			n := startNode(t, node.Options{Mode: mode, Supervise: true, Stream: []string{registry.Host() + "/*"}})
			pullStreamed(t, registry, n, ref)
			w := startWatcher(t, n, "watch", ref, smallSum(65), nil, "/guest", "watch", "/data")
			w.awaitPass(t)
			if err := n.RestartSupervised(); err != nil {
				t.Fatal(err)
			}
			w.awaitPass(t)
			eventually(t, "a daemon that can be killed", n.KillSupervised)
			sumIn(t, n, ref, 65, "/data")
			w.awaitPass(t)
		})
	}
}

// TestDaemonDown: without a supervisor a container that is started while the daemon is down fails, and starts when it is back; and so does one after a restart of containerd.
func TestDaemonDown(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref := registry.Host() + "/app:v1"
	pushSmall(t, ref, 64)
	run(t, "streamctl", "create", "--record", "", ref)
	n := startNode(t, node.Options{Stream: []string{registry.Host() + "/*"}})
	pullStreamed(t, registry, n, ref)
	n.KillSnapshotter()
	begin := time.Now()
	_, err := n.Run(t.Context(), ref, nil)
	t.Logf("while it is down, after %v: %v", time.Since(begin), err)
	if err == nil {
		t.Error("a container started without the snapshotter")
	}
	if err := n.StartSnapshotter(t.Context()); err != nil {
		t.Fatal(err)
	}
	sumIn(t, n, ref, 64, "/data/small")
	for _, kill := range []bool{false, true} {
		if err := n.RestartContainerd(t.Context(), kill); err != nil {
			t.Fatal(err)
		}
		sumIn(t, n, ref, 64, "/data")
	}
}

// TestSupervisorEnds: when who keeps the mounts dies or is stopped, the node works again after a start: images are there and new containers
// run, beside old ones, which are lost. Stopped, it leaves no mount.
func TestSupervisorEnds(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref := registry.Host() + "/app:v1"
	pushSmall(t, ref, 66)
	run(t, "streamctl", "create", "--record", "", ref)
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			n := startNode(t, node.Options{Mode: mode, Supervise: true, Stream: []string{registry.Host() + "/*"}})
			pullStreamed(t, registry, n, ref)
			if _, err := n.Ctr(t.Context(), "run", "--detach", "--snapshotter", n.Snapshotter(), ref, n.ID("old"), "/guest", "pause"); err != nil {
				t.Fatal(err)
			}
			n.KillSnapshotter()
			if err := n.StartSnapshotter(t.Context()); err != nil {
				t.Fatal(err)
			}
			sumIn(t, n, ref, 66, "/data")
			if err := n.StopSnapshotter(); err != nil {
				t.Error(err)
			}
			if left, err := n.Mounts("s"); err != nil || len(left) > 0 {
				t.Errorf("left after a stop: %v, %v", left, err)
			}
			if err := n.StartSnapshotter(t.Context()); err != nil {
				t.Fatal(err)
			}
			sumIn(t, n, ref, 66, "/data")
			out, err := n.Ctr(t.Context(), "tasks", "exec", "--exec-id", "read", n.ID("old"), "/guest", "sum", "/data/big")
			t.Logf("in the old container: %q, %v", out, err)
		})
	}
}

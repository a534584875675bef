package integration_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// keys is on a tmpfs of these tests' own (node.Isolate), which PowerLoss empties.
const keys = "/run/containerd/keys"

// criConfig configures the proxy.
const criConfig = `
cri_proxy = "DIR/run/p.sock"
cri_credentials_key = "` + keys + `/DIR/key"
`

const creds = "me:secret"

// private is a registry with a streaming image that wants a token, for creds only, and no other credentials for anybody.
func private(t *testing.T, seed uint64) (registry *registrytest.Registry, ref string, img v1.Image) {
	t.Helper()
	t.Setenv("DOCKER_CONFIG", tempDir(t))
	registry = startRegistry(t, registrytest.Options{})
	ref = registry.Host() + "/app:v1"
	img = pushSmall(t, ref, seed)
	run(t, "streamctl", "create", "--record", "", ref)
	user, password, _ := strings.Cut(creds, ":")
	registry.RequireToken(registrytest.TokenOptions{User: user, Password: password})
	return registry, ref, img
}

// proxied runs crictl as the kubelet would call: image calls go to the proxy.
func proxied(t *testing.T, n *node.Node, args ...string) (string, error) {
	t.Helper()
	return n.Crictl(t.Context(), append([]string{"--image-endpoint", "unix://" + filepath.Join(n.Dir, "run/p.sock")}, args...)...)
}

// pullProxied pulls with creds, which must stream.
func pullProxied(t *testing.T, registry *registrytest.Registry, n *node.Node, ref string, img v1.Image) {
	t.Helper()
	mustStream(t, registry, img, func() (string, error) { return proxied(t, n, "pull", "--creds", creds, ref) })
}

// kept is the file of credentials, and whether it is there.
func kept(n *node.Node) (name string, there bool) {
	name = filepath.Join(n.Dir, "s/credentials")
	_, err := os.Lstat(name)
	return name, err == nil
}

// TestCRIProxy pulls through the proxy: what a pull came with serves the reads of its image, and lets nobody else pull.
func TestCRIProxy(t *testing.T) {
	for i, pull := range []node.Pull{node.Transfer, node.Local} {
		t.Run(string(pull), func(t *testing.T) {
			seed := uint64(400 + i)
			registry, ref, img := private(t, seed)
			n := startNode(t, node.Options{Pull: pull, Stream: []string{registry.Host() + "/*"}, Config: criConfig})
			refused := func(flags ...string) {
				t.Helper()
				_, want := n.Crictl(t.Context(), append(append([]string{"pull"}, flags...), ref)...)
				registry.Reset()
				_, err := proxied(t, n, append(append([]string{"pull"}, flags...), ref)...)
				if err == nil || want == nil || !strings.Contains(err.Error(), "401 Unauthorized") && !strings.Contains(err.Error(), "authorization failed") {
					t.Fatalf("%q: got %v, without the proxy %v", flags, err, want)
				}
				for _, q := range registry.Requests() {
					if strings.HasPrefix(q.Header.Get("User-Agent"), "streaming-snapshotter") {
						t.Errorf("%q: the snapshotter asked for %s", flags, q.Path)
					}
				}
			}
			refused()
			refused("--creds", "me:wrong")
			pullProxied(t, registry, n, ref, img)
			sumIn(t, n, ref, seed, "/data/small")
			checkAccepted(t, n, ref, "CRI proxy")
			refused() // beside one that may
			refused("--creds", "me:wrong")
			if _, there := kept(n); !there {
				t.Error("the credential is not kept")
			}

			// Reads go on when the daemon and its tokens are gone.
			n.KillSnapshotter()
			registry.ExpireTokens()
			if err := n.StartSnapshotter(t.Context()); err != nil {
				t.Fatal(err)
			}
			sumIn(t, n, ref, seed, "/data")

			if out, err := proxied(t, n, "images", "--quiet"); err != nil || len(strings.Fields(out)) != 1 {
				t.Errorf("images: %q, %v", out, err)
			}
			if _, err := proxied(t, n, "imagefsinfo"); err != nil {
				t.Error(err)
			}
			if _, err := proxied(t, n, "rmi", ref); err != nil {
				t.Fatal(err)
			}
			if _, there := kept(n); there {
				t.Error("the credential of an image that was removed is kept")
			}
			refused()
			pullProxied(t, registry, n, ref, img) // and again
			sumIn(t, n, ref, seed, "/data")
			if out := fetchLayers(t, n, ref); !strings.Contains(out, "fetched 3 layers") {
				t.Errorf("fetch, which has no credentials but by the daemon, says %s", out)
			}
		})
	}
}

// TestCRIProxyBackground: what is fetched when the pull is long over, by the daemon's successor, has the credential.
func TestCRIProxyBackground(t *testing.T) {
	registry, ref, img := private(t, 402)
	n := startNode(t, node.Options{Stream: []string{registry.Host() + "/*"}, Config: criConfig + `background_bandwidth = "1GiB"`, Supervise: true})
	pullProxied(t, registry, n, ref, img)
	ctr(t, n, "run", "--detach", "--snapshotter", n.Snapshotter(), ref, n.ID("c"), "/guest", "pause")
	n.KillSupervised()
	registry.ExpireTokens()
	// Who calls meanwhile waits for the next daemon.
	if _, err := proxied(t, n, "images"); err != nil {
		t.Error(err)
	}
	eventually(t, "completion", func() bool {
		done, _ := filepath.Glob(filepath.Join(n.Dir, "s/images/*/completed"))
		return len(done) == 1
	})
}

// TestCRIProxyRemovedInUse: containers of an image that was removed read on, and with the last the credential goes.
func TestCRIProxyRemovedInUse(t *testing.T) {
	registry, ref, img := private(t, 403)
	n := startNode(t, node.Options{Stream: []string{registry.Host() + "/*"}, Config: criConfig})
	pullProxied(t, registry, n, ref, img)
	c := n.ID("c")
	ctr(t, n, "run", "--detach", "--snapshotter", n.Snapshotter(), ref, c, "/guest", "pause")
	if _, err := proxied(t, n, "rmi", ref); err != nil {
		t.Fatal(err)
	}
	registry.ExpireTokens()
	checkSumsBelow(t, ctr(t, n, "tasks", "exec", "--exec-id", "read", c, "/guest", "sum", "/data"), 403, "/data")
	if _, there := kept(n); !there {
		t.Error("the credential has gone before the container")
	}
	ctr(t, n, "tasks", "delete", "--force", c)
	ctr(t, n, "containers", "delete", c)
	ctr(t, n, "content", "prune", "references") // which collects garbage
	eventually(t, "the credential goes with its last container", func() bool { _, there := kept(n); return !there })
}

// TestCRIProxyFile: a file of credentials that is lost, damaged or of another boot costs reads until the next pull, and no pull.
func TestCRIProxyFile(t *testing.T) {
	restart := func(harm func(t *testing.T, file string)) func(*testing.T, *node.Node, string) {
		return func(t *testing.T, n *node.Node, file string) {
			if err := n.StopSnapshotter(); err != nil {
				t.Fatal(err)
			}
			harm(t, file)
			if err := n.StartSnapshotter(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i, c := range []struct {
		name string
		do   func(t *testing.T, n *node.Node, file string)
	}{
		{"another boot", func(t *testing.T, n *node.Node, _ string) {
			if err := n.PowerLoss(); err != nil {
				t.Fatal(err)
			}
			if err := n.Boot(t.Context()); err != nil {
				t.Fatal(err)
			}
		}},
		{"damaged", restart(func(t *testing.T, file string) {
			if err := os.Truncate(file, 50); err != nil {
				t.Fatal(err)
			}
		})},
		{"never writable", restart(func(t *testing.T, file string) {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			for _, dir := range []string{file, file + ".new"} {
				if err := os.MkdirAll(filepath.Join(dir, "x"), 0o700); err != nil {
					t.Fatal(err)
				}
			}
		})},
	} {
		t.Run(c.name, func(t *testing.T) {
			seed := uint64(410 + i)
			registry, ref, img := private(t, seed)
			n := startNode(t, node.Options{Stream: []string{registry.Host() + "/*"}, Config: criConfig})
			pullProxied(t, registry, n, ref, img)
			file, there := kept(n)
			if !there {
				t.Fatal("the credential is not kept")
			}
			registry.ExpireTokens()
			c.do(t, n, file)
			// The program itself may be what cannot be read, and then says nothing.
			if out, err := n.Run(t.Context(), ref, nil, "/guest", "sum", "/data/big"); err == nil && !strings.Contains(out, "errno=5") {
				t.Errorf("read without a credential: %s", out)
			}
			if !strings.Contains(n.Logs(), "no credential is accepted") {
				t.Error("the daemon does not say that a read lacked a credential")
			}
			pullProxied(t, registry, n, ref, img) // the image is there: the kubelet pulls it again with imagePullPolicy Always
			sumIn(t, n, ref, seed, "/data")
			if _, err := proxied(t, n, "rmi", ref); err != nil {
				t.Fatal(err)
			}
			pullProxied(t, registry, n, ref, img)
			sumIn(t, n, ref, seed, "/data")
		})
	}
}

// TestCRIProxySafeMode: the proxy goes on when nothing else of the daemon does.
func TestCRIProxySafeMode(t *testing.T) {
	registry, ref, img := private(t, 404)
	n := startNode(t, node.Options{Stream: []string{registry.Host() + "/*"}, Config: criConfig, Supervise: true})
	f, err := os.OpenFile(n.ConfigFile(), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintln(f, "nonsense = 1"); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := n.RestartSupervised(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a pull in safe mode", func() bool {
		registry.Reset()
		_, err := proxied(t, n, "pull", "--creds", creds, ref)
		return err == nil && wholeLayers(t, registry, img) > 0
	})
	sumIn(t, n, ref, 404, "/data")
}

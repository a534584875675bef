package integration_test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// provider installs a credential provider plugin that gives creds ("USER:PASSWORD") for a registry, not to be kept, and returns the directory that it is in, with its
// config.yaml, and how often it has run.
func provider(t *testing.T, registry, creds string) (dir string, runs func() int) {
	t.Helper()
	dir = tempDir(t)
	user, password, _ := strings.Cut(creds, ":")
	log := filepath.Join(dir, "log")
	for name, text := range map[string]string{
		"test-provider": fmt.Sprintf(`#!/bin/sh
echo "$(cat)" >>%s
cat <<X
{"apiVersion": "credentialprovider.kubelet.k8s.io/v1", "kind": "CredentialProviderResponse", "cacheKeyType": "Registry", "cacheDuration": "0s", "auth": {%q: {"username": %q, "password": %q}}}
X
`, log, registry, user, password),
		"config.yaml": fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- {name: test-provider, matchImages: [%q], defaultCacheDuration: 1h, apiVersion: credentialprovider.kubelet.k8s.io/v1}
`, registry),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir, func() int {
		b, err := os.ReadFile(log)
		if err != nil && !os.IsNotExist(err) {
			t.Error(err)
		}
		return strings.Count(string(b), "\n")
	}
}

// withPlugins is the snapshotter's configuration for a provider.
func withPlugins(dir string) string {
	return fmt.Sprintf("credential_provider_config = %q\n", filepath.Join(dir, "config.yaml"))
}

// mustStream pulls, without downloading any of the image's layers.
func mustStream(t *testing.T, registry *registrytest.Registry, img v1.Image, pull func() (string, error)) {
	t.Helper()
	registry.Reset()
	if _, err := pull(); err != nil {
		t.Fatal(err)
	}
	if got := wholeLayers(t, registry, img); got > 0 {
		t.Fatalf("a pull that streams downloaded %d layers", got)
	}
}

// pullWithCreds pulls as a kubelet does that has the credentials itself; the pull must stream.
func pullWithCreds(t *testing.T, registry *registrytest.Registry, n *node.Node, ref string, img v1.Image) {
	t.Helper()
	mustStream(t, registry, img, func() (string, error) { return n.Crictl(t.Context(), "pull", "--creds", creds, ref) })
}

// checkAccepted looks at whether `check` says which source's credentials the image's host accepts.
func checkAccepted(t *testing.T, n *node.Node, ref, source string) {
	t.Helper()
	out, err := tryRun(t, "streaming-snapshotter", "check", "--config", n.ConfigFile(), ref)
	if !strings.Contains(out, "has it; credentials: "+source+"\n") || !strings.Contains(out, "STREAMED: ") {
		t.Errorf("check does not say that %s serves: %v\n%s", source, err, out)
	}
}

// TestCredentialProvider streams an image that a credential provider plugin authorises. Its token dies in the middle of a container's reads, and then the plugin
// is asked for the next one.
func TestCredentialProvider(t *testing.T) {
	for i, pull := range []node.Pull{node.Transfer, node.Local} {
		t.Run(string(pull), func(t *testing.T) {
			seed := uint64(430 + i)
			registry, ref, img := private(t, seed)
			plugins, runs := provider(t, registry.Host(), creds)
			n := startNode(t, node.Options{Pull: pull, Stream: []string{registry.Host() + "/*"}, Config: withPlugins(plugins)})
			pullWithCreds(t, registry, n, ref, img)
			if got := runs(); got != 1 {
				t.Errorf("the plugin ran %d times for a pull", got)
			}
			sumIn(t, n, ref, seed, "/data/small")

			var blobs atomic.Int32
			registry.Reset()
			registry.Inject(func(req *http.Request) bool { return registrytest.Blobs(req) && blobs.Add(1) == 3 }, 1, func(r *registrytest.Registry, next http.Handler) http.Handler {
				r.ExpireTokens()
				return next
			})
			sumIn(t, n, ref, seed, "/data")
			if got, _ := registry.Count(func(q registrytest.Request) bool { return q.Status == http.StatusUnauthorized }); got == 0 {
				t.Error("no request was refused: the token was good for all reads")
			}
			if got := runs(); got != 2 {
				t.Errorf("the plugin ran %d times for a pull and one renewal", got)
			}
			checkAccepted(t, n, ref, "credential provider plugin")
		})
	}
}

// TestWrongCredentials: what one place has, and is wrong, does not hinder what the next one has, nor what everybody may pull.
func TestWrongCredentials(t *testing.T) {
	registry, ref, img := private(t, 432)
	plugins, runs := provider(t, registry.Host(), "me:wrong")
	n := startNode(t, node.Options{Stream: []string{registry.Host() + "/*"}, Config: withPlugins(plugins)})
	login(t, registry.Host(), creds)
	pullWithCreds(t, registry, n, ref, img)
	sumIn(t, n, ref, 432, "/data/small")
	if runs() == 0 {
		t.Error("the plugin was not asked")
	}
	registry.ExpireTokens()
	sumIn(t, n, ref, 432, "/data")
	checkAccepted(t, n, ref, "docker config")

	public := startRegistry(t, registrytest.Options{})
	open := public.Host() + "/app:v1"
	img = pushSmall(t, open, 433)
	run(t, "streamctl", "create", "--record", "", open)
	public.RequireToken(registrytest.TokenOptions{})
	login(t, public.Host(), "me:wrong")
	public.Inject(func(req *http.Request) bool { // anonymous clients have tokens, and those whose password is wrong do not
		_, _, named := req.BasicAuth()
		return registrytest.Tokens(req) && (named || req.Method == http.MethodPost)
	}, -1, registrytest.Status(http.StatusUnauthorized))
	m := startNode(t, node.Options{Stream: []string{public.Host() + "/*"}})
	mustStream(t, public, img, func() (string, error) { return m.Crictl(t.Context(), "pull", open) })
	sumIn(t, m, open, 433, "/data")
	checkAccepted(t, m, open, "anonymous")
}

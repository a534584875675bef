package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestImport: an image comes with its referrers, under the name that it is given or has, and takes no other's.
func TestImport(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	private, to := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
	source := private.Host() + "/team/app:v1"
	subject := putImage(t, source, "linux/amd64")
	succeed(t, "create", source)
	private.RequireBasic("me", "secret")
	login := []string{"import", "-u", "me", "-p", "secret", "-n", to.Host(), "--source", source}

	stdout, _ := succeed(t, append(login, "-o", "json", "-t", "a/b:c", "-t", "d", "--repository", "e")...)
	var c converter.Copied
	if err := json.Unmarshal([]byte(stdout), &c); err != nil || c.Digest != subject || c.Referrers == 0 || c.Blobs == 0 {
		t.Errorf("import -o json: %v\n%s", err, stdout)
	}
	for _, name := range []string{"/a/b:c", "/d:latest", "/e@" + subject.String()} {
		if stdout, _ := succeed(t, "verify", to.Host()+name); !strings.Contains(stdout, subject.String()) {
			t.Errorf("%s: %s", name, stdout)
		}
	}
	succeed(t, login...)
	succeed(t, "verify", to.Host()+"/team/app:v1")

	other := putImage(t, to.Host()+"/a/b:other", "linux/arm64")
	status, _, stderr := streamctl(t, append(login, "-t", "a/b:other")...)
	if status != 1 || !strings.Contains(stderr, "/a/b:other names another image, "+other.String()) || !strings.Contains(stderr, "--force") {
		t.Errorf("a tag that names another image: status %d, %s", status, stderr)
	}
	succeed(t, append(login, "-t", "a/b:other", "--force")...)
	succeed(t, "verify", to.Host()+"/a/b:other")

	if status, _, stderr := streamctl(t, "import", "-n", to.Host(), "--source", source); status != 1 || !strings.Contains(stderr, "401") {
		t.Errorf("without a login: status %d, %s", status, stderr)
	}
	// The password from standard input, in the default registry.
	t.Setenv("STREAMCTL_REGISTRY", to.Host())
	cmd := newRoot()
	cmd.SetIn(strings.NewReader("secret\n"))
	cmd.SetArgs([]string{"import", "-u", "me", "-p", "-", "--source", source, "-t", "stdin:v1"})
	if err := cmd.ExecuteContext(t.Context()); err != nil {
		t.Error(err)
	}
	succeed(t, "verify", "-t", "stdin:v1")
}

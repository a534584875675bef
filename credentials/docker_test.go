package credentials

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

func at(image string) registryclient.Place {
	r := registryclient.Repository(image)
	return registryclient.Place{Image: r, Names: []registryclient.Repository{r}}
}

func TestDocker(t *testing.T) {
	home, bin := t.TempDir(), t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("DOCKER_CONFIG", filepath.Join(home, ".docker"))
	t.Setenv("REGISTRY_AUTH_FILE", "")
	t.Setenv("XDG_RUNTIME_DIR", home)
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	helper := `#!/bin/sh
[ "$1" = get ] || exit 1
case $(cat) in
helped.example.com) echo '{"ServerURL":"x","Username":"h","Secret":"hs"}' ;;
identity.example.com) echo '{"ServerURL":"x","Username":"<token>","Secret":"it"}' ;;
*) echo "credentials not found in native keychain"; exit 1 ;;
esac
`
	write := func(name, text string) {
		t.Helper()
		writeFile(t, filepath.Join(bin, name), 0o755, text)
	}
	write("docker-credential-sstest", helper)
	config := func(s string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(home, ".docker"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(home, ".docker", "config.json"), []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	source := NewDocker()
	defer source.Close()
	want := func(host, user, secret string) {
		t.Helper()
		list, err := source.Lookup(t.Context(), at(host+"/team/app"))
		var got Login
		if len(list) > 0 {
			got = list[0]
		}
		if err != nil || len(list) > 1 || got != (Login{user, secret}) {
			t.Errorf("%s: got %v, %v, want %q, %q", host, list, err, user, secret)
		}
	}
	want("auths.example.com", "", "") // no file at all
	auth := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	config(`{"auths": {"auths.example.com": {"auth": "` + auth("a:as") + `"}, "localhost:5000": {"auth": "` + auth("l:ls") + `"},
		"token.example.com": {"auth": "` + auth("t:") + `", "identitytoken": "idt"}, "raw.example.com": {"registrytoken": "x"},
		"https://index.docker.io/v1/": {"auth": "` + auth("d:ds") + `"}},
		"credHelpers": {"helped.example.com": "sstest", "identity.example.com": "sstest", "unknown.example.com": "sstest"}}`)
	want("auths.example.com", "a", "as")
	want("localhost:5000", "l", "ls")
	want("token.example.com", "", "idt")
	want("docker.io", "d", "ds")
	want("helped.example.com", "h", "hs")
	want("identity.example.com", "", "it")
	want("unknown.example.com", "", "")
	want("other.example.com", "", "")
	if _, err := source.Lookup(t.Context(), at("raw.example.com/team/app")); err == nil {
		t.Error("a registrytoken was taken for no credentials")
	}
	write("docker-credential-hangs", "#!/bin/sh\nsleep 3600\n")
	source.timeout = time.Second
	config(`{"auths": {"hung.example.com": {"auth": "` + auth("a:as") + `"}}, "credHelpers": {"hung.example.com": "hangs", "gone.example.com": "gone"}}`)
	for host, want := range map[string]string{"hung": "docker-credential-hangs: no answer within 1s", "gone": "docker-credential-gone: executable file not found"} {
		if _, err := source.Lookup(t.Context(), at(host+".example.com/x")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	if list, _ := source.Lookup(t.Context(), at("hung.example.com/x")); !slices.Equal(list, []Login{{"a", "as"}}) {
		t.Errorf("got %v, want what the file has beside its helper", list)
	}
	config(`{"auths": {"auths.example.com": {"auth": "` + auth("a:new") + `"}}}`)
	want("auths.example.com", "a", "new")
	config(`{`)
	if _, err := source.Lookup(t.Context(), at("auths.example.com/team/app")); err == nil {
		t.Error("a broken config.json was taken for no credentials")
	}

	// And all the way to a registry.
	r := registrytest.Start(t, registrytest.Options{})
	blob := r.PutBlob("team/app", []byte("x"))
	r.RequireBasic("r", "rs")
	config(`{"auths": {"` + r.Host() + `": {"auth": "` + auth("r:rs") + `"}}}`)
	c, err := registryclient.New(registryclient.Options{Credentials: Chain(source)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Blob(t.Context(), registryclient.Repository(r.Host()+"/team/app"), blob, 1); err != nil {
		t.Error(err)
	}
	if hosts := c.Hosts(); len(hosts) != 1 || !slices.Equal(hosts[0].Accepted, []string{"docker config"}) {
		t.Errorf("got %+v", hosts)
	}
}

// A helper that hangs keeps nobody waiting who does not need it.
func TestHangingHelper(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	runs := filepath.Join(dir, "runs")
	hung, other := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
	for name, text := range map[string]string{
		"docker-credential-hangs": "#!/bin/sh\necho >" + runs + "\nsleep 3600\n",
		"config.json":             fmt.Sprintf(`{"credHelpers": {%q: "hangs"}, "auths": {%q: {"username": "u", "password": "hush"}}}`, hung.Host(), other.Host()),
	} {
		writeFile(t, filepath.Join(dir, name), 0o755, text)
	}
	source := NewDocker()
	c, err := registryclient.New(registryclient.Options{Credentials: Chain(source)})
	if err != nil {
		t.Fatal(err)
	}
	read := func(ctx context.Context, r *registrytest.Registry) error {
		r.RequireToken(registrytest.TokenOptions{User: "u", Password: "hush"})
		blob := r.PutBlob("team/app", []byte("x"))
		_, err := c.Blob(ctx, registryclient.Repository(r.Host()+"/team/app"), blob, 1)
		return err
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- read(ctx, hung) }()
	for _, err := os.Stat(runs); err != nil; _, err = os.Stat(runs) { // until it hangs
		time.Sleep(time.Millisecond)
	}
	if err := read(ctx, other); err != nil {
		t.Error(err)
	}
	select {
	case err := <-done:
		t.Errorf("the read whose helper hangs ended before: %v", err)
	default:
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if err := source.Close(); err != nil { // which waits for the helper's end
		t.Error(err)
	}
}

package main

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// Layers come by the daemon, which may have credentials that nobody else has, and what it does not give, or not to the end, because it hangs or dies, from the registry itself.
func TestFetchBlobs(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	data := bytes.Repeat([]byte("layer"), 200_000)
	blob := ocispec.Descriptor{Digest: reg.PutBlob("team/app", data), Size: int64(len(data))}
	dir := t.TempDir()
	config := writeConfig(t, filepath.Join(dir, "root"), filepath.Join(dir, "s.sock"))
	addConfig(t, config, "resolve_timeout = '2s'")
	c, err := loadConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	logins := func(text string) {
		t.Helper()
		t.Setenv("DOCKER_CONFIG", t.TempDir())
		if err := os.WriteFile(filepath.Join(os.Getenv("DOCKER_CONFIG"), "config.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	right := fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, reg.Host(), base64.StdEncoding.EncodeToString([]byte("me:secret")))
	logins(right)
	p := serving(t, config, c.Address)
	idle := time.Minute
	fetch := func(want string) {
		t.Helper()
		var b bytes.Buffer
		err := fetchBlobs(c, idle)(t.Context(), reg.Host()+"/team/app:v1", blob, &b)
		if want == "" && (err != nil || !bytes.Equal(b.Bytes(), data)) || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%d bytes, %v, want error %q", b.Len(), err, want)
		}
	}
	logins("{}")
	reg.RequireToken(registrytest.TokenOptions{User: "me", Password: "secret"})
	fetch("")
	if code, _ := get(t, "unix", adminSocket(c.Root), "/blob?ref=::&size=1"); code != http.StatusBadRequest {
		t.Errorf("no reference: %d", code)
	}
	logins(right)
	inTheMiddle := func(sig unix.Signal) {
		t.Helper()
		stop := reg.Inject(registrytest.Blobs, 1, registrytest.Reset(600_000))
		defer stop()
		stop2 := reg.Inject(func(r *http.Request) bool {
			if registrytest.Blobs(r) && strings.HasPrefix(r.Header.Get("Range"), "bytes=600000-") {
				p.Process.Signal(sig)
			}
			return false
		}, -1, registrytest.Reset(0))
		defer stop2()
		fetch("")
	}
	idle = time.Second
	inTheMiddle(unix.SIGSTOP)
	p.signal(unix.SIGCONT)
	idle = time.Minute
	inTheMiddle(unix.SIGKILL)
	p.wait()
	logins("{}")
	fetch("no daemon answers")
	unix.Unmount(filepath.Join(c.Root, "devices"), unix.MNT_DETACH)
}

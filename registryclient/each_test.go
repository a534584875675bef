package registryclient

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// Each host is asked, whatever those before it answer, and says what it is: for a tag those that resolve, for a digest those that have blobs.
func TestAskEach(t *testing.T) {
	mirror, broken, registry := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
	hosts := t.TempDir()
	if err := os.Mkdir(filepath.Join(hosts, registry.Host()), 0o755); err != nil {
		t.Fatal(err)
	}
	toml := fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\"]\n[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n", registry.URL(), mirror.URL(), broken.URL())
	if err := os.WriteFile(filepath.Join(hosts, registry.Host(), "hosts.toml"), []byte(toml), 0o644); err != nil {
		t.Fatal(err)
	}
	client, err := New(Options{HostsDir: hosts})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	const manifest = `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}`
	dgst := registry.PutManifest("app", "v1", "application/vnd.oci.image.manifest.v1+json", []byte(manifest))
	broken.Inject(registrytest.Any, -1, registrytest.Status(http.StatusForbidden))

	got, err := client.AskEach(t.Context(), registry.Host()+"/app:v1")
	if err != nil || len(got) != 2 {
		t.Fatalf("by tag: got %+v, %v", got, err)
	}
	if a := got[0]; a.Host != broken.Host() || a.Capabilities != "pull resolve" || !errors.Is(a.Err, ErrDenied) {
		t.Errorf("the one that refuses: %+v", a)
	}
	if a := got[1]; a.Host != registry.Host() || a.Err != nil {
		t.Errorf("the registry: %+v", a)
	}
	got, err = client.AskEach(t.Context(), registry.Host()+"/app@"+dgst.String())
	if err != nil || len(got) != 3 {
		t.Fatalf("by digest: got %+v, %v", got, err)
	}
	if a := got[0]; a.Host != mirror.Host() || a.Capabilities != "pull" || !errors.Is(a.Err, ErrNotFound) {
		t.Errorf("the mirror without it: %+v", a)
	}
	if _, err := client.AskEach(t.Context(), "::"); err == nil {
		t.Error("no reference is no error")
	}
}

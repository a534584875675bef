package integration_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestPulledFirst: somebody's copy of an image is pulled first, and their repository is deleted. A pod of the image from its own repository, of whose pull containerd tells nobody since it has all chains, reads on.
func TestPulledFirst(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	pause := registry.Host() + "/pause:1"
	pushPause(t, pause)
	n := startNode(t, node.Options{Pause: pause, Stream: []string{registry.Host() + "/*"}, Config: "background_bandwidth = \"0\"\n"})
	copied, own := registry.Host()+"/mallory/app:v1", registry.Host()+"/own/app:v1"
	for _, ref := range []string{copied, own} {
		pushSmall(t, ref, 11)
		run(t, "streamctl", "create", "--record", "", "--profile", "none", ref)
	}
	for _, ref := range []string{copied, own} {
		if err := n.Pull(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
	}
	registry.Inject(func(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, "/v2/mallory/") }, -1, registrytest.Status(http.StatusNotFound))
	registry.Reset()
	checkSums(t, runPod(t, n, own), 11)
	asked := func(repo string) int {
		got, _ := registry.Count(registrytest.OfBlobs, func(q registrytest.Request) bool { return strings.HasPrefix(q.Path, "/v2/"+repo+"/") })
		return got
	}
	if asked("mallory") == 0 || asked("own") == 0 {
		t.Errorf("%d requests for blobs of the copy, %d of the image's own repository: the test shows nothing", asked("mallory"), asked("own"))
	}
}

package integration_test

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcstatus "google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

// throughProxy is of the kubelet's configuration: it pulls through our proxy of CRI.
const throughProxy = "imageServiceEndpoint: unix://DIR/run/p.sock\n"

// TestKubernetesPull: with a registry that wants a token, what the kubelet pulls with serves the reads of the image, be it an imagePullSecret or a credential provider plugin's. Who has neither is refused as
// by containerd alone. What the kubelet's garbage collection removes is removed from the cache. Without the proxy the kubelet does not start.
func TestKubernetesPull(t *testing.T) {
	if !ownMachine(t) {
		return
	}
	secret, ref, img := private(t, 441)
	provided, other, otherImg := private(t, 442)
	plugins, runs := provider(t, provided.Host(), creds)
	flags := []string{"--image-credential-provider-config=" + filepath.Join(plugins, "config.yaml"), "--image-credential-provider-bin-dir=" + plugins}
	n := startKubernetes(t, node.Options{
		Stream: []string{secret.Host() + "/*", provided.Host() + "/*"}, Config: criConfig + withPlugins(plugins),
		Kubelet: &node.Kubelet{Config: throughProxy, Flags: flags},
	})
	user, password, _ := strings.Cut(creds, ":")
	kubectl(t, n, "create", "secret", "docker-registry", "regcred", "--docker-server="+secret.Host(), "--docker-username="+user, "--docker-password="+password)

	pod{Name: "secret", Image: ref, Secret: "regcred"}.streams(t, n, secret, img, 441)
	wantAccepted(t, n, secret.Host(), "CRI proxy")
	refusedAsPlain(t, n, ref) // although the image is there
	pod{Name: "provided", Image: other}.streams(t, n, provided, otherImg, 442)
	wantAccepted(t, n, provided.Host(), "credential provider plugin")
	if got := runs(); got < 2 {
		t.Errorf("the plugin ran %d times for the kubelet and the daemon", got)
	}

	kubectl(t, n, "delete", "pod", "--all")
	within(t, 3*time.Minute, "the kubelet has removed the containers", func() bool { // once a minute
		out, err := n.Crictl(t.Context(), "ps", "--all", "--quiet")
		return err == nil && strings.TrimSpace(out) == ""
	})
	if _, there := kept(n); len(cacheFiles(t, n)) == 0 || !there {
		t.Fatal("there is nothing to collect")
	}
	if err := n.StopSnapshotter(); err != nil {
		t.Fatal(err)
	}
	// Both ages are over when the kubelet starts: then, and every five minutes, it collects.
	kubelet := node.Kubelet{Config: throughProxy + "imageMinimumGCAge: 1ns\nimageMaximumGCAge: 2ns\n", Flags: flags}
	if err := n.Kubernetes.RestartKubelet(t.Context(), kubelet); err == nil || !strings.Contains(err.Error(), "kubelet ended: exit status 1") || !strings.Contains(err.Error(), "/run/p.sock") {
		t.Errorf("without the proxy the kubelet does not end for that: %v", err)
	}
	if err := n.StartSnapshotter(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.Kubernetes.RestartKubelet(t.Context(), kubelet); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the images are gone, with their chunks and credentials", func() bool {
		s, err := statusOf(t, n)
		_, there := kept(n)
		return err == nil && len(s.Images) == 0 && len(cacheFiles(t, n)) == 0 && !there
	})

	pullProxied(t, secret, n, ref, img) // by crictl alone
	sumIn(t, n, ref, 441, "/data")
}

// wantAccepted wants a registry's host to have let in one source's credentials alone.
func wantAccepted(t *testing.T, n *node.Node, host, source string) {
	t.Helper()
	s, err := statusOf(t, n)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, h := range s.Hosts {
		if h.Host == host {
			got = h.Credentials
		}
	}
	if !slices.Equal(got, []string{source}) {
		t.Errorf("%s has let in credentials of %q, want %q", host, got, source)
	}
}

// refusedAsPlain wants a pod without credentials to say what a containerd says that has no snapshotter of ours, and our proxy to answer what that answers.
func refusedAsPlain(t *testing.T, n *node.Node, ref string) {
	t.Helper()
	plain := startNode(t, node.Options{Pull: node.Plain})
	want, got := pullStatus(t, plain.Socket(), ref), pullStatus(t, filepath.Join(n.Dir, "run/p.sock"), ref)
	if want.Code() == codes.OK || got.Code() != want.Code() || got.Message() != want.Message() {
		t.Errorf("the proxy answers\n%v, want\n%v", got, want)
	}
	p := pod{Name: "refused", Image: ref}
	p.apply(t, n)
	p.await(t, n, "jsonpath={.status.containerStatuses[0].state.waiting.reason}=ErrImagePull")
	if said := kubectl(t, n, "get", "events", "--field-selector=reason=Failed,involvedObject.name="+p.Name, "--output=jsonpath={.items[*].message}"); !strings.Contains(said, want.Message()) {
		t.Errorf("the pod's events say\n%s, want\n%s", said, want.Message())
	}
}

// pullStatus is how a socket of CRI answers a pull without credentials.
func pullStatus(t *testing.T, socket, ref string) *grpcstatus.Status {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, err = runtime.NewImageServiceClient(conn).PullImage(t.Context(), &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: ref}})
	return grpcstatus.Convert(err)
}

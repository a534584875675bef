package integration_test

import (
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// ownMachine is the first thing in a test that wants node.MachineVariable, whose name begins with TestKubernetes. Where it returns false the test is over: it ran in another process, which has a machine of its own, and there
// it returned true.
func ownMachine(t *testing.T) bool {
	t.Helper()
	if os.Getenv(node.MachineVariable) != "" {
		return true
	}
	dir, err := node.KubernetesDir()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "kubelet")); err != nil {
		t.Skipf("%v: make kubernetes builds it", err)
	}
	pattern := "^" + t.Name() + "$"
	if _, below, ok := strings.Cut(flag.Lookup("test.run").Value.String(), "/"); ok {
		pattern += "/" + below
	}
	c := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.v", "-test.run", pattern)
	c.Env = append(os.Environ(), node.MachineVariable+"=1", "PATH="+dir+":"+os.Getenv("PATH")) // its runc is the one with seccomp
	c.WaitDelay = 10 * time.Second
	out, err := c.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Error(err)
	}
	return false
}

// startKubernetes is startNode for a node of Kubernetes; o.Kubelet is what is said to its kubelet. It is on its own machine (ownMachine).
func startKubernetes(t *testing.T, o node.Options) *node.Node {
	t.Helper()
	if o.Kubelet == nil {
		o.Kubelet = new(node.Kubelet)
	}
	pauses := startRegistry(t, registrytest.Options{})
	o.Pause = pauses.Host() + "/pause:v1"
	pushPause(t, o.Pause)
	return startNode(t, o)
}

// kubectl runs kubectl as the administrator.
func kubectl(t *testing.T, n *node.Node, args ...string) string {
	t.Helper()
	out, err := n.Kubernetes.Kubectl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// loginAs writes a kubeconfig of a service account, with a token that `kubectl create token` makes.
func loginAs(t *testing.T, k *node.Kubernetes, kubeconfig, account string, flags ...string) {
	t.Helper()
	token, err := k.Kubectl(t.Context(), append([]string{"create", "token", account}, flags...)...)
	if err != nil {
		t.Fatal(err)
	}
	admin, err := os.ReadFile(k.Kubeconfig())
	if err == nil {
		err = os.WriteFile(kubeconfig, []byte(strings.Replace(string(admin), "{token: admin}", "{token: "+strings.TrimSpace(token)+"}", 1)), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// pod is a pod of one container, which is pulled for, and run once.
type pod struct {
	Name, Image string
	Secret      string   // imagePullSecret
	Command     []string // nil is the image's
	Ready       []string // readiness probe: a command in the container; nil for none
}

// apply makes the pod.
func (p pod) apply(t *testing.T, n *node.Node) {
	t.Helper()
	main := map[string]any{"name": "main", "image": p.Image, "imagePullPolicy": "Always", "command": p.Command}
	if p.Ready != nil {
		main["readinessProbe"] = map[string]any{"exec": map[string]any{"command": p.Ready}, "periodSeconds": 1}
	}
	spec := map[string]any{"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": []any{main}}
	if p.Secret != "" {
		spec["imagePullSecrets"] = []any{map[string]any{"name": p.Secret}}
	}
	b, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": p.Name}, "spec": spec})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Kubernetes.Apply(t.Context(), string(b)); err != nil {
		t.Fatal(err)
	}
}

// await waits until the pod is as a condition of `kubectl wait --for` says.
func (p pod) await(t *testing.T, n *node.Node, condition string) {
	t.Helper()
	if _, err := n.Kubernetes.Kubectl(t.Context(), "wait", "--for="+condition, "pod/"+p.Name, "--timeout=2m"); err != nil {
		t.Fatal(err, kubectl(t, n, "describe", "pod", p.Name))
	}
}

// output makes the pod, waits until it has succeeded, and returns what it has printed.
func (p pod) output(t *testing.T, n *node.Node) string {
	t.Helper()
	p.apply(t, n)
	p.await(t, n, "jsonpath={.status.phase}=Succeeded")
	return kubectl(t, n, "logs", p.Name)
}

// streams runs the pod, of an image of pushSmall; nothing of that is downloaded as a whole.
func (p pod) streams(t *testing.T, n *node.Node, registry *registrytest.Registry, img v1.Image, seed uint64) {
	t.Helper()
	var out string
	mustStream(t, registry, img, func() (string, error) {
		out = p.output(t, n)
		return out, nil
	})
	checkSums(t, out, seed)
}

// TestKubernetes: a pod of a real Kubernetes streams its image.
func TestKubernetes(t *testing.T) {
	if !ownMachine(t) {
		return
	}
	registry := startRegistry(t, registrytest.Options{})
	ref := registry.Host() + "/app:v1"
	img := pushSmall(t, ref, 440)
	run(t, "streamctl", "create", "--record", "", ref)
	n := startKubernetes(t, node.Options{Stream: []string{registry.Host() + "/*"}})
	pod{Name: "app", Image: ref}.streams(t, n, registry, img, 440)
}

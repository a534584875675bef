package integration_test

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/kubeapi"
)

// policyObjects are a node like those that kubelets make, another one, and a pod of the DaemonSet on the first.
const policyObjects = `{apiVersion: v1, kind: Node, metadata: {name: ` + node.NodeName + `, labels: {kubernetes.io/os: linux}, finalizers: [example.com/mine]}}
---
{apiVersion: v1, kind: Node, metadata: {name: another}}
---
apiVersion: v1
kind: Pod
metadata: {namespace: streaming-snapshotter, name: installer}
spec:
  nodeName: ` + node.NodeName + `
  serviceAccountName: streaming-snapshotter
  containers: [{name: watch, image: streaming-snapshotter}]
`

// TestKubernetesPolicy: with its token a pod of deploy/daemonset changes one label of its own node, and can do nothing else. It takes an API server and nothing more of Kubernetes; that each right is
// needed TestKubernetesDaemonSet shows.
func TestKubernetesPolicy(t *testing.T) {
	if !ownMachine(t) {
		return
	}
	dir := tempDir(t)
	if err := os.Mkdir(filepath.Join(dir, "logs"), 0o755); err != nil {
		t.Fatal(err)
	}
	k, err := node.StartAPIServer(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	}()
	if _, err := k.Kubectl(t.Context(), "apply", "-k", filepath.Join(checkout(t), "deploy/daemonset/generic")); err != nil {
		t.Fatal(err)
	}
	if err := k.Apply(t.Context(), policyObjects); err != nil {
		t.Fatal(err)
	}
	kubeconfig := filepath.Join(dir, "pod.kubeconfig")
	loginAs(t, k, kubeconfig, "streaming-snapshotter", inNamespace, "--bound-object-kind=Pod", "--bound-object-name=installer")
	api := kubeapi.New(kubeconfig)
	defer api.Close()
	refused := func(path string, patch any, want string) bool {
		t.Helper()
		err := api.Patch(t.Context(), path, patch)
		return (err == nil) == (want == "") && (err == nil || strings.Contains(err.Error(), want))
	}

	const own, policy = "nodes/" + node.NodeName, "changes nothing of a node but"
	meta := func(key string, value any) any { return map[string]any{"metadata": map[string]any{key: value}} }
	of := func(name string, value any) any { return map[string]any{name: value} }
	eventually(t, "the policy is in force", func() bool { return refused(own, meta("labels", of("mine", "true")), policy) })
	for _, c := range []struct {
		what, path string
		patch      any
		want       string
	}{
		{"its label", own, meta("labels", of(nodeLabel, "true")), ""},
		{"its label, again", own, meta("labels", of(nodeLabel, nil)), ""},
		{"another label", own, meta("labels", of("mine", "true")), policy},
		{"another label's value", own, meta("labels", of("kubernetes.io/os", "windows")), policy},
		{"a label that goes", own, meta("labels", of("kubernetes.io/os", nil)), policy},
		{"an annotation", own, meta("annotations", of("mine", "true")), policy},
		{"a finalizer", own, meta("finalizers", []string{"example.com/mine", "example.com/more"}), policy},
		{"a finalizer that goes", own, meta("finalizers", nil), policy},
		{"an owner", own, meta("ownerReferences", []any{map[string]any{"apiVersion": "v1", "kind": "Node", "name": "another", "uid": "1"}}), policy},
		{"what its name was made of", own, meta("generateName", "node"), policy},
		{"the spec", own, of("spec", of("unschedulable", true)), policy},
		{"another node", "nodes/another", meta("labels", of(nodeLabel, "true")), "labels its own node alone"},
		{"the status", own + "/status", meta("labels", of(nodeLabel, "true")), "cannot patch resource"},
		{"its pod", "namespaces/streaming-snapshotter/pods/installer", meta("labels", of("mine", "true")), "cannot patch resource"},
	} {
		if !refused(c.path, c.patch, c.want) {
			t.Errorf("%s: got %v, want %q", c.what, api.Patch(t.Context(), c.path, c.patch), c.want)
		}
	}
	for _, path := range []string{"nodes", own, "pods", "secrets"} {
		var status *kubeapi.StatusError
		if err := api.Get(t.Context(), path, nil, nil); !errors.As(err, &status) || status.Code != http.StatusForbidden {
			t.Errorf("read %s: %v", path, err)
		}
	}
}

package integration_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/kubeapi"
)

// rights: each verb of the ClusterRole is there for what does not work without it, and with them a pod's token can do nothing else.
func (h *cluster) rights() {
	h.Helper()
	type rule struct {
		APIGroups []string `json:"apiGroups"`
		Resources []string `json:"resources"`
		Verbs     []string `json:"verbs"`
	}
	var role struct{ Rules []rule }
	if err := json.Unmarshal([]byte(h.kubectl("get", "clusterrole", "streaming-snapshotter", "--output=json")), &role); err != nil {
		h.Fatal(err)
	}
	verbs := 0
	for i, r := range role.Rules {
		for j, verb := range r.Verbs {
			verbs++
			less := append([]rule{}, role.Rules...)
			less[i].Verbs = append(append([]string{}, r.Verbs[:j]...), r.Verbs[j+1:]...)
			if len(less[i].Verbs) == 0 {
				less = append(less[:i], less[i+1:]...)
			}
			h.setRules(less)
			h.kubectl("label", "node", node.NodeName, nodeLabel+"-")
			h.kubectl(inNamespace, "delete", "pods", "--all")
			want := "cannot " + verb + " resource"
			eventually(h.T, "the daemon's pod says: "+want, func() bool { return strings.Contains(readyz(h.Context()), want) })
			h.setRules(role.Rules)
			h.rolledOut()
			h.labelled(true)
		}
	}
	if verbs == 0 {
		h.Error("there are no rights")
	}

	if err := h.k.Apply(h.Context(), `{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "another"}}`); err != nil {
		h.Fatal(err)
	}
	defer h.kubectl("delete", "node", "another")
	pod := strings.TrimSpace(h.kubectl(inNamespace, "get", "pods", "--output=jsonpath={.items[0].metadata.name}"))
	kubeconfig := filepath.Join(h.dir, "pod.kubeconfig")
	loginAs(h.T, h.k, kubeconfig, "streaming-snapshotter", inNamespace, "--bound-object-kind=Pod", "--bound-object-name="+pod)
	api := kubeapi.New(kubeconfig)
	defer api.Close()
	meta := func(key, name string, value any) any {
		return map[string]any{"metadata": map[string]any{key: map[string]any{name: value}}}
	}
	for _, c := range []struct {
		what, path string
		patch      any
		want       string
	}{
		{"its label", "nodes/" + node.NodeName, meta("labels", nodeLabel, "true"), ""},
		{"another label", "nodes/" + node.NodeName, meta("labels", "mine", "true"), "changes nothing of a node but"},
		{"a label that goes", "nodes/" + node.NodeName, meta("labels", "kubernetes.io/os", nil), "changes nothing of a node but"},
		{"an annotation", "nodes/" + node.NodeName, meta("annotations", "mine", "true"), "changes nothing of a node but"},
		{"the spec", "nodes/" + node.NodeName, map[string]any{"spec": map[string]any{"unschedulable": true}}, "changes nothing of a node but"},
		{"another node", "nodes/another", meta("labels", nodeLabel, "true"), "labels its own node alone"},
		{"the status", "nodes/" + node.NodeName + "/status", meta("labels", nodeLabel, "true"), "cannot patch resource"},
	} {
		if err := api.Patch(h.Context(), c.path, c.patch); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			h.Errorf("%s: got %v, want %q", c.what, err, c.want)
		}
	}
	for _, path := range []string{"nodes", "nodes/" + node.NodeName, "pods", "secrets"} {
		var status *kubeapi.StatusError
		if err := api.Get(h.Context(), path, nil, nil); !errors.As(err, &status) || status.Code != http.StatusForbidden {
			h.Errorf("read %s: %v", path, err)
		}
	}
}

// setRules replaces the rules of the ClusterRole.
func (h *cluster) setRules(rules any) {
	h.Helper()
	b, err := json.Marshal(map[string]any{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": map[string]any{"name": "streaming-snapshotter"}, "rules": rules})
	if err != nil {
		h.Fatal(err)
	}
	name := filepath.Join(h.dir, "role.json")
	if err := os.WriteFile(name, b, 0o644); err != nil {
		h.Fatal(err)
	}
	h.kubectl("replace", "-f", name)
}

// readyz is what the DaemonSet's pod answers.
func readyz(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:9466/readyz", nil)
	if err != nil {
		return err.Error()
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return string(b)
}

package integration_test

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

// rights: each verb of the ClusterRole is there for what does not work without it. That a pod's token can do nothing else is TestKubernetesPolicy.
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

package integration_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// eventRights are those that docs/operations.md names, of two service accounts of which one has `create` of events alone.
const eventRights = `{apiVersion: v1, kind: ServiceAccount, metadata: {name: nobody}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: creator}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: lister}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: creator}
rules: [{apiGroups: [""], resources: [events], verbs: [create]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: lister}
rules: [{apiGroups: [""], resources: [pods], verbs: [list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: creator}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: creator}
subjects: [{kind: ServiceAccount, namespace: default, name: creator}, {kind: ServiceAccount, namespace: default, name: lister}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: lister}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: lister}
subjects: [{kind: ServiceAccount, namespace: default, name: lister}]
`

// TestKubernetesEvents: a pod's events say that its image is streamed, or why not, by whoever has just the rights for that; who has them not costs no pod anything, and is told once.
func TestKubernetesEvents(t *testing.T) {
	if !ownMachine(t) {
		return
	}
	registry := startRegistry(t, registrytest.Options{})
	config := criConfig + "events_kubeconfig = \"DIR/events.kubeconfig\"\nnode_name = \"" + node.NodeName + "\"\n"
	var reports *serviceDaemon // a start is over half a minute later
	if os.Getenv("FULL") != "" {
		reports = startService(t, registry.Host(), "")
		config += "report = \"http://" + reports.addr + "\"\n"
	}
	n := startKubernetes(t, node.Options{Stream: []string{registry.Host() + "/*"}, Config: config})
	if err := n.Kubernetes.Apply(t.Context(), eventRights); err != nil {
		t.Fatal(err)
	}
	kubeconfig := filepath.Join(n.Dir, "events.kubeconfig")
	as := func(account string) { loginAs(t, n.Kubernetes, kubeconfig, account) }
	seed := uint64(450)
	runs := func(name string, converted bool) {
		t.Helper()
		seed++
		ref := fmt.Sprintf("%s/%s:v1", registry.Host(), name)
		img := pushSmall(t, ref, seed)
		p := pod{Name: name, Image: ref}
		if converted {
			run(t, "streamctl", "create", "--record", "", ref)
			p.streams(t, n, registry, img, seed)
		} else {
			checkSums(t, p.output(t, n), seed)
		}
	}

	as("nobody")
	runs("unheard", true)
	runs("unheard-too", true)
	if got := eventProblems(t, n); len(got) != 1 || !strings.Contains(got[0], `cannot list resource`) {
		t.Errorf("problems: %q", got)
	}
	as("creator")
	runs("unlisted", true) // without the proxy nobody knows whose it is
	as("lister")
	runs("streamed", true)
	wantEvent(t, n, "streamed", "Normal Streaming", "artifact sha256:")
	eventually(t, "the problem is over", func() bool { return len(eventProblems(t, n)) == 0 })
	if reports != nil {
		wantReady(t, n, reports, registry.Host())
	}
	tampered(t, n, registry)
	runs("plain", false)
	wantEvent(t, n, "plain", "Normal NotStreaming", "NO_ARTIFACT: ")

	if err := n.Kubernetes.RestartKubelet(t.Context(), node.Kubelet{Config: throughProxy}); err != nil {
		t.Fatal(err)
	}
	as("creator")
	runs("proxied", true)
	wantEvent(t, n, "proxied", "Normal Streaming", "artifact sha256:")
	if got := eventProblems(t, n); len(got) != 0 {
		t.Errorf("problems: %q", got)
	}
	kubelets, err := os.ReadFile(n.Kubernetes.KubeletKubeconfig())
	if err == nil {
		err = os.WriteFile(kubeconfig, kubelets, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	runs("kubelets", false)
	wantEvent(t, n, "kubelets", "Normal NotStreaming", "NO_ARTIFACT: ")
	for _, name := range []string{"unheard", "unheard-too", "unlisted"} {
		if got := kubectl(t, n, "get", "events", "--field-selector=source=streaming-snapshotter,involvedObject.name="+name, "--output=name"); got != "" {
			t.Errorf("%s has %q", name, got)
		}
	}
}

// wantReady runs a pod with a readiness probe, and wants the service to be told when it was ready.
func wantReady(t *testing.T, n *node.Node, reports *serviceDaemon, host string) {
	t.Helper()
	ref := host + "/probed:v1"
	pushSmall(t, ref, 449)
	run(t, "streamctl", "create", "--record", "", ref)
	p := pod{Name: "probed", Image: ref, Command: []string{"/guest", "pause"}, Ready: []string{"/guest", "sum", "/guest"}}
	p.apply(t, n)
	p.await(t, n, "condition=Ready")
	var got *service.StartsInfo
	within(t, 3*time.Minute, "a report of the start", func() bool {
		info, err := reports.client.Image(t.Context(), host, "probed", "v1")
		if err != nil {
			t.Fatal(err)
		}
		got = info.Platforms[0].Starts
		return got != nil
	})
	if v := got.Variants[0]; v.Ready.Count != 1 || v.Ready.Median <= 0 || v.Ready.Median > 120 || v.Reads.Count != 1 || !v.Current {
		t.Errorf("the service was told %+v", v)
	}
}

// tampered runs a pod that reads, and whose image's artifact lies: its events say that the image is streamed, and then that it is not any more, why, and which artifact it was, of whom. The next pod of that image reads the
// image's own bytes.
func tampered(t *testing.T, n *node.Node, registry *registrytest.Registry) {
	t.Helper()
	ref := registry.Host() + "/tampered:v1"
	dgst := attachLie(t, registry, "tampered", pushSmall(t, ref, 448), "")
	p := pod{Name: "tampered", Image: ref, Command: []string{"/guest", "watch", "/data"}}
	p.apply(t, n)
	wantEvent(t, n, p.Name, "Normal Streaming", "artifact "+dgst.String())
	wantEvent(t, n, p.Name, "Warning Quarantined", "TAMPERED: layer 1 of the streaming artifact "+dgst.String()+", signed by nobody that the node knows of")
	eventually(t, "reads that fail", func() bool { // or page faults of the program, which is of that image, too, and ends with them
		return strings.Contains(kubectl(t, n, "logs", p.Name), "errno=5 /data/") || kubectl(t, n, "get", "pod", p.Name, "--output=jsonpath={.status.phase}") == "Failed"
	})
	next := pod{Name: "after-tampered", Image: ref}
	checkSums(t, next.output(t, n), 448)
	kubectl(t, n, "delete", "pod", p.Name)
}

// wantEvent waits for a pod's event, which what names by its type and its reason.
func wantEvent(t *testing.T, n *node.Node, name, what, text string) {
	t.Helper()
	uid := kubectl(t, n, "get", "pod", name, "--output=jsonpath={.metadata.uid}")
	var got string
	defer func() {
		if t.Failed() {
			t.Logf("%s: %q", name, got)
		}
	}()
	_, reason, _ := strings.Cut(what, " ")
	eventually(t, "event "+what, func() bool {
		got = kubectl(t, n, "get", "events", "--field-selector=source=streaming-snapshotter,involvedObject.name="+name+",reason="+reason,
			"--output=jsonpath={range .items[*]}{.involvedObject.uid} {.type} {.reason} {.count} {.message}{end}")
		return strings.HasPrefix(got, uid+" "+what+" 1 ") && strings.Contains(got, text)
	})
	if said := kubectl(t, n, "describe", "pod", name); !strings.Contains(said, "streaming-snapshotter") || !strings.Contains(said, text) {
		t.Errorf("kubectl describe says\n%s", said)
	}
}

// eventProblems are what the status has of events.
func eventProblems(t *testing.T, n *node.Node) (list []string) {
	t.Helper()
	var s struct{ Problems []string }
	if err := json.Unmarshal([]byte(run(t, "streaming-snapshotter", "status", "-o", "json", "--config", n.ConfigFile())), &s); err != nil {
		t.Fatal(err)
	}
	for _, p := range s.Problems {
		if strings.Contains(p, "events") {
			list = append(list, p)
		}
	}
	return list
}

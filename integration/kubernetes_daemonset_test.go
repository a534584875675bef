package integration_test

import (
	"archive/tar"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// daemonSetTest is what TestKubernetesDaemonSet does in its Debian.
type daemonSetTest struct {
	Registry   string // with the images app, old and other, which have artifacts, pause, and installer:v1 and v2
	Containerd string // the program
}

// The seeds of the images.
const (
	appSeed   = systemdSeed + 10 + iota
	oldSeed   // pulled before the snapshotter is there
	otherSeed // for who is not to stream
)

// TestKubernetesDaemonSet boots a Debian with a real systemd, a containerd of its own and a real Kubernetes, and does with deploy/daemonset what an operator does (daemonSet).
func TestKubernetesDaemonSet(t *testing.T) {
	if text := os.Getenv(insideSystemd); text != "" {
		var c daemonSetTest
		if err := json.Unmarshal([]byte(text), &c); err != nil {
			t.Fatal(err)
		}
		daemonSet(t, c)
		return
	}
	if !ownMachine(t) {
		return
	}
	images, checkout := debians(t), checkout(t)
	registry := startRegistry(t, registrytest.Options{})
	c := daemonSetTest{Registry: registry.Host(), Containerd: filepath.Join(toolsDir(checkout), "containerd")}
	for name, seed := range map[string]uint64{"app": appSeed, "old": oldSeed, "other": otherSeed} {
		pushSmall(t, c.ref(name), seed)
		run(t, "streamctl", "create", "--record", "", c.ref(name))
	}
	pushPause(t, c.ref("pause"))
	programs := buildForDebian(t)
	pushInstaller(t, checkout, c.Registry+"/installer", filepath.Join(programs, thisRelease))
	root := filepath.Join(tempDir(t), "root")
	runInside(t, root, filepath.Join(images, "systemd-trixie"), checkout, programs, "TestKubernetesDaemonSet", c)
	kubernetes, err := node.KubernetesDir()
	if err == nil {
		kubernetes, err = filepath.EvalSymlinks(kubernetes)
	}
	if err != nil {
		t.Fatal(err)
	}
	bootTest(t, root, checkout, "TestKubernetesDaemonSet", 1, kubernetes)
}

func (c daemonSetTest) ref(name string) string { return c.Registry + "/" + name + ":v1" }

// pushInstaller pushes what `make image` makes as v1, and as v2 the same with another program.
func pushInstaller(t *testing.T, checkout, repository, newer string) {
	t.Helper()
	dir := tempDir(t)
	layout := filepath.Join(dir, "layout")
	c := exec.CommandContext(t.Context(), "go", "run", "./deploy/image", layout)
	c.Dir = checkout
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	run(t, "crane", "push", layout, repository+":v1")
	program, err := os.ReadFile(newer)
	if err != nil {
		t.Fatal(err)
	}
	layer := filepath.Join(dir, "newer.tar")
	f, err := os.Create(layer)
	if err != nil {
		t.Fatal(err)
	}
	w := &ociimage.Tar{Writer: tar.NewWriter(f)}
	if err := errors.Join(w.File(strings.TrimPrefix(node.InstalledPath, "/"), 0o755, append(program, "a newer one"...)), w.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	run(t, "crane", "append", "--platform", "linux/"+runtime.GOARCH, "--base", repository+":v1", "--new_layer", layer, "--new_tag", repository+":v2")
}

// cluster is a host that is the only node of a Kubernetes.
type cluster struct {
	*hosted
	c   daemonSetTest
	k   *node.Kubernetes
	dir string
}

const (
	inNamespace = "--namespace=streaming-snapshotter"
	nodeLabel   = "streaming-snapshotter.io/ready"
)

// daemonSet is an operator's life with deploy/daemonset.
func daemonSet(t *testing.T, c daemonSetTest) {
	h := startCluster(t, c)
	h.pod(podSpec{Name: "old", Image: "old"}, "Succeeded")
	h.was = h.files()

	h.apply("v1", "generic")
	h.rolledOut()
	h.labelled(true)
	h.pod(podSpec{Name: "app", Image: "app", Command: []string{"/guest", "watch", "/data"}, Selector: map[string]string{nodeLabel: "true"}}, "Running")
	if s := unitStatus(t); s.Streamed != 1 || !s.Kept {
		t.Fatalf("with a pod of an image that has an artifact: %+v", s)
	}
	h.reads()
	h.pod(podSpec{Name: "old-again", Image: "old"}, "Succeeded") // what was there is there
	if s := unitStatus(t); s.Streamed != 1 {
		t.Errorf("an image that was there is streamed: %+v", s)
	}
	h.rights()

	before := h.program()
	h.apply("v2", "generic")
	h.rolledOut()
	if h.program() == before {
		t.Error("the upgrade has left the program as it was")
	}
	h.labelled(true)
	h.reads()

	h.kubectl("delete", "--ignore-not-found", "-k", h.own())
	h.reads()
	h.labelled(true) // for it is ready
	h.must("systemctl", "is-active", node.Unit)

	h.uninstalls()
	h.unchanged("uninstall")
	h.kubectl("delete", "-k", h.own())

	h.runtimeClass()
	h.unchanged("uninstall of the runtime")
}

const daemonSetContainerd = `version = 3
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "PAUSE"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  disable_apparmor = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["PLUGINS"]
  conf_dir = "DIR/cni"
  use_internal_loopback = true
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
    BinaryName = "DIR/runc"
`

// runcWithoutLimits is runc for a machine whose cgroups with controllers are of version 1, of which nothing is seen where this systemd is: what the kubelet wants of them cannot be set.
const runcWithoutLimits = `#!/bin/sh
for arg; do
  if [ "$before" = --bundle ]; then
    sed -Ei 's/"(cpu|memory|pids|unified)":\{[^{}]*\},?//g; s/,\}/}/g' "$arg/config.json"
  fi
  before=$arg
done
exec PLUGINS/runc "$@"
`

func startCluster(t *testing.T, c daemonSetTest) *cluster {
	for i := range 64 { // here is no udev
		if err := unix.Mknod(fmt.Sprintf("/dev/loop%d", i), unix.S_IFBLK|0o600, int(unix.Mkdev(7, uint32(i)))); err != nil && err != unix.EEXIST {
			t.Fatal(err)
		}
	}
	if err := unix.Mknod("/dev/kmsg", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 11))); err != nil && err != unix.EEXIST { // the kubelet's
		t.Fatal(err)
	}
	// What CNI's plugins set here is this test's own network, which systemd-nspawn takes for the machine's.
	const network = "/proc/sys/net"
	if err := errors.Join(unix.Mount(network, network, "", unix.MS_BIND, ""), unix.Mount("", network, "", unix.MS_REMOUNT|unix.MS_BIND, "")); err != nil {
		t.Fatal(err)
	}
	h := &cluster{hosted: &hosted{T: t, c: installTest{Containerd: c.Containerd}}, c: c, dir: tempDir(t)}
	plugins, err := node.KubernetesDir()
	if err := errors.Join(err, os.Mkdir(filepath.Join(h.dir, "logs"), 0o755), os.Mkdir(filepath.Join(h.dir, "cni"), 0o755), os.MkdirAll("/etc/containerd", 0o755),
		os.WriteFile("/etc/hosts", []byte("127.0.0.1 localhost\n"), 0o644),
		os.WriteFile("/etc/systemd/system/containerd.service", h.unit(), 0o644),
		os.WriteFile("/etc/containerd/config.toml", []byte(strings.NewReplacer("PAUSE", c.ref("pause"), "PLUGINS", plugins, "DIR", h.dir).Replace(daemonSetContainerd)), 0o644),
		os.WriteFile(filepath.Join(h.dir, "runc"), []byte(strings.ReplaceAll(runcWithoutLimits, "PLUGINS", plugins)), 0o755),
		os.WriteFile(filepath.Join(h.dir, "cni/pods.conflist"), []byte(node.PodNetwork), 0o644)); err != nil {
		t.Fatal(err)
	}
	h.must("systemctl", "daemon-reload")
	h.must("systemctl", "start", "containerd")
	if h.k, err = node.StartKubernetes(t.Context(), h.dir, "/run/containerd/containerd.sock", node.Kubelet{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := h.k.Kubectl(context.WithoutCancel(t.Context()), "describe", "pods,nodes", "--all-namespaces")
			t.Log(out)
		}
		if err := h.k.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

func (h *cluster) kubectl(args ...string) string {
	h.Helper()
	out, err := h.k.Kubectl(h.Context(), args...)
	if err != nil {
		h.Fatal(err)
	}
	return out
}

// own is the directory of the operator's own kustomization.
func (h *cluster) own() string { return filepath.Join(h.dir, "own") }

// apply writes the operator's kustomization as docs/operations.md says, and applies it.
func (h *cluster) apply(tag, overlay string, components ...string) {
	h.Helper()
	base, err := filepath.Rel(h.own(), filepath.Join(checkout(h.T), "deploy/daemonset"))
	if err != nil {
		h.Fatal(err)
	}
	text := fmt.Sprintf(`resources: [%s]
images:
- {name: streaming-snapshotter, newName: %s/installer, newTag: %s}
configMapGenerator:
- {name: streaming-snapshotter, namespace: streaming-snapshotter, behavior: replace, files: [config.toml]}
components:
`, filepath.Join(base, overlay), h.c.Registry, tag)
	for _, c := range components {
		text += "- " + filepath.Join(base, "components", c) + "\n"
	}
	if err := errors.Join(os.MkdirAll(h.own(), 0o755), os.WriteFile(filepath.Join(h.own(), "kustomization.yaml"), []byte(text), 0o644),
		os.WriteFile(filepath.Join(h.own(), "config.toml"), fmt.Appendf(nil, "stream = [%q, %q, %q]\nmetrics = \"127.0.0.1:9465\"\n", h.c.Registry+"/app", h.c.Registry+"/old", h.c.Registry+"/other"), 0o644)); err != nil {
		h.Fatal(err)
	}
	h.kubectl("apply", "-k", h.own())
}

// rolledOut waits for the DaemonSet. The kubelet may wait five minutes before it tries an uninstall again.
func (h *cluster) rolledOut() {
	h.Helper()
	if _, err := h.k.Kubectl(h.Context(), inNamespace, "rollout", "status", "daemonset/streaming-snapshotter", "--timeout=7m"); err != nil {
		out, _ := h.k.Kubectl(h.Context(), inNamespace, "logs", "daemonset/streaming-snapshotter", "--all-containers", "--tail=50")
		h.Fatal(err, out)
	}
}

// labelled waits until the node has the label, or has none.
func (h *cluster) labelled(want bool) {
	h.Helper()
	eventually(h.T, fmt.Sprintf("the node's label: %v", want), func() bool {
		return (h.kubectl("get", "node", node.NodeName, "--output=jsonpath={.metadata.labels.streaming-snapshotter\\.io/ready}") == "true") == want
	})
}

// podSpec is a pod of one container.
type podSpec struct {
	Name, Image string
	Command     []string // nil is the image's
	Selector    map[string]string
	Class       string // a RuntimeClass, by which it is pulled, too
	Pull        string // imagePullPolicy; "" is IfNotPresent
}

// pod makes a pod and waits until it is in a phase.
func (h *cluster) pod(p podSpec, phase string) {
	h.Helper()
	h.podUntil(p, "{.status.phase}="+phase)
	if phase == "Succeeded" {
		seed := map[string]uint64{"app": appSeed, "old": oldSeed, "other": otherSeed}[p.Image]
		checkSumsBelow(h.T, h.kubectl("logs", p.Name), seed, "/data")
	}
}

// podUntil makes a pod and waits until a JSONPath of it has a value.
func (h *cluster) podUntil(p podSpec, is string) {
	h.Helper()
	spec := map[string]any{
		"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "nodeSelector": p.Selector, "automountServiceAccountToken": false,
		"containers": []any{map[string]any{"name": "main", "image": h.c.ref(p.Image), "command": p.Command, "imagePullPolicy": cmp.Or(p.Pull, "IfNotPresent")}},
	}
	meta := map[string]any{"name": p.Name}
	if p.Class != "" {
		spec["runtimeClassName"] = p.Class
		meta["annotations"] = map[string]string{"io.containerd.cri.runtime-handler": p.Class}
	}
	b, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
	if err != nil {
		h.Fatal(err)
	}
	if err := h.k.Apply(h.Context(), string(b)); err != nil {
		h.Fatal(err)
	}
	if _, err := h.k.Kubectl(h.Context(), "wait", "--for=jsonpath="+is, "pod/"+p.Name, "--timeout=2m"); err != nil {
		h.Fatal(err, h.kubectl("describe", "pod", p.Name))
	}
}

// reads waits until the pod app has read all of its image twice, from now on. It has never been started again.
func (h *cluster) reads() {
	h.Helper()
	want := smallSum(appSeed)
	passes := func() (n int) {
		for line := range strings.Lines(h.kubectl("logs", "app")) {
			if !strings.HasPrefix(line, want) {
				h.Fatalf("the pod says %q", line)
			}
			n++
		}
		return n
	}
	first := passes()
	eventually(h.T, "a container that reads", func() bool { return passes() >= first+2 })
	if n := h.kubectl("get", "pod", "app", "--output=jsonpath={.status.containerStatuses[0].restartCount}"); n != "0" {
		h.Errorf("the container was started again %s times", n)
	}
}

// program is what is installed.
func (h *cluster) program() string {
	h.Helper()
	return h.must("sha256sum", node.InstalledPath)
}

// uninstalls does it the operator's way: all is refused but that nothing new uses the snapshotter, until nobody uses it any more.
func (h *cluster) uninstalls() {
	h.Helper()
	h.apply("v2", "generic", "uninstall")
	eventually(h.T, "an uninstall that names who is in the way", func() bool {
		out, _ := h.k.Kubectl(h.Context(), inNamespace, "logs", "daemonset/streaming-snapshotter", "--container=uninstall")
		return strings.Contains(out, "nothing new uses the snapshotter") && strings.Contains(out, "pod default/app")
	})
	h.labelled(false) // already: who wants a node that streams goes elsewhere
	h.reads()
	h.pod(podSpec{Name: "late", Image: "other"}, "Succeeded")
	if s := unitStatus(h.T); s.Streamed != 1 {
		h.Errorf("an image that was pulled after it: %+v", s)
	}
	h.kubectl("delete", "pods", "--all")
	h.kubectl(inNamespace, "delete", "pods", "--all") // its own, which was made with the snapshotter
	h.rolledOut()
	h.labelled(false)
	h.pod(podSpec{Name: "app", Image: "app"}, "Succeeded")
	h.kubectl("delete", "pods", "--all")
}

// runtimeClass: one pod streams, and its neighbour, which does not ask for it, does not.
func (h *cluster) runtimeClass() {
	h.Helper()
	within(h.T, 3*time.Minute, "no container", func() bool { // for what a container uses outlives its image, and the kubelet removes containers after their pods
		return h.crictl("ps", "--all", "--quiet") == ""
	})
	for _, name := range []string{"app", "old", "other"} {
		h.crictl("rmi", h.c.ref(name))
	}
	h.pod(podSpec{Name: "before", Image: "old", Command: []string{"/guest", "pause"}}, "Running")
	h.apply("v1", "runtimeclass")
	h.rolledOut()
	h.labelled(true)
	h.pod(podSpec{Name: "app", Image: "app", Command: []string{"/guest", "watch", "/data"}, Class: "streaming"}, "Running")
	h.pod(podSpec{Name: "neighbour", Image: "other"}, "Succeeded")
	if s := unitStatus(h.T); s.Streamed != 1 {
		h.Errorf("with a pod that asks for it, and one that does not: %+v", s)
	}
	h.reads()
	h.mixedClasses()
	if n := h.kubectl("get", "pod", "before", "--output=jsonpath={.status.containerStatuses[0].restartCount}"); n != "0" {
		h.Error("a pod that was there was started again")
	}
	h.kubectl("delete", "pods", "app", "again", "late")
	h.apply("v1", "runtimeclass", "uninstall") // which needs nothing else: the DaemonSet's own pods do not use the snapshotter
	h.rolledOut()
	h.labelled(false)
	h.kubectl("delete", "-k", h.own())
	h.kubectl("delete", "pods", "--all")
}

// mixedClasses: pods that do not ask for the class, of an image that is streamed for others on the node; and one that does, of an image that was downloaded for others.
func (h *cluster) mixedClasses() {
	h.Helper()
	without := podSpec{Name: "without", Image: "app"}
	h.podUntil(without, "{.status.containerStatuses[0].state.waiting.reason}=CreateContainerError")
	if out := h.kubectl("describe", "pod", without.Name); !strings.Contains(out, "content digest") || !strings.Contains(out, "not found") {
		h.Errorf("a pod without the class says\n%s", out)
	}
	h.kubectl("delete", "pods", without.Name)
	without.Pull = "Always"
	h.pod(without, "Succeeded")
	h.reads()
	h.pod(podSpec{Name: "again", Image: "app", Class: "streaming"}, "Succeeded")
	h.pod(podSpec{Name: "late", Image: "old", Class: "streaming"}, "Succeeded")
	if s := unitStatus(h.T); s.Streamed != 1 {
		h.Errorf("with pods of both kinds: %+v", s)
	}
}

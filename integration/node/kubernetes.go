package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Kubernetes is a real Kubernetes 1.34 whose only node is that of a containerd: etcd, kube-apiserver, kube-controller-manager, kube-scheduler and the kubelet, as `make kubernetes` builds them
// from integration/lab. All listen where they usually do, so it takes a machine of its own (MachineVariable), as the whole of one that systemd has booted is, too.
//
//	DIR/admin.kubeconfig     of the cluster's administrator: Kubectl
//	DIR/kubelet.kubeconfig   the kubelet's own, of system:node:node1, which the Node authorizer and NodeRestriction hold to its pods
//	DIR/kubelet.yaml         its configuration
//	DIR/etcd/, DIR/k/        etcd's data and the kubelet's
//	DIR/pki/                 keys and tokens
//	DIR/logs/                of the daemons; those of pods are in /var/log/pods
//
// Pods have networks of their own, if they do not ask for the host's. From both they reach the API server at its service's address, as KUBERNETES_SERVICE_HOST and a service account's token say.
// There are no other services, as no kube-proxy runs, and no DNS.
type Kubernetes struct {
	dir        string
	containerd string      // socket
	keys       Certificate // for service accounts' tokens
	daemons    []*process
	kubelet    *process
}

// Kubelet is what is said to a kubelet beside what it needs here. DIR in it is the directory of Kubernetes, which is the Node's.
type Kubelet struct {
	Config string   // more of the KubeletConfiguration, lines of YAML with keys that kubeletConfig has not
	Flags  []string // more flags
}

// NodeName is the name of a node in Kubernetes.
const NodeName = "node1"

// kubernetesPatience is how long a part of Kubernetes may take to get ready on a machine that has much else to do.
const kubernetesPatience = 3 * time.Minute

// kubeletConfig does without what a container of tests may lack: cgroups of version 2, and cgroups of pods, which would be those of the whole machine. The placeholders are DIR and CONTAINERD.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://CONTAINERD
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
evictionHard: {nodefs.available: 1%, imagefs.available: 1%}
volumePluginDir: DIR/k/volume-plugins
`

const kubeconfig = `apiVersion: v1
kind: Config
clusters: [{name: lab, cluster: {server: "https://` + nodeAddress + `", certificate-authority: DIR/pki/apiserver.crt}}]
users: [{name: lab, user: {token: TOKEN}}]
contexts: [{name: lab, context: {cluster: lab, user: lab}}]
current-context: lab
`

// PodNetwork is the configuration of CNI's plugins, a conflist: a network of its own for each pod.
const PodNetwork = `{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "ptp", "ipam": {"type": "host-local", "ranges": [[{"subnet": "` + podRange + `"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
`

// sysctls are what the kubelet wants of the kernel (setupKernelTunables in its container manager), below /proc/sys.
var sysctls = map[string]string{
	"vm/overcommit_memory":      "1",
	"vm/panic_on_oom":           "0",
	"kernel/panic":              "10",
	"kernel/panic_on_oops":      "1",
	"kernel/keys/root_maxkeys":  "1000000",
	"kernel/keys/root_maxbytes": "25000000",
}

// keepSysctls puts files with the values that the kubelet wants in the place of the kernel's, so that it leaves those alone.
func (k *Kubernetes) keepSysctls() error {
	for name, value := range sysctls {
		file := k.path("sysctl", name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(value+"\n"), 0o644)); err != nil {
			return err
		}
		if err := unix.Mount(file, filepath.Join("/proc/sys", name), "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount in the place of sysctl %s: %w", name, err)
		}
	}
	return nil
}

// KubernetesDir is where `make kubernetes` puts the programs, those of CNI's plugins as well.
func KubernetesDir() (string, error) {
	root, err := Root()
	return filepath.Join(root, ".build/kubernetes"), err
}

// StartKubernetes runs Kubernetes in dir, where there is a directory logs, and returns when the node is ready and pods can be made. containerd is the socket of one whose pods have PodNetwork, or another.
func StartKubernetes(ctx context.Context, dir, containerd string, o Kubelet) (k *Kubernetes, err error) {
	if k, err = StartAPIServer(ctx, dir); err != nil {
		return nil, err
	}
	k.containerd = containerd
	defer func(started *Kubernetes) {
		if err != nil {
			err, k = errors.Join(err, started.Close()), nil
		}
	}(k)
	if err := errors.Join(
		k.keepSysctls(),
		k.run(ctx, nil, "kube-controller-manager", "--kubeconfig="+k.path("admin.kubeconfig"), "--service-account-private-key-file="+k.keys.KeyFile, "--root-ca-file="+k.path("pki/apiserver.crt"),
			"--leader-elect=false", "--bind-address=127.0.0.1", "--flex-volume-plugin-dir="+k.path("k/volume-plugins")),
		k.run(ctx, nil, "kube-scheduler", "--kubeconfig="+k.path("admin.kubeconfig"), "--leader-elect=false", "--bind-address=127.0.0.1"),
	); err != nil {
		return nil, err
	}
	if err := k.startKubelet(ctx, o); err != nil {
		return nil, err
	}
	_, err = k.Kubectl(ctx, "wait", "--for=create", "serviceaccount/default", "--timeout", kubernetesPatience.String())
	return k, err
}

// StartAPIServer runs etcd and the API server in dir, where there is a directory logs, and nothing else of Kubernetes: what is made there stays as it was made.
func StartAPIServer(ctx context.Context, dir string) (k *Kubernetes, err error) {
	k = &Kubernetes{dir: dir}
	defer func(started *Kubernetes) {
		if err != nil {
			err, k = errors.Join(err, started.Close()), nil
		}
	}(k)
	pki := k.path("pki")
	if err := os.Mkdir(pki, 0o700); err != nil {
		return nil, err
	}
	if k.keys, err = MakeCertificate(pki); err != nil {
		return nil, err
	}
	for name, text := range map[string]string{
		"pki/tokens.csv":     "admin,admin,1,system:masters\nkubelet,system:node:" + NodeName + ",2,system:nodes\n",
		"admin.kubeconfig":   strings.ReplaceAll(kubeconfig, "TOKEN", "admin"),
		"kubelet.kubeconfig": strings.ReplaceAll(kubeconfig, "TOKEN", "kubelet"),
	} {
		if err := os.WriteFile(k.path(name), []byte(strings.ReplaceAll(text, "DIR", dir)), 0o600); err != nil {
			return nil, err
		}
	}
	const etcd, peers = "127.0.0.1:2379", "http://127.0.0.1:2380"
	if err := k.run(ctx, func(context.Context) error { return dialTCP(etcd) },
		"etcd", "--unsafe-no-fsync", "--data-dir", k.path("etcd"), "--listen-client-urls", "http://"+etcd, "--advertise-client-urls", "http://"+etcd,
		"--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers, "--initial-cluster", "default="+peers); err != nil {
		return nil, err
	}
	return k, k.run(ctx, func(ctx context.Context) error { return answersOK(ctx, "https://"+nodeAddress+"/readyz") },
		"kube-apiserver", "--etcd-servers=http://"+etcd, "--bind-address=0.0.0.0", "--secure-port=443", "--advertise-address="+nodeAddress, "--cert-dir="+pki,
		"--service-account-key-file="+k.keys.CertFile, "--service-account-signing-key-file="+k.keys.KeyFile, "--service-account-issuer=https://kubernetes.default.svc",
		"--token-auth-file="+k.path("pki/tokens.csv"), "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--service-cluster-ip-range="+serviceRange,
		"--allow-privileged=true", "--kubelet-preferred-address-types=InternalIP", "--endpoint-reconciler-type=none")
}

func (k *Kubernetes) path(elem ...string) string {
	return filepath.Join(append([]string{k.dir}, elem...)...)
}

// run runs one of the daemons, and waits until ready succeeds; nil for not at all.
func (k *Kubernetes) run(ctx context.Context, ready func(context.Context) error, args ...string) error {
	p, err := k.start(args...)
	if err != nil {
		return err
	}
	k.daemons = append(k.daemons, p)
	if ready == nil {
		return nil
	}
	return p.readyIn(ctx, kubernetesPatience, ready)
}

func (k *Kubernetes) start(args ...string) (*process, error) {
	bin, err := KubernetesDir()
	if err != nil {
		return nil, err
	}
	return start(k.path("logs"), args[0], append([]string{filepath.Join(bin, args[0])}, args[1:]...)...)
}

// startKubelet runs the kubelet and waits until its node is ready.
func (k *Kubernetes) startKubelet(ctx context.Context, o Kubelet) error {
	config := strings.NewReplacer("DIR", k.dir, "CONTAINERD", k.containerd).Replace(kubeletConfig + o.Config)
	if err := os.WriteFile(k.path("kubelet.yaml"), []byte(config), 0o644); err != nil {
		return err
	}
	args := []string{"kubelet", "--config=" + k.path("kubelet.yaml"), "--kubeconfig=" + k.path("kubelet.kubeconfig"), "--hostname-override=" + NodeName, "--node-ip=" + nodeAddress,
		"--root-dir=" + k.path("k"), "--cert-dir=" + k.path("k/pki")}
	for _, f := range o.Flags {
		args = append(args, strings.ReplaceAll(f, "DIR", k.dir))
	}
	p, err := k.start(args...)
	if err != nil {
		return err
	}
	if err := p.readyIn(ctx, kubernetesPatience, func(ctx context.Context) error {
		if err := answersOK(ctx, "http://127.0.0.1:10248/healthz"); err != nil {
			return err
		}
		_, err := k.Kubectl(ctx, "wait", "--for=condition=Ready", "node/"+NodeName, "--timeout=10s")
		return err
	}); err != nil {
		p.kill()
		return err
	}
	k.kubelet = p
	return nil
}

// RestartKubelet ends the kubelet, as `systemctl stop` does, and runs it as o says. Containers go on. After an error there is none, and it may be called again.
func (k *Kubernetes) RestartKubelet(ctx context.Context, o Kubelet) error {
	p := k.kubelet
	k.kubelet = nil
	if err := p.stop(); err != nil {
		return err
	}
	return k.startKubelet(ctx, o)
}

// Kubeconfig is the path of the administrator's kubeconfig, and KubeletKubeconfig that of the kubelet's.
func (k *Kubernetes) Kubeconfig() string { return k.path("admin.kubeconfig") }

func (k *Kubernetes) KubeletKubeconfig() string { return k.path("kubelet.kubeconfig") }

// Kubectl runs kubectl as the administrator and returns its output.
func (k *Kubernetes) Kubectl(ctx context.Context, args ...string) (string, error) {
	bin, err := KubernetesDir()
	if err != nil {
		return "", err
	}
	return command(ctx, append([]string{filepath.Join(bin, "kubectl"), "--kubeconfig", k.Kubeconfig(), "--cache-dir", k.path("kubectl")}, args...)...)
}

// Apply has kubectl apply a manifest, YAML or JSON.
func (k *Kubernetes) Apply(ctx context.Context, manifest string) error {
	name := k.path("manifest.yaml")
	if err := os.WriteFile(name, []byte(manifest), 0o600); err != nil {
		return err
	}
	_, err := k.Kubectl(ctx, "apply", "-f", name)
	return err
}

// Close kills all of Kubernetes; containers go on. Its error names what had ended before. It may be called again.
func (k *Kubernetes) Close() error {
	all := k.daemons
	if k.kubelet != nil {
		all = append(all, k.kubelet)
	}
	k.daemons, k.kubelet = nil, nil
	var errs []error
	for _, p := range all {
		select {
		case <-p.done:
			errs = append(errs, p.stop())
		default:
			p.kill()
		}
	}
	return errors.Join(errs...)
}

func dialTCP(address string) error {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	return c.Close()
}

// answersOK is nil if a URL of this machine answers 200.
func answersOK(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	t := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	defer t.CloseIdleConnections()
	resp, err := t.RoundTrip(req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, resp.Status)
	}
	return nil
}

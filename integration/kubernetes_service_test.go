package integration_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/lagproxy"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

// TestKubernetesService applies deploy/service to a real Kubernetes, with NATS as a process outside: its pods live before NATS is there, are ready after, convert an image of a registry, and are
// not started again because NATS is. That namespace, which takes restricted pods alone, takes them.
func TestKubernetesService(t *testing.T) {
	if !ownMachine(t) {
		return
	}
	registry, err := node.StartDockerRegistry(t.Context(), tempDir(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { registry.Close() })
	at := func(address string) string { // for pods, and, as registries on loopback need no TLS, for this process and containerd
		t.Helper()
		p, err := lagproxy.ListenOn(address, "unix", registry.Socket, lagproxy.Link{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		return p.Addr()
	}
	here, forPods := at("127.0.0.1:0"), at("192.0.2.1:0")
	image := pushRandom(t, here, "team/app", 3_000_000, 1_000_000)
	dir, checkout := tempDir(t), checkout(t)
	c := exec.CommandContext(t.Context(), "go", "run", "./deploy/image", "-program", "streamctl", filepath.Join(dir, "image"))
	c.Dir = checkout
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	run(t, "crane", "push", filepath.Join(dir, "image"), here+"/streamctl:v1")

	const token, password = "0123456789abcdefghij", "p0123456789abcdef"
	s := &kubeService{t: t, token: token, n: startKubernetes(t, node.Options{})}
	nats := newNATS(t, "192.0.2.1:4222", "authorization: {user: streamctl, password: "+password+"}\n")
	s.apply(checkout, dir, here, forPods, "nats://192.0.2.1:4222", password)

	// NATS is not there.
	eventually(t, "two pods that run", func() bool { return len(s.pods("{.status.phase}", "Running", "{.metadata.name}")) >= 2 })
	if out := s.kubectl("get", "pods", "--output=jsonpath={.items[*].status.containerStatuses[0].ready}"); strings.Contains(out, "true") {
		t.Errorf("ready without NATS: %s", out)
	}
	nats.run()
	s.kubectl("rollout", "status", "deployment/streamctl", "--timeout=5m")
	pods := s.addresses()

	// What one pod is asked the other knows.
	var op service.Operation
	s.ask(pods[0], http.MethodPost, "/v1/registries/"+forPods+"/repositories/team/app/_images/"+image.Digest.String()+"/_artifacts", &op)
	within(t, 5*time.Minute, "the end", func() bool {
		s.ask(pods[1], http.MethodGet, "/v1/operations/"+op.ID, &op)
		return op.State.Ended()
	})
	if n, err := artifactsAt(t.Context(), image); op.State != service.Succeeded || n != 1 || err != nil {
		t.Errorf("%s, %d artifacts, %v", show(op), n, err)
	}

	// NATS is killed, and comes back: nobody is started again for that.
	nats.cmd.Process.Kill()
	nats.cmd.Wait()
	s.kubectl("wait", "--for=condition=Ready=false", "pods", "--all", "--timeout=2m")
	nats.start()
	s.kubectl("wait", "--for=condition=Ready", "pods", "--all", "--timeout=2m")
	if out := s.kubectl("get", "pods", "--output=jsonpath={.items[*].status.containerStatuses[0].restartCount}"); strings.Trim(out, "0 ") != "" {
		t.Errorf("started again: %s", out)
	}
	// A pod that is to end does so in order.
	name := strings.Fields(s.kubectl("get", "pods", "--output=jsonpath={.items[*].metadata.name}"))[0]
	s.kubectl("delete", "pod", name, "--timeout=50s")
	s.kubectl("rollout", "status", "deployment/streamctl", "--timeout=5m")
}

// kubeService is deploy/service in a Kubernetes.
type kubeService struct {
	t      *testing.T
	n      *node.Node
	token  string
	client *http.Client
}

func (s *kubeService) kubectl(args ...string) string {
	s.t.Helper()
	out, err := s.n.Kubernetes.Kubectl(s.t.Context(), append([]string{"--namespace=streaming-service"}, args...)...)
	if err != nil {
		logs, _ := s.n.Kubernetes.Kubectl(context.WithoutCancel(s.t.Context()), "--namespace=streaming-service", "describe", "pods,deployments,replicasets")
		s.t.Fatal(err, logs, s.logs())
	}
	return out
}

// logs are what the pods have said: kubectl does not get them from this kubelet.
func (s *kubeService) logs() string {
	var b strings.Builder
	files, _ := filepath.Glob("/var/log/pods/streaming-service_*/*/*.log")
	for _, f := range files {
		text, _ := os.ReadFile(f)
		fmt.Fprintf(&b, "%s\n%s", f, text)
	}
	return b.String()
}

// apply does what docs/service.md says, with an overlay of deploy/service.
func (s *kubeService) apply(checkout, dir, image, registry, natsURL, password string) {
	s.t.Helper()
	cert, err := node.MakeCertificate(dir)
	if err != nil {
		s.t.Fatal(err)
	}
	ca, err := os.ReadFile(cert.CAFile)
	if err != nil {
		s.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	s.client = &http.Client{Timeout: time.Minute, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: node.CertificateName}}}

	deployed, own := filepath.Join(checkout, "deploy/service"), filepath.Join(dir, "own")
	config, err := os.ReadFile(filepath.Join(deployed, "serve.toml"))
	if err != nil {
		s.t.Fatal(err)
	}
	text := string(config)
	for _, r := range [][2]string{{"nats://nats.streaming-service:4222", natsURL}, {`name = "registry.example.com"`, fmt.Sprintf("name = %q\nplain_http = true", registry)}} {
		if !strings.Contains(text, r[0]) {
			s.t.Fatalf("serve.toml has no %s", r[0])
		}
		text = strings.Replace(text, r[0], r[1], 1)
	}
	base, err := filepath.Rel(own, deployed)
	if err != nil {
		s.t.Fatal(err)
	}
	for name, text := range map[string]string{
		"own/kustomization.yaml": fmt.Sprintf("resources: [%s]\nimages: [{name: streamctl, newName: %s/streamctl, newTag: v1}]\n", base, image) +
			"configMapGenerator: [{name: streamctl, namespace: streaming-service, behavior: replace, files: [serve.toml]}]\n",
		"own/serve.toml": text,
		"config.json":    "{}", "admin.token": s.token, "session.key": strings.Repeat("k", 32), "password": password,
	} {
		if err := errors.Join(os.MkdirAll(own, 0o755), os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644)); err != nil {
			s.t.Fatal(err)
		}
	}
	s.kubectl("create", "namespace", "streaming-service")
	from := func(name string) string { return "--from-file=" + filepath.Join(dir, name) }
	s.kubectl("create", "secret", "generic", "streamctl", from("config.json"), from("admin.token"), from("session.key"))
	s.kubectl("create", "secret", "generic", "streamctl-nats", from("password"))
	s.kubectl("create", "secret", "tls", "streamctl-tls", "--cert="+cert.CertFile, "--key="+cert.KeyFile)
	s.kubectl("apply", "-k", own)
}

// pods are what a JSONPath says of those pods of which another has a value.
func (s *kubeService) pods(path, value, say string) (list []string) {
	s.t.Helper()
	for line := range strings.Lines(s.kubectl("get", "pods", "--output=jsonpath={range .items[*]}"+path+" "+say+"{\"\\n\"}{end}")) {
		if got, said, _ := strings.Cut(strings.TrimSpace(line), " "); got == value {
			list = append(list, said)
		}
	}
	return list
}

// addresses are those of the pods that are ready: two or more, as the HorizontalPodAutoscaler will have it.
func (s *kubeService) addresses() (list []string) {
	s.t.Helper()
	eventually(s.t, "two pods that are ready", func() bool {
		list = s.pods(`{.status.conditions[?(@.type=="Ready")].status}`, "True", "{.status.podIP}")
		return len(list) >= 2
	})
	return list
}

// ask asks a pod.
func (s *kubeService) ask(pod, method, path string, answer any) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), method, "https://"+pod+":8443"+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+s.token)
	if method == http.MethodPost {
		req.Header.Set("Content-Type", "application/json")
		req.Body = io.NopCloser(strings.NewReader("{}"))
	}
	resp, err := s.client.Do(req)
	if err != nil {
		s.t.Fatal(err, s.logs())
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 300 {
		err = errors.New(resp.Status)
	}
	if err == nil {
		err = json.Unmarshal(body, answer)
	}
	if err != nil {
		s.t.Fatalf("%s %s: %v\n%s\n%s", method, path, err, body, s.logs())
	}
}

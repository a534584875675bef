package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// published are Azure's examples: of "Artifact streaming in Azure Container Registry", and of the references of `az acr artifact-streaming`,
// `az acr manifest list-referrers` and `az acr import`.
var published = []string{
	`az config set defaults.acr="mystreamingtest"`,
	`az acr import --source docker.io/jupyter/all-spark-notebook:latest -t jupyter/all-spark-notebook:latest`,
	`az acr artifact-streaming create --image jupyter/all-spark-notebook:latest`,
	`az acr manifest list-referrers -n jupyter/all-spark-notebook:latest`,
	`az acr artifact-streaming operation show --repository jupyter/all-spark-notebook --id c015067a-7463-4a5a-9168-3b17dbe42ca3`,
	`az acr artifact-streaming operation cancel --repository jupyter/all-spark-notebook --id c015067a-7463-4a5a-9168-3b17dbe42ca3`,
	`az acr artifact-streaming update --repository jupyter/all-spark-notebook --enable-streaming true`,
	`az acr artifact-streaming operation show --image jupyter/all-spark-notebook:newtag`,
	`az acr artifact-streaming update --repository jupyter/all-spark-notebook --enable-streaming false`,
	`az acr import -n myregistry --source sourceregistry.azurecr.io/sourcerepository:sourcetag`,
	`az acr import -n myregistry --source docker.io/library/hello-world:latest -t targetrepository:targettag`,
	`az acr import -n myregistry --source myprivateregistry.azurecr.io/hello-world:latest -u username -p password`,
	`az acr import -n myregistry --source sourcerepository:sourcetag -t targetrepository:targettag -r /subscriptions/.../registries/sourceRegistry`,
	`az acr import -n myregistry --source sourceregistry.azurecr.io/sourcerepository:sourcetag --no-wait`,
	`az acr import -n myregistry --source sourceregistry.eastus.geo.azurecr.io/sourcerepository:sourcetag`,
	`az acr manifest list-referrers -r myregistry -n hello-world:latest`,
	`az acr manifest list-referrers myregistry.azurecr.io/hello-world:latest`,
	`az acr manifest list-referrers -r myregistry -n hello-world@sha256:abc123`,
	`az acr artifact-streaming show -n myregistry --repository MyRepo`,
	`az acr artifact-streaming update -n myregistry --repository MyRepo --enable-streaming True`,
	`az acr artifact-streaming create -n myregistry -t MyImage`,
	`az acr artifact-streaming operation show -n myregistry --repository MyRepo --id OperationId`,
	`az acr artifact-streaming operation cancel -n myregistry --repository MyRepo --id OperationId`,
}

// TestAzureExamples runs the counterpart of each of Azure's published examples as it stands in docs/cli.md, one after the other: Azure's registries and Docker Hub are played by
// registries here, reached under their own names by HTTPS through a proxy. What stands for an operation's ID or a digest is replaced by one.
func TestAzureExamples(t *testing.T) {
	doc, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile("(?m)^\\| `(az [^`]*)` \\| `([^`]*)` \\|").FindAllStringSubmatch(string(doc), -1)
	var examples []string
	for _, row := range rows {
		examples = append(examples, row[1])
	}
	if !slices.Equal(examples, published) {
		t.Fatalf("docs/cli.md has\n%s\nand Azure\n%s", strings.Join(examples, "\n"), strings.Join(published, "\n"))
	}
	w := newCloud(t)
	for _, row := range rows {
		w.row(row[1], row[2])
	}
}

// cloud is a world of registries with Azure's names, and a conversion service for two of them.
type cloud struct {
	t          *testing.T
	registries map[string]*registrytest.Registry
	env        []string
	id, digest string // of the last operation, and of hello-world
	stop       func() // of what stalls
}

// What stands in examples for something that is there only when they run.
const (
	exampleID     = "c015067a-7463-4a5a-9168-3b17dbe42ca3"
	exampleDigest = "sha256:abc123"
)

func newCloud(t *testing.T) *cloud {
	w := &cloud{t: t, registries: map[string]*registrytest.Registry{}, stop: func() {}}
	for _, name := range []string{"index.docker.io", "mystreamingtest.azurecr.io", "myregistry.azurecr.io", "sourceregistry.azurecr.io", "myprivateregistry.azurecr.io"} {
		w.registries[name] = registrytest.Start(t, registrytest.Options{})
	}
	w.registries["sourceregistry.eastus.geo.azurecr.io"] = w.registries["sourceregistry.azurecr.io"]
	w.put("index.docker.io", "jupyter/all-spark-notebook:latest")
	w.put("index.docker.io", "library/hello-world:latest")
	w.digest = w.put("myprivateregistry.azurecr.io", "hello-world:latest")
	w.put("sourceregistry.azurecr.io", "sourcerepository:sourcetag")
	w.put("myregistry.azurecr.io", "myimage:latest")
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	for registry, image := range map[string]string{"sourceregistry.azurecr.io": "sourcerepository:sourcetag", "myprivateregistry.azurecr.io": "hello-world:latest"} {
		succeed(t, "create", w.registries[registry].Host()+"/"+image) // so that there are referrers to be copied
	}
	w.registries["myprivateregistry.azurecr.io"].RequireBasic("username", "password")

	dir := t.TempDir()
	cert, err := node.MakeCertificate(dir, "index.docker.io", "*.azurecr.io", "sourceregistry.eastus.geo.azurecr.io")
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(program, filepath.Join(dir, "streamctl")); err != nil {
		t.Fatal(err)
	}
	w.env = append(os.Environ(), "STREAMCTL_TEST_MAIN=run", "PATH="+dir+":"+os.Getenv("PATH"), "HTTPS_PROXY="+w.proxy(cert), "NO_PROXY=", "SSL_CERT_FILE="+cert.CAFile,
		"DOCKER_CONFIG="+dir, "XDG_CONFIG_HOME="+filepath.Join(dir, "config"), "XDG_CACHE_HOME="+filepath.Join(dir, "cache"))
	w.env = append(w.env, "STREAMCTL_SERVER="+w.serve(dir))
	return w
}

// put puts an image that is like no other, and returns its digest.
func (w *cloud) put(registry, image string) string {
	w.t.Helper()
	return putImageOf(w.t, w.registries[registry].Host()+"/"+image, "linux/amd64", image).String()
}

// proxy is an HTTP proxy at which every host is the registry of that name.
func (w *cloud) proxy(cert node.Certificate) string {
	pair, err := tls.LoadX509KeyPair(cert.CertFile, cert.KeyFile)
	if err != nil {
		w.t.Fatal(err)
	}
	front := httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if registry := w.registries[r.Host]; registry != nil {
			registry.ServeHTTP(rw, r)
			return
		}
		http.Error(rw, "no such host", http.StatusBadGateway)
	}))
	front.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	front.StartTLS()
	w.t.Cleanup(func() { front.CloseClientConnections(); front.Close() })
	proxy := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		up, err := net.Dial("tcp", front.Listener.Addr().String())
		if err != nil || r.Method != http.MethodConnect {
			http.Error(rw, "want CONNECT", http.StatusBadGateway)
			return
		}
		down, _, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			up.Close()
			return
		}
		io.WriteString(down, "HTTP/1.1 200 OK\r\n\r\n")
		go func() {
			io.Copy(up, down)
			up.Close()
		}()
		io.Copy(down, up)
		down.Close()
	}))
	w.t.Cleanup(proxy.Close)
	return proxy.URL
}

// serve runs `streamctl serve` for two of the registries until the test ends, and returns its URL, of which it tells as it would tell systemd.
func (w *cloud) serve(dir string) string {
	t := w.t
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	config := filepath.Join(dir, "serve.toml")
	text := fmt.Sprintf("listen = '127.0.0.1:0'\ndata_dir = %q\n[times]\nreconcile = '200ms'\n[[registry]]\nname = 'mystreamingtest.azurecr.io'\n[[registry]]\nname = 'myregistry.azurecr.io'\n", filepath.Join(dir, "data"))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(dir, "streamctl"), "serve", "--config", config)
	cmd.Env = append(w.env, "NOTIFY_SOCKET="+socket.LocalAddr().String())
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		w.stop()
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("streamctl serve: %v", err)
		}
		if t.Failed() {
			t.Log(log.String())
		}
	})
	socket.SetReadDeadline(time.Now().Add(time.Minute))
	told := make([]byte, 1024)
	n, err := socket.Read(told)
	if err != nil {
		t.Fatalf("streamctl serve tells nothing: %v\n%s", err, log.String())
	}
	m := regexp.MustCompile(`^READY=1\nSTATUS=serving at (http://\S+)$`).FindStringSubmatch(string(told[:n]))
	if m == nil {
		t.Fatalf("streamctl serve tells %q", told[:n])
	}
	return m[1]
}

// sh runs a command line and returns what it prints on standard output and standard error.
func (w *cloud) sh(line string) (stdout, stderr string, err error) {
	ctx, cancel := context.WithTimeout(w.t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", line+"\nstatus=$?\nwait\nexit $status")
	cmd.Env = w.env
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// must is sh for what the examples need to be there.
func (w *cloud) must(line string) (stderr string) {
	w.t.Helper()
	_, stderr, err := w.sh(line)
	if err != nil {
		w.t.Fatalf("%s: %v\n%s", line, err, stderr)
	}
	return stderr
}

// begin begins a conversion that does not end by itself, and remembers its operation.
func (w *cloud) begin(registry, image, flags string) {
	w.t.Helper()
	w.stop()
	layer := lastLayer(w.t, w.registries[registry].Host()+"/"+image).String()
	w.stop = w.registries[registry].Inject(func(r *http.Request) bool { return r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, layer) }, -1, registrytest.Stall(1000))
	w.id = scraped.FindStringSubmatch(w.must("streamctl create --no-wait " + flags + " -n " + registry + " -t " + image))[1]
}

// row runs the counterpart of an example.
func (w *cloud) row(example, ours string) {
	w.t.Helper()
	eventually := false
	switch {
	case strings.Contains(example, "operation cancel") && strings.Contains(example, "MyRepo"):
		w.put("myregistry.azurecr.io", "myrepo:latest")
		w.begin("myregistry.azurecr.io", "myrepo:latest", "")
	case strings.Contains(example, "operation cancel"):
		w.begin("mystreamingtest.azurecr.io", "jupyter/all-spark-notebook:latest", "--force")
	case strings.Contains(example, ":newtag"):
		w.put("mystreamingtest.azurecr.io", "jupyter/all-spark-notebook:newtag")
		eventually = true // it is converted because it was pushed
	case strings.Contains(example, "operation show -n myregistry"):
		w.put("myregistry.azurecr.io", "myrepo:shown")
		w.id = scraped.FindStringSubmatch(w.must("streamctl create --no-wait -n myregistry.azurecr.io -t myrepo:shown"))[1]
	}
	line := strings.NewReplacer(exampleID, w.id, exampleDigest, w.digest).Replace(ours)
	stdout, stderr, err := w.sh(line)
	for deadline := time.Now().Add(time.Minute); eventually && err != nil && time.Now().Before(deadline); {
		stdout, stderr, err = w.sh(line)
	}
	if err != nil {
		w.t.Fatalf("%s: %v\n%s%s", line, err, stdout, stderr)
	}
	if m := scraped.FindStringSubmatch(stderr); m != nil {
		w.id = m[1]
	}
	w.stop()
	for verb, want := range map[string]string{
		"streamctl import": `manifests, `, "streamctl create": `Succeeded`, "streamctl list-referrers": `application/vnd\.streaming-snapshotter\.artifact\.v1`,
		"operation show": `ArtifactStreaming|status +(NotStarted|Running|Succeeded)`, "operation cancel": `status +Canceled`,
		"--enable-streaming true": ` Active `, "--enable-streaming True": ` Active `, "--enable-streaming false": ` Inactive `, "streamctl show": `Inactive`,
	} {
		if strings.Contains(line, verb) && !regexp.MustCompile(want).MatchString(stdout) {
			w.t.Errorf("%s prints %q, want %s", line, stdout, want)
		}
	}
}

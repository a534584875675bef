package integration_test

import (
	"archive/tar"
	"bufio"
	"context"
	crand "crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/lagproxy"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
)

// replica is a process of the conversion service, or the NATS server, that can be killed and started again.
type replica struct {
	t    *testing.T
	name string // of the process, as operations have it
	args []string

	mu   sync.Mutex
	cmd  *exec.Cmd
	addr string
}

// replicaProgram builds integration/replica.
var replicaProgram = sync.OnceValues(func() (string, error) {
	root, err := node.Root()
	if err != nil {
		return "", err
	}
	program := filepath.Join(os.TempDir(), "replica")
	c := exec.Command("go", "build", "-o", program, "./integration/replica")
	c.Dir = root
	if out, err := c.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return program, nil
})

func startReplica(t *testing.T, args ...string) *replica {
	t.Helper()
	r := &replica{t: t, name: fmt.Sprintf("%x", rand.Uint64()), args: args}
	r.start()
	t.Cleanup(func() {
		r.cmd.Process.Signal(syscall.SIGTERM)
		if err := r.cmd.Wait(); err != nil {
			t.Errorf("replica %q: %v", args, err)
		}
	})
	return r
}

// start starts the process and reads its address.
func (r *replica) start() {
	r.t.Helper()
	program, err := replicaProgram()
	if err != nil {
		r.t.Fatal(err)
	}
	c := exec.Command(program, append(slices.Clone(r.args), "-name", r.name)...)
	c.Stderr = r.t.Output()
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		r.t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		r.t.Fatalf("replica %q: %v", r.args, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cmd, r.addr = c, strings.TrimSpace(line)
}

// restart kills the process, by SIGKILL, and starts another one.
func (r *replica) restart() {
	r.t.Helper()
	r.cmd.Process.Kill()
	r.cmd.Wait()
	r.start()
}

func (r *replica) address() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.addr
}

// call asks the replica.
func (r *replica) call(ctx context.Context, method, path string, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+r.address()+path, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, body)
	}
	return json.Unmarshal(body, answer)
}

// serviceRegistry runs docker-registry in dir, behind a link, until the test ends, and returns its host.
func serviceRegistry(t *testing.T, dir string, link lagproxy.Link) string {
	t.Helper()
	registry, err := node.StartDockerRegistry(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { registry.Close() })
	proxy, err := lagproxy.Listen("unix", registry.Socket, link)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { proxy.Close() })
	return proxy.Addr()
}

// pushRandom pushes an image with layers of random bytes.
func pushRandom(t *testing.T, host, repository string, sizes ...int64) service.Image {
	t.Helper()
	var layers []v1.Layer
	dir := tempDir(t)
	for _, n := range sizes {
		l, err := ociimage.Layer(dir, func(w *ociimage.Tar) error {
			if err := w.WriteHeader(&tar.Header{Name: "random", Mode: 0o644, Size: n}); err != nil {
				return err
			}
			_, err := io.CopyN(w, crand.Reader, n)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, l)
	}
	img, err := ociimage.Image(v1.Config{}, layers...)
	if err == nil {
		err = ociimage.Push(t.Context(), img, host+"/"+repository+":v1")
	}
	if err != nil {
		t.Fatal(err)
	}
	h, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return service.Image{Registry: host, Repository: repository, Digest: digest.Digest(h.String())}
}

// show prints an operation whole.
func show(op service.Operation) string {
	raw, _ := json.Marshal(op)
	return string(raw)
}

// artifactsAt verifies the artifacts that are attached to an image, and returns how many there are.
func artifactsAt(ctx context.Context, i service.Image) (int, error) {
	p, ref, err := converter.Open(i.String(), converter.OpenOptions{})
	if err != nil {
		return 0, err
	}
	list, err := converter.ListReferrers(ctx, p, ref, nil, artifact.ArtifactType)
	if err != nil || len(list) == 0 {
		return 0, err
	}
	for _, a := range list {
		if _, err := converter.Verify(ctx, p, a.Digest.String(), converter.VerifyOptions{Jobs: 1}); err != nil {
			return 0, fmt.Errorf("artifact %s of %s: %w", a.Digest, i, err)
		}
	}
	return len(list), nil
}

// TestServiceKilled kills processes of the conversion service while they convert images: each image gets one operation, that succeeds, and
// one artifact, that is good whenever it is looked at.
func TestServiceKilled(t *testing.T) {
	replicas, images, kills := 2, 6, 3
	if os.Getenv("FULL") != "" {
		replicas, images, kills = 3, 30, 20
	}
	dir := tempDir(t)
	host := serviceRegistry(t, dir, lagproxy.Link{})
	queue := startReplica(t, "nats", "-dir", tempDir(t))
	k := &killer{t: t}
	for range replicas {
		k.replicas = append(k.replicas, startReplica(t, "serve", "-nats", queue.address(), "-registry", host))
	}
	for n := range images {
		size := 2_000_000 + rand.Int64N(4_000_000)
		k.images = append(k.images, pushRandom(t, host, fmt.Sprintf("team/app%d", n), size, size/2, 1000))
	}
	ctx, stop := context.WithCancel(t.Context())
	var looking sync.WaitGroup
	looking.Go(func() { k.look(ctx) })
	for _, i := range k.images {
		k.submit(i)
	}
	for range kills {
		k.kill()
	}
	within(t, 10*time.Minute, "all operations end", func() bool {
		return !slices.ContainsFunc(k.operations(), func(op service.Operation) bool { return !op.State.Ended() })
	})
	stop()
	looking.Wait()
	k.check(dir)
}

// killer has the processes of the service, and the images that they are asked to convert.
type killer struct {
	t        *testing.T
	replicas []*replica
	images   []service.Image
}

// any asks the replicas, beginning with one at random, until one answers: others may have been killed.
func (k *killer) any(method, path string, answer any) {
	k.t.Helper()
	first := rand.IntN(len(k.replicas))
	var err error
	within(k.t, time.Minute, "a replica answers", func() bool {
		for n := range k.replicas {
			if err = k.replicas[(first+n)%len(k.replicas)].call(k.t.Context(), method, path, answer); err == nil {
				return true
			}
		}
		k.t.Log(err)
		return false
	})
}

// submit asks for a conversion twice, as a client does that did not hear the answer.
func (k *killer) submit(i service.Image) {
	k.t.Helper()
	var first, second service.Operation
	path := "/acr/v1/" + i.Repository + "/_streaming/" + i.Digest.String()
	k.any(http.MethodPost, path, &first)
	k.any(http.MethodPost, path, &second)
	if first.ID == "" || first.ID != second.ID {
		k.t.Errorf("operations %s and %s of %s", first.ID, second.ID, i)
	}
}

func (k *killer) operations() (list []service.Operation) {
	k.t.Helper()
	k.any(http.MethodGet, "/v1/operations", &list)
	return list
}

// kill kills a replica that converts, at any moment of it. An image over which four have died already is spared: it would be called failed.
func (k *killer) kill() {
	k.t.Helper()
	within(k.t, 5*time.Minute, "a replica that can be killed", func() bool {
		ops := k.operations()
		for _, n := range rand.Perm(len(k.replicas)) {
			r := k.replicas[n]
			var mine []service.Operation
			for _, op := range ops {
				if op.State == service.Running && op.Worker == r.name {
					mine = append(mine, op)
				}
			}
			if len(mine) > 0 && !slices.ContainsFunc(mine, func(op service.Operation) bool { return op.Attempt > 3 }) {
				time.Sleep(rand.N(300 * time.Millisecond)) // the fault itself: at any moment of what they do
				r.restart()
				return true
			}
		}
		return false
	})
}

// look looks at the images again and again, as nodes do: what is attached is good.
func (k *killer) look(ctx context.Context) {
	for ctx.Err() == nil {
		for _, i := range k.images {
			if _, err := artifactsAt(ctx, i); err != nil && ctx.Err() == nil {
				k.t.Error(err)
			}
		}
	}
}

// check looks at what is there in the end.
func (k *killer) check(dir string) {
	k.t.Helper()
	ops := k.operations()
	if len(ops) != len(k.images) {
		k.t.Errorf("%d operations of %d images", len(ops), len(k.images))
	}
	attempts := 0
	for _, op := range ops {
		if attempts += op.Attempt; op.State != service.Succeeded || len(op.Artifacts) != 1 || op.Artifacts[0].Existed {
			k.t.Errorf("%s", show(op))
		}
	}
	if attempts == len(ops) {
		k.t.Error("no operation was interrupted")
	}
	k.t.Logf("%d operations in %d attempts", len(ops), attempts)
	for _, i := range k.images {
		if n, err := artifactsAt(k.t.Context(), i); err != nil || n != 1 {
			k.t.Errorf("%s has %d artifacts, %v", i, n, err)
		}
		// The image, its artifact, and the tag that lists it: no manifest was ever made beside them.
		revisions, err := filepath.Glob(filepath.Join(dir, "registry/docker/registry/v2/repositories", i.Repository, "_manifests/revisions/sha256/*"))
		if err != nil || len(revisions) != 3 {
			k.t.Errorf("%s has the manifests %q, %v", i, revisions, err)
		}
	}
}

// TestServiceLarge converts a large image (with FULL, of a gigabyte) in a service with all in one process: it says how far it is each
// second, is cancelled within two, and the process, killed in the middle and started again, still knows the operation and finishes it.
func TestServiceLarge(t *testing.T) {
	layer, link := int64(16<<20), lagproxy.Link{Bandwidth: 25 << 20} // so that there is a middle
	full := os.Getenv("FULL") != ""
	if full {
		layer, link = 256<<20, lagproxy.Link{}
	}
	host := serviceRegistry(t, tempDir(t), link)
	r := startReplica(t, "serve", "-dir", tempDir(t), "-registry", host)
	i := pushRandom(t, host, "team/large", layer, layer, layer, layer)
	call := func(method, path string) (op service.Operation) {
		t.Helper()
		if err := r.call(t.Context(), method, "/acr/v1/team/large/"+path, &op); err != nil {
			t.Fatal(err)
		}
		return op
	}
	// until polls the operation, and with FULL looks at how often it says how far it is.
	until := func(id, what string, ok func(service.Operation) bool) (op service.Operation) {
		t.Helper()
		var told service.Operation
		within(t, 5*time.Minute, what, func() bool {
			op = call(http.MethodGet, "_operations/"+id)
			gap := op.Progress.Updated.Sub(told.Progress.Updated)
			if full && op.State == service.Running && op.Attempt == told.Attempt && !told.Progress.Updated.IsZero() && gap > time.Second {
				t.Errorf("%v after the last progress: %s", gap, show(op))
			}
			if told = op; op.State == service.Failed {
				t.Fatal(show(op))
			}
			return ok(op)
		})
		return op
	}
	part := func(n int64) func(service.Operation) bool {
		return func(op service.Operation) bool {
			return op.Progress.Total > 4*layer && op.Progress.Bytes > op.Progress.Total/n
		}
	}
	ended := func(op service.Operation) bool { return op.State.Ended() }

	first := call(http.MethodPost, "_streaming/"+i.Digest.String())
	until(first.ID, "a quarter", part(4))
	asked := time.Now()
	call(http.MethodPost, "_operations/"+first.ID+":cancel")
	first = until(first.ID, "the end", ended)
	took := first.End.Sub(asked)
	if n, err := artifactsAt(t.Context(), i); first.State != service.Canceled || n != 0 || err != nil || full && took > 2*time.Second {
		t.Errorf("after %v: %s, %d artifacts, %v", took, show(first), n, err)
	}
	t.Logf("cancelled after %v", took)

	second := call(http.MethodPost, "_streaming/"+i.Digest.String())
	until(second.ID, "the half", part(2))
	r.restart()
	if op := call(http.MethodGet, "_operations/"+second.ID); op.ID != second.ID {
		t.Error(show(op))
	}
	second = until(second.ID, "the end", ended)
	if n, err := artifactsAt(t.Context(), i); second.State != service.Succeeded || second.Attempt != 2 || n != 1 || err != nil {
		t.Errorf("%s, %d artifacts, %v", show(second), n, err)
	}
}

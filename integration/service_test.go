package integration_test

import (
	"archive/tar"
	"context"
	crand "crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/client"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/lagproxy"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
)

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

// TestServiceKilled kills processes of the conversion service, and the NATS servers that they share, while they convert images: each image
// gets one operation, that succeeds, and one artifact, that is good whenever it is looked at.
func TestServiceKilled(t *testing.T) {
	for _, c := range []struct{ servers, replicas, images, kills int }{{1, 2, 6, 4}, {1, 3, 30, 24}, {3, 3, 12, 12}} {
		full := c.replicas > 2
		if full != (os.Getenv("FULL") != "") {
			continue
		}
		t.Run(fmt.Sprintf("%d servers", c.servers), func(t *testing.T) {
			dir := tempDir(t)
			host := serviceRegistry(t, dir, lagproxy.Link{})
			k := &killer{t: t, host: host, servers: startNATS(t, c.servers), killed: map[string]bool{}}
			for range c.replicas {
				// Few requests a second: there is a middle of each conversion, and most of what it is to be killed in is between two of them.
				k.replicas = append(k.replicas, startService(t, host, fmt.Sprintf("requests_per_second = 10\n[times]\nlease = '5s'\n[nats]\nurl = %q\n", urls(k.servers))))
			}
			for range c.images {
				k.push()
			}
			ctx, stop := context.WithCancel(t.Context())
			var looking sync.WaitGroup
			looking.Go(func() { k.look(ctx) })
			for _, i := range k.list() {
				k.submit(i)
			}
			for n := range c.kills {
				if n%4 == 1 {
					k.servers[rand.IntN(len(k.servers))].restart()
				} else {
					k.kill()
				}
			}
			for _, r := range k.replicas { // each knows of all
				within(t, 10*time.Minute, "all operations end", func() bool { return k.ended(r.client.Operations(t.Context(), service.Filter{Limit: 1000})) })
			}
			stop()
			looking.Wait()
			k.check(dir)
		})
	}
}

// killer has the processes of the service, and the images that they are asked to convert.
type killer struct {
	t        *testing.T
	host     string // of the registry
	servers  []*daemon
	replicas []*serviceDaemon
	killed   map[string]bool // processes of the service that converted, by their names

	mu     sync.Mutex
	images []service.Image
}

// push pushes an image more.
func (k *killer) push() service.Image {
	k.t.Helper()
	size := 2_000_000 + rand.Int64N(4_000_000)
	i := pushRandom(k.t, k.host, fmt.Sprintf("team/app%d", len(k.list())), size, size/2, 1000)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.images = append(k.images, i)
	return i
}

func (k *killer) list() []service.Image {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.images)
}

// any asks the replicas, beginning with one at random, until one answers: others may have been killed.
func (k *killer) any(ask func(*client.Client) error) {
	k.t.Helper()
	first := rand.IntN(len(k.replicas))
	within(k.t, time.Minute, "a replica answers", func() bool {
		for n := range k.replicas {
			err := ask(k.replicas[(first+n)%len(k.replicas)].client)
			if err == nil {
				return true
			}
			k.t.Log(err)
		}
		return false
	})
}

// submit asks for a conversion twice, as a client does that did not hear the answer.
func (k *killer) submit(i service.Image) {
	k.t.Helper()
	var ops [2]service.Operation
	for n := range ops {
		k.any(func(c *client.Client) (err error) {
			ops[n], _, err = c.Submit(k.t.Context(), service.Request{Image: i})
			return err
		})
	}
	if ops[0].ID == "" || ops[0].ID != ops[1].ID {
		k.t.Errorf("operations %s and %s of %s", ops[0].ID, ops[1].ID, i)
	}
}

func (k *killer) operations() (list []service.Operation) {
	k.t.Helper()
	k.any(func(c *client.Client) (err error) {
		list, err = c.Operations(k.t.Context(), service.Filter{Limit: 1000})
		return err
	})
	return list
}

// kill kills a replica that converts, at any moment of it: an image more if there is none left. Whoever converts still, when it is asked at the last moment, is interrupted.
func (k *killer) kill() {
	k.t.Helper()
	within(k.t, 5*time.Minute, "a replica that can be killed", func() bool {
		for _, i := range rand.Perm(len(k.replicas)) {
			r := k.replicas[i]
			if k.victim(r) == "" {
				continue
			}
			time.Sleep(rand.N(300 * time.Millisecond)) // the fault itself: at any moment of what they do
			if process := k.victim(r); process != "" {
				r.restart()
				k.killed[process] = true
				return true
			}
		}
		if k.ended(k.operations(), nil) { // that was too fast
			k.submit(k.push())
		}
		return false
	})
}

// ended says that there is nothing left to be done.
func (k *killer) ended(list []service.Operation, err error) bool {
	if err != nil {
		k.t.Log(err)
	}
	return err == nil && len(list) == len(k.list()) && !slices.ContainsFunc(list, func(op service.Operation) bool { return !op.State.Ended() })
}

// victim returns the name of a replica's process if that converts, as it says itself. An image over which four have died already is spared: it would be called failed.
func (k *killer) victim(r *serviceDaemon) (process string) {
	list, err := r.client.Operations(k.t.Context(), service.Filter{Limit: 1000, States: []service.State{service.Running}})
	if err != nil {
		k.t.Log(err) // NATS may have been killed
		return ""
	}
	for _, op := range list {
		switch {
		case !strings.HasPrefix(op.Worker, r.name+"-") || k.killed[op.Worker]: // what the process before it had is taken over when its lease is over
		case op.Attempt > 3:
			return ""
		default:
			process = op.Worker
		}
	}
	return process
}

// look looks at the images again and again, as nodes do: what is attached is good.
func (k *killer) look(ctx context.Context) {
	for ctx.Err() == nil {
		for _, i := range k.list() {
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
	if len(ops) != len(k.list()) {
		k.t.Errorf("%d operations of %d images", len(ops), len(k.list()))
	}
	attempts := 0
	for _, op := range ops {
		if attempts += op.Attempt; op.State != service.Succeeded || len(op.Artifacts) != 1 || op.Artifacts[0].Existed {
			k.t.Errorf("%s", show(op))
		}
	}
	if attempts-len(ops) < len(k.killed) {
		k.t.Errorf("%d operations were begun %d times, although %d processes were killed over them", len(ops), attempts, len(k.killed))
	}
	k.t.Logf("%d operations in %d attempts, %d processes killed", len(ops), attempts, len(k.killed))
	for _, i := range k.list() {
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
	r := startService(t, host, "[nats]\n")
	i := pushRandom(t, host, "team/large", layer, layer, layer, layer)
	submit := func() service.Operation {
		t.Helper()
		op, existed, err := r.client.Submit(t.Context(), service.Request{Image: i})
		if err != nil || existed {
			t.Fatal(show(op), existed, err)
		}
		return op
	}
	answer := func(id string) service.Operation {
		t.Helper()
		op, err := r.client.Operation(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		return op
	}
	// until polls the operation, and with FULL looks at how often it says how far it is.
	until := func(id, what string, ok func(service.Operation) bool) (op service.Operation) {
		t.Helper()
		var told service.Operation
		within(t, 5*time.Minute, what, func() bool {
			op = answer(id)
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

	first := submit()
	until(first.ID, "a quarter", part(4))
	asked := time.Now()
	if _, err := r.client.Cancel(t.Context(), first.ID, ""); err != nil {
		t.Fatal(err)
	}
	first = until(first.ID, "the end", ended)
	took := first.End.Sub(asked)
	if n, err := artifactsAt(t.Context(), i); first.State != service.Canceled || n != 0 || err != nil || full && took > 2*time.Second {
		t.Errorf("after %v: %s, %d artifacts, %v", took, show(first), n, err)
	}
	t.Logf("cancelled after %v", took)

	second := submit()
	until(second.ID, "the half", part(2))
	r.restart()
	if op := answer(second.ID); op.ID != second.ID {
		t.Error(show(op))
	}
	second = until(second.ID, "the end", ended)
	if n, err := artifactsAt(t.Context(), i); second.State != service.Succeeded || second.Attempt != 2 || n != 1 || err != nil {
		t.Errorf("%s, %d artifacts, %v", show(second), n, err)
	}
}

package integration_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestCommit makes an image of what a container of a streamed image has written, with containerd's client as `nerdctl commit` does. It runs beside the streamed one at once, and can be exported once
// the layers of that are fetched.
func TestCommit(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref, committed := registry.Host()+"/app:v1", registry.Host()+"/committed:v1"
	img := pushSmall(t, ref, 44)
	run(t, "streamctl", "create", "--record", "", ref)
	n := startNode(t, node.Options{Stream: []string{registry.Host() + "/*"}})
	pullStreamed(t, registry, n, ref)
	id := n.ID("writes")
	ctr(t, n, "run", "--detach", node.NoShares, "--null-io", "--snapshotter", n.Snapshotter(), ref, id, "/guest", "pause")
	pid, err := n.PID(id)
	if err != nil {
		t.Fatal(err)
	}
	text := []byte("written in a container")
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/root/written", pid), text, 0o644); err != nil {
		t.Fatal(err)
	}
	commit(t, n, id, committed)
	out, err := n.Run(t.Context(), committed, nil, "/guest", "sum", "/written")
	if want := fmt.Sprintf("%x /written\ndone\n", sha256.Sum256(text)); err != nil || out != want {
		t.Errorf("the new image prints %q, %v, want %q", out, err, want)
	}
	sumIn(t, n, committed, 44, "/data")
	if got := layersHere(t, n, img); got != 0 {
		t.Errorf("%d layers were downloaded", got)
	}

	archive := filepath.Join(tempDir(t), "image.tar")
	wantNoLayer(t, n, img, "images", "export", archive, committed)
	fetchLayers(t, n, ref)
	ctr(t, n, "images", "export", archive, committed)
	run(t, "skopeo", "copy", "--quiet", "--dest-tls-verify=false", "oci-archive:"+archive, "docker://"+committed)
	run(t, "crane", "validate", "--insecure", "--remote", committed)
}

// commit makes name an image of a container's, with one more layer: what its snapshot has beyond its parent.
func commit(t *testing.T, n *node.Node, container, name string) {
	t.Helper()
	cl, err := client.New(n.Socket(), client.WithDefaultNamespace(node.Namespace))
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	ctx, done, err := cl.WithLease(namespaces.WithNamespace(t.Context(), node.Namespace))
	if err != nil {
		t.Fatal(err)
	}
	defer done(ctx)
	c, err := cl.ContainerService().Get(ctx, container)
	if err != nil {
		t.Fatal(err)
	}
	base, err := cl.GetImage(ctx, c.Image)
	if err != nil {
		t.Fatal(err)
	}
	cs := cl.ContentStore()
	manifest, err := images.Manifest(ctx, cs, base.Target(), base.Platform())
	if err != nil {
		t.Fatal(err)
	}
	config, err := base.Spec(ctx)
	if err != nil {
		t.Fatal(err)
	}
	layer, err := rootfs.CreateDiff(ctx, c.SnapshotKey, cl.SnapshotService(c.Snapshotter), cl.DiffService())
	if err != nil {
		t.Fatal(err)
	}
	diffID, err := images.GetDiffID(ctx, cs, layer)
	if err != nil {
		t.Fatal(err)
	}
	config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, diffID)
	manifest.Layers = append(manifest.Layers, layer)
	write := func(mediaType string, v any, labels map[string]string) ocispec.Descriptor {
		b, err := json.Marshal(v)
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
		if err == nil {
			err = content.WriteBlob(ctx, cs, d.Digest.String(), bytes.NewReader(b), d, content.WithLabels(labels))
		}
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	manifest.Config = write(manifest.Config.MediaType, config, nil)
	labels := map[string]string{"containerd.io/gc.ref.content.config": manifest.Config.Digest.String()}
	for i, l := range manifest.Layers {
		labels[fmt.Sprintf("containerd.io/gc.ref.content.l.%d", i)] = l.Digest.String()
	}
	target := write(manifest.MediaType, manifest, labels)
	if _, err := cl.ImageService().Create(ctx, images.Image{Name: name, Target: target}); err != nil {
		t.Fatal(err)
	}
}

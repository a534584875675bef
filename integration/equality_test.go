package integration_test

import (
	"context"
	"fmt"
	"path"
	"regexp"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/crane"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs/erofstest"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// pushBuilt pushes an image that integration/images has built.
func pushBuilt(t *testing.T, ref, name string) {
	t.Helper()
	if err := ociimage.Push(t.Context(), builtImage(t, name), ref); err != nil {
		t.Fatal(err)
	}
}

// builtImage returns an image that integration/images has built.
func builtImage(t *testing.T, name string) v1.Image {
	t.Helper()
	img, err := ociimage.Built(name)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestEquality holds the tree that a container sees when it is streamed, in each way to mount, against what containerd's
// overlayfs snapshotter gives, and runs the image.
func TestEquality(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	plain := startNode(t, node.Options{Pull: node.Plain})
	nodes := map[string]*node.Node{}
	for _, mode := range modes {
		nodes[mode] = startNode(t, node.Options{Mode: mode, Stream: []string{registry.Host() + "/*"}})
	}
	for _, name := range []string{"weird", "weird-files", "debian-base", "nginx", "node-app", "postgres", "python-app"} {
		t.Run(name, func(t *testing.T) {
			ref := registry.Host() + "/" + name + ":latest"
			ready := regexp.MustCompile(`(?m)^` + name + `: ready`)
			if name == "weird" {
				ready = regexp.MustCompile(`(?m)^done$`)
				push(t, ref, func(dir string, guest []byte) (v1.Image, error) { return ociimage.Weird(t.Context(), dir, guest) })
			} else {
				pushBuilt(t, ref, name)
			}
			run(t, "streamctl", "create", "--record", "", ref)
			begin := time.Now()
			want := walkContainer(t, plain, ref)
			untimed := unpackTimes(want, begin)
			forgetTimes(want, untimed)
			for _, mode := range modes {
				t.Run(mode, func(t *testing.T) {
					n := nodes[mode]
					pullStreamed(t, registry, n, ref)
					got := walkContainer(t, n, ref)
					forgetTimes(got, untimed)
					if diff := erofstest.Diff(got, want); diff != "" {
						t.Errorf("streamed is not what overlayfs shows:\n%s", diff)
					}
					out, err := n.Run(t.Context(), ref, []string{"EXIT_ON_READY=1"})
					if err != nil {
						t.Fatal(err)
					}
					if !ready.MatchString(out) {
						t.Errorf("the container did not say that it is ready:\n%s", out)
					}
				})
			}
		})
	}
}

// unpackTimes returns the directories to which no layer gives a time: unpacked, they have the time of unpacking.
func unpackTimes(entries []erofstest.Entry, begin time.Time) map[string]bool {
	unpacked := map[string]bool{}
	for _, e := range entries {
		if e.Mode&unix.S_IFMT == unix.S_IFDIR && e.Mtime >= begin.Unix() {
			unpacked[e.Path] = true
		}
	}
	return unpacked
}

// forgetTimes clears the times of paths.
func forgetTimes(entries []erofstest.Entry, paths map[string]bool) {
	for i, e := range entries {
		if paths[e.Path] {
			entries[i].Mtime, entries[i].MtimeNsec = 0, 0
		}
	}
}

// pullStreamed pulls ref and fails if any of the image's layers was downloaded.
func pullStreamed(t *testing.T, registry *registrytest.Registry, n *node.Node, ref string) {
	t.Helper()
	registry.Reset()
	if err := n.Pull(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if got := layerDownloads(t, registry, ref); len(got) > 0 {
		t.Fatalf("a pull that streams downloaded %q", got)
	}
}

// layerDownloads lists the requests for blobs that are layers of the image.
func layerDownloads(t *testing.T, registry *registrytest.Registry, ref string) []string {
	t.Helper()
	layers := map[string]bool{}
	for _, l := range manifest(t, ref).Layers {
		layers[l.Digest.String()] = true
	}
	var downloads []string
	for _, q := range registry.Requests() {
		if registrytest.OfBlobs(q) && layers[path.Base(q.Path)] {
			downloads = append(downloads, fmt.Sprintf("%s %s: %d bytes", q.Method, q.Path, q.Bytes))
		}
	}
	return downloads
}

// manifest fetches the image manifest of ref for this machine.
func manifest(t *testing.T, ref string) *v1.Manifest {
	t.Helper()
	img, err := crane.Pull(ref, crane.WithContext(t.Context()), crane.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// walkContainer pulls ref if need be and lists the root that a container of it would see.
func walkContainer(t *testing.T, n *node.Node, ref string) []erofstest.Entry {
	t.Helper()
	if err := n.Pull(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	dir := tempDir(t)
	if err := n.Mount(t.Context(), ref, dir); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := n.Unmount(context.WithoutCancel(t.Context()), dir); err != nil {
			t.Error(err)
		}
	}()
	entries, err := erofstest.Walk(dir, erofstest.Options{MaxContent: erofstest.AllContent, NoDirNlink: true, NoGhosts: true})
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

package integration_test

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestNextVersion pulls an image and reads all of it, then its next version, in which one file in the middle of the largest layer has grown by
// 100 bytes (FULL with python-app, 278 MB, where it is one of the Python packages): that costs what has changed, and the index of the layer.
func TestNextVersion(t *testing.T) {
	name := "postgres"
	if os.Getenv("FULL") != "" {
		name = "python-app"
	}
	registry := startRegistry(t, registrytest.Options{})
	pause, ref := registry.Host()+"/pause:1", registry.Host()+"/app:"
	pushPause(t, pause)
	img := builtImage(t, name)
	next, size := nextVersion(t, img)
	for tag, img := range map[string]v1.Image{"1": img, "2": next} {
		if err := ociimage.Push(t.Context(), img, ref+tag); err != nil {
			t.Fatal(err)
		}
		run(t, "streamctl", "create", "--record", "", ref+tag)
	}
	n := startNode(t, node.Options{Pause: pause, Stream: []string{registry.Host() + "/*"}})
	for _, tag := range []string{"1", "2"} {
		registry.Reset()
		if err := n.Pull(t.Context(), ref+tag); err != nil {
			t.Fatal(err)
		}
		requests, pulled := registry.Count()
		readImage(t, n, ref+tag)
		allRequests, all := registry.Count()
		t.Logf("version %s of %d bytes: %d bytes, %d requests to pull; %d, %d with everything read", tag, size, pulled, requests, all, allRequests)
		if tag == "2" && all*100 > size*2 {
			t.Errorf("version 2 has cost %d bytes, %.1f %% of the image's %d", all, 100*float64(all)/float64(size), size)
		}
	}
}

// nextVersion returns img with one file in the middle of its largest layer 100 bytes larger, and the size of img, as it is pulled.
func nextVersion(t *testing.T, img v1.Image) (next v1.Image, size int64) {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	largest, most := 0, int64(0)
	for i, l := range layers {
		n, err := l.Size()
		if err != nil {
			t.Fatal(err)
		}
		if size += n; n > most {
			largest, most = i, n
		}
	}
	if layers[largest], err = ociimage.Layer(tempDir(t), func(w *ociimage.Tar) error { return grow(w, layers[largest], most) }); err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	base := *config
	base.RootFS.DiffIDs, base.History = nil, nil
	if next, err = mutate.ConfigFile(empty.Image, &base); err != nil {
		t.Fatal(err)
	}
	if next, err = mutate.AppendLayers(next, layers...); err != nil {
		t.Fatal(err)
	}
	return next, size
}

// grow copies layer, of size bytes, to w. The first script of some size behind its middle gets 100 bytes more.
func grow(w *ociimage.Tar, layer v1.Layer, size int64) error {
	r, err := layer.Uncompressed()
	if err != nil {
		return err
	}
	defer r.Close()
	entries, read, grown := tar.NewReader(r), int64(0), false
	for {
		h, err := entries.Next()
		if errors.Is(err, io.EOF) {
			if !grown {
				return errors.New("no file to grow")
			}
			return nil
		}
		if err != nil {
			return err
		}
		more := ""
		if read += h.Size; !grown && read > size && h.Size > 10_000 && (strings.HasSuffix(h.Name, ".py") || strings.HasSuffix(h.Name, ".sql")) {
			more, grown = strings.Repeat("#", 99)+"\n", true
			h.Size += int64(len(more))
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(w, io.MultiReader(entries, strings.NewReader(more))); err != nil {
			return err
		}
	}
}

// readImage reads every file of ref.
func readImage(t *testing.T, n *node.Node, ref string) {
	t.Helper()
	dir := tempDir(t)
	if err := n.Mount(t.Context(), ref, dir); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := n.Unmount(t.Context(), dir); err != nil {
			t.Error(err)
		}
	}()
	if err := node.ReadFiles(dir); err != nil {
		t.Fatal(err)
	}
}

// Command image makes a container image of one of our programs and nothing else, for amd64 and arm64: streaming-snapshotter, which is the DaemonSet's installer, or streamctl, the
// conversion service. It is an OCI layout with one index. It takes the go command and no Docker engine. The same commit and Go release give the same digests.
package main

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/buildinfo"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	commands = "github.com/streaming-snapshotter/streaming-snapshotter/cmd/"
	path     = "usr/local/bin/" // of the program in the image
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: image [-program NAME] DIR\n\nMakes DIR, which is replaced, an OCI layout. Run it in the module's checkout.")
	}
	program := flag.String("program", "streaming-snapshotter", "or streamctl")
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	digest, err := write(ctx, *program, flag.Arg(0), []string{"amd64", "arm64"}, "-trimpath") // so that the checkout may be anywhere
	if err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
	fmt.Printf("%s: %s\n", flag.Arg(0), digest)
}

// write makes dir a layout with the image for each of archs, of program, which is built with flags, and returns the digest of its index.
func write(ctx context.Context, program, dir string, archs []string, flags ...string) (v1.Hash, error) {
	scratch, err := os.MkdirTemp("", "image")
	if err != nil {
		return v1.Hash{}, err
	}
	defer os.RemoveAll(scratch)
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, arch := range archs {
		binary := filepath.Join(scratch, arch)
		if err := build(ctx, program, arch, binary, flags); err != nil {
			return v1.Hash{}, err
		}
		img, err := image(binary, program, arch)
		if err != nil {
			return v1.Hash{}, err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
	}
	if err := os.RemoveAll(dir); err != nil {
		return v1.Hash{}, err
	}
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		return v1.Hash{}, err
	}
	if err := p.AppendIndex(index); err != nil {
		return v1.Hash{}, err
	}
	return index.Digest()
}

func build(ctx context.Context, program, arch, binary string, flags []string) error {
	c := exec.CommandContext(ctx, "go", slices.Concat([]string{"build", "-buildvcs=auto", "-ldflags=-s -w"}, flags, []string{"-o", binary, commands + program})...)
	c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOFLAGS=", "GOAMD64=v1", "GOARM64=v8.0")
	c.Stderr = os.Stderr
	if err := c.Run(); err != nil {
		return fmt.Errorf("%s: %w", c, err)
	}
	return nil
}

// image is that of one platform.
func image(binary, program, arch string) (v1.Image, error) {
	text, err := os.ReadFile(binary)
	if err != nil {
		return nil, err
	}
	info, err := buildinfo.Read(bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := pack(&b, path+program, text); err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil }, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	img, err := mutate.AppendLayers(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON), layer)
	if err != nil {
		return nil, err
	}
	f, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	f = f.DeepCopy()
	f.OS, f.Architecture, f.Created = "linux", arch, v1.Time{Time: time.Unix(0, 0).UTC()}
	f.History = []v1.History{{Created: f.Created, CreatedBy: "deploy/image"}}
	f.Config = v1.Config{
		Entrypoint: []string{"/" + path + program},
		Env:        []string{"PATH=/usr/local/bin"},
		Labels:     map[string]string{"org.opencontainers.image.title": program, "org.opencontainers.image.version": info.Main.Version},
	}
	return mutate.ConfigFile(img, f)
}

// pack writes the layer: the program, of no time.
func pack(w io.Writer, name string, text []byte) error {
	t := tar.NewWriter(w)
	var errs []error
	for _, dir := range []string{"usr/", "usr/local/", "usr/local/bin/"} {
		errs = append(errs, t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755, ModTime: time.Unix(0, 0)}))
	}
	errs = append(errs, t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755, Size: int64(len(text)), ModTime: time.Unix(0, 0)}))
	_, err := t.Write(text)
	return errors.Join(append(errs, err, t.Close())...)
}

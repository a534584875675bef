// Package integration_test runs everything end to end: the real containerd, runc, crictl and ctr, Debian's docker-registry (which has the
// referrers tag schema only) and a registry with the referrers API that counts, the streaming snapshotter and streamctl as they are built.
//
// The whole test program runs in namespaces of its own (node.Isolate), so that nothing is left behind however it ends. It builds the binaries under test itself; containerd and the other tools
// are taken from .build/bin (`make build`).
package integration_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

func TestMain(m *testing.M) {
	if os.Getenv(insideSystemd) != "" { // that host has nothing but what TestSystemd has given it
		os.Exit(m.Run())
	}
	node.Isolate()
	if os.Getenv(node.MachineVariable) != "" { // the program that has started this one has built all
		os.Exit(m.Run())
	}
	if err := build(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// build builds the programs under test and puts them and the tools first in PATH.
func build() error {
	root, err := node.Root()
	if err != nil {
		return err
	}
	bin := filepath.Join(os.TempDir(), "bin")
	c := exec.Command("go", "build", "-o", bin+"/", "./cmd/...")
	c.Dir = root
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("go build ./cmd/...: %w\n%s", err, out)
	}
	if err := os.Setenv("PATH", strings.Join([]string{bin, filepath.Join(root, ".build/bin"), os.Getenv("PATH")}, ":")); err != nil {
		return err
	}
	for _, tool := range []string{"containerd", "containerd-shim-runc-v2", "ctr", "crictl", "crane", "notation", "runc", "skopeo", "docker-registry"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%w (`make build` builds the Go tools, .ci/run lists the packages of the others)", err)
		}
	}
	return nil
}

// modes are the ways to mount; every test about what a container sees runs in each.
var modes = [...]string{"file", "loop", "tree"}

// startNode runs a node until the test ends, and shows its logs if the test has failed. Nothing is fetched in the background unless o says so: tests count
// what containers ask for.
func startNode(t *testing.T, o node.Options) *node.Node {
	t.Helper()
	if !strings.Contains(o.Config, "background_bandwidth") {
		o.Config += "\nbackground_bandwidth = \"0\"\n"
	}
	n, err := node.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(n.Logs())
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// startRegistry runs a counting registry with the referrers API until the test ends.
func startRegistry(t *testing.T, o registrytest.Options) *registrytest.Registry {
	t.Helper()
	if o.Dir == "" {
		o.Dir = tempDir(t)
	}
	return registrytest.Start(t, o)
}

// tempDir is t.TempDir with a short name: paths below it become mount options.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "t")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// run runs a program to its end and returns its output; failure ends the test.
func run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := tryRun(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func tryRun(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out, errs bytes.Buffer
	c := exec.CommandContext(t.Context(), args[0], args[1:]...)
	c.Stdout, c.Stderr = &out, &errs
	if err := c.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w\n%s%s", strings.Join(args, " "), err, out.String(), errs.String())
	}
	return out.String(), nil
}

// guest is the program that runs in the tests' own images.
var guest = sync.OnceValues(func() ([]byte, error) {
	root, err := node.Root()
	if err != nil {
		return nil, err
	}
	return ociimage.Guest(context.Background(), root, os.TempDir())
})

// goImage is the image of this machine's Go toolchain. To make and convert it takes longer than the tests that use it: they share it, and what
// goRegistry and pushGo keep.
var goImage = sync.OnceValues(func() (v1.Image, error) {
	dir, err := os.MkdirTemp("", "go")
	if err != nil {
		return nil, err
	}
	return ociimage.Go(context.Background(), dir)
})

// goRegistry is startRegistry with all blobs of former such registries.
func goRegistry(t *testing.T) *registrytest.Registry {
	t.Helper()
	return startRegistry(t, registrytest.Options{Dir: filepath.Join(os.TempDir(), "goblobs")})
}

// pushGo pushes goImage with its artifact to ref, in a goRegistry.
func pushGo(t *testing.T, ref string) {
	t.Helper()
	img, err := goImage()
	if err != nil {
		t.Fatal(err)
	}
	if err := ociimage.Push(t.Context(), img, ref); err != nil {
		t.Fatal(err)
	}
	run(t, "streamctl", "create", "--record", filepath.Join(os.TempDir(), "gorecord"), ref)
}

// pushSmall pushes ociimage.Small to ref, and pushPause the pause image.
func pushSmall(t *testing.T, ref string, seed uint64) v1.Image {
	t.Helper()
	return push(t, ref, func(dir string, guest []byte) (v1.Image, error) { return ociimage.Small(dir, guest, seed) })
}

func pushPause(t *testing.T, ref string) { t.Helper(); push(t, ref, ociimage.Pause) }

func push(t *testing.T, ref string, image func(dir string, guest []byte) (v1.Image, error)) v1.Image {
	t.Helper()
	g, err := guest()
	if err != nil {
		t.Fatal(err)
	}
	img, err := image(tempDir(t), g)
	if err != nil {
		t.Fatal(err)
	}
	if err := ociimage.Push(t.Context(), img, ref); err != nil {
		t.Fatal(err)
	}
	return img
}

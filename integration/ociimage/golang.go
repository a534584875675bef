package ociimage

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// program is what the container compiles and runs.
const program = `package main

import (
	"fmt"
	"runtime"
)

func main() {
	fmt.Printf("hello: compiled and run by %s in the container\n", runtime.Version())
}
`

const (
	goroot  = "usr/local/go" // in the image
	gocache = "root/.cache/go-build"
)

// Go makes an image of this machine's Go toolchain, with the layers that a Dockerfile would have given it, whiteouts and an opaque directory
// among them. Its command compiles and runs program.
func Go(ctx context.Context, dir string) (v1.Image, error) {
	root, err := output(ctx, dir, "go", "env", "GOROOT")
	if err != nil {
		return nil, err
	}
	source, err := writeProgram(ctx, dir)
	if err != nil {
		return nil, err
	}
	top := func(path string) string { first, _, _ := strings.Cut(path, "/"); return first }
	steps := []func(*Tar) error{
		baseLayer,
		func(t *Tar) error { // the toolchain
			return t.Tree(goroot, root, func(path string) bool { return top(path) == "src" || top(path) == "test" || top(path) == "misc" })
		},
		func(t *Tar) error { // the standard library, and much that nobody needs
			return t.Tree(goroot, root, func(path string) bool {
				switch top(path) {
				case ".", "src", "test", "misc":
					return false
				}
				return true
			})
		},
		func(t *Tar) error { // "RUN rm -rf ..."
			for _, name := range []string{"test", "misc", "api"} {
				if err := t.Whiteout(goroot + "/" + name); err != nil {
					return err
				}
			}
			if err := t.Dir(0o755, goroot+"/doc"); err != nil { // removed and made anew
				return err
			}
			if err := t.Opaque(goroot + "/doc"); err != nil {
				return err
			}
			if err := t.File(goroot+"/doc/README", 0o644, []byte("See https://go.dev/doc.\n")); err != nil {
				return err
			}
			return t.File("etc/motd", 0o644, []byte("Go, streamed.\n")) // replaces the base layer's
		},
		func(t *Tar) error { // "RUN go build": what it left in the cache
			return t.Tree(gocache, filepath.Join(dir, "cache"), nil)
		},
		func(t *Tar) error { return t.Tree("src/hello", source, nil) },
	}
	var layers []v1.Layer
	for _, s := range steps {
		l, err := Layer(dir, s)
		if err != nil {
			return nil, err
		}
		layers = append(layers, l)
	}
	return Image(v1.Config{
		Cmd:        []string{"go", "run", "."},
		WorkingDir: "/src/hello",
		Env: []string{"PATH=/" + goroot + "/bin", "HOME=/root", "GOROOT=/" + goroot, "GOCACHE=/" + gocache, "GOTOOLCHAIN=local", "GOFLAGS=-trimpath",
			"GOTELEMETRY=off", "GO111MODULE=on", "CGO_ENABLED=0"},
	}, layers...)
}

// baseLayer is what a program without libc needs of a distribution.
func baseLayer(t *Tar) error {
	if err := t.Dir(0o755, "etc", "root", "root/.cache", "src", "usr", "usr/local"); err != nil {
		return err
	}
	if err := t.Dir(0o777|os.ModeSticky, "tmp"); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"etc/motd":   "A base image.\n",
		"etc/passwd": "root:x:0:0:root:/root:/sbin/nologin\n",
		"etc/group":  "root:x:0:\n",
	} {
		if err := t.File(name, 0o644, []byte(text)); err != nil {
			return err
		}
	}
	return nil
}

// writeProgram writes program's module and builds it once, so that dir/cache holds what the image's last RUN would have left.
func writeProgram(ctx context.Context, dir string) (source string, err error) {
	source = filepath.Join(dir, "hello")
	if err := os.Mkdir(source, 0o755); err != nil {
		return "", err
	}
	for name, text := range map[string]string{"main.go": program, "go.mod": "module hello\n\ngo 1.21\n"} {
		if err := os.WriteFile(filepath.Join(source, name), []byte(text), 0o644); err != nil {
			return "", err
		}
	}
	_, err = output(ctx, source, "env", "GOCACHE="+filepath.Join(dir, "cache"), "GOFLAGS=-trimpath", "GOTOOLCHAIN=local", "CGO_ENABLED=0",
		"go", "build", "-o", filepath.Join(dir, "hello.bin"), ".")
	return source, err
}

// output runs a program in dir and returns what it has printed, trimmed.
func output(ctx context.Context, dir string, args ...string) (string, error) {
	c := exec.CommandContext(ctx, args[0], args[1:]...)
	c.Dir = dir
	var errs strings.Builder
	c.Stderr = &errs
	b, err := c.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, errs.String())
	}
	return strings.TrimSpace(string(b)), nil
}

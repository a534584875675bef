package ociimage

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Guest builds integration/guest of the module at root as a static program and returns its bytes.
func Guest(ctx context.Context, root, dir string) ([]byte, error) {
	out := filepath.Join(dir, "guest")
	c := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, "./integration/guest")
	c.Dir = root
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := c.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build guest: %w\n%s", err, bytes.TrimSpace(b))
	}
	return os.ReadFile(out)
}

// guestLayer has the program and what containerd expects of every image.
func guestLayer(dir string, guest []byte) (v1.Layer, error) {
	return Layer(dir, func(t *Tar) error {
		if err := t.Dir(0o755, "etc"); err != nil {
			return err
		}
		return t.File("guest", 0o755, guest)
	})
}

// Pause makes a pause image of the guest.
func Pause(dir string, guest []byte) (v1.Image, error) {
	l, err := guestLayer(dir, guest)
	if err != nil {
		return nil, err
	}
	return Image(v1.Config{Entrypoint: []string{"/guest", "pause"}}, l)
}

// Small makes an image of three layers and a few megabytes that do not compress: a file of /data is deleted and another replaced by the
// third. Its command sums the files below /data. Images of different seeds share the first layer only.
func Small(dir string, guest []byte, seed uint64) (v1.Image, error) {
	base, err := guestLayer(dir, guest)
	if err != nil {
		return nil, err
	}
	source := rand.New(rand.NewPCG(seed, 0))
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(source.Uint32())
		}
		return b
	}
	data, err := Layer(dir, func(t *Tar) error {
		if err := t.Dir(0o755, "data", "data/small"); err != nil {
			return err
		}
		for i := range 200 {
			if err := t.File(fmt.Sprintf("data/small/%03d", i), 0o644, random(100+source.IntN(8000))); err != nil {
				return err
			}
		}
		for _, name := range []string{"data/big", "data/deleted", "data/replaced"} {
			if err := t.File(name, 0o644, random(1<<20)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	change, err := Layer(dir, func(t *Tar) error {
		if err := t.Whiteout("data/deleted"); err != nil {
			return err
		}
		return t.File("data/replaced", 0o600, random(300<<10))
	})
	if err != nil {
		return nil, err
	}
	return Image(v1.Config{Cmd: []string{"/guest", "sum", "/data"}}, base, data, change)
}

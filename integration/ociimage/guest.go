package ociimage

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

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

// Small makes an image of three layers and two megabytes that do not compress: a file of /data is deleted and another replaced by the
// third. Its command sums the files below /data. Images of different seeds share the first layer only.
func Small(dir string, guest []byte, seed uint64) (v1.Image, error) {
	base, err := guestLayer(dir, guest)
	if err != nil {
		return nil, err
	}
	below, above := smallFiles(seed)
	data, err := Layer(dir, func(t *Tar) error {
		if err := t.Dir(0o755, "data", "data/small"); err != nil {
			return err
		}
		return t.files(below)
	})
	if err != nil {
		return nil, err
	}
	change, err := Layer(dir, func(t *Tar) error {
		if err := t.Whiteout("data/deleted"); err != nil {
			return err
		}
		return t.files(above)
	})
	if err != nil {
		return nil, err
	}
	return Image(v1.Config{Cmd: []string{"/guest", "sum", "/data"}}, base, data, change)
}

// SmallSums returns the SHA-256 of the files that a container of Small sees below /data, by path.
func SmallSums(seed uint64) map[string]string {
	below, above := smallFiles(seed)
	delete(below, "data/deleted")
	maps.Copy(below, above)
	sums := map[string]string{}
	for name, b := range below {
		sums["/"+name] = fmt.Sprintf("%x", sha256.Sum256(b))
	}
	return sums
}

// smallFiles are the files of Small's second and third layer.
func smallFiles(seed uint64) (below, above map[string][]byte) {
	source := rand.New(rand.NewPCG(seed, 0))
	below = map[string][]byte{}
	for i := range 200 {
		below[fmt.Sprintf("data/small/%03d", i)] = random(source, 100+source.IntN(8000))
	}
	for _, name := range []string{"data/big", "data/deleted", "data/replaced"} {
		below[name] = random(source, 1<<20)
	}
	return below, map[string][]byte{"data/replaced": random(source, 300<<10)}
}

func random(source *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(source.Uint32())
	}
	return b
}

// files writes regular files in the order of their names.
func (t *Tar) files(files map[string][]byte) error {
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := t.File(name, 0o644, files[name]); err != nil {
			return err
		}
	}
	return nil
}

// Layers makes an image of n layers: the guest and then one file of /data each. Its command sums the files.
func Layers(dir string, guest []byte, n int, seed uint64) (v1.Image, error) {
	base, err := guestLayer(dir, guest)
	if err != nil {
		return nil, err
	}
	layers := []v1.Layer{base}
	for i := 1; i < n; i++ {
		l, err := Layer(dir, func(t *Tar) error {
			return t.File(fmt.Sprintf("data/%03d", i), 0o644, fmt.Appendf(nil, "layer %d of image %d\n", i, seed))
		})
		if err != nil {
			return nil, err
		}
		layers = append(layers, l)
	}
	return Image(v1.Config{Cmd: []string{"/guest", "sum", "/data"}}, layers...)
}

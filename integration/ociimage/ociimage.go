// Package ociimage makes images for the demo and the tests, layer by layer, and pushes them. Layers are what a function writes into a tar; their bytes are kept in files, not in memory.
package ociimage

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
)

// Layer makes a gzip layer of what write puts into a tar; its file is in dir.
func Layer(dir string, write func(*Tar) error) (v1.Layer, error) {
	f, err := os.CreateTemp(dir, "layer-*.tar.gz")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	z := gzip.NewWriter(f)
	t := &Tar{Writer: tar.NewWriter(z)}
	if err := write(t); err != nil {
		return nil, err
	}
	for _, c := range []io.Closer{t, z, f} {
		if err := c.Close(); err != nil {
			return nil, err
		}
	}
	return tarball.LayerFromFile(f.Name(), tarball.WithMediaType(types.OCILayer))
}

// Tar writes entries with plain defaults: root's, of a fixed time. Names have no leading slash.
type Tar struct{ *tar.Writer }

// epoch is the time of everything that has no other.
func epoch() time.Time { return time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC) }

// Put writes an entry; its size is body's.
func (t *Tar) Put(h tar.Header, body []byte) error {
	h.Size = int64(len(body))
	if h.ModTime.IsZero() {
		h.ModTime = epoch()
	}
	if err := t.WriteHeader(&h); err != nil {
		return fmt.Errorf("%s: %w", h.Name, err)
	}
	_, err := t.Write(body)
	return err
}

// Dir writes directories.
func (t *Tar) Dir(mode fs.FileMode, names ...string) error {
	for _, name := range names {
		if err := t.Put(tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: tarMode(mode)}, nil); err != nil {
			return err
		}
	}
	return nil
}

// File writes a regular file.
func (t *Tar) File(name string, mode fs.FileMode, body []byte) error {
	return t.Put(tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: tarMode(mode)}, body)
}

// Whiteout says that layers below have name no longer.
func (t *Tar) Whiteout(name string) error {
	return t.File(filepath.Join(filepath.Dir(name), ".wh."+filepath.Base(name)), 0, nil)
}

// Opaque says that of directory name nothing of the layers below is left.
func (t *Tar) Opaque(name string) error { return t.File(filepath.Join(name, ".wh..wh..opq"), 0, nil) }

// Tree writes what is under dir as under name. Entries that skip says true of (by their path below dir) are left out, with all below them.
func (t *Tar) Tree(name, dir string, skip func(path string) bool) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if skip != nil && skip(rel) {
			if d.IsDir() {
				return filepath.SkipDir
			}
			return nil
		}
		return t.copy(filepath.Join(name, rel), path, d)
	})
}

func (t *Tar) copy(name, path string, d fs.DirEntry) error {
	fi, err := d.Info()
	if err != nil {
		return err
	}
	link := ""
	if fi.Mode()&fs.ModeSymlink != 0 {
		if link, err = os.Readlink(path); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(fi, link)
	if err != nil {
		return err
	}
	h.Name, h.Format = name, tar.FormatPAX
	if fi.IsDir() {
		h.Name += "/"
	}
	h.Uid, h.Gid, h.Uname, h.Gname = 0, 0, "", ""
	if err := t.WriteHeader(h); err != nil {
		return err
	}
	if !fi.Mode().IsRegular() {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(t, f)
	return err
}

// tarMode is Go's mode as tar has it.
func tarMode(m fs.FileMode) int64 {
	mode := int64(m.Perm())
	for bit, to := range map[fs.FileMode]int64{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if m&bit != 0 {
			mode |= to
		}
	}
	return mode
}

// Image puts layers together to an OCI image for this machine.
func Image(config v1.Config, layers ...v1.Layer) (v1.Image, error) {
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.ConfigFile(img, &v1.ConfigFile{
		OS: "linux", Architecture: runtime.GOARCH, Created: v1.Time{Time: epoch()}, Config: config, RootFS: v1.RootFS{Type: "layers"},
	})
	if err != nil {
		return nil, err
	}
	return mutate.AppendLayers(img, layers...)
}

// BuiltDir is where integration/images puts what it builds: $OUT, or ~/.cache/test-images.
func BuiltDir() (string, error) {
	if dir := os.Getenv("OUT"); dir != "" {
		return dir, nil
	}
	cache, err := os.UserCacheDir()
	return filepath.Join(cache, "test-images"), err
}

// Built returns an image that integration/images has built.
func Built(name string) (v1.Image, error) {
	dir, err := BuiltDir()
	if err != nil {
		return nil, err
	}
	img, err := FromLayout(filepath.Join(dir, "oci", name))
	if err != nil {
		return nil, fmt.Errorf("%w (`make images` builds the test images)", err)
	}
	return img, nil
}

// FromLayout returns the only image of an OCI layout.
func FromLayout(dir string) (v1.Image, error) {
	p, err := layout.FromPath(dir)
	if err != nil {
		return nil, err
	}
	index, err := p.ImageIndex()
	if err != nil {
		return nil, err
	}
	m, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	if len(m.Manifests) != 1 {
		return nil, fmt.Errorf("%s holds %d images", dir, len(m.Manifests))
	}
	return index.Image(m.Manifests[0].Digest)
}

// Push pushes img to a registry on loopback as ref ("127.0.0.1:5000/repo:tag").
func Push(ctx context.Context, img v1.Image, ref string) error {
	tag, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		return err
	}
	return remote.Write(tag, img, remote.WithContext(ctx))
}

// PushIndex pushes an index and its images as ref, as Push does.
func PushIndex(ctx context.Context, index v1.ImageIndex, ref string) error {
	tag, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		return err
	}
	return remote.WriteIndex(tag, index, remote.WithContext(ctx))
}

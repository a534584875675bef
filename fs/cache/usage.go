package cache

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Usage returns the bytes on disk (blocks really allocated) that the cache holds of layers, named as Layer names them, be they open or
// not. What it has nothing of counts nothing; one named twice counts once. It costs four lstat(2) per layer and takes no lock, so that it may be
// called for every snapshot.
func (c *Cache) Usage(layers ...digest.Digest) (total int64, err error) {
	seen := make(map[digest.Digest]bool, len(layers))
	for _, dgst := range layers {
		if err := dgst.Validate(); err != nil {
			return 0, err
		}
		if seen[dgst] {
			continue
		}
		seen[dgst] = true
		n, err := dirUsage(c.layerDir(dgst))
		if err != nil {
			return 0, err
		}
		total += n
	}
	return total, nil
}

// dirUsage returns the bytes allocated of a layer's files in dir.
func dirUsage(dir string) (total int64, err error) {
	for _, name := range []string{"data", "whole", "map", "uses"} {
		var st unix.Stat_t
		err := unix.Lstat(filepath.Join(dir, name), &st)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, &os.PathError{Op: "lstat", Path: filepath.Join(dir, name), Err: err}
		}
		if err == nil {
			total += st.Blocks * 512
		}
	}
	return total, nil
}

package stream

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Blobs lists the first n layers of image id by the names that their files have, the digests of their indexes, bottom first; none of an image that cannot be loaded.
func (s *Store) Blobs(id string, n int) (blobs []digest.Digest) {
	img, err := s.load(id)
	if err != nil {
		return nil
	}
	for _, l := range img.rec.Layers[:min(n, len(img.rec.Layers))] {
		blobs = append(blobs, l.IndexDigest)
	}
	return blobs
}

// Usage returns the bytes on disk of blobs, chunks and indexes, and of the metadata images of the first n layers of image id.
func (s *Store) Usage(id string, n int, blobs []digest.Digest) (int64, error) {
	total, err := s.o.Cache.Usage(blobs...)
	if err != nil {
		return 0, fmt.Errorf("usage of image %s: %w", id, err)
	}
	files := []string{filepath.Join(s.imageDir(id), fmt.Sprintf("%d.erofs", n))}
	if img, err := s.load(id); err == nil && n == len(img.rec.Layers) {
		files = append(files, filepath.Join(s.imageDir(id), directName))
	}
	for _, b := range blobs {
		files = append(files, s.indexPath(b))
	}
	for _, path := range files {
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); errors.Is(err, os.ErrNotExist) {
			continue
		} else if err != nil {
			return 0, fmt.Errorf("usage of %s: %w", path, err)
		}
		total += st.Blocks * 512
	}
	return total, nil
}

package stream

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
)

// discardIndexes removes what a search has fetched in vain.
func (s *Store) discardIndexes() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sweepIndexes()
}

// sweepIndexes removes indexes and cached layers that no image on disk names, once every image's record can be read. The caller holds s.mu or is alone.
func (s *Store) sweepIndexes() error {
	used := map[string]bool{}
	for name := range s.pins {
		used[name] = true
	}
	dirs, err := os.ReadDir(filepath.Join(s.o.Root, "images"))
	if err != nil {
		return err
	}
	for _, d := range dirs {
		rec, err := loadRecord(s.imageDir(d.Name()))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil // it names what this release does not know
		}
		for _, l := range rec.Layers {
			used[l.IndexDigest.Encoded()] = true
		}
	}
	files, err := os.ReadDir(filepath.Join(s.o.Root, "indexes"))
	if err != nil {
		return err
	}
	for _, f := range files {
		// One that is being written belongs to whoever names it, too.
		if name, _, _ := strings.Cut(f.Name(), tmpInfix); !used[name] {
			os.Remove(filepath.Join(s.o.Root, "indexes", f.Name()))
		}
	}
	return s.o.Cache.Retain(func(index digest.Digest) bool { return used[index.Encoded()] })
}

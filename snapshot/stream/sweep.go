package stream

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
)

// records returns the records of the images on disk, and reads those that are not in the set. all is false if there are others, which cannot be read: they name what this release does not
// know. The caller holds s.mu or is alone.
func (s *Store) records() (list []*record, all bool, err error) {
	dirs, err := os.ReadDir(filepath.Join(s.o.Root, "images"))
	if err != nil {
		return nil, false, err
	}
	for _, d := range dirs {
		if img := s.images[d.Name()]; img != nil {
			list = append(list, img.rec) // a search that refuses one artifact after the other does not read them all each time
			continue
		}
		rec, err := loadRecord(s.imageDir(d.Name()))
		switch {
		case err == nil:
			list = append(list, rec)
		case !errors.Is(err, os.ErrNotExist):
			return list, false, nil
		}
	}
	return list, true, nil
}

// retainProofs drops old proofs of what no image on disk names, once every image's record can be read.
func (s *Store) retainProofs() error {
	if s.o.Trust.Ledger == nil {
		return nil
	}
	s.mu.Lock()
	list, all, err := s.records()
	s.mu.Unlock()
	if err != nil || !all {
		return err
	}
	used := map[ledger.Key]bool{}
	for _, rec := range list {
		for i := range rec.Layers {
			used[rec.key(i)] = true
		}
	}
	s.o.Trust.Ledger.Retain(func(k ledger.Key) bool { return used[k] })
	return nil
}

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
	list, all, err := s.records()
	if err != nil || !all {
		return err
	}
	for _, rec := range list {
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

package stream

import (
	"cmp"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

// ImageStatus is how much of an image is on this node.
type ImageStatus struct {
	ID         string                    `json:"artifact"` // the hex of the artifact's digest
	Repository registryclient.Repository `json:"repository"`
	Manifest   digest.Digest             `json:"manifest"` // of the platform manifest
	Layers     int                       `json:"layers"`
	Size       int64                     `json:"size"`                 // bytes of the tars, of one that is there twice once
	Local      int64                     `json:"local"`                // bytes of them that are here
	Complete   bool                      `json:"complete"`             // all was here once
	Reads      cache.LayerStats          `json:"reads"`                // of its layers, since it is in use
	Proven     int                       `json:"proven"`               // layers that were proven
	ProofDue   *time.Time                `json:"proofDue,omitempty"`   // of an image that was mounted and is not proven
	Quarantine string                    `json:"quarantine,omitempty"` // why the artifact is in quarantine
}

// Status lists the images on disk, by repository. It reads no chunk and asks nobody; the first time it decodes the indexes of an image that is not in use.
func (s *Store) Status() (list []ImageStatus, err error) {
	dirs, err := os.ReadDir(filepath.Join(s.o.Root, "images"))
	if err != nil {
		return nil, err
	}
	for _, d := range dirs {
		img, loadErr := s.load(d.Name())
		if loadErr != nil {
			if !errors.Is(loadErr, os.ErrNotExist) { // which goes, or does not come
				err = errors.Join(err, loadErr)
			}
			continue
		}
		list = append(list, img.status())
	}
	slices.SortFunc(list, func(a, b ImageStatus) int {
		return cmp.Or(cmp.Compare(a.Repository, b.Repository), cmp.Compare(a.Manifest, b.Manifest), cmp.Compare(a.ID, b.ID))
	})
	return list, err
}

// onDisk returns the images whose records can be read.
func (s *Store) onDisk() (list []*image) {
	dirs, _ := os.ReadDir(filepath.Join(s.o.Root, "images"))
	for _, d := range dirs {
		if img, err := s.load(d.Name()); err == nil {
			list = append(list, img)
		}
	}
	return list
}

// Size returns the bytes of an image's own layers, as the registry has them; 0 if that is not known.
func (s *Store) Size(id string) (total int64) {
	img, err := s.load(id)
	if err != nil {
		return 0
	}
	for _, l := range img.rec.Sources {
		total += l.Size
	}
	return total
}

func (img *image) status() ImageStatus {
	st := ImageStatus{ID: img.id, Repository: img.rec.Repository, Manifest: img.rec.Manifest, Layers: len(img.rec.Layers)}
	_, err := os.Stat(filepath.Join(img.store.imageDir(img.id), completedName))
	st.Complete = err == nil
	img.trustStatus(&st)
	// Who holds mu may be asking the registry: then it is the disk that says how much is here.
	if img.mu.TryLock() {
		defer img.mu.Unlock()
		if img.dev != nil {
			img.dev.addTo(&st)
			img.size.Store(st.Size)
			return st
		}
	}
	st.Size = img.tarSize()
	used, err := img.store.o.Cache.Usage(img.indexDigests()...)
	if err == nil {
		st.Local = min(used, st.Size)
	}
	return st
}

// trustStatus adds what is known of the image's proof.
func (img *image) trustStatus(st *ImageStatus) {
	s := img.store
	if s.o.Trust.Ledger == nil {
		return
	}
	for i := range img.rec.Layers {
		if s.o.Trust.Ledger.Proven(img.rec.key(i)) {
			st.Proven++
		}
	}
	if err := img.refused(); err != nil {
		st.Quarantine = err.Error()
	} else if at := s.mountedAt(img); !at.IsZero() && st.Proven < st.Layers {
		due := at.Add(s.deadline())
		st.ProofDue = &due
	}
}

// addTo adds what an open device knows.
func (d *device) addTo(st *ImageStatus) {
	for i, l := range d.layers {
		if slices.Contains(d.digests[:i], d.digests[i]) {
			continue // it is here once
		}
		st.Size += d.indexes[i].TarSize
		st.Local += l.Present()
		r := l.Stats()
		st.Reads.Hits += r.Hits
		st.Reads.Misses += r.Misses
		st.Reads.MissedBytes += r.MissedBytes
	}
}

func (img *image) indexDigests() (list []digest.Digest) {
	for _, l := range img.rec.Layers {
		list = append(list, l.IndexDigest)
	}
	return list
}

// tarSize returns the bytes of the layers' tars, 0 if an index cannot be read.
func (img *image) tarSize() int64 {
	if n := img.size.Load(); n > 0 {
		return n
	}
	total := int64(0)
	for i, l := range img.rec.Layers {
		if slices.Contains(img.indexDigests()[:i], l.IndexDigest) {
			continue
		}
		x, err := mapIndex(img.store.indexPath(l.IndexDigest), l)
		if err != nil {
			return 0
		}
		total += x.TarSize
	}
	img.size.Store(total)
	return total
}

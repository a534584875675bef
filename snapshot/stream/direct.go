package stream

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
)

// A chain of which every chunk is here and was proven in this life of the daemon is mounted from the cache's own files: what runs on it needs the daemon no more.
// The proving is done in the background, like the fetching of what is missing, and never while a mount waits for it: so after a start the daemon serves what
// it has not yet proven, and replaces these mounts later, for those that come then. What is mounted so since a former life is proven again, too, and if the disk has
// damaged any of it, mended and mounted anew: the old mount may have the damage in its page cache.
//
// Only whole images are, of which each layer was proven to be the image's (see proof.go: nobody could put such a mount into quarantine), and only once their first start is recorded: nobody sees what is read of such a mount.

// directName is the metadata image of the whole chain with each layer that is not empty as a device of its own, in the image's directory.
const directName = "direct.erofs"

// through lists where image id is mounted as a whole and served by the daemon.
func (s *Store) through(id string) []string {
	img, err := s.load(id)
	if err != nil {
		return nil
	}
	return s.o.Mounter.At(img.metadataPath(len(img.rec.Layers)))
}

// direct lists where image id is mounted from local files.
func (s *Store) direct(id string) []string {
	return s.o.Mounter.At(filepath.Join(s.imageDir(id), directName))
}

// unproven reports whether image id is mounted from local files that this life has not proven.
func (s *Store) unproven(id string) bool {
	img, err := s.load(id)
	if err != nil || len(s.direct(id)) == 0 {
		return false
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	return !img.proven
}

// makeDirect proves what is here of img and replaces its mounts, if all is.
func (s *Store) makeDirect(ctx context.Context, img *image, use *deviceUse) error {
	if !s.proven(img.rec) {
		return nil // such a mount could not be put into quarantine: see there. The proof wakes us
	}
	for _, l := range use.layers {
		for {
			now := time.Now()
			p := pacer{store: s, image: img, asked: now, begun: now}
			err := l.Verify(ctx, func(n int64) error {
				p.read += n
				return p.wait(ctx)
			})
			if err == nil {
				break
			}
			if !errors.Is(err, errBusy) && !errors.Is(err, cache.ErrLeft) {
				return err
			}
			if err := s.waitQuiet(ctx); err != nil {
				return err
			}
			if s.forgotten(img) {
				return nil
			}
		}
	}
	damaged := false
	for i, l := range use.layers {
		if l.Present() < use.indexes[i].TarSize { // the cache has given something back
			return nil
		}
		damaged = damaged || l.Damaged()
	}
	_, parts := use.parts()
	if parts == nil || s.forgotten(img) {
		return nil
	}
	path := filepath.Join(s.imageDir(img.id), directName)
	if err := img.makeMetadata(ctx, use.device, path, len(use.layers), parts); err != nil {
		return fmt.Errorf("metadata image of local files: %w", err)
	}
	targets := s.through(img.id)
	img.mu.Lock()
	defer img.mu.Unlock()
	if damaged && !img.proven {
		targets = append(targets, s.direct(img.id)...)
	}
	img.proven = true
	if len(targets) == 0 {
		return nil
	}
	d := img.direct()
	for i := 0; i < len(targets) && d != nil; i++ {
		if err := s.replace(img, d, targets[i]); err != nil {
			s.log.Debug("a mount goes on as it is", "image", img.id, "error", err)
		}
	}
	return nil
}

// parts returns the layers that are not empty, and where they begin in the device; none if a tar is not of whole blocks, as its file is not then.
func (d *device) parts() (layers []*cache.Layer, bases []int64) {
	for i, l := range d.layers {
		size := d.indexes[i].TarSize
		if size%blockSize != 0 {
			return nil, nil
		}
		if size > 0 {
			layers, bases = append(layers, l), append(bases, d.bases[i])
		}
	}
	return layers, bases
}

// direct returns how img is mounted without the daemon, nil if it cannot be now. The caller holds mu, and the device is open.
func (img *image) direct() *fs.Direct {
	dir := img.store.imageDir(img.id)
	if !img.started() || !img.store.proven(img.rec) {
		return nil
	}
	d := &fs.Direct{Metadata: filepath.Join(dir, directName)}
	layers, _ := img.dev.parts()
	if len(layers) == 0 || verifyMetadata(d.Metadata) != nil {
		return nil
	}
	var err error
	if d.Files, err = img.store.o.Cache.Whole(layers); err != nil {
		img.store.log.Debug("an image is mounted through the daemon", "image", img.id, "error", err)
		return nil
	}
	return d
}

// replace puts a direct mount in the place of the one at target. The caller holds img.mu, and the device is open.
func (s *Store) replace(img *image, d *fs.Direct, target string) error {
	gone, err := s.o.Mounter.Replace(fs.Image{ID: img.id, Device: img.dev, Direct: d}, target)
	if err != nil {
		return err
	}
	s.mu.Lock()
	mine := s.targets[target] == img // or of a former life
	s.targets[target] = img
	s.mu.Unlock()
	img.mounts++
	if mine { // the old mount may have users
		s.running.Go(func() {
			select {
			case <-gone:
			case <-s.closing:
				return
			}
			img.mu.Lock()
			defer img.mu.Unlock()
			img.mounts--
			img.release()
		})
	}
	return nil
}

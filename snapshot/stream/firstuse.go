package stream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
)

// A node keeps the record of each image's first start: the chunks that were used, in the order of first use, from the first mount of the image
// until nothing new has been used for a while. It is a profile, for who attaches it to the image, so that other nodes need not wait for what this one has
// waited for.
const (
	firstUseName = "first-use.json"
	// firstUsePart is the record in the making: what is left of it when the daemon is killed is the record.
	firstUsePart = "first-use.part"

	// firstUseQuiet is how long nothing new is used once a start is over: a program that computes for longer is rare, and a server that waits for its first
	// request has started.
	firstUseQuiet = 30 * time.Second
	// firstUseMax ends a record in any case: what an image's container reads after so long is its work and not its start.
	firstUseMax = 5 * time.Minute
	// firstUseSave is how often that is saved, at least: a mount goes on in the next life of the daemon, and is not recorded there.
	firstUseSave   = 4 * time.Second
	firstUseChunks = 1 << 16 // 8 GiB at 128 KiB a chunk
)

// ErrNoRecord: no start of that image was recorded on this node.
var ErrNoRecord = errors.New("no start of the image was recorded on this node")

// firstUses is a record in the making.
type firstUses struct {
	mu     sync.Mutex
	seen   map[artifact.HotChunk]bool
	chunks []artifact.HotChunk
	last   time.Time // of a new chunk
}

// note adds what is new of chunks [lo, hi) of a layer.
func (u *firstUses) note(layer, lo, hi int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for i := lo; i < hi && len(u.chunks) < firstUseChunks; i++ {
		c := artifact.HotChunk{Layer: layer, Chunk: i}
		if !u.seen[c] {
			u.seen[c] = true
			u.chunks = append(u.chunks, c)
			u.last = time.Now()
		}
	}
}

// profile is what was recorded until now.
func (u *firstUses) profile(d *device) *artifact.Profile {
	u.mu.Lock()
	defer u.mu.Unlock()
	p := &artifact.Profile{}
	at := make(map[digest.Digest]int)
	numbers := make([]int, len(d.digests))
	for i, dgst := range d.digests { // an image may have a layer twice
		k, ok := at[dgst]
		if !ok {
			k = len(p.Layers)
			at[dgst] = k
			p.Layers = append(p.Layers, dgst)
		}
		numbers[i] = k
	}
	seen := make(map[artifact.HotChunk]bool, len(u.chunks))
	for _, c := range u.chunks {
		c.Layer = numbers[c.Layer]
		if !seen[c] {
			seen[c] = true
			p.Chunks = append(p.Chunks, c)
		}
	}
	return p
}

// recordFirstUses begins the record of img, which is mounted since then, unless there is one. The caller holds img.mu.
func (s *Store) recordFirstUses(img *image, mounted time.Time) {
	if img.started() || img.dev.uses.Load() != nil {
		return
	}
	use, err := img.use(context.Background()) // it is open
	if err != nil {
		return
	}
	u := &firstUses{seen: make(map[artifact.HotChunk]bool), last: time.Now()}
	finish := img.beginStart(use.device, mounted)
	use.uses.Store(u)
	s.mu.Lock()
	closed := s.closed
	if !closed {
		s.running.Go(func() {
			saved := 0 // chunks
			how := s.waitFirstUses(img, u, func() {
				if p := u.profile(use.device); len(p.Chunks) > saved {
					saved = len(p.Chunks)
					s.saveFirstUses(img, p, firstUsePart)
				}
			})
			use.uses.Store(nil)
			finish(u, how)
			if p := u.profile(use.device); len(p.Chunks) > 0 {
				s.saveFirstUses(img, p, firstUseName)
				os.Remove(filepath.Join(s.imageDir(img.id), firstUsePart))
				s.o.Mounter.Started(img.metadataPath(len(img.rec.Layers)))
				s.wake()
			}
			use.Close()
		})
	}
	s.mu.Unlock()
	if closed {
		use.uses.Store(nil)
		img.mounts--
	}
}

// started reports whether the first start of img is recorded. The caller holds img.mu, and the device is open.
func (img *image) started() bool {
	_, err := os.Stat(filepath.Join(img.store.imageDir(img.id), firstUseName))
	return err == nil && img.dev.uses.Load() == nil
}

// waitFirstUses waits until the start of img is over. It calls save meanwhile.
func (s *Store) waitFirstUses(img *image, u *firstUses, save func()) end {
	tick := time.NewTicker(min(s.o.StartQuiet/8, firstUseSave))
	defer tick.Stop()
	late := time.After(firstUseMax)
	for {
		select {
		case <-s.closing:
			return cut
		case <-late:
			return going
		case <-tick.C:
		}
		u.mu.Lock()
		quiet := len(u.chunks) > 0 && time.Since(u.last) > s.o.StartQuiet
		u.mu.Unlock()
		s.mu.Lock()
		gone := s.images[img.id] != img
		s.mu.Unlock()
		if quiet || gone {
			return over
		}
		save()
	}
}

// saveFirstUses makes the record of img's first start durable under name, unless img was forgotten.
func (s *Store) saveFirstUses(img *image, p *artifact.Profile, name string) {
	b, err := json.Marshal(p)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil && s.images[img.id] == img {
		err = ledger.WriteFile(s.imageDir(img.id), name, b)
	}
	if err != nil {
		s.log.Warn("record of an image's first start", "image", img.id, "error", err)
	}
}

// FirstUses returns the record of the first start of the image with this platform manifest, or what there is of it yet. The error is ErrNoRecord if there is none.
func (s *Store) FirstUses(manifest digest.Digest) (*artifact.Profile, error) {
	ids, err := s.withManifest(manifest)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		p, err := s.firstUsesOf(id)
		if err == nil || !errors.Is(err, os.ErrNotExist) {
			return p, err
		}
	}
	return nil, fmt.Errorf("%s: %w", manifest, ErrNoRecord)
}

// withManifest lists the images with this platform manifest: one for each artifact.
func (s *Store) withManifest(manifest digest.Digest) (ids []string, err error) {
	dirs, err := os.ReadDir(filepath.Join(s.o.Root, "images"))
	if err != nil {
		return nil, err
	}
	for _, d := range dirs {
		if rec, err := loadRecord(s.imageDir(d.Name())); err == nil && rec.Manifest == manifest {
			ids = append(ids, d.Name())
		}
	}
	return ids, nil
}

// recording returns the record in the making of image id, and the device that it is of; nil if there is none.
func (s *Store) recording(id string) (*firstUses, *device) {
	s.mu.Lock()
	img := s.images[id]
	s.mu.Unlock()
	if img == nil {
		return nil, nil
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	if img.dev == nil {
		return nil, nil
	}
	return img.dev.uses.Load(), img.dev
}

// recordsFirstUses reports whether the first start of image id is being recorded.
func (s *Store) recordsFirstUses(id string) bool {
	u, _ := s.recording(id)
	return u != nil
}

func (s *Store) firstUsesOf(id string) (*artifact.Profile, error) {
	if u, dev := s.recording(id); u != nil {
		return u.profile(dev), nil
	}
	b, err := os.ReadFile(filepath.Join(s.imageDir(id), firstUseName))
	if err != nil {
		return nil, err
	}
	p := &artifact.Profile{}
	if err := json.Unmarshal(b, p); err != nil {
		return nil, fmt.Errorf("record of the first start of image %s: %w", id, err)
	}
	return p, nil
}

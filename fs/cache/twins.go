package cache

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

// Equal chunks have equal digests, in whatever layer they are, so one that another layer on this node has is copied and not fetched: the next
// version of an image costs what changed. What is copied is verified like what is fetched, and becomes the layer's own, so that neither layer needs
// the other.
//
// Which chunks there are is known by 16 bytes each: 4 MB for a hundred images of 300 MB.

// maxTwins bounds the places where a chunk is looked for: some bytes, zeros above all, are everywhere.
const maxTwins = 4

// twins knows the chunks of all layers on disk by their bytes.
type twins struct {
	index func(dgst digest.Digest) (*artifact.Index, error) // of a layer on disk; nil: there is no copying
	ready atomic.Bool                                       // the layers of former lives are known

	// generation counts up when a layer is opened.
	generation atomic.Int64

	mu     sync.RWMutex
	known  int64 // the generation of layers
	layers map[digest.Digest][]place
}

// place is where a layer's tar has the bytes of a digest.
type place struct {
	key uint64 // the first 8 bytes of the digest
	off int64  // in the tar, bytes
}

// key returns what places are sorted by.
func key(sum [32]byte) uint64 { return binary.NativeEndian.Uint64(sum[:]) }

// learn takes in the layers that came since the last time, and lets go of those that left.
func (c *Cache) learn() {
	t := &c.twins
	now := t.generation.Load()
	t.mu.RLock()
	known := t.known
	t.mu.RUnlock()
	if known == now {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	layers := make(map[digest.Digest][]place)
	for _, dgst := range c.layersOnDisk() {
		places, ok := t.layers[dgst]
		if !ok {
			if fault := mapped.Guard(func() { places = t.placesOf(dgst) }); fault != nil {
				places = nil
			}
		}
		layers[dgst] = places
	}
	t.layers, t.known = layers, now
}

// placesOf lists the chunks of a layer; none if its index cannot be had.
func (t *twins) placesOf(dgst digest.Digest) []place {
	x, err := t.index(dgst)
	if err != nil {
		return nil
	}
	places := make([]place, x.NumChunks())
	for i := range places {
		ch := x.Chunk(i)
		places[i] = place{key(ch.Digest), ch.TarOffset}
	}
	slices.SortFunc(places, func(a, b place) int { return cmp.Compare(a.key, b.key) })
	return places
}

// copy delivers those of flights whose bytes another place on this disk has, and returns the others.
func (f *fill) copy(ctx context.Context, flights []*flight) (missing []*flight) {
	s := f.layer.store
	c := s.cache
	if !c.twins.ready.Load() {
		return flights
	}
	c.learn()
	for i, fl := range flights {
		if ctx.Err() != nil {
			return append(missing, flights[i:]...)
		}
		ch := s.index.Chunk(fl.chunk)
		buf := c.bufs.get(int(ch.TarSize))
		b := buf.mem[:ch.TarSize]
		if c.readTwin(ch, b) && s.check(fl.chunk, b) == nil {
			buf.b = b
			c.stats.copied.Add(1)
			f.deliver(fl, buf, ch.TarOffset, false)
			continue
		}
		c.bufs.put(buf)
		missing = append(missing, fl)
	}
	return missing
}

// readTwin fills b with the bytes of ch if a place on this disk has them.
func (c *Cache) readTwin(ch artifact.Chunk, b []byte) bool {
	t := &c.twins
	t.mu.RLock()
	layers := t.layers // is replaced, never changed
	t.mu.RUnlock()
	want, tries := key(ch.Digest), 0
	for dgst, places := range layers {
		i, _ := slices.BinarySearchFunc(places, want, func(p place, k uint64) int { return cmp.Compare(p.key, k) })
		for ; i < len(places) && places[i].key == want && tries < maxTwins; i++ {
			tries++ // a hole costs three system calls
			if c.readPlace(dgst, places[i].off, b) && sha256.Sum256(b) == ch.Digest {
				return true
			}
		}
	}
	return false
}

// readPlace fills b from tar offset off of a layer on disk, open or not. It reports false if there is a hole; what is there otherwise is
// whatever it is.
func (c *Cache) readPlace(dgst digest.Digest, off int64, b []byte) bool {
	f, err := os.Open(c.dataPath(dgst))
	if err != nil {
		return false
	}
	defer f.Close()
	if at, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA); err != nil || at != off {
		return false
	}
	n, _ := f.ReadAt(b, off)
	return n == len(b)
}

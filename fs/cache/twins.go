package cache

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"os"
	"slices"
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
const (
	// maxPlaces is how many chunks are known, 64 MiB of them: those of the layers used last. A layer of more than layerPlaces, whose index took 48 bytes
	// of its publisher for each, is not known.
	maxPlaces   = 4 << 20
	layerPlaces = maxPlaces / 4
	// maxTwins bounds the places where a chunk is looked for: some bytes, zeros above all, are everywhere.
	maxTwins = 4
)

// twins knows the chunks of the layers on disk by their bytes.
type twins struct {
	index func(dgst digest.Digest) (*artifact.Index, error) // of a layer on disk; nil: there is no copying
	kick  chan struct{}                                     // asks the learner to look which layers there are

	layers atomic.Pointer[map[digest.Digest]twin] // replaced, never changed; nil until those of former lives are known
}

// twin is a layer on disk.
type twin struct {
	chunks int     // 0: its index could not be had
	places []place // of its chunks, in the order of their keys; nil if they are not known
}

// place is where a layer's tar has the bytes of a digest.
type place struct {
	key uint64 // the first 8 bytes of the digest
	off int64  // in the tar, bytes
}

// key returns what places are sorted by.
func key(sum [32]byte) uint64 { return binary.NativeEndian.Uint64(sum[:]) }

// learner keeps up with the layers on disk until Close. No read waits for it: what it does not know yet is fetched.
func (c *Cache) learner() {
	for {
		stores := c.openStores()
		slices.SortFunc(stores, func(a, b *store) int { return cmp.Compare(b.lastUse.Load(), a.lastUse.Load()) })
		var layers []digest.Digest
		for _, s := range stores {
			layers = append(layers, s.dgst)
		}
		for _, l := range slices.Backward(c.idleLayers(stores)) {
			layers = append(layers, l.dgst)
		}
		c.twins.learn(layers, maxPlaces, c.stop)
		select {
		case <-c.stop:
			return
		case <-c.twins.kick:
		}
	}
}

// learn knows the first of layers from now on, up to so many places. It goes on with what it knows of them, and ends with stop.
func (t *twins) learn(layers []digest.Digest, places int, stop <-chan struct{}) {
	var known map[digest.Digest]twin
	if p := t.layers.Load(); p != nil {
		known = *p
	}
	now := make(map[digest.Digest]twin)
	for _, dgst := range layers {
		select {
		case <-stop:
			return
		default:
		}
		most := min(places, layerPlaces)
		tw := known[dgst]
		switch {
		case tw.chunks > most:
			tw.places = nil
		case tw.places == nil:
			if fault := mapped.Guard(func() { tw = t.look(dgst, most) }); fault != nil {
				tw = twin{}
			}
		}
		places -= len(tw.places)
		now[dgst] = tw
	}
	t.layers.Store(&now)
}

// look returns what the index of a layer says, if it can be had, and its places if they are not more than most.
func (t *twins) look(dgst digest.Digest, most int) twin {
	x, err := t.index(dgst)
	if err != nil {
		return twin{}
	}
	n := x.NumChunks()
	if n > most {
		return twin{chunks: n}
	}
	places := make([]place, n)
	for i := range places {
		ch := x.Chunk(i)
		places[i] = place{key(ch.Digest), ch.TarOffset}
	}
	slices.SortFunc(places, func(a, b place) int { return cmp.Compare(a.key, b.key) })
	return twin{n, places}
}

// copy delivers those of flights whose bytes another place on this disk has, and returns the others.
func (f *fill) copy(ctx context.Context, flights []*flight) (missing []*flight) {
	s := f.layer.store
	c := s.cache
	layers := c.twins.layers.Load()
	if layers == nil {
		return flights
	}
	var empty digest.Digest
	if s.madeAnew() {
		empty = s.dgst
	}
	for i, fl := range flights {
		if ctx.Err() != nil {
			return append(missing, flights[i:]...)
		}
		ch := s.index.Chunk(fl.chunk)
		buf := c.bufs.get(int(ch.TarSize))
		b := buf.mem[:ch.TarSize]
		if c.readTwin(*layers, "", empty, ch, b) && s.check(fl.chunk, b) == nil {
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

// known reports whether one of layers, but not, may have the bytes of ch.
func known(layers map[digest.Digest]twin, not digest.Digest, ch artifact.Chunk) bool {
	want := key(ch.Digest)
	for dgst, tw := range layers {
		if dgst == not {
			continue
		}
		if _, found := slices.BinarySearchFunc(tw.places, want, func(p place, k uint64) int { return cmp.Compare(p.key, k) }); found {
			return true
		}
	}
	return false
}

// readTwin fills b with the bytes of ch if one of layers, but not, has them on this disk. In empty ch's own place is a hole, which is not looked at.
func (c *Cache) readTwin(layers map[digest.Digest]twin, not, empty digest.Digest, ch artifact.Chunk, b []byte) bool {
	want, tries := key(ch.Digest), 0
	for dgst, tw := range layers {
		if dgst == not {
			continue
		}
		i, _ := slices.BinarySearchFunc(tw.places, want, func(p place, k uint64) int { return cmp.Compare(p.key, k) })
		for ; i < len(tw.places) && tw.places[i].key == want && tries < maxTwins; i++ {
			if dgst == empty && tw.places[i].off == ch.TarOffset {
				continue
			}
			tries++ // a hole costs some system calls, 30 us
			if c.readPlace(dgst, tw.places[i].off, b) && sha256.Sum256(b) == ch.Digest {
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
	if errors.Is(err, os.ErrNotExist) {
		f, err = os.Open(c.wholePath(dgst))
	}
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

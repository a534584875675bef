package cache

import (
	"cmp"
	"errors"
	"math/bits"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

// A cache with a limit gives back what was used least recently: chunks of layers that are open, by punching holes, and layers that nobody
// has open as a whole, by deleting their files (where their chunks lie is in an index that nobody has open either). Layers of images
// that left the node do not wait for that: see Retain.
//
// The limit is hard: a chunk that has no room is not written. Well before, at high, the flusher gives back down to low, so that eviction
// runs seldom and in batches that share their syncs.
//
// A reader takes no lock and may be in the middle of a pread, so a chunk goes in these steps:
//
//  1. it is absent from verified and present, and then evictions counts up;
//  2. the map without it is durable: a crash from here on leaves bytes that nobody claims;
//  3. its blocks are given back. Until that is done, nobody writes to it (punching).
//
// A reader that sees one value of evictions before it looked at verified and after its pread has read no hole: step 3 of what it read has
// not begun, or the chunk was written anew after it.
//
// Files that others may read are not given back by the chunk, but as a whole when nobody does: see whole.go.
//
// Chunks do not begin at file system blocks. A hole takes in the blocks that it shares with neighbours that are absent, too, and
// leaves those of others; nothing is left behind when all is gone.

// blockSize is what holes are aligned to, bytes: the block of most file systems. Larger ones give back less of each hole.
const blockSize = 4 << 10

// leakBytes that a layer has on disk beyond its chunks are looked for and given back: a crash leaves them, and a hole that failed.
const leakBytes = 1 << 20

// high is where eviction begins, low where it ends.
func (c *Cache) high() int64 { return c.limit - c.limit/16 }
func (c *Cache) low() int64  { return c.limit - c.limit/8 }

// full is where chunks are written no more: what is left is for maps and uses.
func (c *Cache) full() int64 { return c.limit - c.limit/64 }

// room reports whether n bytes more may be written, and asks for eviction if not.
func (c *Cache) room(n int) bool {
	if c.limit == 0 || c.used.Load()+onDisk(n) <= c.full() {
		return true
	}
	c.press()
	return false
}

// reserve takes the room for n bytes, until written says that they are on disk or not; or reports that there is none.
func (c *Cache) reserve(n int) bool {
	if c.limit == 0 {
		return true
	}
	c.writing.Add(onDisk(n)) // before used: see measure
	used := c.used.Add(onDisk(n))
	if used > c.high() {
		c.press()
	}
	if used <= c.full() {
		return true
	}
	c.used.Add(-onDisk(n))
	c.writing.Add(-onDisk(n))
	return false
}

// written ends a reservation.
func (c *Cache) written(n int) {
	if c.limit > 0 {
		c.writing.Add(-onDisk(n))
	}
}

// onDisk is what n bytes take at most, with the blocks at both ends.
func onDisk(n int) int64 { return int64(n) + 2*blockSize }

// press asks the flusher to evict, unless it could not help a moment ago.
func (c *Cache) press() {
	if !c.stuck.Load() {
		wake(c.kick)
	}
}

// measure looks how much disk the cache uses. What is written meanwhile may count twice until the next time.
func (c *Cache) measure() {
	if c.limit == 0 {
		return
	}
	before := c.used.Load()
	total := c.writing.Load() // what is reserved in before and maybe not yet on disk
	for _, dgst := range c.layersOnDisk() {
		n, err := dirUsage(c.layerDir(dgst))
		if err != nil {
			c.stats.diskError(err)
		}
		total += n
	}
	c.used.Add(total - before)
}

// layersOnDisk returns the layers that have files.
func (c *Cache) layersOnDisk() (layers []digest.Digest) {
	dirs, err := os.ReadDir(c.dir)
	if err != nil {
		c.stats.diskError(err)
	}
	for _, d := range dirs {
		alg, enc, ok := strings.Cut(d.Name(), "-")
		dgst := digest.NewDigestFromEncoded(digest.Algorithm(alg), enc)
		if ok && d.IsDir() && dgst.Validate() == nil {
			layers = append(layers, dgst)
		}
	}
	return layers
}

// Retain deletes what the cache has of layers that are not used: at once, or with their last user if they are open.
func (c *Cache) Retain(used func(dgst digest.Digest) bool) error {
	var errs []error
	for _, dgst := range c.layersOnDisk() {
		if !used(dgst) {
			errs = append(errs, c.remove(dgst, true))
		}
	}
	c.measure()
	return errors.Join(errs...)
}

// remove deletes the files of dgst if it is not open. If it is, they are deleted with the last user, if later, or stay.
func (c *Cache) remove(dgst digest.Digest, later bool) error {
	c.mu.Lock()
	sl := c.use(dgst)
	c.mu.Unlock()
	sl.mu.Lock()
	defer sl.mu.Unlock()
	defer func() { c.unuse(dgst, sl, sl.store) }()
	if sl.refs > 0 {
		sl.removed = sl.removed || later
		return nil
	}
	return c.removeFiles(dgst)
}

// removeFiles deletes the files of a layer that is not open. Others' files stay.
func (c *Cache) removeFiles(dgst digest.Digest) error {
	for _, path := range []string{c.mapPath(dgst), c.usesPath(dgst), c.dataPath(dgst), c.wholePath(dgst)} {
		if err := c.disk.remove(path); err != nil {
			return err
		}
	}
	os.Remove(c.layerDir(dgst)) // unless somebody has put something there
	return nil
}

// evict gives back chunks if the cache uses too much.
func (c *Cache) evict() {
	if c.limit == 0 {
		return
	}
	c.evictMu.Lock()
	defer c.evictMu.Unlock()
	if c.used.Load() > c.high() {
		c.measure()
	}
	if need := c.used.Load() - c.low(); c.used.Load() > c.high() {
		c.giveBack(need)
		c.measure()
	}
	c.stuck.Store(c.used.Load() > c.high()) // until the next flush
}

// idleLayer is a layer on disk that is not open.
type idleLayer struct {
	dgst digest.Digest
	last uint32 // Unix seconds of its last use
	size int64
}

// giveBack frees need bytes of what was used least recently.
func (c *Cache) giveBack(need int64) {
	now := uint32(time.Now().Unix())
	stores := c.openStores()
	idle := slices.DeleteFunc(c.idleLayers(stores), func(l idleLayer) bool { return c.inUse(l.dgst) })
	var ages histogram
	for _, l := range idle {
		ages[ageOf(now, l.last)] += l.size
	}
	for _, s := range stores {
		mapped.Guard(s.trim) // what an index that is lost says is left alone; who reads the layer is told
		mapped.Guard(func() { s.countAges(now, &ages) })
	}
	cut, some := ages.cut(need)
	for _, l := range idle {
		switch age := ageOf(now, l.last); {
		case age < cut, age == cut && some <= 0:
			continue
		case age == cut:
			some -= l.size
		}
		if err := c.remove(l.dgst, false); err != nil {
			c.stats.diskError(err)
		}
	}
	for _, s := range stores {
		mapped.Guard(func() {
			s.evict(func(i int) bool {
				age := ageOf(now, s.recent[i].Load())
				if age == cut && some > 0 {
					some -= s.index.Chunk(i).TarSize
					return true
				}
				return age > cut
			})
		})
	}
}

// idleLayers returns the layers on disk that are not among stores, the one longest unused first.
func (c *Cache) idleLayers(stores []*store) (idle []idleLayer) {
	open := make(map[digest.Digest]bool)
	for _, s := range stores {
		open[s.dgst] = true
	}
	for _, dgst := range c.layersOnDisk() {
		if open[dgst] {
			continue
		}
		l := idleLayer{dgst: dgst}
		l.size, _ = dirUsage(c.layerDir(dgst))
		for _, path := range []string{c.usesPath(dgst), c.mapPath(dgst)} { // written when it was closed
			if fi, err := os.Stat(path); err == nil {
				l.last = max(l.last, uint32(fi.ModTime().Unix()))
			}
		}
		idle = append(idle, l)
	}
	slices.SortFunc(idle, func(a, b idleLayer) int { return cmp.Compare(a.last, b.last) })
	return idle
}

// histogram has bytes by age.
type histogram [1024]int64

// ageOf returns the bucket of what was used at then: of a second at first, then within 1/32 of the age.
func ageOf(now, then uint32) int {
	age := now - min(then, now)
	e := max(bits.Len32(age)-6, 0)
	return e<<5 + int(age>>e)
}

// cut returns the age beyond which everything must go to free need bytes, and how many bytes of that age itself.
func (h *histogram) cut(need int64) (age int, some int64) {
	for age = len(h) - 1; age > 0; age-- {
		if h[age] >= need {
			break
		}
		need -= h[age]
	}
	return age, need
}

// countAges adds the chunks of s to ages.
func (s *store) countAges(now uint32, ages *histogram) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := 0; i < s.n && !s.whole; i++ {
		if s.present.has(i) {
			ages[ageOf(now, s.recent[i].Load())] += s.index.Chunk(i).TarSize
		}
	}
}

// evict gives back the chunks that are on disk and that victim says, which it asks in the order of the tar, going on where it ended the last time.
func (s *store) evict(victim func(i int) bool) {
	s.punch(func() (gone []int) {
		for k := range s.n {
			i := (s.hand + k) % s.n
			if s.present.has(i) && s.flights[i] == nil && s.writing[i] == 0 && victim(i) {
				gone = append(gone, i)
			}
		}
		if len(gone) > 0 {
			s.hand = gone[len(gone)-1] + 1
		}
		return gone
	})
}

// trim gives back what s has on disk and does not claim.
func (s *store) trim() {
	usage, err := dirUsage(s.cache.layerDir(s.dgst))
	if err != nil {
		s.cache.stats.diskError(err)
		return
	}
	s.punch(func() (gone []int) {
		claimed := onDisk(mapSize(s.n)) + onDisk(4*s.n)
		for i := range s.n {
			if s.present.has(i) || s.writing[i] > 0 {
				claimed += onDisk(int(s.index.Chunk(i).TarSize))
			} else {
				gone = append(gone, i)
			}
		}
		if usage < claimed+leakBytes {
			return nil
		}
		return gone
	})
}

// punch makes the chunks that choose names absent, which it calls with flushMu and mu held, makes the map durable and gives back their blocks. The index may
// fault on the way: then less is given back.
func (s *store) punch(choose func() (gone []int)) {
	s.flushMu.Lock() // the files stay open
	defer s.flushMu.Unlock()
	if s.closed || s.data == nil || s.whole {
		return
	}
	defer func() {
		s.mu.Lock()
		clear(s.punching)
		s.mu.Unlock()
	}()
	holes := s.forgo(choose)
	if len(holes) == 0 {
		return
	}
	err := s.flushLocked()
	for _, h := range holes {
		if err == nil {
			if err = s.data.punch(h.from, h.to-h.from); err != nil {
				s.cache.stats.diskError(err)
			}
		}
	}
}

// forgo makes the chunks that choose names absent, and returns what of the data file they leave.
func (s *store) forgo(choose func() (gone []int)) []hole {
	s.mu.Lock()
	defer s.mu.Unlock()
	gone := choose()
	if len(gone) == 0 {
		return nil
	}
	for _, i := range gone {
		if s.present.has(i) {
			s.verified.clear(i)
			s.present.clear(i)
			s.dirty = true
			s.cache.stats.evicted.Add(1)
		}
	}
	s.evictions.Add(1)
	slices.Sort(gone)
	return s.holes(gone)
}

// hole is a part of the data file.
type hole struct{ from, to int64 }

// holes returns the whole blocks that nobody needs of chunks gone, in order, and keeps writers off them. The caller holds mu.
func (s *store) holes(gone []int) (holes []hole) {
	free := func(i int) bool { return !s.present.has(i) && s.writing[i] == 0 }
	for k := 0; k < len(gone); {
		lo, hi := gone[k], gone[k]+1
		for k++; k < len(gone) && gone[k] == hi; k++ {
			hi++
		}
		for i := lo; i < hi; i++ {
			s.punching[i] = true
		}
		from := s.index.Chunk(lo).TarOffset
		block := from &^ (blockSize - 1)
		for i := lo - 1; i >= 0 && from > block && free(i); i-- {
			s.punching[i] = true
			from = max(block, s.index.Chunk(i).TarOffset)
		}
		last := s.index.Chunk(hi - 1)
		to := last.TarOffset + last.TarSize
		block = roundUp(to)
		for i := hi; i < s.n && to < block && free(i); i++ {
			s.punching[i] = true
			c := s.index.Chunk(i)
			to = min(block, c.TarOffset+c.TarSize)
		}
		if to == s.index.TarSize {
			to = block
		}
		if from, to = roundUp(from), to&^(blockSize-1); from < to {
			holes = append(holes, hole{from, to})
		}
	}
	return holes
}

func roundUp(off int64) int64 { return (off + blockSize - 1) &^ (blockSize - 1) }

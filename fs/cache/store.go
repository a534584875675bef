package cache

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// store is what all openers of a layer share: its files, which chunks they hold, and the chunks on their way.
type store struct {
	cache  *Cache
	dgst   digest.Digest
	id     [32]byte        // of the index
	index  *artifact.Index // of the first opener
	n      int             // chunks
	header []byte          // of the map file

	// nil while the disk refuses; the layer is then read without caching. Set once, under flushMu and mu.
	data, table file
	anew        bool // data was made without anything in it, so that it has what present tells of and no more; likewise

	// verified chunks are in data and were proven by this process: they may be read without a lock.
	// Verified implies present. Set under mu.
	verified bitmap

	recent    []atomic.Uint32 // Unix seconds of the last use of each chunk
	lastUse   atomic.Uint32   // of any
	evictions atomic.Uint64   // counts up when chunks are given back: see evict.go
	damaged   atomic.Bool     // a chunk in data did not verify
	reads     layerReads

	flushMu   sync.Mutex // held while the files are synced, punched or closed
	closed    bool       // guarded by flushMu
	whole     bool       // no hole may be punched in data: see whole.go; set under flushMu and mu
	usesSaved uint32     // lastUse when uses were written; guarded by flushMu
	hand      int        // where the last eviction has ended; guarded by flushMu

	layoutMu   sync.Mutex // held while index decodes its layout: once for all
	lastLayout uint32     // Unix seconds when somebody has needed that last

	mu      sync.Mutex
	present bitmap // chunks in data, as far as we know
	flights map[int]*flight
	// writing counts who writes a chunk; punching are those that are given back, which nobody may write.
	writing  map[int]int
	punching map[int]bool
	kept     []*flight // delivered, but not on disk; oldest first
	pass     *pass     // under way, if the blob is gone or wrong
	dirty    bool      // present differs from the map file
	// epoch counts the times that the disk lost writes (a failed fdatasync): a chunk written in an earlier epoch may be gone.
	epoch int
}

// keepBytes bounds what a layer keeps in memory of the chunks that the disk did not take, so that small reads of one chunk
// do not fetch it over and over.
const keepBytes = 1 << 20

// layout returns that of the index. Where no pass over the headers has left one, they are read at the first fetch and not while a mount waits.
func (s *store) layout() (*artifact.Layout, error) {
	s.layoutMu.Lock()
	defer s.layoutMu.Unlock()
	s.lastLayout = now()
	wake(s.cache.stirred)
	return s.index.Layout()
}

// openStore opens the files of dgst. Errors of the disk are noted, and cost the caching.
func (c *Cache) openStore(dgst digest.Digest, x *artifact.Index, id [32]byte) *store {
	n := x.NumChunks()
	s := &store{
		cache: c, dgst: dgst, id: id, index: x, n: n, header: encodeMapHeader(x, id),
		verified: newBitmap(n), present: newBitmap(n), flights: make(map[int]*flight),
		recent: make([]atomic.Uint32, n), writing: make(map[int]int), punching: make(map[int]bool), lastLayout: now(),
	}
	if err := s.openFiles(x.TarSize); err != nil {
		c.stats.diskError(err)
	}
	wake(c.stirred) // the index may have a layout that nobody will need
	return s
}

// openFiles opens data and map and takes in what the map claims, or makes both anew.
func (s *store) openFiles(tarSize int64) (err error) {
	data, whole, err := s.openData(tarSize)
	if err != nil {
		return err
	}
	table, err := s.cache.disk.open(s.cache.mapPath(s.dgst))
	if err != nil {
		return errors.Join(err, data.Close())
	}
	var present bitmap
	if whole {
		present = newBitmap(s.n)
		present.setAll(s.n)
	} else {
		present, err = readFiles(data, table, tarSize, s.header, s.n)
	}
	anew := err != nil
	if anew {
		if !errors.Is(err, errStale) {
			s.cache.stats.diskError(err)
		}
		present = newBitmap(s.n)
		err = reset(data, table, tarSize)
	}
	if err != nil {
		return errors.Join(err, data.Close(), table.Close())
	}
	if !present.empty() {
		s.loadUses()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.data, s.table, s.present, s.whole, s.anew = data, table, present, whole, anew
	return nil
}

// madeAnew reports whether data was made by this store: one of a former life may have chunks that its map does not tell of.
func (s *store) madeAnew() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.anew
}

// readFiles returns the chunks that are in data if one can believe table, or why not.
func readFiles(data, table file, tarSize int64, header []byte, n int) (bitmap, error) {
	size, err := data.size()
	if err != nil {
		return nil, err
	}
	if size != tarSize {
		return nil, fmt.Errorf("data of %d bytes, want %d: %w", size, tarSize, errStale)
	}
	if size, err = table.size(); err != nil {
		return nil, err
	}
	if size != int64(mapSize(n)) {
		return nil, fmt.Errorf("map of %d bytes, want %d: %w", size, mapSize(n), errStale)
	}
	m := make([]byte, mapSize(n))
	if _, err := table.ReadAt(m, 0); err != nil {
		return nil, err
	}
	return decodeMap(header, n, m)
}

// reset empties both files. The map goes first: at no time does it claim chunks of a data file that is not its own.
func reset(data, table file, tarSize int64) error {
	size, err := table.size()
	if err == nil && size > 0 { // opening a new layer waits for no sync
		err = errors.Join(table.truncate(0), table.datasync())
	}
	if err != nil {
		return err
	}
	return errors.Join(data.truncate(0), data.truncate(tarSize))
}

// write puts chunk i, verified, on disk. It reports whether the disk took it: if not, that costs the caching only.
func (s *store) write(i int, off int64, b []byte) bool {
	if s.cache.stats.suspended.Load() || !s.cache.reserve(len(b)) {
		return false
	}
	defer s.cache.written(len(b))
	s.mu.Lock()
	if s.data == nil || s.punching[i] {
		s.mu.Unlock()
		return false
	}
	size, err := s.data.size()
	if err == nil && size < s.index.TarSize { // or the write would leave a hole that no read finds short
		s.doubt()
	}
	s.writing[i]++
	epoch := s.epoch
	s.mu.Unlock()
	if err == nil {
		_, err = s.data.WriteAt(b, off)
	}
	s.mu.Lock()
	if s.writing[i]--; s.writing[i] == 0 {
		delete(s.writing, i)
	}
	if err == nil && s.epoch == epoch {
		s.present.set(i)
		s.verified.set(i)
		s.dirty = true
	}
	s.mu.Unlock()
	if err != nil {
		s.cache.stats.suspended.Store(true)
		s.cache.stats.diskError(err)
		return false
	}
	s.touch(i, i+1)
	s.cache.wrote(len(b))
	return true
}

// keep holds on to fl, which the disk did not take, and lets the oldest go. The caller holds mu.
func (s *store) keep(fl *flight) {
	wake(s.cache.stirred)
	fl.refs++
	s.kept = append(s.kept, fl)
	total := 0
	for _, fl := range s.kept {
		total += len(fl.buf.b)
	}
	for len(s.kept) > 1 && total > keepBytes {
		oldest := s.kept[0]
		s.kept = slices.Delete(s.kept, 0, 1)
		total -= len(oldest.buf.b)
		s.land(oldest)
		s.unref(oldest)
	}
}

// holds reports whether chunk i is on disk, as far as we know.
func (s *store) holds(i int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.present.has(i)
}

// forget makes chunks [lo, hi) misses.
func (s *store) forget(lo, hi int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := lo; i < hi; i++ {
		s.verified.clear(i)
		s.present.clear(i)
	}
	s.dirty = true
	wake(s.cache.stirred)
}

// flush makes data durable, and then the map that tells of it. Files that the disk refused are asked for again.
func (s *store) flush() {
	s.flushMu.Lock()
	defer s.flushMu.Unlock()
	if s.closed {
		return
	}
	if s.data == nil {
		if err := s.openFiles(s.index.TarSize); err != nil {
			s.cache.stats.diskError(err)
			return
		}
	}
	s.writeKept()
	if s.flushLocked() == nil {
		s.saveUses(false)
	}
}

// writeKept offers the disk again what it did not take.
func (s *store) writeKept() {
	s.mu.Lock()
	kept := s.kept
	s.kept = nil
	s.mu.Unlock()
	for _, fl := range kept {
		written := s.write(fl.chunk, fl.off, fl.buf.b)
		s.mu.Lock()
		if written {
			s.land(fl)
		} else {
			s.keep(fl)
		}
		s.unref(fl)
		s.mu.Unlock()
	}
}

func (s *store) flushLocked() error {
	s.mu.Lock()
	if s.closed || s.data == nil || !s.dirty {
		s.mu.Unlock()
		return nil
	}
	m := encodeMap(s.header, s.n, s.present) // before the sync: what is written after it is not covered
	s.dirty = false
	s.mu.Unlock()

	if err := s.data.datasync(); err != nil {
		s.cache.stats.diskError(err)
		s.lost()
		return err
	}
	_, err := s.table.WriteAt(m, 0)
	if err == nil {
		err = s.table.datasync()
	}
	if err != nil {
		s.cache.stats.diskError(err)
		s.mu.Lock()
		s.dirty = true // what the map claims now is true; try again later
		s.mu.Unlock()
		return err
	}
	if !s.cache.stats.suspended.Load() { // a map may be written in place on a disk that is full
		s.cache.stats.diskWorks()
	}
	return nil
}

// lost forgets all chunks after a failed fdatasync: the kernel may have dropped any page written since the last good one, and
// will not say so again.
func (s *store) lost() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.verified.clearAll()
	s.present.clearAll()
	s.epoch++
	s.dirty = true
}

// short notes why a read of data was short.
func (s *store) short(err error) {
	if err != io.EOF {
		s.cache.stats.diskError(err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.doubt()
}

// doubt has every chunk verified anew: somebody has cut data, and what is written next leaves zeros before it. The disk is well. The caller holds mu.
func (s *store) doubt() {
	s.verified.clearAll()
	s.epoch++ // nor is what is being written there for sure
	if err := s.data.truncate(s.index.TarSize); err != nil {
		s.cache.stats.diskError(err)
	}
}

// close flushes and closes the files. Nobody reads any more.
func (s *store) close() error {
	s.flushMu.Lock()
	defer s.flushMu.Unlock()
	if s.data == nil {
		s.closed = true
		return nil
	}
	err := s.flushLocked()
	if err == nil {
		err = s.saveUses(true)
	}
	s.closed = true
	return errors.Join(err, s.data.Close(), s.table.Close())
}

package cache

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// store is what all openers of a layer share: its files, which chunks they hold, and the chunks on their way.
type store struct {
	cache  *Cache
	dgst   digest.Digest
	id     [32]byte                         // of the index
	index  *artifact.Index                  // of the first opener
	layout func() (*artifact.Layout, error) // of index: decoded once for all, at the first fetch and not while a mount waits
	n      int                              // chunks
	header []byte                           // of the map file

	data, table file // nil if the disk refused; the layer is then read without caching

	// verified chunks are in data and were proven by this process: they may be read without a lock.
	// Verified implies present. Set under mu.
	verified bitmap

	flushMu sync.Mutex // held while the files are synced or closed
	closed  bool       // guarded by flushMu

	mu      sync.Mutex
	present bitmap // chunks in data, as far as we know
	flights map[int]*flight
	kept    []*flight // delivered, but not on disk; oldest first
	pass    *pass     // under way, if the blob is gone
	dirty   bool      // present differs from the map file
	// epoch counts the times that the disk lost writes (a failed fdatasync): a chunk written in an earlier epoch may be gone.
	epoch int
}

// keepBytes bounds what a layer keeps in memory of the chunks that the disk did not take, so that small reads of one chunk
// do not fetch it over and over.
const keepBytes = 1 << 20

// openStore opens the files of dgst. Errors of the disk are noted, and cost the caching.
func (c *Cache) openStore(dgst digest.Digest, x *artifact.Index, id [32]byte) *store {
	n := x.NumChunks()
	s := &store{
		cache: c, dgst: dgst, id: id, index: x, layout: sync.OnceValues(x.Layout), n: n, header: encodeMapHeader(x, id),
		verified: newBitmap(n), present: newBitmap(n), flights: make(map[int]*flight),
	}
	if err := s.openFiles(x.TarSize); err != nil {
		c.stats.diskError(err)
	}
	return s
}

// openFiles opens data and map and takes in what the map claims, or makes both anew.
func (s *store) openFiles(tarSize int64) (err error) {
	data, err := s.cache.disk.open(s.cache.dataPath(s.dgst))
	if err != nil {
		return err
	}
	table, err := s.cache.disk.open(s.cache.mapPath(s.dgst))
	if err != nil {
		return errors.Join(err, data.Close())
	}
	present, err := readFiles(data, table, tarSize, s.header, s.n)
	if err != nil {
		if !errors.Is(err, errStale) {
			s.cache.stats.diskError(err)
		}
		present = newBitmap(s.n)
		err = reset(data, table, tarSize)
	}
	if err != nil {
		return errors.Join(err, data.Close(), table.Close())
	}
	s.data, s.table, s.present = data, table, present
	return nil
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
	if s.data == nil || s.cache.stats.suspended.Load() {
		return false
	}
	s.mu.Lock()
	epoch := s.epoch
	s.mu.Unlock()
	if _, err := s.data.WriteAt(b, off); err != nil {
		s.cache.stats.suspended.Store(true)
		s.cache.stats.diskError(err)
		return false
	}
	s.mu.Lock()
	if s.epoch == epoch {
		s.present.set(i)
		s.verified.set(i)
		s.dirty = true
	}
	s.mu.Unlock()
	s.cache.wrote(len(b))
	return true
}

// keep holds on to fl, which the disk did not take, and lets the oldest go. The caller holds mu.
func (s *store) keep(fl *flight) {
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

// forget makes chunks [lo, hi) misses.
func (s *store) forget(lo, hi int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := lo; i < hi; i++ {
		s.verified.clear(i)
		s.present.clear(i)
	}
	s.dirty = true
}

// flush makes data durable, and then the map that tells of it.
func (s *store) flush() error {
	s.flushMu.Lock()
	defer s.flushMu.Unlock()
	return s.flushLocked()
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
	}
	return err
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

// close flushes and closes the files. Nobody reads any more.
func (s *store) close() error {
	s.flushMu.Lock()
	defer s.flushMu.Unlock()
	if s.data == nil {
		s.closed = true
		return nil
	}
	err := s.flushLocked()
	s.closed = true
	return errors.Join(err, s.data.Close(), s.table.Close())
}

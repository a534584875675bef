package cache

import (
	"sync"
	"sync/atomic"
	"time"
)

// Stats are counts since Open. A chunk that several reads wait for is counted once.
type Stats struct {
	Hits          int64 `json:"hits"`           // chunks read from disk, verified before
	Verified      int64 `json:"verified"`       // chunks found on disk and verified at their first use
	Copied        int64 `json:"copied"`         // chunks that another layer had
	Misses        int64 `json:"misses"`         // chunks fetched because a read waited for them
	ReadAhead     int64 `json:"read_ahead"`     // chunks fetched before a read asked for them
	Hot           int64 `json:"hot"`            // chunks that a stream brought: see Fill
	Waits         int64 `json:"waits"`          // chunks that a read waited for, whoever brought them
	Waiting       int64 `json:"waiting"`        // reads that wait now
	Requests      int64 `json:"requests"`       // calls of Blob.ReadRange
	FetchedBytes  int64 `json:"fetched_bytes"`  // bytes asked of Blob.ReadRange
	CorruptChunks int64 `json:"corrupt_chunks"` // chunks from a Blob that did not verify
	DamagedChunks int64 `json:"damaged_chunks"` // chunks on disk that did not verify
	Evicted       int64 `json:"evicted"`        // chunks given back to stay within the limit
	DiskErrors    int64 `json:"disk_errors"`    // operations on the cache's disk that failed
}

// counters are the live Stats.
type counters struct {
	hits, verified, copied, misses, readAhead, hot, waits, waiting, requests, fetchedBytes, corrupt, damaged, evicted, diskErrors atomic.Int64

	opened time.Time
	waited atomic.Int64 // when a read has last ended to wait, nanoseconds after opened

	// failing: the disk refused something, and has written and synced nothing since.
	failing atomic.Bool
	// suspended: a write failed, so do not write before the next flush.
	suspended atomic.Bool

	onDisk  func(failing bool, err error) // Options.OnDisk
	stirred chan<- struct{}               // Cache.stirred

	mu  sync.Mutex
	err error // the last failure of the disk
}

// Stats returns the counts since Open.
func (c *Cache) Stats() Stats {
	s := &c.stats
	return Stats{
		Hits: s.hits.Load(), Verified: s.verified.Load(), Copied: s.copied.Load(), Misses: s.misses.Load(), ReadAhead: s.readAhead.Load(), Hot: s.hot.Load(),
		Waits: s.waits.Load(), Waiting: s.waiting.Load(), Requests: s.requests.Load(), FetchedBytes: s.fetchedBytes.Load(),
		CorruptChunks: s.corrupt.Load(), DamagedChunks: s.damaged.Load(), Evicted: s.evicted.Load(), DiskErrors: s.diskErrors.Load(),
	}
}

// LayerStats are counts of a layer's chunks since the first of its present openers opened it. Layers that images share count for all of them.
type LayerStats struct {
	Hits        int64 `json:"hits"`            // read from disk
	Misses      int64 `json:"misses"`          // fetched because a read waited for them
	MissedBytes int64 `json:"on_demand_bytes"` // of the tar, of those
}

// layerReads are the live LayerStats.
type layerReads struct{ hits, misses, missedBytes atomic.Int64 }

// Stats returns the layer's counts.
func (l *Layer) Stats() LayerStats {
	r := &l.store.reads
	return LayerStats{r.hits.Load(), r.misses.Load(), r.missedBytes.Load()}
}

// hit counts n chunks that were read from disk.
func (s *store) hit(n int) {
	s.cache.stats.hits.Add(int64(n))
	s.reads.hits.Add(int64(n))
}

// miss counts a chunk of n bytes that was fetched because a read waited for it.
func (s *store) miss(n int64) {
	s.cache.stats.misses.Add(1)
	s.reads.misses.Add(1)
	s.reads.missedBytes.Add(n)
}

// Waited returns when a read has last waited for a chunk: now, if one does. What nobody waits for is to make way for them.
func (c *Cache) Waited() time.Time {
	if c.stats.waiting.Load() > 0 {
		return time.Now()
	}
	return c.stats.opened.Add(time.Duration(c.stats.waited.Load()))
}

// wait notes that a read waits, until done is called.
func (c *counters) wait() (done func()) {
	c.waits.Add(1)
	c.waiting.Add(1)
	return func() {
		c.waited.Store(int64(time.Since(c.opened))) // before waiting: see Waited
		c.waiting.Add(-1)
	}
}

// Status is the state of the cache's disk.
type Status struct {
	Used, Limit int64 // bytes on disk, as of the last look, and what they may be; without a limit both are 0
	// NotCaching: the disk refused something and has done nothing well since. Reads go on without caching.
	NotCaching bool
	Err        error // the last failure of the disk, also if it has recovered; nil if there was none
}

// Status returns the state of the cache's disk, for a log and for operators.
func (c *Cache) Status() Status {
	return Status{Used: c.used.Load(), Limit: c.limit, NotCaching: c.stats.failing.Load(), Err: c.Err()}
}

// Err returns the last failure of the cache's disk, or nil. Reads go on without caching meanwhile.
func (c *Cache) Err() error {
	c.stats.mu.Lock()
	defer c.stats.mu.Unlock()
	return c.stats.err
}

// diskError notes a failure of the disk.
func (c *counters) diskError(err error) {
	c.diskErrors.Add(1)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
	c.turn(true)
	wake(c.stirred) // it may work again
}

// diskWorks notes that the disk has taken something for good.
func (c *counters) diskWorks() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.turn(false)
}

// turn notes whether the disk fails, and tells if that is new. The caller holds mu.
func (c *counters) turn(failing bool) {
	if c.failing.Swap(failing) != failing && c.onDisk != nil {
		c.onDisk(failing, c.err)
	}
}

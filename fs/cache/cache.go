// Package cache keeps verified chunks on local disk, so that a chunk crosses the network once per node.
//
// A layer's tar is a sparse file, addressed by tar offset, beside a map of the chunks that it holds. A read of a chunk
// that is not there fetches the chunk's frame from the layer blob, decodes it, compares it with the index (digest and
// headers), hands it to everyone who waits for it, and only then writes it down. Three rules carry the rest:
//
//   - Nothing unproven is visible. Bytes from the network are verified before anyone sees them or they reach the disk; bytes
//     from the disk are verified when a process first uses them. There is no switch for this.
//   - Damage is a miss. A map or a data file that is lost, cut, foreign or wrong costs a fetch, never an error and never a
//     wrong byte. A disk that is full or failing costs the caching: reads go on from memory.
//   - The map on disk never claims a chunk whose bytes are not durable: data is synced first, then the map is written.
//
// The directory of a cache, which one process at a time holds (flock on the directory):
//
//	DIR/
//	  sha256-HEX/   a layer, named by the digest of its index (mode 0700)
//	    data        the layer's tar, sparse: chunk i at its tar offset (mode 0600)
//	    whole       instead of data: the layer's tar, complete, which others may read, see whole.go (mode 0600)
//	    map         which chunks of data are present (mode 0600)
//	    uses        when each chunk was used last, Unix seconds, 4 bytes each, little-endian (mode 0600); only the order of eviction
//	                depends on it, so it is never synced, and one of another size says nothing
//
// A layer is named by its index, which says what each chunk's bytes are, and not by what the index or its artifact claims the layer to be
// (diffID, source layer, blob): so bytes of one artifact cannot stand in for another's before they are proven, nor take their place. Files
// that are not named here belong to others and are left alone.
//
// The map, integers little-endian; a map of another size, version, index or layer is as good as none:
//
//	offset  size  field
//	0       8     magic "SSCHUNKS"
//	8       4     version, 1
//	12      4     zero
//	16      8     size of the tar, bytes
//	24      8     number of chunks n
//	32      32    identity of the index: SHA-256 of what it says of the tar and its chunks
//	64      (n+7)/8  chunk i is present if bit i%8 of byte i/8 is set; bits from n on are zero
//
// The map is written in place: a torn write mixes old bits and new ones, and both are true.
//
// A Blob that is gone or wrong for good may know another way to the tar: see rebuild.go.
//
// Reads of a file from its start to its end are seen and fetched ahead: see readahead.go.
//
// A chunk that another layer has, too, is copied: see twins.go.
//
// A stream may bring the chunks that are needed first of several layers, in the order of their use: see hot.go.
//
// Who judges a layer reads it once, from its start to its end, whatever is here: see sweep.go.
//
// A layer that is here as a whole may be read by others than this process: see whole.go.
//
// With a limit, chunks that were used least recently are given back, also of layers that are open: see evict.go.
//
// The package knows nothing of registries, of retries over hosts, of mounts, or of the images that layers belong to.
package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

// Blob reads ranges of a layer blob from wherever it is kept.
type Blob interface {
	// ReadRange returns exactly n bytes at off, or an error: a reader that ends early fails with io.ErrUnexpectedEOF.
	// It may be called from many goroutines. ctx ends the reads of what it returned, too.
	// try counts from 0: a chunk whose bytes proved wrong is asked for again with try+1, and the Blob should then turn to another host, or wait
	// before it asks the same one. When that has gone on for long enough it returns an error. If the reader has a method
	// Wrong(off, n int64), it is told which n bytes at off of the blob were wrong, once it is not read any more at the latest.
	ReadRange(ctx context.Context, off, n int64, try int) (io.ReadCloser, error)
}

const (
	// A crash costs the chunks of the last flush period, to be fetched again; a flush costs two fdatasyncs per layer that
	// changed. It comes so long after what it is for: while nothing happens there is none.
	flushAfter = 5 * time.Second
	// Under load, flush more often: less to lose, and no large burst of writeback.
	flushBytes = 64 << 20
)

// Cache is a directory of layers.
type Cache struct {
	dir      string
	lock     *os.File // holds the flock
	disk     disk
	bufs     buffers
	stats    counters
	twins    twins
	exact    bool         // no read-ahead
	onDamage func(Damage) // of Options
	onLie    func(layer digest.Digest, chunk int, err error)
	onRest   func() // likewise
	limit    int64

	used    atomic.Int64   // bytes on disk when last measured, and what was written since
	writing atomic.Int64   // of used: may not be on disk yet
	unsaved atomic.Int64   // bytes written since the last flush
	kick    chan struct{}  // asks the flusher to flush now
	stirred chan struct{}  // tells it that there is something to flush, or to try again
	stop    chan struct{}  // closed by Close
	running sync.WaitGroup // the flusher and the learner

	wholeMu sync.Mutex  // one call of Whole at a time
	evictMu sync.Mutex  // one eviction at a time
	stuck   atomic.Bool // the last eviction has not freed enough: not again before the next flush

	// LOCK ORDER: Cache.wholeMu, Cache.evictMu, slot.mu, Cache.mu, store.flushMu, readAhead.mu, store.layoutMu, hot.mu, store.mu. None is held while waiting for a Blob or a fill.
	mu      sync.Mutex
	slots   map[digest.Digest]*slot
	handles map[*Layer]struct{}
	closed  bool
}

// slot is the place of a layer in the cache. Its mutex serialises opening and closing of the layer's files.
type slot struct {
	users   int  // handles, and those about to open one or to remove the files; guarded by Cache.mu
	removed bool // the files go with the last handle; guarded by mu

	mu    sync.Mutex
	refs  int    // handles
	store *store // nil while refs is 0; written under mu and Cache.mu, read under either
}

// Open opens or creates the cache in dir. Damage is a miss, never an error. It fails if dir cannot be made or another
// process has it open.
func Open(dir string, o Options) (*Cache, error) {
	return open(dir, o, osDisk{})
}

// Damage is a chunk on disk that does not verify: a miss.
type Damage struct {
	Layer        digest.Digest // as Cache.Layer has it
	File         string
	Offset, Size int64 // in the file, bytes
}

// Options of a Cache.
type Options struct {
	NoReadAhead bool  // fetch the chunks that reads touch and no others
	Limit       int64 // bytes on disk, blocks really allocated; 0 for no limit. See evict.go
	// Index opens the index of a layer that was opened before, by its digest, for as long as it is used: so chunks that another layer has
	// are copied, see twins.go. Nil: each is fetched.
	Index func(dgst digest.Digest) (*artifact.Index, error)
	// OnDisk is told when the disk begins to fail, with the reason, and when it works again: once each. It must not block or call the Cache. Nil is nobody.
	OnDisk func(failing bool, err error)
	// OnDamage is told of each chunk on disk that did not verify. It must not block or call the Cache. Nil is nobody.
	OnDamage func(Damage)
	// OnLie is told of each chunk whose bytes have their digest and are not what the index says otherwise: either no source of the layer can be right, or the memory of the index is damaged. It must
	// not block or call the Cache. Nil is nobody.
	OnLie func(layer digest.Digest, chunk int, err error)
	// OnRest is called when no layer has been read for a minute, after some were: what reading them took is garbage then. It must not call the Cache. Nil is nobody.
	OnRest func()
}

func open(dir string, o Options, d disk) (*Cache, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open cache: %w", err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, fmt.Errorf("open cache: %w", err)
	}
	c := &Cache{
		dir: dir, lock: lock, disk: d, exact: o.NoReadAhead, limit: o.Limit,
		kick: make(chan struct{}, 1), stirred: make(chan struct{}, 1), stop: make(chan struct{}),
		slots: make(map[digest.Digest]*slot), handles: make(map[*Layer]struct{}),
	}
	c.twins.index, c.twins.kick = o.Index, make(chan struct{}, 1)
	c.stats.onDisk, c.stats.opened, c.stats.stirred = o.OnDisk, time.Now(), c.stirred
	c.onDamage, c.onLie, c.onRest = o.OnDamage, o.OnLie, o.OnRest
	c.measure()
	c.running.Go(c.flusher)
	if o.Index != nil {
		c.running.Go(c.learner)
	}
	return c, nil
}

// Layer opens the layer with index x, whose digest is dgst, for reading; the data files are shared by all openers of the same dgst.
// Close it when no mount needs it.
//
// The x of the first opener serves all: its bytes must stay readable until every opener of dgst has closed. A chunk is
// fetched through the blob of the opener that asked first; if that fails, others turn to their own. It is
// artifact.ErrInvalid if dgst is open with another index. A disk that refuses is no error: see Err.
func (c *Cache) Layer(dgst digest.Digest, x *artifact.Index, blob Blob) (*Layer, error) {
	if err := dgst.Validate(); err != nil {
		return nil, fmt.Errorf("open layer %q in the cache: %w", dgst, err)
	}
	var id [32]byte
	err := mapped.Guard(func() { id = identity(x) })
	if err != nil {
		return nil, fmt.Errorf("open layer %s in the cache: %w", dgst, err)
	}
	s, err := c.acquire(dgst, x, id)
	if err != nil {
		return nil, fmt.Errorf("open layer %s in the cache: %w", dgst, err)
	}
	l := &Layer{
		blob: blob, store: s, index: x,
		closing: make(chan struct{}), fills: make(map[*fill]struct{}),
	}
	l.close = sync.OnceValue(l.end)
	l.ahead.layer = l
	c.mu.Lock()
	closed := c.closed
	if !closed {
		c.handles[l] = struct{}{}
	}
	c.mu.Unlock()
	if closed {
		return nil, errors.Join(os.ErrClosed, c.release(dgst))
	}
	return l, nil
}

// acquire returns the store of dgst, whose index is x, of identity id, with one more reference.
func (c *Cache) acquire(dgst digest.Digest, x *artifact.Index, id [32]byte) (*store, error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, os.ErrClosed
	}
	sl := c.use(dgst)
	c.mu.Unlock()

	sl.mu.Lock()
	defer sl.mu.Unlock()
	sl.removed = false
	switch {
	case sl.store == nil:
		s := c.openStore(dgst, x, id)
		wake(c.twins.kick)
		c.mu.Lock()
		sl.store = s
		c.mu.Unlock()
	case sl.store.id != id:
		c.unuse(dgst, sl, sl.store)
		return nil, fmt.Errorf("it is open with another index: %w", artifact.ErrInvalid)
	}
	sl.refs++
	return sl.store, nil
}

// use returns the slot of dgst with one more use. The caller holds mu.
func (c *Cache) use(dgst digest.Digest) *slot {
	sl := c.slots[dgst]
	if sl == nil {
		sl = new(slot)
		c.slots[dgst] = sl
	}
	sl.users++
	return sl
}

// unuse takes back a use of sl, whose store is now s.
func (c *Cache) unuse(dgst digest.Digest, sl *slot, s *store) {
	c.mu.Lock()
	defer c.mu.Unlock()
	sl.store = s
	if sl.users--; sl.users == 0 {
		delete(c.slots, dgst)
	}
}

// release drops a reference to the store of dgst, and closes it if it was the last.
func (c *Cache) release(dgst digest.Digest) error {
	c.mu.Lock()
	sl := c.slots[dgst]
	c.mu.Unlock()

	sl.mu.Lock()
	defer sl.mu.Unlock()
	s := sl.store
	var err error
	if sl.refs--; sl.refs == 0 {
		err = s.close()
		s = nil
		if sl.removed {
			err = c.removeFiles(dgst)
		}
	}
	c.unuse(dgst, sl, s)
	return err
}

// wrote counts n bytes written to a data file, and asks for a flush when there are many.
func (c *Cache) wrote(n int) {
	if c.unsaved.Add(int64(n)) >= flushBytes {
		wake(c.kick)
	}
}

// wake asks who listens to kick to begin now.
func wake(kick chan<- struct{}) {
	select {
	case kick <- struct{}{}:
	default: // it is asked already
	}
}

// flusher saves the layers while something happens, until Close.
func (c *Cache) flusher() {
	stirred := c.stirred
	var due <-chan time.Time
	rested := true
	for {
		select {
		case <-c.stop:
			return
		case <-stirred:
			stirred, due, rested = nil, time.After(flushAfter), false
			continue
		case <-c.kick:
		case <-due:
		}
		stirred, due = c.stirred, nil
		wait := c.flush()
		if wait > 0 {
			due = time.After(wait)
		} else if !rested && c.onRest != nil {
			c.onRest()
		}
		rested = wait == 0
	}
}

// flush makes what was written until now durable. Its errors are in Stats. It returns when the next one is due if nothing happens until then; 0 says that all layers
// are at rest.
func (c *Cache) flush() (wait time.Duration) {
	c.unsaved.Store(0)
	c.stats.suspended.Store(false) // a disk that was full may have room again
	atRest := make(map[*store]bool)
	for _, s := range c.openStores() {
		s.flush()
		left := s.rest()
		atRest[s] = left == 0
		wait = max(wait, left)
	}
	for _, l := range c.openLayers() {
		if atRest[l.store] {
			l.index.ForgetLayout()
		}
	}
	c.evict()
	return wait
}

func (c *Cache) openStores() (stores []*store) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, sl := range c.slots {
		if sl.store != nil {
			stores = append(stores, sl.store)
		}
	}
	return stores
}

// Close flushes and closes all. Layers that are still open read no more.
func (c *Cache) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	c.mu.Unlock()

	close(c.stop)
	c.running.Wait()
	var errs []error
	for _, l := range c.openLayers() {
		errs = append(errs, l.Close())
	}
	return errors.Join(append(errs, c.lock.Close())...)
}

// openLayers returns the handles in use.
func (c *Cache) openLayers() []*Layer {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Keys(c.handles))
}

// dataPath and mapPath name a layer's files.
func (c *Cache) dataPath(dgst digest.Digest) string { return filepath.Join(c.layerDir(dgst), "data") }
func (c *Cache) mapPath(dgst digest.Digest) string  { return filepath.Join(c.layerDir(dgst), "map") }

func (c *Cache) layerDir(dgst digest.Digest) string {
	return filepath.Join(c.dir, dgst.Algorithm().String()+"-"+dgst.Encoded())
}

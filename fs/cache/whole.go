package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

// A layer of which every chunk is here, proven and durable may be read by others without this process: as a device of a mount. Its data is then named whole, and
// no hole is ever punched in a file of that name, because whoever has it open would read zeros: not by this process, nor by a later one, nor by an older
// release, which knows no such name and takes the layer to be missing. So nothing has to be recorded of who uses it. It goes as a whole, by unlink(2), which leaves
// its bytes to those that have it open; as that would free nothing while somebody has, the kernel is asked whether anybody does.
//
// A chunk of it that the disk has damaged is a miss like any other, and what is fetched is written in its place.

// wholeShare is the part of a cache with a limit that such files may take: what they have is not given back by the chunk.
const wholeShare = 2

// ErrNotWhole says that a part of a layer is not here, or was not proven by this process.
var ErrNotWhole = errors.New("not all of the layer is here and proven")

func (c *Cache) wholePath(dgst digest.Digest) string {
	return filepath.Join(c.layerDir(dgst), "whole")
}

// Verify proves what is here of the layer and was not yet: pace is told how many bytes are to be read next, and its error ends it. What is damaged is fetched:
// the error is ErrLeft until that is on disk. The others are ctx's, os.ErrClosed and what ReadAt returns.
func (l *Layer) Verify(ctx context.Context, pace func(n int64) error) (err error) {
	if !l.enter() {
		return fmt.Errorf("verify layer %s: %w", l.store.dgst, os.ErrClosed)
	}
	defer l.running.Done()
	s := l.store
	left := false
	if fault := mapped.Guard(func() { // of the index
		for i := 0; i < s.n && err == nil; i++ {
			if s.verified.has(i) || !s.holds(i) {
				continue
			}
			if err = ctx.Err(); err == nil {
				err = pace(s.index.Chunk(i).TarSize)
			}
			if err == nil {
				err = l.prove(ctx, i)
			}
			left = left || !s.verified.has(i)
		}
	}); fault != nil {
		err = fault
	}
	if err == nil && left {
		err = ErrLeft
	}
	if err != nil {
		return fmt.Errorf("verify layer %s: %w", s.dgst, err)
	}
	s.flush() // what was fetched a moment ago is proven, but not durable
	return nil
}

// prove does what a read of chunk i would, which nobody waits for.
func (l *Layer) prove(ctx context.Context, i int) error {
	flights := l.claim(i, i+1)
	defer l.store.release(flights)
	if flights[0] == nil {
		return nil
	}
	select {
	case <-flights[0].done:
		return flights[0].err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Whole returns for each of layers, which are open, the path of a file that is its tar, for others to read; it is there, and unchanged, for as long as the layer is
// open or somebody has opened the file. The errors are ErrNotWhole, ErrFull (more than half of the limit would be in such files) and the disk's.
func (c *Cache) Whole(layers []*Layer) (paths []string, err error) {
	c.wholeMu.Lock()
	defer c.wholeMu.Unlock()
	more := int64(0)
	seen := make(map[*store]bool)
	for _, l := range layers {
		s := l.store
		if !s.proven() {
			return nil, fmt.Errorf("layer %s: %w", s.dgst, ErrNotWhole)
		}
		if !seen[s] {
			more += s.index.TarSize
		}
		seen[s] = true
	}
	if c.limit > 0 {
		for _, dgst := range c.layersOnDisk() {
			if fi, err := os.Lstat(c.wholePath(dgst)); err == nil {
				more += fi.Size()
			}
		}
		for s := range seen {
			if s.isWhole() {
				more -= s.index.TarSize
			}
		}
		if more > c.limit/wholeShare {
			return nil, ErrFull
		}
	}
	for _, l := range layers {
		if err := l.store.makeWhole(); err != nil {
			return nil, fmt.Errorf("layer %s: %w", l.store.dgst, err)
		}
		paths = append(paths, c.wholePath(l.store.dgst))
	}
	return paths, nil
}

// Damaged reports whether a chunk on disk did not verify since the layer was opened first: a mount of its file may have that in its page cache.
func (l *Layer) Damaged() bool { return l.store.damaged.Load() }

func (s *store) isWhole() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.whole
}

// proven reports whether all chunks are on disk, verified and durable: what was written since the last flush may not be.
func (s *store) proven() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.data != nil && s.verified.hasAll(0, s.n) && !s.dirty
}

// makeWhole gives the data file its other name. While flushMu is held nothing is punched, and no flush is under way.
func (s *store) makeWhole() error {
	s.flushMu.Lock()
	defer s.flushMu.Unlock()
	if s.closed || !s.proven() {
		return ErrNotWhole
	}
	s.touch(0, s.n)
	if s.whole {
		return nil
	}
	if err := s.cache.disk.rename(s.cache.dataPath(s.dgst), s.cache.wholePath(s.dgst)); err != nil {
		s.cache.stats.diskError(err)
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.whole = true
	return nil
}

// openData opens the data file, and reports whether it is whole. An older release may have put another beside it.
func (s *store) openData(tarSize int64) (data file, whole bool, err error) {
	c := s.cache
	if fi, err := os.Lstat(c.wholePath(s.dgst)); err == nil && fi.Size() == tarSize {
		c.disk.remove(c.dataPath(s.dgst))
		data, err = c.disk.open(c.wholePath(s.dgst))
		return data, true, err
	} else if err == nil {
		if err := c.disk.remove(c.wholePath(s.dgst)); err != nil {
			return nil, false, err
		}
	}
	data, err = c.disk.open(c.dataPath(s.dgst))
	return data, false, err
}

// inUse reports whether the layer, which is not open here, has a whole file that somebody else has open, be it the kernel for a mount: then the kernel gives
// nobody a write lease on it.
func (c *Cache) inUse(dgst digest.Digest) bool {
	f, err := os.Open(c.wholePath(dgst))
	if err != nil {
		return false
	}
	defer f.Close()
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	}
	return errors.Is(err, unix.EAGAIN) // without leases it goes too early, which harms nobody
}

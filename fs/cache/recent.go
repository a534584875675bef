package cache

import (
	"encoding/binary"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	// saveUsesEvery is how often, in seconds, the file of uses is written while a layer is read. A crash costs so much of the order of eviction.
	saveUsesEvery = 300
	// restAfter is how long, in seconds, a layer has not been read when it is at rest.
	restAfter = 60
)

func (c *Cache) usesPath(dgst digest.Digest) string { return filepath.Join(c.layerDir(dgst), "uses") }

// now is the clock of recency, Unix seconds.
func now() uint32 { return uint32(time.Now().Unix()) }

// touch notes a use of chunks [lo, hi). It writes memory that other readers share only when the clock has moved on.
func (s *store) touch(lo, hi int) {
	now, changed := now(), false
	for i := lo; i < hi; i++ {
		if s.recent[i].Load() != now {
			s.recent[i].Store(now)
			changed = true
		}
	}
	if changed {
		s.lastUse.Store(now)
		wake(s.cache.stirred)
	}
}

// rest writes the uses of a layer that has not been read for a while, and forgets what only fetches need. It returns how long that is to wait yet.
func (s *store) rest() time.Duration {
	s.flushMu.Lock()
	defer s.flushMu.Unlock()
	s.layoutMu.Lock()
	defer s.layoutMu.Unlock()
	if idle := now() - max(s.lastUse.Load(), s.lastLayout); idle < restAfter {
		return time.Duration(restAfter-idle) * time.Second
	}
	s.index.ForgetLayout()
	if s.data != nil && !s.closed {
		s.saveUses(true)
	}
	return 0
}

// loadUses reads when chunks were used in former lives. A file that is not good says nothing: its chunks are the first to go.
func (s *store) loadUses() {
	f, err := s.cache.disk.open(s.cache.usesPath(s.dgst))
	if err != nil {
		s.cache.stats.diskError(err)
		return
	}
	defer f.Close()
	size, err := f.size()
	b := make([]byte, 4*s.n)
	if err == nil && size != int64(len(b)) {
		return
	}
	if err == nil {
		_, err = f.ReadAt(b, 0)
	}
	if err != nil {
		s.cache.stats.diskError(err)
		return
	}
	now := now()
	for i := range s.n {
		s.recent[i].Store(min(binary.LittleEndian.Uint32(b[4*i:]), now))
	}
}

// saveUses writes when chunks were used, if that has changed for some time, or at all. The caller holds flushMu.
func (s *store) saveUses(always bool) error {
	last := s.lastUse.Load()
	if last == s.usesSaved || !always && now()-s.usesSaved < saveUsesEvery {
		return nil
	}
	s.usesSaved = last
	f, err := s.cache.disk.open(s.cache.usesPath(s.dgst))
	if err != nil {
		s.cache.stats.diskError(err)
		return err
	}
	defer f.Close()
	b := make([]byte, 0, 4*s.n)
	for i := range s.n {
		b = binary.LittleEndian.AppendUint32(b, s.recent[i].Load())
	}
	if _, err = f.WriteAt(b, 0); err != nil {
		s.cache.stats.diskError(err)
	}
	return err
}

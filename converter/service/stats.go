package service

import (
	"sync"
	"time"
)

// Stats are what metrics are made of. Operations and Waiting are of all processes, the rest is of this one; counters begin with it.
type Stats struct {
	Operations map[State]int // that are kept
	Waiting    int           // in the queue
	Running    int           // conversions
	Slots      int           // for conversions
	Disk       int64         // bytes reserved for converted layers; 0 without a limit

	Auto AutoStats

	Succeeded, Failed, Canceled uint64  // operations that this process ended
	Bytes                       int64   // of source layers of those that succeeded
	Seconds                     float64 // from the start of those that succeeded to their end
}

// AutoStats are what the service does by itself. Counters are of this process, and begin with it.
type AutoStats struct {
	Events            uint64            // that told of something to look at
	Due               int               // tags that wait to be looked at, as of the last looks of this process
	Deleted           uint64            // artifacts and profiles
	Reconciled        time.Time         // when the last pass over the registry ended whose last one is the oldest, of any process; zero if there is one without
	ReconcileFailures map[string]uint64 // passes over a repository that failed, by registry
}

// deeds counts for AutoStats. auto.mu guards it.
type deeds struct {
	events, deleted uint64
	due             map[repository]int
	passed          map[string]time.Time // by registry
	failed          map[string]uint64    // by registry
}

func (a *auto) stats() AutoStats {
	a.mu.Lock()
	defer a.mu.Unlock()
	st := AutoStats{Events: a.deeds.events, Deleted: a.deeds.deleted, ReconcileFailures: map[string]uint64{}}
	for _, n := range a.deeds.due {
		st.Due += n
	}
	for i, name := range a.names {
		st.ReconcileFailures[name] = a.deeds.failed[name]
		if t := a.deeds.passed[name]; i == 0 || t.Before(st.Reconciled) {
			st.Reconciled = t
		}
	}
	return st
}

// counters count what ended.
type counters struct {
	mu  sync.Mutex
	sum Stats
}

func (c *counters) ended(r record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch r.State {
	case Succeeded:
		c.sum.Succeeded++
		c.sum.Bytes += r.Progress.Bytes
		c.sum.Seconds += r.End.Sub(r.Start).Seconds()
	case Failed:
		c.sum.Failed++
	case Canceled:
		c.sum.Canceled++
	}
}

// Stats returns what the service has done and does.
func (s *Service) Stats() Stats {
	s.counters.mu.Lock()
	st := s.counters.sum
	s.counters.mu.Unlock()
	st.Operations = s.view.states()
	st.Waiting = st.Operations[NotStarted]
	st.Running, st.Slots = int(s.converting.Load()), int(s.room.slots)
	st.Disk = s.room.used.Load()
	st.Auto = s.auto.stats()
	return st
}

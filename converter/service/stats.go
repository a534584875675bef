package service

import "sync"

// Stats are what metrics are made of. Operations and Waiting are of all processes, the rest is of this one; counters begin with it.
type Stats struct {
	Operations map[State]int // that are kept
	Waiting    int           // in the queue
	Running    int           // conversions
	Slots      int           // for conversions
	Disk       int64         // bytes reserved for converted layers; 0 without a limit

	Succeeded, Failed, Canceled uint64  // operations that this process ended
	Bytes                       int64   // of source layers of those that succeeded
	Seconds                     float64 // from the start of those that succeeded to their end
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
	st.Running, st.Slots = int(s.converting.Load()), cap(s.room.conversions)
	st.Disk = s.room.used.Load()
	return st
}

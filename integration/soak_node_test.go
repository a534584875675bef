package integration_test

import (
	"errors"
	"os"
	"syscall"
	"time"
)

// fillDisk lets another writer fill the cache's disk, and take what the cache gives back.
func (s *soak) fillDisk() {
	s.t.Helper()
	s.log("the cache's disk is full")
	f, err := os.CreateTemp(s.n.CacheDir(), "other")
	if err != nil {
		s.t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- fill(f, stop) }()
	s.lasting("the cache's disk has room", func() {
		close(stop)
		if err := errors.Join(<-done, f.Close(), os.Remove(f.Name())); err != nil {
			s.t.Error(err)
		}
	})
}

// fill writes to f until stop. While there is no room it tries again and again.
func fill(f *os.File, stop <-chan struct{}) error {
	b := make([]byte, 64<<10)
	for {
		var pause time.Duration
		if _, err := f.Write(b); errors.Is(err, syscall.ENOSPC) {
			pause = 10 * time.Millisecond
		} else if err != nil {
			return err
		}
		select {
		case <-stop:
			return nil
		case <-time.After(pause):
		}
	}
}

// remapped runs a container whose IDs begin at base on the node.
func (s *soak) remapped(base uint32) {
	s.t.Helper()
	s.log("a container in a user namespace, from %d", base)
	out, err := s.n.RunFlags(s.t.Context(), s.app, idMaps(base))
	if err != nil {
		s.t.Error(err)
		return
	}
	checkSums(s.t, out, s.seed)
}

// reboot takes the power away, boots, and starts the same containers again.
func (s *soak) reboot() {
	s.t.Helper()
	s.log("the power goes; boot")
	s.heal() // who writes to the node's disk dies too
	for _, w := range s.watchers {
		if err := w.end(); err != nil {
			s.t.Error(err)
		}
	}
	if err := s.n.PowerLoss(); err != nil {
		s.t.Fatal(err)
	}
	if err := s.n.Boot(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	for _, w := range s.watchers {
		if err := w.startAgain(s.t.Context(), s.n); err != nil {
			s.t.Fatal(err)
		}
	}
}

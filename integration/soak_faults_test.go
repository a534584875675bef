package integration_test

import (
	"context"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// step does one thing of the following, chosen at random, and checks. What it draws does not depend on how the run goes.
func (s *soak) step() {
	s.t.Helper()
	what, size, which := s.rand.IntN(120), s.rand.Int64N(100_000), s.rand.IntN(otherImages)
	wait := time.Duration(s.rand.IntN(int(400 * time.Millisecond)))
	times := 1 + int(size%8)
	switch {
	case what < 8:
		wait *= 5
		s.log("the registry is away for %v", wait)
		address := s.proxy.Addr()
		s.proxy.Close()
		defer s.startProxy(address)
	case what < 15:
		s.onTheWay("broken connections", -1, registrytest.Reset(-1))
	case what < 24:
		s.onTheWay("connections broken in the body", times, registrytest.Reset(size))
	case what < 36:
		s.onTheWay("truncated bodies", times, registrytest.Truncate(size))
	case what < 40:
		s.onTheWay("a body that stalls", 1, registrytest.Stall(size))
	case what < 50:
		s.onTheWay("503 with Retry-After", times, registrytest.Status(http.StatusServiceUnavailable, "Retry-After", "1"))
	case what < 55:
		s.onTheWay("500", times, registrytest.Status(http.StatusInternalServerError))
	case what < 60:
		s.onTheWay("a slow registry", 20, registrytest.Delay(200*time.Millisecond))
	case what < 62:
		s.log("delete the files of the cache")
		s.damageCache(deleted)
	case what < 66:
		s.onTheWay("a flipped byte", times, registrytest.Flip(size))
	case what < 70:
		s.onTheWay("ignored ranges", times, registrytest.IgnoreRange())
	case what < 75:
		s.log("restart containerd, killed: %v", which == 0)
		if err := s.n.RestartContainerd(s.t.Context(), which == 0); err != nil {
			s.t.Fatal(err)
		}
	case what < 84:
		s.restartDaemon(size%4 > 0, damage(size%3))
	case what < 96:
		s.pull(which, time.Duration(size)*2*time.Microsecond)
	case what < 106:
		s.fillDisk()
	case what < 114:
		s.remapped(100_000 * uint32(1+size%5))
	case what < 118:
		s.reboot()
	default:
		s.log("nothing")
	}
	time.Sleep(wait) // the time between faults is a part of what is tested
	s.check()
}

// heal ends the faults that still last.
func (s *soak) heal() {
	for _, heal := range s.heals {
		heal()
	}
	s.heals = nil
}

// lasting lets a fault last for a while, whatever the steps meanwhile wait for.
func (s *soak) lasting(name string, heal func()) {
	once := sync.OnceFunc(func() {
		heal()
		s.log("... %s", name)
	})
	time.AfterFunc(soakRegistryWait, once)
	s.heals = append(s.heals, once)
}

// onTheWay lets requests of the snapshotter for blobs fail.
func (s *soak) onTheWay(name string, times int, f registrytest.Fault) {
	s.log("on the way: %s, %d times", name, times)
	match := func(r *http.Request) bool { return snapshotters(r) && registrytest.Blobs(r) }
	s.lasting("no more "+name, s.registry.Inject(match, times, f))
}

// damage is what is done to the files of the cache.
type damage int64

const (
	none damage = iota
	flipped
	deleted
)

func (d damage) String() string { return [...]string{"left alone", "flipped", "deleted"}[d] }

func (s *soak) damageCache(d damage) {
	for _, name := range cacheFiles(s.t, s.n) {
		switch d {
		case flipped:
			flipBytes(s.t, name)
		case deleted:
			if err := os.Remove(name); err != nil {
				s.t.Error(err)
			}
		}
	}
}

// restartDaemon kills the daemon and damages its cache before the next is started, or has it restarted in an orderly way. What was verified since
// the start is not verified again, so that the cache is not damaged under a daemon that serves.
func (s *soak) restartDaemon(kill bool, d damage) {
	s.t.Helper()
	if !kill {
		s.log("restart the daemon")
		if err := s.n.RestartSupervised(); err != nil {
			s.t.Fatal(err)
		}
		return
	}
	s.log("kill the daemon, files of the cache: %v", d)
	if err := s.n.KillSupervisedAnd(s.t.Context(), func() { s.damageCache(d) }); err != nil {
		s.t.Fatal(err)
	}
}

// pull pulls another image, first with a client that is killed after a while, runs it and removes it. Faults on the way are for reads of
// blobs only: what cannot be streamed for them is pulled in the normal way.
func (s *soak) pull(which int, kill time.Duration) {
	s.t.Helper()
	ref, seed := s.other(which), s.seed+1+uint64(which)
	s.log("pull %s, client killed after %v; run, remove", ref, kill)
	ctx, cancel := context.WithTimeout(s.t.Context(), kill)
	_ = s.n.Pull(ctx, ref) // it may have been quicker
	cancel()
	if err := s.n.Pull(s.t.Context(), ref); err != nil {
		s.t.Error(err)
		return
	}
	sumIn(s.t, s.n, ref, seed, "/data")
	if _, err := s.n.Crictl(s.t.Context(), "rmi", ref); err != nil {
		s.t.Error(err)
	}
}

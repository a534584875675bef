package stream

import (
	"cmp"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
)

// proofs is what a Store knows of its proofs.
type proofs struct {
	kick  chan struct{} // asks the prover to look what there is to do
	since time.Time     // that this life of the daemon proves

	mu     sync.Mutex
	urgent map[digest.Digest]bool  // indexes, by OnLie
	tries  map[ledger.Key]*attempt // that have failed
	told   map[string]bool         // images that are told to be overdue
}

func newProofs() proofs {
	return proofs{kick: make(chan struct{}, 1), since: time.Now(), urgent: map[digest.Digest]bool{}, tries: map[ledger.Key]*attempt{}, told: map[string]bool{}}
}

// attempt is what failed of a layer's proof.
type attempt struct {
	n    int
	next time.Time
	err  error
}

// job is a layer to be proven.
type job struct {
	image    *image
	layer    int
	begun    time.Time // the first mount
	deadline time.Time
	attempt  attempt
	urgent   bool
}

func (j *job) key() ledger.Key { return j.image.rec.key(j.layer) }

// noteMounted writes down when img was mounted first. The caller holds img.mu.
func (s *Store) noteMounted(img *image) {
	if s.o.Trust.Ledger == nil || img.noted {
		return
	}
	img.noted = true
	now := time.Now()
	s.running.Go(func() { // no container waits for the disk
		if _, err := s.mountedAt(img.id); err == nil {
			return
		}
		if err := ledger.WriteFile(s.imageDir(img.id), mountedName, now.AppendFormat(nil, time.RFC3339Nano)); err != nil && !s.forgotten(img) {
			s.log.Warn("the time of an image's first mount is not written down: its proof is due from the next one on", "image", img.id, "error", err)
		}
		s.wakeProver()
	})
}

func (s *Store) mountedAt(id string) (time.Time, error) {
	b, err := os.ReadFile(filepath.Join(s.imageDir(id), mountedName))
	if err != nil {
		return time.Time{}, err
	}
	at, err := time.Parse(time.RFC3339Nano, string(b))
	if err != nil || at.After(time.Now()) {
		at = time.Now().Add(-s.deadline()) // damaged, or the clock was wrong: it is due
	}
	return at, nil
}

// ended remembers how a job has ended.
func (s *Store) ended(j *job, err error) {
	s.proofs.mu.Lock()
	defer s.proofs.mu.Unlock()
	delete(s.proofs.urgent, j.key().Index)
	if err == nil || errors.Is(err, ErrQuarantined) || errors.Is(err, errForgotten) {
		delete(s.proofs.tries, j.key())
		return
	}
	a := &attempt{n: j.attempt.n + 1, err: err}
	if !errors.Is(err, errSlow) {
		a.next = time.Now().Add(min(completeRetry, s.deadline()/6))
		s.log.Info("a layer is not proven for now", "image", j.image.name(), "layer", j.layer, "deadline", j.deadline, "error", err)
	}
	s.proofs.tries[j.key()] = a
}

// jobs lists the layers in use that are to be proven now, the first first, and tells of images whose time is over. If there are none, it returns when to look again, 0 for not before something happens.
func (s *Store) jobs() (list []*job, wait time.Duration) {
	now := time.Now()
	later := func(at time.Time) {
		if d := max(at.Sub(now), time.Millisecond); wait == 0 || d < wait {
			wait = d
		}
	}
	seen := map[ledger.Key]bool{}
	for _, j := range s.toProve() {
		s.overdue(j, now)
		key := j.key()
		s.proofs.mu.Lock()
		j.urgent = s.proofs.urgent[key.Index]
		if a := s.proofs.tries[key]; a != nil {
			j.attempt = *a
		}
		s.proofs.mu.Unlock()
		start := s.begins(j)
		switch {
		case seen[key]:
		case !j.urgent && j.attempt.next.After(now):
			later(j.attempt.next)
			if j.deadline.After(now) {
				later(j.deadline)
			}
		case !j.urgent && start.After(now):
			later(start)
		default:
			seen[key] = true
			list = append(list, j)
		}
	}
	slices.SortStableFunc(list, func(a, b *job) int {
		if a.urgent != b.urgent {
			if a.urgent {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(a.attempt.n, b.attempt.n), a.deadline.Compare(b.deadline))
	})
	return list, wait
}

// toProve lists the layers of images that were mounted, and are not proven.
func (s *Store) toProve() (list []*job) {
	for _, img := range s.onDisk() {
		if s.proven(img.rec) || img.refused() != nil {
			continue
		}
		at, err := s.mountedAt(img.id)
		if err != nil {
			if len(s.through(img.id)) == 0 && len(s.direct(img.id)) == 0 {
				continue
			}
			at = time.Now() // a release before has mounted it
			img.mu.Lock()
			s.noteMounted(img)
			img.mu.Unlock()
		}
		for i := range img.rec.Layers {
			if !s.o.Trust.Ledger.Proven(img.rec.key(i)) {
				list = append(list, &job{image: img, layer: i, begun: at, deadline: at.Add(s.deadline())})
			}
		}
	}
	return list
}

// begins returns when the proof of j may begin: after a quarter of its time, so that an image of which a container ran for minutes is not fetched for that; or when its first start is over, if then all of it is fetched anyway.
func (s *Store) begins(j *job) time.Time {
	latest := j.begun.Add(s.deadline() / 4)
	if s.o.Background == 0 {
		return latest
	}
	if _, err := os.Stat(filepath.Join(s.imageDir(j.image.id), firstUseName)); err == nil || !s.recordsFirstUses(j.image.id) {
		return j.begun
	}
	return latest
}

// overdue tells once that the time of j's image is over.
func (s *Store) overdue(j *job, now time.Time) {
	s.proofs.mu.Lock()
	a := s.proofs.tries[j.key()]
	// After a time in which nothing ran, it has a while first.
	tell := !j.deadline.After(now) && (a != nil || now.Sub(s.proofs.since) > s.deadline()/4) && !s.proofs.told[j.image.id]
	if tell {
		s.proofs.told[j.image.id] = true
	}
	s.proofs.mu.Unlock()
	if tell {
		var err error
		if a != nil {
			err = a.err
		}
		s.log.Warn("an image is not proven in time; it is tried on", "image", j.image.name(), "layer", j.layer, "deadline", j.deadline, "error", err)
		s.tell(Proof{Kind: Overdue, Layer: j.layer, Key: j.key(), Err: err}, j.image)
	}
}

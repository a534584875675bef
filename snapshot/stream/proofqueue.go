package stream

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
)

// Whoever makes an image, or holds its registry, says how large its layers are and how fast they come, and must not so keep the layers of others unproven. So a few are proven side by side, at most one of each registry;
// a layer that takes long makes room for those that wait, also one that was seen to lie, of which only that chunk is read at once; the registries and repositories whose layers were not proven at the last try come
// after the others, and those first whose deadline does. Until half of its time is over a layer is read only while no container waits for the registry, and at all times no faster than is needed for its own
// image: see proofpace.go.

// proofWorkers is how many layers are proven side by side in the background.
const proofWorkers = 2

// proofs is what a Store knows of its proofs.
type proofs struct {
	kick   chan struct{} // asks the prover to look what there is to do
	since  time.Time     // that this life of the daemon proves
	images atomic.Int32  // that are to be proven

	mu     sync.Mutex
	urgent map[digest.Digest]int // chunks of indexes that were seen to lie, by OnLie
	tries  map[try]*attempt      // that have failed
	misses map[string]int        // that have failed, in a row, by registry and by repository
	told   map[string]bool       // images that are told to be overdue
}

func newProofs() *proofs {
	return &proofs{kick: make(chan struct{}, 1), since: time.Now(), urgent: map[digest.Digest]int{}, tries: map[try]*attempt{}, misses: map[string]int{}, told: map[string]bool{}}
}

// try is to prove a layer as that of one of the images that have it: where another is read, it may be had.
type try struct {
	ledger.Key
	image string
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
	left     int64     // cost of the image's layers which are not proven, as their indexes claim; known once it has begun
	begun    time.Time // the first mount
	starts   time.Time
	deadline time.Time
	attempt  attempt
	misses   int  // of its registry and its repository
	urgent   bool // chunk was seen to lie
	chunk    int
	waiting  atomic.Int32 // 0, or one more than the fewest tries of those that could begin if it ended

	err error // of its end
}

// waited is the fewest tries of the jobs that could begin if j ended, -1 without one.
func (j *job) waited() int { return int(j.waiting.Load()) - 1 }

// noteWaiting tells those that are busy, by registry, which jobs wait for them: a layer of its own registry, or of one that is not busy if no more are proven side by side.
func noteWaiting(busy map[string]*job, waiting []*job) {
	for registry, b := range busy {
		tries := int32(0)
		for _, w := range waiting {
			of := w.registry()
			if n := int32(w.attempt.n) + 1; (of == registry || busy[of] == nil) && (tries == 0 || n < tries) {
				tries = n
			}
		}
		b.waiting.Store(tries)
	}
}

func (j *job) key() ledger.Key { return j.image.rec.key(j.layer) }

func (j *job) try() try { return try{j.key(), j.image.id} }

func (j *job) registry() string { return registryOf(j.image.rec.Repository) }

// registryOf is a repository's registry, as a reference has it.
func registryOf(repo registryclient.Repository) string {
	registry, _, _ := strings.Cut(string(repo), "/")
	return registry
}

// prove proves layers until ctx ends.
func (s *Store) prove(ctx context.Context) {
	var workers sync.WaitGroup
	defer workers.Wait()
	busy := map[string]*job{} // by registry
	done := make(chan *job, proofWorkers)
	for ctx.Err() == nil {
		if err := s.o.Trust.Ledger.Save(); err != nil {
			s.log.Error("a quarantine counts in memory alone", "error", err)
		}
		jobs, wait := s.jobs()
		var waiting []*job
		for _, j := range jobs {
			switch {
			case slices.ContainsFunc(slices.Collect(maps.Values(busy)), func(b *job) bool { return b.key() == j.key() }):
			case len(busy) == proofWorkers || busy[j.registry()] != nil:
				waiting = append(waiting, j)
			default:
				busy[j.registry()] = j
				workers.Go(func() {
					j.err = s.proveJob(ctx, j)
					done <- j
				})
			}
		}
		noteWaiting(busy, waiting)
		var due <-chan time.Time
		if wait > 0 {
			due = time.After(wait)
		}
		select {
		case j := <-done:
			delete(busy, j.registry())
			if ctx.Err() == nil {
				s.ended(j, j.err)
			}
		case <-s.proofs.kick:
		case <-due:
		case <-ctx.Done():
		}
	}
}

// noteMounted notes when img was mounted first, and writes it down. The caller holds img.mu.
func (s *Store) noteMounted(img *image) {
	if s.o.Trust.Ledger == nil || !s.setMounted(img, time.Now()) {
		return
	}
	s.running.Go(func() { // no container waits for the disk
		s.writeMounted(img)
		s.wakeProver()
	})
}

// setMounted notes that img was mounted at a time, unless it is known to have been before.
func (s *Store) setMounted(img *image, at time.Time) (isNew bool) {
	s.proofs.mu.Lock()
	defer s.proofs.mu.Unlock()
	if isNew = img.mounted.IsZero(); isNew {
		img.mounted, img.writeAt = at, at.Add(s.proofRetry())
	}
	return isNew
}

// writeMounted writes down when img was mounted first, or takes it from there.
func (s *Store) writeMounted(img *image) {
	at, err := s.readMounted(img)
	if err != nil {
		s.proofs.mu.Lock()
		at = img.mounted
		s.proofs.mu.Unlock()
		err = ledger.WriteFile(s.imageDir(img.id), mountedName, at.AppendFormat(nil, time.RFC3339Nano))
		if err != nil && !s.forgotten(img) {
			s.log.Warn("the time of an image's first mount is not written down, which is tried again: after a restart its proof would be due later", "image", img.id, "error", err)
		}
	}
	s.proofs.mu.Lock()
	defer s.proofs.mu.Unlock()
	img.mounted, img.written = at, err == nil
}

func (s *Store) readMounted(img *image) (time.Time, error) {
	b, err := os.ReadFile(filepath.Join(s.imageDir(img.id), mountedName))
	if err != nil {
		return time.Time{}, err
	}
	at, err := time.Parse(time.RFC3339Nano, string(b))
	if err != nil || at.After(time.Now()) {
		at = time.Now().Add(-s.deadline()) // damaged, or the clock was wrong: it is due
	}
	return at, nil
}

// mountedAt returns when img was mounted first, as far as is known; the zero time is never.
func (s *Store) mountedAt(img *image) time.Time {
	s.proofs.mu.Lock()
	at := img.mounted
	s.proofs.mu.Unlock()
	if !at.IsZero() {
		return at
	}
	at, err := s.readMounted(img)
	if err != nil {
		return time.Time{}
	}
	s.proofs.mu.Lock()
	defer s.proofs.mu.Unlock()
	img.mounted, img.written = at, true
	return at
}

// proofRetry is the pause before what failed is tried again.
func (s *Store) proofRetry() time.Duration { return min(completeRetry, s.deadline()/6) }

// ended remembers how a job has ended.
func (s *Store) ended(j *job, err error) {
	p := s.proofs
	registry, repo := j.registry(), string(j.image.rec.Repository)
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.urgent, j.key().Index)
	if err == nil || errors.Is(err, ErrQuarantined) || errors.Is(err, errForgotten) {
		delete(p.tries, j.try())
		delete(p.misses, registry)
		delete(p.misses, repo)
		return
	}
	p.misses[registry]++
	p.misses[repo]++
	a := &attempt{n: j.attempt.n + 1, err: err}
	if !errors.Is(err, errSlow) {
		a.next = time.Now().Add(s.proofRetry())
		s.log.Info("a layer is not proven for now", "image", j.image.name(), "layer", j.layer, "deadline", j.deadline, "error", err)
	}
	p.tries[j.try()] = a
}

// jobs lists the layers in use that are to be proven now, the first first, and tells of images whose time is over. wait is when to look again, 0 for not before something happens.
func (s *Store) jobs() (list []*job, wait time.Duration) {
	now := time.Now()
	later := func(at time.Time) {
		if d := max(at.Sub(now), time.Millisecond); wait == 0 || d < wait {
			wait = d
		}
	}
	all := s.toProve(now)
	s.ordered(all)
	seen := map[ledger.Key]bool{}
	for _, j := range all {
		if at := s.overdue(j, now); !at.IsZero() {
			later(at)
		}
		key := j.key()
		switch {
		case seen[key]:
		case j.attempt.next.After(now):
			later(j.attempt.next)
		case !j.urgent && j.starts.After(now):
			later(j.starts)
		default:
			seen[key] = true
			list = append(list, j)
		}
	}
	for _, at := range s.unwritten(all, now) {
		later(at)
	}
	return list, wait
}

// ordered puts jobs in their order, with what is known of each, and forgets what is known of others.
func (s *Store) ordered(list []*job) {
	p := s.proofs
	p.mu.Lock()
	tries, misses := map[try]*attempt{}, map[string]int{}
	images := map[*image]bool{}
	for _, j := range list {
		images[j.image] = true
		if a := p.tries[j.try()]; a != nil {
			j.attempt, tries[j.try()] = *a, a
		}
		chunk, urgent := p.urgent[j.key().Index]
		j.chunk, j.urgent = chunk, urgent && j.attempt.n == 0
		registry, repo := j.registry(), string(j.image.rec.Repository)
		j.misses = p.misses[registry] + p.misses[repo]
		misses[registry], misses[repo] = p.misses[registry], p.misses[repo]
	}
	p.tries, p.misses = tries, misses
	p.images.Store(int32(len(images)))
	p.mu.Unlock()
	slices.SortStableFunc(list, func(a, b *job) int {
		switch {
		case a.urgent && !b.urgent:
			return -1
		case b.urgent && !a.urgent:
			return 1
		}
		return cmp.Or(cmp.Compare(a.misses, b.misses), cmp.Compare(a.attempt.n, b.attempt.n), a.deadline.Compare(b.deadline))
	})
}

// unwritten writes down, once more, when images were mounted first, and returns when that is to be tried again.
func (s *Store) unwritten(list []*job, now time.Time) (again []time.Time) {
	seen := map[*image]bool{}
	for _, j := range list {
		img := j.image
		if seen[img] {
			continue
		}
		seen[img] = true
		s.proofs.mu.Lock()
		due := !img.written && !img.writeAt.After(now)
		if due {
			img.writeAt = now.Add(s.proofRetry())
		}
		s.proofs.mu.Unlock()
		if due {
			s.writeMounted(img)
		}
		s.proofs.mu.Lock()
		if !img.written {
			again = append(again, img.writeAt)
		}
		s.proofs.mu.Unlock()
	}
	return again
}

// toProve lists the layers of images that were mounted, and are not proven.
func (s *Store) toProve(now time.Time) (list []*job) {
	for _, img := range s.onDisk() {
		if s.proven(img.rec) || img.refused() != nil {
			continue
		}
		at := s.mountedAt(img)
		if at.IsZero() {
			if len(s.through(img.id)) == 0 && len(s.direct(img.id)) == 0 {
				continue
			}
			s.setMounted(img, now) // a release before has mounted it
			at = s.mountedAt(img)
		}
		starts := s.begins(img, at)
		for i := range img.rec.Layers {
			if !s.o.Trust.Ledger.Proven(img.rec.key(i)) {
				list = append(list, &job{image: img, layer: i, begun: at, starts: starts, deadline: at.Add(s.deadline())})
			}
		}
	}
	return list
}

// begins returns when the proof of img may begin: after a quarter of its time, so that an image of which a container ran for minutes is not fetched for that; or when its first start is over, if then all of it is fetched anyway.
func (s *Store) begins(img *image, mounted time.Time) time.Time {
	latest := mounted.Add(s.deadline() / 4)
	if s.o.Background == 0 {
		return latest
	}
	if _, err := os.Stat(filepath.Join(s.imageDir(img.id), firstUseName)); err == nil || !s.recordsFirstUses(img.id) {
		return mounted
	}
	return latest
}

// overdue tells once that the time of j's image is over, and returns when to look again, if ever.
func (s *Store) overdue(j *job, now time.Time) (again time.Time) {
	s.proofs.mu.Lock()
	a := s.proofs.tries[j.try()]
	tell := false
	switch {
	case s.proofs.told[j.image.id]:
	case j.deadline.After(now):
		again = j.deadline
	case a == nil && now.Sub(s.proofs.since) <= s.deadline()/4: // after a time in which nothing ran, it has a while first
		again = s.proofs.since.Add(s.deadline()/4 + time.Millisecond)
	default:
		s.proofs.told[j.image.id] = true
		tell = true
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
	return again
}

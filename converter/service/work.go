package service

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// maxDeaths is how many processes may die over an operation, or stop to be heard of, before it is called failed: an image may be what
	// kills them.
	maxDeaths = 5
	// aloneDeaths is after how many it is converted alone in its process: what was converted beside it is innocent.
	aloneDeaths = 2
	// retryTime is how long is waited before NATS, or a registry, is asked again.
	retryTime = time.Second
	// unknownTries is how often a message whose operation is not found is looked at: replicas of NATS may lag.
	unknownTries = 5
)

// work takes operations from the queue as there is room for them, until ctx ends and all were handed back.
func (s *Service) work(ctx context.Context) error {
	if s.view.wait(ctx) != nil {
		return nil
	}
	var attempts sync.WaitGroup
	defer attempts.Wait()
	for n := 1; ; n++ {
		if s.room.conversions.Acquire(ctx, 1) != nil {
			return nil
		}
		msg := s.next(ctx, n)
		if msg == nil {
			s.room.conversions.Release(1)
			return nil
		}
		attempts.Go(func() { s.handle(ctx, msg) })
	}
}

// bulkTurns is of how many operations that a process takes one is bulk.
const bulkTurns = 4

// bulkLook is how long is waited for what is not bulk before bulk is looked for again.
const bulkLook = 5 * time.Second

// next waits for a message, of which this is the n-th; nil is that ctx has ended.
func (s *Service) next(ctx context.Context, n int) jetstream.Msg {
	lanes := []jetstream.Consumer{s.consumer, s.bulk}
	if n%bulkTurns == 0 {
		slices.Reverse(lanes)
	}
	for ctx.Err() == nil {
		for _, lane := range lanes {
			if batch, err := lane.FetchNoWait(1); err == nil {
				if msg := <-batch.Messages(); msg != nil {
					return msg
				}
			}
		}
		wait, cancel := context.WithTimeout(ctx, bulkLook)
		msg, err := s.consumer.Next(jetstream.FetchContext(wait))
		cancel()
		if err == nil {
			return msg
		}
		if !errors.Is(err, nats.ErrTimeout) && !errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			s.c.Log.Warn("the queue cannot be read", "error", err)
			sleep(ctx, retryTime)
		}
	}
	return nil
}

// handle does what a message says, and gives back the slot that it has. What fails here is tried again, by whichever process is given the message then.
func (s *Service) handle(ctx context.Context, msg jetstream.Msg) {
	defer s.room.conversions.Release(1)
	id := strings.TrimPrefix(strings.TrimPrefix(msg.Subject(), workPrefix), "bulk.")
	beside, ok := s.beside(ctx, id, msg)
	if !ok {
		return
	}
	defer s.room.beside.Release(beside)
	if ctx.Err() != nil {
		_ = msg.Nak()
		return
	}
	a, err := s.take(context.WithoutCancel(ctx), id, msg) // or it is ours, and not known to be
	switch {
	case err != nil:
		s.c.Log.Warn("an operation cannot be begun", "operation", id, "error", err)
		_ = msg.NakWithDelay(retryTime)
	case a == nil:
		s.done(ctx, id, msg)
	default:
		s.converting.Add(1)
		defer s.converting.Add(-1)
		a.run(ctx)
	}
}

// aloneTries is how often a message of an operation that is to be alone is given back, for a process that has nothing else to do; then this one waits until it has.
const aloneTries = 5

// aloneTime is how long it waits, before the message is given back all the same, for a process that has become idle meanwhile. If there is none this one is given it again, before
// what waits behind it.
const aloneTime = 5 * time.Second

// beside takes of room.beside what an operation needs: all of it if it may be what its processes die of, so that nothing dies along with it, and none if it is
// not going to be converted. False is that its message was given back: it is for another process, or for later.
func (s *Service) beside(ctx context.Context, id string, msg jetstream.Msg) (n int64, ok bool) {
	converted, deadly := s.dangers(id)
	if !converted {
		return 0, true
	}
	if n = 1; deadly {
		n = s.room.slots
	}
	if s.room.beside.TryAcquire(n) {
		return n, true
	}
	if meta, err := msg.Metadata(); !deadly || err != nil || meta.NumDelivered < aloneTries {
		_ = msg.NakWithDelay(retryTime)
		sleep(ctx, retryTime) // or the queue is taken from, and given back, in a circle
		return 0, false
	}
	waited, stop := context.WithTimeout(ctx, aloneTime)
	var beat sync.WaitGroup
	defer beat.Wait()
	defer stop()
	beat.Go(func() {
		for sleep(waited, min(retryTime, s.c.Lease/3)) {
			_ = msg.InProgress()
			if converted, _ := s.dangers(id); !converted { // any more
				stop()
			}
		}
	})
	if s.room.beside.Acquire(waited, n) == nil {
		return n, true
	}
	if converted, _ := s.dangers(id); !converted {
		return 0, true
	}
	_ = msg.Nak()
	return 0, false
}

// dangers says whether an operation is going to be converted, and whether it may be what its processes die of.
func (s *Service) dangers(id string) (converted, deadly bool) {
	r, _, known := s.view.record(id)
	if r.State == Running { // whose process was not heard of
		r.Deaths++
	}
	converted = !known || !r.Cancel && !r.State.Ended() && r.Deaths < maxDeaths
	return converted, converted && r.Deaths >= aloneDeaths
}

// take makes the operation this process's; nil is that there is nothing to do any more.
func (s *Service) take(ctx context.Context, id string, msg jetstream.Msg) (*attempt, error) {
	for range contested {
		rec, rev, err := s.get(ctx, idPrefix+id)
		if err != nil {
			return nil, err
		}
		if rev == 0 {
			if meta, err := msg.Metadata(); err == nil && meta.NumDelivered < unknownTries {
				return nil, errors.New("its record is not found")
			}
			return nil, nil
		}
		if rec.State.Ended() {
			return nil, nil
		}
		if rec.State == Running {
			s.c.Log.Warn("an operation is taken over: its process was not heard of", "operation", id, "process", rec.Worker)
			rec.Deaths++
		}
		rec.take(s.c.Name)
		held := time.Now()
		rev, err = s.put(ctx, idPrefix+id, rec, rev)
		if errors.Is(err, errContested) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return &attempt{s: s, msg: msg, rec: rec, rev: rev, held: held}, nil
	}
	return nil, errContested
}

// take makes r an operation that the process works on.
func (r *record) take(process string) {
	r.State, r.Worker = Running, process
	r.Attempt++
	if r.Start.IsZero() {
		r.Start = now()
	}
}

// done takes the message of what has ended away: msg, or whichever there is if that is nil.
func (s *Service) done(ctx context.Context, id string, msg jetstream.Msg) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeDeadline)
	defer cancel()
	var err error
	if msg == nil {
		err = s.dequeue(ctx, id)
	} else {
		err = msg.DoubleAck(ctx)
	}
	if err != nil { // it comes again, and there is nothing to do then
		s.c.Log.Warn("an operation stays in the queue although it has ended", "operation", id, "error", err)
	}
}

// maintain heals what processes left that died, and removes what is too old.
func (s *Service) maintain(ctx context.Context) error {
	if s.view.wait(ctx) != nil {
		return nil
	}
	cancelled := map[string]uint64{}
	for {
		if err := errors.Join(s.heal(ctx), s.abandoned(ctx, cancelled), s.retire(ctx)); err != nil && ctx.Err() == nil {
			s.c.Log.Warn("operations cannot be looked after", "error", err)
		}
		if !sleep(ctx, s.c.Lease) {
			return nil
		}
	}
}

// heal gives each operation that has not ended its record and its message.
func (s *Service) heal(ctx context.Context) error {
	var errs []error
	for key := range s.view.orphans() {
		_, _, _, err := s.ongoing(ctx, key)
		errs = append(errs, err)
	}
	info, err := s.queue.Info(ctx, jetstream.WithSubjectFilter(workPrefix+">"))
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	for _, e := range s.view.entries(func(r record) bool { return !r.State.Ended() && info.State.Subjects[r.subject()] == 0 }) {
		rec, rev, err := s.get(ctx, idPrefix+e.rec.ID)
		if err == nil && rev > 0 && !rec.State.Ended() {
			err = s.enqueue(ctx, rec)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// abandoned ends the operations that are to be cancelled, and whose process has not written for as long as a lease: until one has room for them may take hours. seen has
// their revisions, as they were when it was called last, a lease ago.
func (s *Service) abandoned(ctx context.Context, seen map[string]uint64) error {
	var errs []error
	before := maps.Clone(seen)
	clear(seen)
	for _, e := range s.view.entries(func(r record) bool { return r.State == Running && r.Cancel }) {
		if seen[e.rec.ID] = e.rev; before[e.rec.ID] != e.rev {
			continue
		}
		s.c.Log.Warn("an operation that is to be cancelled is taken over: its process was not heard of", "operation", e.rec.ID, "process", e.rec.Worker)
		if err := s.endCancelled(ctx, e.rec, e.rev); !errors.Is(err, errContested) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// retire removes the operations that ended longer ago than they are kept.
func (s *Service) retire(ctx context.Context) error {
	var errs []error
	before := time.Now().Add(-s.c.Retention)
	for _, e := range s.view.entries(func(r record) bool { return r.State.Ended() && r.End.Before(before) }) {
		key, err := imageKey(e.rec.Image), error(nil)
		if rev := s.view.lastRevision(key, e.rec.ID); rev > 0 {
			err = s.drop(ctx, key, rev)
		}
		if err == nil {
			err = s.drop(ctx, idPrefix+e.rec.ID, e.rev)
		}
		if errors.Is(err, errContested) { // another process does the same, or did while this one was cut off
			err = errors.Join(s.lookFor(ctx, key), s.lookFor(ctx, idPrefix+e.rec.ID))
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

package service

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/plain"
)

// progressTime is how often a record says how far its conversion is: often enough that a second does not pass without.
const progressTime = 250 * time.Millisecond

// maxMessage is how many bytes of an error a record has: registries may answer with a page.
const maxMessage = 2000

// handBackTime is how long a process that ends tries to say so: after that, others find out when the lease is over.
const handBackTime = 5 * time.Second

// Why a conversion is stopped.
var (
	errCanceled = errors.New("cancelled")
	errLost     = errors.New("another process has the operation")
	errHandBack = errors.New("this process ends")
)

// errWider: more was asked for while it was converted.
var errWider = errors.New("more was asked for meanwhile")

// attempt is an operation in the hands of this process. Its fields belong to the goroutine of run, which alone writes the record.
type attempt struct {
	s     *Service
	msg   jetstream.Msg // nil if it is not at hand
	rec   record        // as it is in NATS, as far as known
	rev   uint64
	doing scope     // what is being converted
	held  time.Time // when the last write was begun that showed that the operation is ours
	lost  bool      // it is not any more: nothing may be written
	stop  context.CancelCauseFunc
	asks  chan ask
}

// ask asks run whether the operation is ours; m, unless nil, is to be noted first.
type ask struct {
	m     *made
	reply chan error
}

type outcome struct {
	created []converter.Created
	err     error
	cause   error // why the conversion was stopped, nil if it was not
}

// run converts, and sees to it that the record is right and the message ours, until the operation has ended or is handed back because
// ctx has ended.
func (a *attempt) run(ctx context.Context) {
	end := ctx.Done()
	ctx = context.WithoutCancel(ctx) // for what is to be written still
	work, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	a.stop, a.asks = stop, make(chan ask)
	log := a.s.c.Log.With("operation", a.rec.ID, "image", a.rec.Image.String())
	log.Info("conversion begins", "attempt", a.rec.Attempt)
	began := time.Now()

	changes := make(chan entry, 1)
	if unfollow, ok := a.s.view.follow(a.rec.ID, &watcher{changed: func(e entry, _ Operation) { offer(changes, e) }, ended: func() {}}); ok {
		defer unfollow()
	}
	a.tend(ctx, work, end, changes)
	log.Info("conversion ends", "status", a.rec.State, "seconds", time.Since(began).Seconds(), "message", a.rec.Message, "lost", a.lost)
}

// begin converts what the record says now.
func (a *attempt) begin(ctx context.Context, finished chan<- outcome) *tracker {
	rec, track := a.rec, &tracker{}
	a.doing = rec.scope()
	if rec.Cancel || rec.Deaths >= maxDeaths { // finish knows which
		err := fmt.Errorf("%d processes died over it, or were not heard of any more", rec.Deaths)
		finished <- outcome{err: &converter.Error{Code: ProcessesDied, Err: err}}
		return track
	}
	go func() {
		o := a.convert(ctx, rec.Operation, track)
		o.cause = context.Cause(ctx)
		finished <- o
	}()
	return track
}

// tend looks after the record and the message until the conversion has finished, and then writes how.
func (a *attempt) tend(ctx, work context.Context, end <-chan struct{}, changes <-chan entry) {
	finished := make(chan outcome, 1)
	track := a.begin(work, finished)
	progress := time.NewTicker(progressTime)
	defer progress.Stop()
	beat := time.NewTicker(a.s.c.Lease / 3)
	defer beat.Stop()
	for {
		select {
		case <-progress.C:
			_ = a.write(ctx, func(r *record) error { r.Progress = track.progress(); return nil }) // the next one may do it
		case <-beat.C:
			_ = a.msg.InProgress()
		case q := <-a.asks:
			q.reply <- a.persist(ctx, func(r *record) error {
				r.Progress = track.progress()
				if q.m != nil && !slices.ContainsFunc(r.Made, q.m.is) {
					r.Made = append(slices.Clip(r.Made), *q.m)
				}
				return nil
			})
		case e := <-changes:
			if e.rev > a.rev {
				a.adopt(e)
			}
		case <-end:
			end = nil
			a.stop(errHandBack)
		case o := <-finished:
			if !a.finish(ctx, o, track) {
				return
			}
			track = a.begin(work, finished)
		}
	}
}

// convert runs beside tend.
func (a *attempt) convert(ctx context.Context, op Operation, track *tracker) outcome {
	place, err := a.s.open(op.Registry, op.Repository)
	if err != nil {
		return outcome{err: err}
	}
	platforms, err := parsePlatforms(op.Platforms)
	if err != nil {
		return outcome{err: err}
	}
	o := converter.CreateOptions{Options: a.s.c.Convert, Platforms: platforms, Force: op.Force, Static: a.s.c.Static}
	o.Record, o.Progress, o.Reserve = a.s.record, track.report, a.s.room.reserve
	if err := a.s.auto.awaitLeaving(ctx, place, op.Image); err != nil {
		return outcome{err: err}
	}
	created, err := converter.Create(ctx, fenced{place, op.Force, a.hold, a.regret(op, place)}, op.Digest.String(), o)
	return outcome{created: created, err: err}
}

// hold says whether the operation is still ours; tend answers.
func (a *attempt) hold(ctx context.Context, m *made) error {
	q := ask{m, make(chan error, 1)}
	select {
	case a.asks <- q:
		return <-q.reply
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// regret returns what takes away m, attached when the operation was not ours any more, if it was cancelled meanwhile: whoever did that
// could not know of m. Another process that goes on with it attaches the same.
func (a *attempt) regret(op Operation, p converter.Place) func(context.Context, made) error {
	return func(ctx context.Context, m made) error {
		rec, rev, err := a.s.get(ctx, idPrefix+op.ID)
		if err != nil || rev == 0 || !rec.Cancel {
			return err
		}
		last, _, err := a.s.get(ctx, imageKey(op.Image))
		if err != nil || last.ID != op.ID { // it was asked for again
			return err
		}
		return takeAway(ctx, p, []made{m})
	}
}

// write changes the record if the operation is still ours, and says errLost if it is not. What change does not want is its error.
func (a *attempt) write(ctx context.Context, change func(*record) error) error {
	if a.lost {
		return errLost
	}
	ctx, cancel := context.WithTimeout(ctx, a.s.c.Lease/3)
	defer cancel()
	for range contested {
		rec := a.rec
		if err := change(&rec); err != nil {
			return err
		}
		begun := time.Now()
		rev, err := a.s.put(ctx, idPrefix+rec.ID, rec, a.rev)
		if err == nil {
			a.rec, a.rev, a.held = rec, rev, begun
			return nil
		}
		var other record
		if errors.Is(err, errContested) {
			other, rev, err = a.s.get(ctx, idPrefix+rec.ID)
		}
		if err != nil {
			if time.Since(a.held) > a.s.c.Lease {
				a.lose()
			}
			return err
		}
		if !a.adopt(entry{other, rev}) {
			return errLost
		}
	}
	return errContested
}

// adopt takes over what others have written, or what this attempt has without knowing that it arrived. False is that the operation is
// not ours any more.
func (a *attempt) adopt(e entry) bool {
	if e.rec.State != Running || e.rec.Worker != a.rec.Worker || e.rec.Attempt != a.rec.Attempt {
		a.lose()
		return false
	}
	a.rec, a.rev = e.rec, e.rev
	if a.rec.Cancel && a.stop != nil {
		a.stop(errCanceled)
	}
	return true
}

func (a *attempt) lose() {
	a.lost = true
	if a.stop != nil {
		a.stop(errLost)
	}
}

// persist is write for what must not be lost: it tries as long as the operation may be ours.
func (a *attempt) persist(ctx context.Context, change func(*record) error) error {
	for {
		err := a.write(ctx, change)
		if err == nil || a.lost || errors.Is(err, errCanceled) || errors.Is(err, errWider) || !sleep(ctx, min(retryTime, a.s.c.Lease/10)) {
			return err
		}
	}
}

// finish writes what has become of the conversion. It says whether there is more to convert.
func (a *attempt) finish(ctx context.Context, o outcome, track *tracker) (more bool) {
	err := errCanceled
	switch {
	case a.lost:
		return false
	case a.rec.Cancel:
	case o.err == nil:
		err = a.succeed(ctx, o, track)
	case errors.Is(o.cause, errHandBack):
		err = a.handBack(ctx, 0)
	default:
		err = a.fail(ctx, o)
	}
	if errors.Is(err, errCanceled) { // asked for meanwhile, perhaps
		err = a.cancel(ctx)
	}
	if more = errors.Is(err, errWider); err != nil && !more { // its message comes again, to this process or to another
		a.s.c.Log.Warn("what has become of an operation cannot be written", "operation", a.rec.ID, "error", err)
	}
	return more
}

// conclude writes a state that is the last, unless a cancellation, or more, was asked for before.
func (a *attempt) conclude(ctx context.Context, change func(*record)) error {
	err := a.persist(ctx, func(r *record) error {
		r.End = now()
		if change(r); r.Cancel && r.State != Canceled {
			return errCanceled
		}
		if r.State != Canceled && r.scope() != a.doing {
			return errWider
		}
		return nil
	})
	if err == nil {
		a.s.counters.ended(a.rec)
		a.s.done(ctx, a.rec.ID, a.msg)
	}
	return err
}

// note lets auto know what is attached, before the record says so: what is not known to be ours would count as somebody's who asked for it. It tries as long as the
// operation is ours.
func (a *attempt) note(ctx context.Context, o outcome) error {
	op := a.rec.Operation
	op.Artifacts = append(artifacts(o.created, a.rec.Made), a.left(ctx, o.created)...)
	if len(op.Artifacts) == 0 {
		return nil
	}
	for {
		try, cancel := context.WithTimeout(ctx, a.s.c.Lease/3)
		m, err := a.s.auto.converted(try, op, a.doing.wanted)
		if err == nil {
			err = a.s.auto.stillThere(try, m)
			cancel()
			if err != nil { // reconcile finds it out
				a.s.c.Log.Warn("whether an image is still there is not known", "operation", op.ID, "image", op.Image.String(), "error", err)
			}
			return nil
		}
		cancel()
		a.s.c.Log.Warn("what is attached cannot be noted", "operation", op.ID, "image", op.Image.String(), "error", err)
		if a.msg != nil {
			_ = a.msg.InProgress()
		}
		if err := a.persist(ctx, func(*record) error { return nil }); err != nil { // is it still ours?
			return err
		}
		if !sleep(ctx, min(retryTime, a.s.c.Lease/10)) {
			return ctx.Err()
		}
	}
}

func (a *attempt) succeed(ctx context.Context, o outcome, track *tracker) error {
	if err := a.note(ctx, o); err != nil {
		return err
	}
	return a.conclude(ctx, func(r *record) {
		r.State, r.Artifacts, r.Warnings = Succeeded, artifacts(o.created, r.Made), warnings(o.created)
		r.Progress = track.progress()
		r.Progress.Percent, r.Progress.Bytes, r.Progress.Layer, r.Progress.Digest = 100, r.Progress.Total, 0, ""
	})
}

func (a *attempt) fail(ctx context.Context, o outcome) error {
	if err := a.note(ctx, o); err != nil {
		return err
	}
	return a.conclude(ctx, func(r *record) {
		r.State, r.Artifacts, r.Warnings = Failed, artifacts(o.created, r.Made), warnings(o.created)
		r.ErrorCode, r.Message = converter.CodeOf(o.err), plain.Cut(o.err.Error(), maxMessage)
	})
}

// cancel takes away what the operation has made, and ends it.
func (a *attempt) cancel(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	if a.msg != nil {
		_ = a.msg.InProgress()
	}
	err := a.undo(ctx)
	if a.lost {
		return errLost
	}
	if err != nil && a.rec.Deaths < maxDeaths { // the registry may answer later
		a.s.c.Log.Warn("a cancelled operation's artifact stays for now", "operation", a.rec.ID, "error", err)
		return a.handBack(ctx, retryTime)
	}
	return a.conclude(ctx, func(r *record) {
		r.State = Canceled
		if err != nil {
			r.Warnings = append(slices.Clip(r.Warnings), plain.Cut(fmt.Sprintf("what it had attached may be there still: %v", err), maxMessage))
		}
	})
}

// undo takes away what the operation has made. A registry that says nothing has until the middle of the lease: what comes of it can be written then.
func (a *attempt) undo(ctx context.Context) error {
	if len(a.rec.Made) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, a.s.c.Lease/2)
	defer cancel()
	place, err := a.s.open(a.rec.Registry, a.rec.Repository)
	if err == nil { // what somebody else has attached since is not to go
		err = a.persist(ctx, func(*record) error { return nil })
	}
	if err == nil {
		err = takeAway(ctx, place, a.rec.Made)
	}
	return err
}

// handBack lets another process go on, after delay.
func (a *attempt) handBack(ctx context.Context, delay time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, handBackTime)
	defer cancel()
	err := a.persist(ctx, func(r *record) error {
		r.State, r.Worker = NotStarted, ""
		if delay > 0 { // something is wrong: not for ever
			r.Deaths++
		}
		return nil
	})
	if a.lost || a.msg == nil {
		return err
	}
	if delay > 0 {
		return errors.Join(err, a.msg.NakWithDelay(delay))
	}
	return errors.Join(err, a.msg.Nak())
}

func artifacts(created []converter.Created, own []made) (list []Artifact) {
	for _, c := range created {
		m := made{Subject: c.Subject.Digest, Digest: c.Artifact.Digest}
		existed := c.Status == converter.StatusExists && !slices.ContainsFunc(own, m.is)
		list = append(list, Artifact{Platform: c.Platform, Subject: m.Subject, Digest: m.Digest, Existed: existed})
	}
	return list
}

// left returns the artifacts that the operation has attached and that no conversion tells of, because it, or its process, ended in the middle.
func (a *attempt) left(ctx context.Context, created []converter.Created) (list []Artifact) {
	ctx, cancel := context.WithTimeout(ctx, a.s.c.Lease/3)
	defer cancel()
	for _, m := range a.rec.Made {
		if m.Platform == "" || slices.ContainsFunc(created, func(c converter.Created) bool { return c.Artifact.Digest == m.Digest }) {
			continue
		}
		place, err := a.s.open(a.rec.Registry, a.rec.Repository)
		if err != nil {
			continue
		}
		if gone, err := isGone(ctx, place, m.Digest); err == nil && gone { // it was about to be
			continue
		}
		list = append(list, Artifact{Platform: m.Platform, Subject: m.Subject, Digest: m.Digest})
	}
	return list
}

func warnings(created []converter.Created) (list []string) {
	for _, c := range created {
		for _, w := range c.Warnings {
			list = append(list, plain.Cut(w, maxMessage))
		}
	}
	return list
}

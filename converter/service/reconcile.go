package service

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// lease says until when somebody reconciles a registry. It is no lock: two that reconcile at once do the same twice, and nothing wrong.
type lease struct {
	Began time.Time `json:"began"`
	Ended time.Time `json:"ended,omitzero"` // of the last pass that looked at all repositories
	Until time.Time `json:"until"`
}

const (
	leaseTime = 30 * time.Second
	minPause  = time.Second      // between two looks at the lease
	visitTime = 15 * time.Minute // for one repository, whatever its registry does
)

func leaseKey(registry string) string { return "reconcile-" + hashKey(registry) }

// reconcile passes over all repositories of a registry every interval, in one process at a time, until ctx ends. Each registry has its own passes: one that
// does not answer is in no other's way.
func (a *auto) reconcile(ctx context.Context, registry string) {
	for {
		wait, err := a.tryPass(ctx, registry)
		if err != nil && ctx.Err() == nil {
			a.log.Warn("reconcile", "registry", registry, "error", err)
		}
		t := time.NewTimer(max(wait, min(minPause, a.interval)))
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// tryPass makes a pass if it is time for one and no other process makes one, and says when to try again.
func (a *auto) tryPass(ctx context.Context, registry string) (wait time.Duration, err error) {
	if err := a.recount(ctx, registry); err != nil && ctx.Err() == nil {
		a.log.Warn("count the tags that are due", "registry", registry, "error", err)
	}
	key := leaseKey(registry)
	var l lease
	rev, err := getJSON(ctx, a.seen, key, &l)
	if err != nil {
		return min(leaseTime, a.interval), err
	}
	a.mu.Lock()
	a.deeds.passed[registry] = l.Ended
	a.mu.Unlock()
	now := time.Now()
	if d := l.Until.Sub(now); d > 0 && d <= leaseTime { // a longer one is a clock's mistake
		return d, nil
	}
	if d := l.Began.Add(a.interval).Sub(now); rev != 0 && d > 0 && d <= a.interval {
		return d, nil
	}
	l = lease{Began: now.UTC(), Ended: l.Ended, Until: now.Add(leaseTime).UTC()}
	if rev, err = setJSON(ctx, a.seen, key, l, rev); err != nil {
		if errors.Is(err, errContested) {
			err = nil
		}
		return min(leaseTime, a.interval), err
	}
	held, cancel := context.WithCancel(ctx)
	released := make(chan struct{})
	ended := make(chan time.Time, 1)
	go func(l lease) {
		defer close(released)
		defer cancel()
		a.holdLease(held, key, l, rev, ended)
	}(l)
	whole, err := a.pass(held, registry)
	if whole && err == nil {
		l.Ended = time.Now().UTC()
		ended <- l.Ended
	}
	cancel()
	<-released
	a.mu.Lock()
	a.deeds.passed[registry] = l.Ended
	a.mu.Unlock()
	return max(time.Until(l.Began.Add(a.interval)), 0), err
}

// holdLease renews the lease until ctx ends, and gives it back then, with when the pass ended, if that is there. It returns before if it is lost.
func (a *auto) holdLease(ctx context.Context, key string, l lease, rev uint64, ended <-chan time.Time) {
	tick := time.NewTicker(leaseTime / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			// It is a courtesy: who does not get to say so lets it run out.
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			l.Until = time.Now().UTC()
			select {
			case l.Ended = <-ended:
			default:
			}
			_, _ = setJSON(end, a.seen, key, l, rev)
			return
		case <-tick.C:
			l.Until = time.Now().Add(leaseTime).UTC()
			next, err := setJSON(ctx, a.seen, key, l, rev)
			if err != nil {
				return
			}
			rev = next
		}
	}
}

// pass looks at every repository of a registry that is active, or in which something was made, others first each time. If several in a row fail, the rest waits
// for the next pass; whole says that none did.
func (a *auto) pass(ctx context.Context, registry string) (whole bool, err error) {
	made := map[repository]bool{}
	err = eachKey(ctx, a.made, "*.*", func(e jetstream.KeyValueEntry) error {
		var m madeFor
		if json.Unmarshal(e.Value(), &m) == nil && m.Registry == registry {
			made[repository{m.Registry, m.Repository}] = true
		}
		return nil
	})
	if err != nil {
		return false, err
	}
	list, _, err := a.readSettings(ctx, registry)
	if err != nil {
		return false, err
	}
	whole = true
	var repositories []repository
	if slices.ContainsFunc(list, func(s storedSettings) bool { return s.Active }) {
		known, cancel := context.WithTimeout(ctx, visitTime)
		if repositories, _, err = a.known(known, registry, list); err != nil {
			whole = false
			a.log.Warn("reconcile: list repositories", "registry", registry, "error", err)
		}
		cancel()
		repositories = slices.DeleteFunc(repositories, func(r repository) bool { return !countingFor(list, r).Active })
	}
	for _, r := range repositories {
		delete(made, r)
	}
	repositories = slices.AppendSeq(repositories, maps.Keys(made))
	fails := 0
	for _, r := range window(repositories, len(repositories)) {
		err := a.reconcileRepository(ctx, r)
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		if err == nil {
			fails = 0
			continue
		}
		whole = false
		a.mu.Lock()
		a.deeds.failed[registry]++
		a.mu.Unlock()
		a.log.Warn("reconcile", "repository", r.String(), "error", err)
		if fails++; fails == visitFails {
			break
		}
	}
	return whole, nil
}

func (a *auto) reconcileRepository(ctx context.Context, r repository) error {
	ctx, cancel := context.WithTimeout(ctx, visitTime)
	defer cancel()
	v, err := a.visit(ctx, r)
	if err != nil {
		return err
	}
	var errs []error
	if v.settings.Active {
		errs = append(errs, v.reconcile(ctx))
	}
	v.countDue()
	errs = append(errs, v.reconcileImages(ctx))
	if v.settings.Active && errors.Join(errs...) == nil {
		errs = append(errs, v.keep(ctx))
	}
	return errors.Join(errs...)
}

// recount counts anew what this process has counted of a registry: another one may have looked since, or the repository is switched off.
func (a *auto) recount(ctx context.Context, registry string) error {
	ctx, cancel := context.WithTimeout(ctx, visitTime)
	defer cancel()
	a.mu.Lock()
	counted := slices.DeleteFunc(slices.Collect(maps.Keys(a.deeds.due)), func(r repository) bool { return r.registry != registry })
	a.mu.Unlock()
	for _, r := range counted {
		v, err := a.visit(ctx, r)
		if err != nil {
			return err
		}
		v.countDue()
	}
	return nil
}

// resume looks at what another process, or this one before, has left due.
func (a *auto) resume(ctx context.Context) {
	due := map[string]bool{} // keys of repositories
	err := eachKey(ctx, a.seen, "*.*", func(e jetstream.KeyValueEntry) error {
		var t seenTag
		if json.Unmarshal(e.Value(), &t) == nil && t.State == stateDue {
			due[e.Key()[:len(hashKey(""))]] = true
		}
		return nil
	})
	bases, basesErr := a.bases(ctx)
	if err = errors.Join(err, basesErr); err != nil && ctx.Err() == nil {
		a.log.Warn("look for what was left", "error", err)
	}
	for r := range bases {
		if due[r.key()] {
			a.hint(r, hint{})
		}
	}
}

// reconcile looks for what events have missed: new tags, tags that name something else, operations that failed for a reason that may have passed.
func (v *visit) reconcile(ctx context.Context) error {
	if err := v.fromFuture(ctx); err != nil {
		return err
	}
	listed, err := v.list(ctx)
	if err != nil {
		return err
	}
	left, err := v.due(ctx, listed)
	errs := []error{err}
	if err == nil && !left && v.base.Existing {
		v.base.Existing, v.base.Since = false, v.base.since() // all of it was looked at
		if _, err := setJSON(ctx, v.a.seen, v.r.key(), v.base, v.base.rev); err != nil && !errors.Is(err, errContested) {
			errs = append(errs, err)
		}
	}
	again, err := v.check(ctx, listed)
	errs = append(errs, err)
	if len(again) > 0 {
		_, err = v.look(ctx, again)
		errs = append(errs, err)
	}
	return errors.Join(append(errs, v.noteMissing(ctx, listed))...)
}

// fromFuture puts right what was noted by a clock that was ahead: what is pushed from now on would not be newer.
func (v *visit) fromFuture(ctx context.Context) error {
	ahead := func(t time.Time) bool { return t.After(v.began.Add(notYet)) } // clocks differ
	for _, t := range v.tags {
		if t.rev == 0 || !ahead(t.Pushed) && !ahead(t.Missing) {
			continue
		}
		if ahead(t.Pushed) {
			t.Pushed = v.began
		}
		if ahead(t.Missing) {
			t.Missing = time.Time{}
		}
		if err := v.a.setTag(ctx, v.r, t); err != nil && !errors.Is(err, errContested) {
			return err
		}
	}
	return nil
}

// check returns the tags that are known and due again: because they name something else, or because of a failed operation. A repository with more tags than
// a visit may ask for has as many of them checked, others each time.
func (v *visit) check(ctx context.Context, listed []string) (again []*seenTag, err error) {
	var known []*seenTag
	for _, name := range listed {
		if t := v.tags[name]; t != nil && t.State != stateDue && v.named[name] == "" {
			known = append(known, t)
		}
	}
	for _, t := range v.tags {
		if t.State != stateDone || t.Operation == "" {
			continue
		}
		op, err := v.a.ops.Last(ctx, v.r.image(t.Digest))
		switch {
		case err != nil && !errors.Is(err, ErrNotFound):
			return nil, err
		case err == nil && !op.State.Ended():
			continue
		case err == nil && op.State == Failed && (op.ErrorCode == "" || op.ErrorCode == converter.Unknown) && t.Tries < maxTries:
			t.State, t.Digest, t.Operation, t.Tries = stateDue, "", "", t.Tries+1
			again = append(again, t)
			continue
		}
		t.Operation = "" // it need not be looked for any more
		if err := v.a.setTag(ctx, v.r, t); err != nil && !errors.Is(err, errContested) {
			return nil, err
		}
	}
	err = v.each(ctx, v.unreadFirst(window(known, len(known))), func(ctx context.Context, t *seenTag) error {
		if t.State == stateDue {
			return nil
		}
		d, err := v.resolve(ctx, t.Tag)
		if errors.Is(err, ErrNotFound) {
			return nil // deleted since it was listed, or see passOver
		}
		if err != nil {
			return err
		}
		v.readable(t.Tag)
		v.mu.Lock()
		defer v.mu.Unlock()
		switch {
		case t.Digest != "" && t.Digest != d:
			t.due(v.began)
			t.Source, t.By = "", ""
			again = append(again, t)
			return nil
		case t.Digest == d && t.Missing.IsZero():
			return nil
		}
		t.Digest, t.Missing = d, time.Time{}
		if err := v.a.setTag(ctx, v.r, t); !errors.Is(err, errContested) {
			return err
		}
		return nil
	})
	return again, err
}

// window returns n of list, all if it has no more, others first each time.
func window[T any](list []T, n int) []T {
	if len(list) == 0 {
		return nil
	}
	from := rand.IntN(len(list))
	return slices.Concat(list[from:], list[:from])[:min(n, len(list))]
}

// noteMissing notes which tags the registry does not list any more, and forgets them later. (What was deleted for certain is forgotten at once, see cascade.)
func (v *visit) noteMissing(ctx context.Context, listed []string) error {
	there := make(map[string]bool, len(listed))
	for _, name := range listed {
		there[name] = true
	}
	for _, t := range v.tags {
		if there[t.Tag] || t.State == stateDue {
			continue
		}
		var err error
		switch {
		case t.Missing.IsZero():
			t.Missing = time.Now().UTC()
			err = v.a.setTag(ctx, v.r, t)
		case time.Since(t.Missing) > forget:
			err = removeKey(ctx, v.a.seen, v.r.tagKey(t.Tag), t.rev)
		}
		if err != nil && !errors.Is(err, errContested) {
			return err
		}
	}
	return nil
}

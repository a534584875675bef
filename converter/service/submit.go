package service

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/uuid"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// Submit asks for a conversion. If the image has an operation that has not ended, that is returned, and does what r asks for, too: existed says so.
// Nothing is queued for what one look at the registry shows: an image that has all its artifacts
// (ErrExists, unless r.Force), one that is not there (ErrNotFound), one that cannot be converted (a *converter.Error).
func (s *Service) Submit(ctx context.Context, r Request) (op Operation, existed bool, err error) {
	place, platforms, err := s.check(r)
	if err != nil {
		return op, false, err
	}
	if err := s.view.wait(ctx); err != nil {
		return op, false, err
	}
	key := imageKey(r.Image)
	for range contested {
		last, rev, ongoing, err := s.ongoing(ctx, key)
		if ongoing && last.Cancel && s.ends(ctx, last.ID) {
			continue
		}
		if ongoing && !last.Cancel {
			if op, err = s.join(ctx, last.ID, place, r, platforms); !errors.Is(err, errContested) {
				return op, err == nil, err
			}
			continue
		}
		if ongoing || err != nil {
			return last, ongoing, err
		}
		made, err := s.auto.getMade(ctx, r.Image)
		if err != nil {
			return op, false, err
		}
		if err := s.plan(ctx, place, r, platforms); err != nil {
			has := true
			if errors.Is(err, ErrExists) {
				var claimed error
				has, claimed = s.auto.claim(ctx, r, made)
				err = errors.Join(err, claimed)
			}
			if has {
				return op, false, err
			}
		}
		rec := newRecord(r)
		rec.Bulk = s.view.waiting(rec) >= bulkAfter
		_, err = s.put(ctx, key, rec, rev)
		if errors.Is(err, errContested) {
			continue
		}
		if err == nil {
			op, err = s.begin(ctx, rec)
		}
		return op, false, err
	}
	return op, false, unavailable("ask for a conversion of "+r.Image.String(), errContested)
}

// join has an operation that has not ended do what r asks for, too. That it has ended, or is to be cancelled, is errContested.
func (s *Service) join(ctx context.Context, id string, place converter.Place, r Request, platforms []ocispec.Platform) (Operation, error) {
	rec, rev, err := s.get(ctx, idPrefix+id)
	if err != nil {
		return Operation{}, err
	}
	if rev == 0 || rec.State.Ended() || rec.Cancel {
		return Operation{}, errContested
	}
	before := rec.scope()
	rec.widen(r)
	if after := rec.scope(); after != before {
		if after.platforms != before.platforms || after.force != before.force {
			if err := s.plan(ctx, place, r, platforms); err != nil {
				return Operation{}, err
			}
		}
		if _, err := s.put(ctx, idPrefix+id, rec, rev); err != nil {
			return Operation{}, err
		}
	}
	op, _ := s.view.get(id)
	return op, nil
}

// scope is what an operation is to do, and for whom.
type scope struct {
	platforms string
	force     bool
	wanted    bool
}

func (r *record) scope() scope { return scope{strings.Join(r.Platforms, ","), r.Force, r.Wanted} }

// widen adds what q asks for to what r does.
func (r *record) widen(q Request) {
	r.Force = r.Force || q.Force
	r.Wanted = r.Wanted || !q.pushed
	if len(q.Platforms) == 0 || len(r.Platforms) == 0 {
		r.Platforms = nil
		return
	}
	for _, p := range q.Platforms {
		if !slices.Contains(r.Platforms, p) {
			r.Platforms = append(slices.Clip(r.Platforms), p)
		}
	}
}

// bulkAfter is how many operations of a repository, or of one who asks, may wait before what is asked for more is bulk.
const bulkAfter = 10

// cancelTime is how long Submit waits for the end of a cancelled operation: who asks again wants another one.
const cancelTime = 5 * time.Second

// ends says whether an operation ends soon.
func (s *Service) ends(ctx context.Context, id string) bool {
	ctx, cancel := context.WithTimeout(ctx, cancelTime)
	defer cancel()
	changes, err := s.Watch(ctx, id)
	if err != nil {
		return false
	}
	for op := range changes {
		if op.State.Ended() {
			return true
		}
	}
	return false
}

func newRecord(r Request) record {
	if !r.pushed && strings.HasPrefix(r.By, pushTo) { // an issuer may let people choose their names
		r.By = strconv.Quote(r.By)
	}
	return record{Operation: Operation{
		ID: uuid.NewString(), Image: r.Image, Tag: r.Tag, Platforms: r.Platforms, Force: r.Force, By: r.By,
		State: NotStarted, Asked: now(),
	}, Wanted: !r.pushed}
}

// check looks at a request without asking anybody.
func (s *Service) check(r Request) (converter.Place, []ocispec.Platform, error) {
	if err := r.Image.Digest.Validate(); err != nil {
		return nil, nil, fmt.Errorf("%w: digest %q: %w", ErrInvalid, r.Image.Digest, err)
	}
	if err := CheckRepository(r.Image.Repository); err != nil { // or REPOSITORY:TAG would be another's
		return nil, nil, err
	}
	platforms, err := parsePlatforms(r.Platforms)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	place, err := s.open(r.Image.Registry, r.Image.Repository)
	return place, platforms, err
}

func parsePlatforms(list []string) (platforms []ocispec.Platform, err error) {
	for _, name := range list {
		p, err := converter.ParsePlatform(name)
		if err != nil {
			return nil, err
		}
		platforms = append(platforms, p)
	}
	return platforms, nil
}

// ongoing returns the operation of an image's key if it has not ended, and the key's revision.
func (s *Service) ongoing(ctx context.Context, key string) (op Operation, rev uint64, ongoing bool, err error) {
	asked, rev, err := s.get(ctx, key)
	if rev == 0 || err != nil {
		return op, rev, false, err
	}
	rec, found, err := s.get(ctx, idPrefix+asked.ID)
	switch {
	case err != nil:
		return op, rev, false, err
	case found == 0: // who asked for it died in the middle, or is in it
		op, err = s.begin(ctx, asked)
		return op, rev, true, err
	case rec.State.Ended():
		return op, rev, false, nil
	}
	op, _ = s.view.get(rec.ID)
	return op, rev, true, nil
}

// begin makes the record and the message of an operation whose image's key is written, unless they are there.
func (s *Service) begin(ctx context.Context, rec record) (Operation, error) {
	if _, err := s.put(ctx, idPrefix+rec.ID, rec, 0); err != nil && !errors.Is(err, errContested) {
		return Operation{}, err
	}
	if err := s.enqueue(ctx, rec); err != nil {
		return Operation{}, err
	}
	if op, ok := s.view.get(rec.ID); ok {
		return op, nil
	}
	return rec.Operation, nil // another process has made the record, and this one will be told of it
}

// plan says what is against converting the image.
func (s *Service) plan(ctx context.Context, p converter.Place, r Request, platforms []ocispec.Platform) error {
	list, err := converter.Plan(ctx, p, r.Image.Digest.String(), converter.CreateOptions{Options: s.c.Convert, Platforms: platforms})
	if err != nil {
		return registryError(r.Image, err)
	}
	if !r.Force && !slices.ContainsFunc(list, func(p converter.Planned) bool { return p.Artifact == "" }) {
		return fmt.Errorf("the streaming artifact of %s %w", r.Image, ErrExists)
	}
	return nil
}

// registryError says what callers tell apart: not there, an image that cannot be converted, a registry that cannot be asked.
func registryError(i Image, err error) error {
	var status *transport.Error
	var network net.Error
	var refused *converter.Error
	switch {
	case converter.CodeOf(err) == converter.ResourceNotFound:
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	case errors.As(err, &refused):
		return err
	case errors.As(err, &status), errors.As(err, &network), errors.Is(err, context.Canceled):
		return unavailable("look at "+i.String(), err)
	}
	return &converter.Error{Code: converter.Unknown, Err: err}
}

// Operation returns an operation by its id.
func (s *Service) Operation(ctx context.Context, id string) (Operation, error) {
	if err := s.view.wait(ctx); err != nil {
		return Operation{}, err
	}
	if op, ok := s.view.get(id); ok {
		return op, nil
	}
	// Another process may have made it just now.
	if u, err := uuid.Parse(id); err == nil && u.String() == id {
		_, rev, err := s.get(ctx, idPrefix+id)
		if err != nil {
			return Operation{}, err
		}
		if op, ok := s.view.get(id); ok && rev > 0 {
			return op, nil
		}
	}
	return Operation{}, fmt.Errorf("%w: no operation %q", ErrNotFound, id)
}

// Operations returns the operations that f chooses, the newest first.
func (s *Service) Operations(ctx context.Context, f Filter) ([]Operation, error) {
	if err := s.view.wait(ctx); err != nil {
		return nil, err
	}
	limit := f.Limit
	if limit <= 0 {
		limit = 100
	}
	return s.view.list(limit, func(op Operation) bool {
		return (f.Registry == "" || f.Registry == op.Registry) && (f.Repository == "" || f.Repository == op.Repository) &&
			(f.May == nil || f.May(op.Registry, op.Repository)) && (f.Digest == "" || f.Digest == op.Digest) && (len(f.States) == 0 || slices.Contains(f.States, op.State))
	}), nil
}

// Last returns the operation of an image that was asked for last.
func (s *Service) Last(ctx context.Context, i Image) (Operation, error) {
	if err := s.view.wait(ctx); err != nil {
		return Operation{}, err
	}
	if op, ok := s.view.lastOf(imageKey(i)); ok {
		return op, nil
	}
	asked, rev, err := s.get(ctx, imageKey(i)) // as in Operation
	if err != nil {
		return Operation{}, err
	}
	if rev == 0 {
		return Operation{}, fmt.Errorf("%w: no operation of %s", ErrNotFound, i)
	}
	return s.Operation(ctx, asked.ID)
}

// Watch sends an operation as it is, and as it changes; who reads slowly misses what is not the newest. The channel is closed when the
// operation has ended, after its last state, or when ctx ends.
func (s *Service) Watch(ctx context.Context, id string) (<-chan Operation, error) {
	if _, err := s.Operation(ctx, id); err != nil {
		return nil, err
	}
	c := make(chan Operation, 1)
	remove, ok := s.view.follow(id, &watcher{
		changed: func(_ entry, op Operation) { offer(c, op) },
		ended:   func() { close(c) },
	})
	if !ok {
		return nil, fmt.Errorf("%w: no operation %q", ErrNotFound, id)
	}
	context.AfterFunc(ctx, remove)
	return c, nil
}

// Cancel ends an operation, and takes away what it has attached. It returns at once: one that a process works on is Canceled a moment
// later. One that has ended is ErrNotRunning, and returned too.
func (s *Service) Cancel(ctx context.Context, id, by string) (Operation, error) {
	if _, err := s.Operation(ctx, id); err != nil {
		return Operation{}, err
	}
	for range contested {
		rec, rev, err := s.get(ctx, idPrefix+id)
		if err != nil {
			return Operation{}, err
		}
		if rev == 0 {
			return Operation{}, fmt.Errorf("%w: no operation %q", ErrNotFound, id)
		}
		if rec.State.Ended() {
			return rec.Operation, fmt.Errorf("%w: operation %s has ended (%s)", ErrNotRunning, id, rec.State)
		}
		if !rec.Cancel {
			rec.Cancel, rec.CancelBy = true, by
		}
		if rec.State == NotStarted {
			err = s.endCancelled(ctx, rec, rev)
		} else {
			_, err = s.put(ctx, idPrefix+id, rec, rev)
		}
		if errors.Is(err, errContested) {
			continue
		}
		op, _ := s.view.get(id)
		return op, err
	}
	return Operation{}, unavailable("cancel operation "+id, errContested)
}

// endCancelled ends an operation that is to be cancelled and that no process works on, rather than to wait until one has room for it. errContested is that the
// record is not of rev any more.
func (s *Service) endCancelled(ctx context.Context, rec record, rev uint64) error {
	if len(rec.Made) == 0 {
		rec.State, rec.End = Canceled, now()
	} else { // this process has room for what is to do
		rec.take(s.c.Name)
	}
	rev, err := s.put(ctx, idPrefix+rec.ID, rec, rev)
	switch {
	case err != nil:
		return err
	case rec.State == Canceled:
		s.counters.ended(rec)
		s.done(ctx, rec.ID, nil)
		return nil
	}
	a := &attempt{s: s, rec: rec, rev: rev, held: time.Now()}
	if err = a.cancel(ctx); errors.Is(err, errLost) { // another process has been given its message, and cancels it
		return nil
	}
	return err
}

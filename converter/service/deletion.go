package service

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// converted notes what an operation has attached, which must not be lost.
func (a *auto) converted(ctx context.Context, op Operation, asked bool) (m madeFor, err error) {
	a.tags.clear()
	return a.noteMade(ctx, madeFor{Image: op.Image, Artifacts: op.Artifacts, Asked: asked})
}

// stillThere notes whether the image of an operation was deleted while it was converted: registries attach to what is not there, too.
func (a *auto) stillThere(ctx context.Context, m madeFor) error {
	_, p, err := a.reach(m.Registry, m.Repository)
	if err != nil {
		return err
	}
	gone, err := isGone(ctx, p, m.Digest)
	if err != nil {
		return err
	}
	_, err = a.noteGone(ctx, m, gone)
	return err
}

// handleDeleted is Handle for what was deleted.
func (a *auto) handleDeleted(ctx context.Context, r repository, e Event) error {
	dgst := e.Digest
	if dgst == "" && e.Tag != "" {
		t, err := a.getTag(ctx, r, e.Tag)
		if err != nil {
			return err
		}
		dgst = t.Digest
	}
	if dgst != "" {
		a.hint(r, hint{events: 1, gone: []digest.Digest{dgst}}) // if that is lost, reconcile finds it
	}
	return nil
}

// cascade deletes the artifacts and profiles of an image that is gone, and forgets it; of one that is there it does nothing. An operation that converts it
// is cancelled before.
//
// Only the registry's word that there is no such manifest counts, and only if it has the artifact: one whose storage is away, or that hides what the
// credentials may not see any more, has neither. And it must say so again notYet later: copies of a registry, and caches before it, get what was pushed at
// different times, so that one of them may have the artifact and not the image.
func (v *visit) cascade(ctx context.Context, dgst digest.Digest) error {
	a, image := v.a, v.r.image(dgst)
	m := v.made[dgst]
	m.Image = image
	op, err := a.ops.Last(ctx, image)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	ongoing := err == nil && !op.State.Ended()
	if v.tags == nil { // those of an inactive repository
		if v.tags, err = a.tagsOf(ctx, v.r); err != nil {
			return err
		}
	}
	tagged := false
	for _, t := range v.tags {
		tagged = tagged || t.Digest == dgst
	}
	if m.rev == 0 && !ongoing && !tagged {
		return nil // nobody knows it
	}
	gone, err := isGone(ctx, v.p, dgst)
	if err != nil {
		return err
	}
	if !gone {
		return v.note(ctx, m, false)
	}
	has := false
	if m.rev != 0 {
		if has, err = hasArtifacts(ctx, v.p, m.unshared(v.made)); err != nil {
			return err
		}
	}
	switch {
	case !has && !ongoing:
		// Nothing is left, which the registry may have seen to itself, or it answers nothing.
		if _, err := v.p.Tags(ctx); err != nil {
			return nil
		}
		return v.forget(ctx, m)
	case m.Gone.IsZero():
		return v.note(ctx, m, true)
	case time.Since(m.Gone) < notYet:
		return nil
	}
	if ongoing {
		if err := a.cancel(ctx, image, "deletion of the image"); err != nil {
			return err
		}
		a.done(Deed{Action: "cancel", Image: image, Target: op.ID, Detail: "the image is gone since " + m.Gone.Format(time.RFC3339)})
	}
	return v.takeArtifacts(ctx, m)
}

// takeArtifacts deletes the artifacts and profiles of what only an image has that is gone.
func (v *visit) takeArtifacts(ctx context.Context, m madeFor) error {
	tagged := map[digest.Digest]bool{}
	if slices.ContainsFunc(m.subjects(), func(s digest.Digest) bool { return s != m.Digest }) {
		var known bool
		var err error
		if tagged, known, err = v.tagged(ctx, &m); !known {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, leaveTime)
	defer cancel()
	d, err := v.leave(ctx, m)
	if err != nil || len(d.images) == 0 {
		return err
	}
	m = d.images[0]
	defer func() { v.stay(ctx, m) }()
	if gone, err := isGone(ctx, v.p, m.Digest); !gone { // it may have been pushed again
		return err
	}
	stay, err := v.release(ctx, d, m, tagged, "the image is gone since "+m.Gone.Format(time.RFC3339))
	if err != nil {
		return err
	}
	// What stays goes with the last image that has it, of which nothing else may be known.
	rest := m
	rest.Leaving = time.Time{}
	if rest.Artifacts = slices.DeleteFunc(slices.Clone(m.Artifacts), func(made Artifact) bool { return !stay[made.Subject] }); len(rest.Artifacts) == 0 {
		return v.forget(ctx, m)
	}
	if err := v.a.setMade(ctx, &rest); err != nil {
		return err
	}
	v.made[m.Digest] = rest
	return v.forgetTags(ctx, m.Digest)
}

// release deletes the artifacts and profiles of the manifests that one of the images has, but for those that are needed or that another image has, which it returns.
func (v *visit) release(ctx context.Context, d *departure, m madeFor, needed map[digest.Digest]bool, why string) (stay map[digest.Digest]bool, err error) {
	stay = map[digest.Digest]bool{}
	unshared := m.unshared(d.all)
	for _, s := range m.subjects() {
		if stay[s] = needed[s] || d.used[s] || !slices.Contains(unshared, s); stay[s] {
			continue
		}
		if err := v.drop(ctx, m.Image, s, why); err != nil {
			return nil, err
		}
	}
	delete(d.all, m.Digest)
	return stay, nil
}

// note is noteGone for the visit.
func (v *visit) note(ctx context.Context, m madeFor, gone bool) (err error) {
	if m, err = v.a.noteGone(ctx, m, gone); m.rev != 0 {
		v.made[m.Digest] = m
	}
	return err
}

// forget forgets an image and the tags that named it, so that it is new when it is pushed again.
func (v *visit) forget(ctx context.Context, m madeFor) error {
	if err := v.forgetTags(ctx, m.Digest); err != nil || m.rev == 0 {
		return err
	}
	delete(v.made, m.Digest)
	return removeKey(ctx, v.a.made, madeKey(m.Image), m.rev)
}

func (v *visit) forgetTags(ctx context.Context, dgst digest.Digest) error {
	for name, t := range v.tags {
		if t.Digest == dgst && t.State != stateDue && t.rev != 0 {
			if err := removeKey(ctx, v.a.seen, v.r.tagKey(name), t.rev); err != nil {
				return err
			}
			delete(v.tags, name)
		}
	}
	return nil
}

// isGone says that the registry has no such manifest. With an error nobody knows.
func isGone(ctx context.Context, p converter.Place, dgst digest.Digest) (bool, error) {
	_, err := p.Resolve(ctx, dgst.String())
	if errors.Is(err, converter.ErrNotFound) {
		return true, nil
	}
	return false, placeError(err)
}

// hasArtifacts says whether an artifact or profile of one of the subjects is there.
func hasArtifacts(ctx context.Context, p converter.Place, subjects []digest.Digest) (bool, error) {
	for _, s := range subjects {
		list, err := p.Referrers(ctx, s)
		if err != nil {
			return false, placeError(err)
		}
		for _, d := range list {
			if d.ArtifactType != artifact.ArtifactType && d.ArtifactType != artifact.ProfileType {
				continue
			}
			if gone, err := isGone(ctx, p, d.Digest); !gone {
				return err == nil, err
			}
		}
	}
	return false, nil
}

// reconcileImages looks for images that were deleted, of those with artifacts.
func (v *visit) reconcileImages(ctx context.Context) error {
	alive := map[digest.Digest]bool{}
	for _, dgst := range v.named {
		alive[dgst] = true
	}
	var first, check []digest.Digest
	for dgst, m := range v.made {
		switch {
		case !m.Gone.IsZero():
			first = append(first, dgst)
		case !alive[dgst]:
			check = append(check, dgst)
		}
	}
	if len(first) == 0 {
		v.a.mu.Lock()
		delete(v.a.scans, v.r)
		v.a.mu.Unlock()
	}
	var errs []error
	for _, dgst := range append(window(first, visitChecks), window(check, visitChecks)...) {
		if len(errs) == visitFails || ctx.Err() != nil {
			break
		}
		if err := v.cascade(ctx, dgst); err != nil {
			errs = append(errs, fmt.Errorf("image %s: %w", dgst, err))
		}
	}
	return errors.Join(errs...)
}

// cancel cancels the operation that converts an image, if there is one.
func (a *auto) cancel(ctx context.Context, i Image, by string) error {
	op, err := a.ops.Last(ctx, i)
	if errors.Is(err, ErrNotFound) || err == nil && op.State.Ended() {
		return nil
	}
	if err != nil {
		return err
	}
	if _, err := a.ops.Cancel(ctx, op.ID, by); err != nil && !errors.Is(err, ErrNotRunning) {
		return err
	}
	return nil
}

// done tells the audit log.
func (a *auto) done(d Deed) {
	if a.audit != nil {
		a.audit(d)
	}
}

// drop deletes the artifacts and profiles of a subject that an image has or had.
func (v *visit) drop(ctx context.Context, i Image, subject digest.Digest, why string) error {
	deleted, err := converter.DeleteReferrers(ctx, v.p, subject)
	for _, dgst := range deleted {
		v.a.log.Info("artifact deleted", "image", i.String(), "deleted", dgst, "why", why)
		v.a.done(Deed{Action: "delete", Image: i, Target: dgst.String(), Detail: why})
	}
	v.a.mu.Lock()
	v.a.deeds.deleted += uint64(len(deleted))
	v.a.mu.Unlock()
	if errors.Is(err, converter.ErrNotOurs) {
		v.a.log.Warn("a list of referrers names what is none, and it stays", "image", i.String(), "subject", subject, "error", err)
		err = nil
	}
	if err == nil {
		err = v.a.forgetStarts(ctx, v.r, subject)
	}
	return placeError(err)
}

// cancelWait is how long DeleteArtifacts waits for the end of a conversion.
const cancelWait = 30 * time.Second

// DeleteArtifacts deletes the artifacts of an image, and the profiles of what has none any more; the image stays. An ongoing conversion of it is cancelled
// first, or the artifact would be there again. It returns what it deleted, also with an error; that there is none is ErrNotFound.
func (a *auto) DeleteArtifacts(ctx context.Context, i Image, by string) ([]digest.Digest, error) {
	_, p, err := a.reach(i.Registry, i.Repository)
	if err != nil {
		return nil, err
	}
	if err := i.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("%w: digest %q: %w", ErrInvalid, i.Digest, err)
	}
	if err := a.stop(ctx, i, by); err != nil {
		return nil, err
	}
	m, err := a.getMade(ctx, i)
	if err != nil {
		return nil, err
	}
	deleted, err := converter.DeleteArtifacts(ctx, p, i.Digest.String(), nil)
	a.tags.clear()
	if errors.Is(err, converter.ErrNotOurs) {
		a.log.Warn("a list of referrers names what is none, and it stays", "image", i.String(), "error", err)
		err = nil
	}
	if err != nil || m.rev == 0 {
		return deleted, placeError(err)
	}
	return deleted, removeKey(ctx, a.made, madeKey(i), m.rev)
}

// stop cancels the operation that converts an image, and waits until it has ended.
func (a *auto) stop(ctx context.Context, i Image, by string) error {
	if err := a.cancel(ctx, i, by); err != nil {
		return err
	}
	op, err := a.ops.Last(ctx, i)
	if errors.Is(err, ErrNotFound) || err == nil && op.State.Ended() {
		return nil
	}
	if err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, cancelWait)
	defer cancel()
	states, err := a.ops.Watch(wait, op.ID)
	if err != nil {
		return err
	}
	for op = range states {
		if op.State.Ended() {
			return nil
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("%w: operation %s, which converts the image, was asked to end and has not yet", ErrUnavailable, op.ID)
}

package service

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// madeFor is an image with the artifacts that were attached for it, or found attached: what is to go when the image does.
type madeFor struct {
	Image
	Artifacts []Artifact `json:"artifacts"`
	Asked     bool       `json:"asked,omitempty"` // somebody asked for them, so that the rule how many are kept does not bind them

	rev uint64
}

func madeKey(i Image) string {
	return repository{i.Registry, i.Repository}.key() + "." + strings.Replace(i.Digest.String(), ":", "-", 1)
}

func (a *auto) getMade(ctx context.Context, i Image) (madeFor, error) {
	m := madeFor{Image: i}
	rev, err := getJSON(ctx, a.made, madeKey(i), &m)
	m.rev = rev
	return m, err
}

// madeIn returns what was made in a repository, by the image's digest.
func (a *auto) madeIn(ctx context.Context, r repository) (map[digest.Digest]madeFor, error) {
	all := map[digest.Digest]madeFor{}
	err := eachKey(ctx, a.made, r.key()+".*", func(e jetstream.KeyValueEntry) error {
		m := madeFor{rev: e.Revision()}
		if err := json.Unmarshal(e.Value(), &m); err != nil {
			return fmt.Errorf("artifacts of an image of %s in %s: %w", r, e.Key(), err)
		}
		all[m.Digest] = m
		return nil
	})
	return all, err
}

// noteMade adds to what is known of an image's artifacts. Those of other platforms stay.
func (a *auto) noteMade(ctx context.Context, m madeFor) error {
	if len(m.Artifacts) == 0 {
		return nil
	}
	for {
		next, err := a.getMade(ctx, m.Image)
		if err != nil {
			return err
		}
		next.Asked = next.Asked || m.Asked
		next.Artifacts = slices.DeleteFunc(next.Artifacts, func(old Artifact) bool {
			return slices.ContainsFunc(m.Artifacts, func(n Artifact) bool { return n.Subject == old.Subject })
		})
		next.Artifacts = append(next.Artifacts, m.Artifacts...)
		if _, err = setJSON(ctx, a.made, madeKey(m.Image), next, next.rev); !errors.Is(err, errContested) {
			return err
		}
	}
}

// converted notes what an operation has attached. The image may have been deleted while it was converted: registries attach to what is not there, too, and
// then it goes at once.
func (a *auto) converted(ctx context.Context, op Operation) error {
	m := madeFor{Image: op.Image, Artifacts: op.Artifacts, Asked: !strings.HasPrefix(op.By, pushTo)}
	if err := a.noteMade(ctx, m); err != nil {
		return err
	}
	_, err := a.cascade(ctx, repository{op.Registry, op.Repository}, op.Digest, false)
	return err
}

// cascade deletes the artifacts and profiles of an image that is gone, and forgets it; of one that is there it does nothing. With stop, an operation that
// converts it is cancelled first.
//
// Only the registry's word that there is no such manifest counts, and only if it has the artifact: one whose storage is away, or that hides what the
// credentials may not see any more, has neither.
func (a *auto) cascade(ctx context.Context, r repository, dgst digest.Digest, stop bool) (deleted []digest.Digest, err error) {
	_, p, err := a.reach(r.registry, r.name)
	if err != nil {
		return nil, err
	}
	if gone, err := isGone(ctx, p, dgst); !gone {
		return nil, err
	}
	if stop {
		if err := a.cancel(ctx, r.image(dgst), "deletion of the image"); err != nil {
			return nil, err
		}
	}
	all, err := a.madeIn(ctx, r)
	if err != nil {
		return nil, err
	}
	tags, err := a.tagsOf(ctx, r)
	if err != nil {
		return nil, err
	}
	used := map[digest.Digest]bool{}
	for _, t := range tags {
		used[t.Digest] = used[t.Digest] || t.Digest != dgst && t.Missing.IsZero()
	}
	subjects := all[dgst].unshared(all, used)
	has, err := hasArtifacts(ctx, p, subjects)
	if err != nil {
		return nil, err
	}
	if !has {
		// Nothing is left, which the registry may have seen to itself, or it answers nothing.
		if _, err := p.Tags(ctx); err != nil {
			return nil, nil
		}
	} else if gone, err := isGone(ctx, p, dgst); !gone { // it may have been pushed again
		return nil, err
	}
	for _, s := range subjects {
		more, err := converter.DeleteReferrers(ctx, p, s)
		deleted = append(deleted, more...)
		if err == nil {
			err = a.forgetStarts(ctx, r, s)
		}
		if err != nil {
			return deleted, placeError(err)
		}
	}
	if len(deleted) > 0 {
		a.log.Info("artifacts deleted with their image", "image", r.image(dgst).String(), "deleted", len(deleted))
	}
	return deleted, a.forget(ctx, r, all[dgst], dgst, tags)
}

// forget forgets an image and the tags that named it, so that it is new when it is pushed again.
func (a *auto) forget(ctx context.Context, r repository, m madeFor, dgst digest.Digest, tags map[string]*seenTag) error {
	for _, t := range tags {
		if t.Digest == dgst && t.State != stateDue {
			if err := removeKey(ctx, a.seen, r.tagKey(t.Tag), t.rev); err != nil {
				return err
			}
		}
	}
	if m.rev == 0 {
		return nil
	}
	return removeKey(ctx, a.made, madeKey(m.Image), m.rev)
}

// unshared returns the manifests that the image's artifacts refer to, and the image itself, but for those that artifacts of another image refer to, or that
// are used.
func (m madeFor) unshared(all map[digest.Digest]madeFor, used map[digest.Digest]bool) []digest.Digest {
	subjects := []digest.Digest{}
	if m.Digest != "" {
		subjects = append(subjects, m.Digest)
	}
	for _, made := range m.Artifacts {
		subjects = append(subjects, made.Subject)
	}
	slices.Sort(subjects)
	return slices.DeleteFunc(slices.Compact(subjects), func(s digest.Digest) bool {
		if used[s] {
			return true
		}
		for _, other := range all {
			if other.Digest != m.Digest && slices.ContainsFunc(other.Artifacts, func(made Artifact) bool { return made.Subject == s }) {
				return true
			}
		}
		return false
	})
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
	var check []digest.Digest
	for dgst := range v.made {
		if !v.alive[dgst] {
			check = append(check, dgst)
		}
	}
	slices.Sort(check)
	var errs []error
	for _, dgst := range window(check, visitChecks) {
		if len(errs) == visitFails || ctx.Err() != nil {
			break
		}
		if _, err := v.a.cascade(ctx, v.r, dgst, true); err != nil {
			errs = append(errs, fmt.Errorf("image %s: %w", dgst, err))
		}
	}
	return errors.Join(errs...)
}

// keep deletes the artifacts of pushed images that are not among those of the newest tags, if the rules say so. Images that somebody asked for keep theirs.
func (v *visit) keep(ctx context.Context) error {
	n := v.settings.Rules.Keep
	if n == 0 {
		return nil
	}
	var tags []*seenTag
	listed := 0
	for _, t := range v.tags {
		switch {
		case t.State == stateDue:
			return nil // nobody knows yet what is the newest
		case t.Missing.IsZero():
			listed++
		case time.Since(t.Missing) > gone:
			continue
		}
		tags = append(tags, t)
	}
	if listed == 0 {
		return nil // a list without any is the registry's mistake, or the images go too, and their artifacts with them
	}
	slices.SortFunc(tags, func(x, y *seenTag) int { return cmp.Or(y.Pushed.Compare(x.Pushed), cmp.Compare(y.Tag, x.Tag)) })
	kept := map[digest.Digest]bool{}
	listed = 0
	for i, t := range tags { // the newest ones, whether those that the list lacks are there or not
		if t.Missing.IsZero() {
			listed++
		}
		if i >= n && (listed > n || !t.Missing.IsZero()) {
			continue
		}
		if t.Digest == "" {
			return nil // it was not looked at yet
		}
		kept[t.Digest] = true
	}
	for dgst, m := range v.made {
		if m.Asked || kept[dgst] {
			continue
		}
		for _, s := range m.unshared(v.made, kept) {
			if _, err := converter.DeleteReferrers(ctx, v.p, s); err != nil {
				return placeError(err)
			}
		}
		if err := removeKey(ctx, v.a.made, madeKey(m.Image), m.rev); err != nil {
			return err
		}
		delete(v.made, dgst)
		v.a.log.Info("artifacts deleted: there are newer tags than are kept", "image", m.Image.String(), "keep", n)
	}
	return nil
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

package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// madeFor is an image with the artifacts that were attached for it, or found attached: what is to go when the image does.
type madeFor struct {
	Image
	Artifacts []Artifact `json:"artifacts"`
	Asked     bool       `json:"asked,omitempty"`  // somebody asked for them, so that the rule how many are kept does not bind them
	Gone      time.Time  `json:"gone,omitzero"`    // since when the registry says that it has no such image
	Alone     time.Time  `json:"alone,omitzero"`   // of what is gone: since when the registry lists no tag, so that no other image seems to have its manifests
	Leaving   time.Time  `json:"leaving,omitzero"` // its artifacts are being deleted since then: who converts what shares a manifest with it waits

	rev uint64
}

// leaveTime is how long artifacts may be being deleted, and leaveAtOnce of how many images.
const (
	leaveTime   = 2 * time.Minute
	leaveAtOnce = 50
)

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

// noteMade adds to what is known of an image's artifacts, and returns it. Those of other platforms stay.
func (a *auto) noteMade(ctx context.Context, m madeFor) (madeFor, error) {
	for {
		next, err := a.getMade(ctx, m.Image)
		if err != nil {
			return next, err
		}
		next.Asked, next.Leaving = next.Asked || m.Asked, time.Time{}
		next.Artifacts = merged(next.Artifacts, m.Artifacts)
		rev, err := setJSON(ctx, a.made, madeKey(m.Image), next, next.rev)
		if next.rev = rev; !errors.Is(err, errContested) {
			return next, err
		}
	}
}

// merged adds artifacts to those that are known of an image, in place of those of the same manifests. What an operation before has attached is the service's own,
// although this one found it.
func merged(known, news []Artifact) []Artifact {
	news = slices.Clone(news)
	for i, n := range news {
		own := func(old Artifact) bool { return old.Subject == n.Subject && old.Digest == n.Digest && !old.Existed }
		news[i].Existed = n.Existed && !slices.ContainsFunc(known, own)
	}
	known = slices.DeleteFunc(slices.Clone(known), func(old Artifact) bool {
		return slices.ContainsFunc(news, func(n Artifact) bool { return n.Subject == old.Subject })
	})
	return append(known, news...)
}

// claim notes that what an image has already is asked for. It is false if that is being deleted, or was since known was read, so that it is to be made again. Who
// is about to delete it knows by the record's revision, which changes also if a push is the reason and nothing else is to be noted.
func (a *auto) claim(ctx context.Context, r Request, known madeFor) (has bool, err error) {
	for {
		m, err := a.getMade(ctx, r.Image)
		if err != nil {
			return true, err
		}
		if m.isLeaving() || m.rev == 0 && known.rev != 0 {
			return false, nil
		}
		if m.rev == 0 {
			return true, nil
		}
		m.Asked = m.Asked || !r.pushed
		if _, err = setJSON(ctx, a.made, madeKey(r.Image), m, m.rev); !errors.Is(err, errContested) {
			return true, err
		}
	}
}

// isLeaving says that m's artifacts are being deleted. Who deletes them ends within leaveTime, or died.
func (m madeFor) isLeaving() bool {
	return !m.Leaving.IsZero() && time.Since(m.Leaving).Abs() < time.Hour // whatever the clocks are
}

// departure is of images whose artifacts are being deleted.
type departure struct {
	images []madeFor
	used   map[digest.Digest]bool    // manifests of what is being converted
	all    map[digest.Digest]madeFor // of the repository, those images among them that still have artifacts
}

// leave notes of images that their artifacts are being deleted, and finds out then what others need of them. Left out are those of which somebody has noted something
// else since they were read, and those that are being converted. Who converts what has a manifest in common from now on waits, see awaitLeaving. Who calls it has
// what is not deleted stay.
func (v *visit) leave(ctx context.Context, list ...madeFor) (d *departure, err error) {
	d = &departure{used: map[digest.Digest]bool{}}
	defer func() {
		if err != nil {
			v.stay(ctx, d.images...)
			d = &departure{}
		}
	}()
	for _, m := range list {
		m.Leaving = now()
		rev, err := setJSON(ctx, v.a.made, madeKey(m.Image), m, m.rev)
		if errors.Is(err, errContested) {
			continue
		}
		m.rev = rev
		d.images = append(d.images, m) // or it may have been noted
		if err != nil {
			return d, err
		}
	}
	ops, err := v.a.ops.Operations(ctx, Filter{Registry: v.r.registry, Repository: v.r.name, States: []State{NotStarted, Running}, Limit: math.MaxInt})
	if err != nil {
		return d, err
	}
	for _, op := range ops {
		i := slices.IndexFunc(d.images, func(m madeFor) bool { return m.Digest == op.Digest })
		if i >= 0 && !d.images[i].Gone.IsZero() {
			continue // it is being cancelled
		}
		known, err := v.addManifests(ctx, d.used, op.Digest)
		if err != nil {
			return d, err
		}
		if !known {
			v.stay(ctx, d.images...)
			return &departure{}, nil
		}
	}
	d.images = slices.DeleteFunc(d.images, func(m madeFor) bool {
		stays := d.used[m.Digest] && m.Gone.IsZero()
		if stays {
			v.stay(ctx, m)
		}
		return stays
	})
	d.all, err = v.a.madeIn(ctx, v.r)
	return d, err
}

// stay notes of images that their artifacts are not being deleted any more, whatever has kept them from it. What cannot be noted now is by a visit later.
func (v *visit) stay(ctx context.Context, list ...madeFor) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeDeadline)
	defer cancel()
	for _, was := range list {
		if was.Leaving.IsZero() {
			continue
		}
		m, err := v.a.getMade(ctx, was.Image)
		if err == nil && m.Leaving.Equal(was.Leaving) && m.rev != 0 {
			m.Leaving = time.Time{}
			if err = v.a.setMade(ctx, &m); err == nil {
				v.made[m.Digest] = m
			}
		}
		if err != nil {
			v.a.log.Warn("that artifacts are not being deleted any more cannot be noted", "image", was.Image.String(), "error", err)
		}
	}
}

// awaitLeaving waits until no artifact is being deleted that an image may have in common with another: what is found there would be gone a moment later. Who
// deletes looks for what is being converted after it has noted what it does. While NATS does not answer it waits, too.
func (a *auto) awaitLeaving(ctx context.Context, p converter.Place, i Image) error {
	r := repository{i.Registry, i.Repository}
	var manifests []digest.Digest
	for end := time.Now().Add(leaveTime); ; {
		all, err := a.madeIn(ctx, r)
		if err != nil {
			if !errors.Is(err, ErrUnavailable) && ctx.Err() == nil {
				return err
			}
			a.log.Warn("whether artifacts are being deleted is not known; a conversion waits", "image", i.String(), "error", err)
			if !sleep(ctx, retryTime) {
				return context.Cause(ctx)
			}
			end = time.Now().Add(leaveTime)
			continue
		}
		maps.DeleteFunc(all, func(_ digest.Digest, m madeFor) bool { return !m.isLeaving() })
		if len(all) > 0 && manifests == nil {
			if manifests, err = converter.Manifests(ctx, p, i.Digest.String()); err != nil {
				return err // Create would meet it, too
			}
		}
		shares := func(m madeFor) bool {
			return m.Digest == i.Digest || slices.ContainsFunc(m.Artifacts, func(made Artifact) bool { return slices.Contains(manifests, made.Subject) })
		}
		if !slices.ContainsFunc(slices.Collect(maps.Values(all)), shares) || time.Now().After(end) { // who deleted them died
			return nil
		}
		if !sleep(ctx, retryTime) {
			return context.Cause(ctx)
		}
	}
}

// noteGone notes since when an image is gone, or that it is there. What another process notes at the same time stays.
func (a *auto) noteGone(ctx context.Context, m madeFor, gone bool) (madeFor, error) {
	switch {
	case gone != m.Gone.IsZero():
		return m, nil
	case gone:
		m.Gone = now()
	case len(m.Artifacts) == 0: // it was noted for that alone
		return madeFor{Image: m.Image}, removeKey(ctx, a.made, madeKey(m.Image), m.rev)
	default:
		m.Gone, m.Alone = time.Time{}, time.Time{}
	}
	return m, a.setMade(ctx, &m)
}

// setMade writes m if it is what it was when it was read, and leaves what another process has written.
func (a *auto) setMade(ctx context.Context, m *madeFor) error {
	rev, err := setJSON(ctx, a.made, madeKey(m.Image), m, m.rev)
	if errors.Is(err, errContested) {
		return nil
	}
	m.rev = rev
	return err
}

// subjects returns the image and the manifests that its artifacts refer to.
func (m madeFor) subjects() (list []digest.Digest) {
	if m.Digest != "" {
		list = append(list, m.Digest)
	}
	for _, made := range m.Artifacts {
		list = append(list, made.Subject)
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// unshared returns those of the subjects that no artifact of another image refers to.
func (m madeFor) unshared(all map[digest.Digest]madeFor) []digest.Digest {
	return slices.DeleteFunc(m.subjects(), func(s digest.Digest) bool {
		for _, other := range all {
			if other.Digest != m.Digest && slices.ContainsFunc(other.Artifacts, func(made Artifact) bool { return made.Subject == s }) {
				return true
			}
		}
		return false
	})
}

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

// claim notes that somebody asked for what an image has already. It is false if that is being deleted, so that it is to be made again.
func (a *auto) claim(ctx context.Context, r Request) (has bool, err error) {
	for {
		m, err := a.getMade(ctx, r.Image)
		if err != nil {
			return true, err
		}
		if !m.Leaving.IsZero() {
			return false, nil
		}
		if m.rev == 0 || m.Asked || r.pushed() {
			return true, nil
		}
		m.Asked = true
		if _, err = setJSON(ctx, a.made, madeKey(r.Image), m, m.rev); !errors.Is(err, errContested) {
			return true, err
		}
	}
}

// departure is of images whose artifacts are being deleted.
type departure struct {
	images []madeFor
	used   map[digest.Digest]bool    // manifests of what is being converted
	all    map[digest.Digest]madeFor // of the repository, those images among them that still have artifacts
}

// leave notes of images that their artifacts are being deleted, and finds out then what others need of them. Left out are those of which somebody has noted something
// else since they were read, and those that are being converted. Who converts what has a manifest in common from now on waits, see awaitLeaving.
func (v *visit) leave(ctx context.Context, list ...madeFor) (*departure, error) {
	d := &departure{used: map[digest.Digest]bool{}}
	for _, m := range list {
		m.Leaving = now()
		rev, err := setJSON(ctx, v.a.made, madeKey(m.Image), m, m.rev)
		if errors.Is(err, errContested) {
			continue
		}
		if err != nil {
			return nil, err
		}
		m.rev = rev
		d.images = append(d.images, m)
	}
	ops, err := v.a.ops.Operations(ctx, Filter{Registry: v.r.registry, Repository: v.r.name, States: []State{NotStarted, Running}, Limit: math.MaxInt})
	if err != nil {
		return nil, err
	}
	for _, op := range ops {
		i := slices.IndexFunc(d.images, func(m madeFor) bool { return m.Digest == op.Digest })
		if i >= 0 && !d.images[i].Gone.IsZero() {
			continue // it is being cancelled
		}
		known, err := v.addManifests(ctx, d.used, op.Digest)
		if err != nil || !known {
			for _, m := range d.images {
				err = errors.Join(err, v.stay(ctx, &m))
			}
			return &departure{}, err
		}
	}
	for _, m := range d.images {
		if d.used[m.Digest] && m.Gone.IsZero() {
			err = errors.Join(err, v.stay(ctx, &m))
		}
	}
	d.images = slices.DeleteFunc(d.images, func(m madeFor) bool { return d.used[m.Digest] && m.Gone.IsZero() })
	if err == nil {
		d.all, err = v.a.madeIn(ctx, v.r)
	}
	return d, err
}

// stay notes that artifacts of m are not being deleted any more.
func (v *visit) stay(ctx context.Context, m *madeFor) error {
	m.Leaving = time.Time{}
	return v.a.setMade(ctx, m)
}

// awaitLeaving waits until no artifact is being deleted that an image may have in common with another: what is found there would be gone a moment later. Who
// deletes looks for what is being converted after it has noted what it does.
func (a *auto) awaitLeaving(ctx context.Context, p converter.Place, i Image) error {
	r := repository{i.Registry, i.Repository}
	var manifests []digest.Digest
	for end := time.Now().Add(leaveTime); ; {
		all, err := a.madeIn(ctx, r)
		if err != nil {
			return err
		}
		maps.DeleteFunc(all, func(_ digest.Digest, m madeFor) bool { return m.Leaving.IsZero() || time.Since(m.Leaving) > time.Hour }) // whatever the clocks are
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

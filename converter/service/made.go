package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/opencontainers/go-digest"
)

// madeFor is an image with the artifacts that were attached for it, or found attached: what is to go when the image does.
type madeFor struct {
	Image
	Artifacts []Artifact `json:"artifacts"`
	Asked     bool       `json:"asked,omitempty"` // somebody asked for them, so that the rule how many are kept does not bind them
	Gone      time.Time  `json:"gone,omitzero"`   // since when the registry says that it has no such image

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

// noteMade adds to what is known of an image's artifacts, and returns it. Those of other platforms stay.
func (a *auto) noteMade(ctx context.Context, m madeFor) (madeFor, error) {
	for {
		next, err := a.getMade(ctx, m.Image)
		if err != nil {
			return next, err
		}
		next.Asked = next.Asked || m.Asked
		next.Artifacts = slices.DeleteFunc(next.Artifacts, func(old Artifact) bool {
			return slices.ContainsFunc(m.Artifacts, func(n Artifact) bool { return n.Subject == old.Subject })
		})
		next.Artifacts = append(next.Artifacts, m.Artifacts...)
		rev, err := setJSON(ctx, a.made, madeKey(m.Image), next, next.rev)
		if next.rev = rev; !errors.Is(err, errContested) {
			return next, err
		}
	}
}

// claim notes that somebody asked for what an image has already.
func (a *auto) claim(ctx context.Context, r Request) error {
	m, err := a.getMade(ctx, r.Image)
	if err != nil || m.rev == 0 || m.Asked || r.pushed() {
		return err
	}
	_, err = a.noteMade(ctx, madeFor{Image: r.Image, Asked: true})
	return err
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
		m.Gone = time.Time{}
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

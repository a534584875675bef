package service

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// keep deletes the artifacts of pushed images that are not among those of the newest tags, if the rules say so. Images that somebody asked for keep theirs.
func (v *visit) keep(ctx context.Context) error {
	n := v.settings.Rules.Keep
	if n == 0 {
		return nil
	}
	newest, why := newestTags(v.tags, v.listed, n)
	kept := map[digest.Digest]bool{}
	for _, t := range newest {
		known, err := v.addTag(ctx, kept, t)
		if err != nil {
			return err
		}
		if !known {
			why = "the tag " + t.Tag + " was there a moment ago, or is listed and cannot be read"
		}
	}
	if why != "" {
		v.doubt("artifacts of images that are not among the newest stay: " + why)
		return nil
	}
	var leaving []madeFor
	for dgst, m := range v.made {
		if !m.Asked && !kept[dgst] && m.Gone.IsZero() { // what is gone goes another way
			leaving = append(leaving, m)
		}
	}
	if len(leaving) == 0 {
		return nil
	}
	tags, err := v.a.tagsOf(ctx, v.r)
	if err != nil {
		return err
	}
	for name, t := range tags {
		if known := v.tags[name]; known == nil || known.rev != t.rev { // pushed again, to an old image maybe, since the visit began
			return nil
		}
	}
	for some := range slices.Chunk(leaving, leaveAtOnce) {
		if err := v.leaveBehind(ctx, some, kept, fmt.Sprintf("those of the %d newest tags are kept", n)); err != nil {
			return err
		}
	}
	return nil
}

// leaveBehind deletes the artifacts of images that the service has made of itself, but for those of manifests that are kept. If others have made some of an
// image's, that was asked for, and all stay.
func (v *visit) leaveBehind(ctx context.Context, list []madeFor, kept map[digest.Digest]bool, why string) error {
	var own []madeFor
	for _, m := range list {
		other, err := v.ofOthers(ctx, m)
		if err != nil {
			return err
		}
		if other == "" {
			own = append(own, m)
			continue
		}
		v.a.log.Info("artifacts stay although their image is not among the newest: the service has not made all of them", "image", m.Image.String(), "artifact", other)
		m.Asked = true
		if err := v.a.setMade(ctx, &m); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, leaveTime)
	defer cancel()
	d, err := v.leave(ctx, own...)
	if err != nil {
		return err
	}
	for _, m := range d.images {
		if _, err := v.release(ctx, d, m, kept, why); err != nil {
			return err
		}
		delete(v.made, m.Digest)
		if err := removeKey(ctx, v.a.made, madeKey(m.Image), m.rev); err != nil {
			return err
		}
	}
	return nil
}

// ofOthers returns an artifact of an image that the service has not made, "" if there is none.
func (v *visit) ofOthers(ctx context.Context, m madeFor) (digest.Digest, error) {
	own := map[digest.Digest]bool{}
	for _, made := range m.Artifacts {
		own[made.Digest] = !made.Existed
	}
	for _, made := range m.Artifacts {
		if made.Existed {
			return made.Digest, nil
		}
		list, err := v.p.Referrers(ctx, made.Subject)
		if err != nil {
			return "", placeError(err)
		}
		for _, d := range list {
			if d.ArtifactType == artifact.ArtifactType && !own[d.Digest] {
				return d.Digest, nil
			}
		}
	}
	return "", nil
}

// newestTags returns the n newest of the tags whether the registry, which lists those in listed, has them all or not: the newest of all, of which it may lack
// some by mistake, and as many that it lists. If nobody knows them, why says it.
func newestTags(all map[string]*seenTag, listed map[string]bool, n int) (newest []*seenTag, why string) {
	var tags []*seenTag
	there := 0
	for _, t := range all {
		switch {
		case t.State == stateDue && !listed[t.Tag]:
			continue // an event told of it, and it is not there
		case t.State == stateDue:
			return nil, "the tag " + t.Tag + " is still to be looked at"
		case listed[t.Tag]:
			there++
		case !t.Missing.IsZero() && time.Since(t.Missing) > longMissing:
			continue
		}
		tags = append(tags, t)
	}
	if there == 0 {
		return nil, "the registry lists no tag" // a list without any is the registry's mistake, or the images go too, and their artifacts with them
	}
	slices.SortFunc(tags, newestFirst)
	there = 0
	for i, t := range tags {
		if listed[t.Tag] {
			there++
		}
		if i >= n && (there > n || !listed[t.Tag]) {
			continue
		}
		if t.Digest == "" {
			return nil, "the tag " + t.Tag + " was not looked at yet"
		}
		newest = append(newest, t)
	}
	return newest, ""
}

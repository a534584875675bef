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

// keep deletes the artifacts of pushed images that are not among those of the newest tags, if the rules say so. Images that somebody asked for keep theirs.
func (v *visit) keep(ctx context.Context) error {
	n := v.settings.Rules.Keep
	if n == 0 {
		return nil
	}
	v.passed = v.passOver()
	tags, listed := v.there()
	newest, why := newestTags(tags, listed, n)
	kept := map[digest.Digest]bool{}
	for tag := range v.passed {
		if d := v.named[tag]; d != "" { // which is there, if not whole: what is of it stays
			if _, err := v.addManifests(ctx, kept, d); err != nil {
				return err
			}
		}
	}
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
	// Each time it is looked again what tags name: that takes as many requests as the deletions, about.
	for some := range slices.Chunk(leaving, min(max(1, len(v.listed)/10), leaveAtOnce)) {
		doubt, err := v.lookAgain(ctx, kept, true)
		if err == nil && doubt == "" {
			some = slices.DeleteFunc(some, func(m madeFor) bool { return kept[m.Digest] })
			doubt, err = v.leaveBehind(ctx, some, kept, fmt.Sprintf("those of the %d newest tags are kept", n))
		}
		if err != nil {
			return err
		}
		if doubt != "" {
			v.doubt("artifacts of images that are not among the newest stay: " + doubt)
			return nil
		}
	}
	return nil
}

// leaveBehind deletes the artifacts of images that the service has made of itself, but for those of manifests that are kept. If others have made some of an
// image's, that was asked for, and all stay. The doubt is why the rest stays.
func (v *visit) leaveBehind(ctx context.Context, list []madeFor, kept map[digest.Digest]bool, why string) (doubt string, err error) {
	ctx, cancel := context.WithTimeout(ctx, leaveTime)
	defer cancel()
	d, err := v.leave(ctx, list...)
	if err != nil {
		return "", err
	}
	stays := slices.Clone(d.images)
	defer func() { v.stay(ctx, stays...) }()
	for _, m := range d.images {
		if doubt, err = v.lookAgain(ctx, kept, false); doubt != "" || err != nil {
			return doubt, err
		}
		if kept[m.Digest] {
			continue
		}
		other, err := v.ofOthers(ctx, m)
		if err != nil {
			return "", err
		}
		if other != "" {
			v.a.log.Info("artifacts stay although their image is not among the newest: the service has not made all of them", "image", m.Image.String(), "artifact", other)
			m.Asked = true
			if err := v.a.setMade(ctx, &m); err != nil {
				return "", err
			}
			continue
		}
		if _, err := v.release(ctx, d, m, kept, why); err != nil {
			return "", err
		}
		delete(v.made, m.Digest)
		if err := removeKey(ctx, v.a.made, madeKey(m.Image), m.rev); err != nil {
			return "", err
		}
	}
	return "", nil
}

// lookAgain looks again what tags name, right before something is deleted, and adds to kept what a tag names that was pushed since the visit looked: what is pushed
// again is kept, whatever it was. Of whole are the tags that were there then, too, or some of them if there are very many; otherwise there are only new ones. The
// reason why nobody knows is returned.
func (v *visit) lookAgain(ctx context.Context, kept map[digest.Digest]bool, whole bool) (why string, err error) {
	names, err := v.p.Tags(ctx)
	if err != nil {
		return "", placeError(err)
	}
	var ask, known []*seenTag
	for _, name := range names {
		switch t := (&seenTag{Tag: name}); {
		case !IsTag(name):
		case !v.listed[name]:
			ask = append(ask, t)
		case whole:
			known = append(known, t)
		}
	}
	if whole {
		told, err := v.toldSince(ctx)
		if err != nil {
			return "", err
		}
		ask = slices.Concat(ask, told, window(known, visitChecks))
	}
	err = v.each(ctx, ask, func(ctx context.Context, t *seenTag) error {
		d, err := v.p.Resolve(ctx, t.Tag)
		if err != nil && !errors.Is(err, converter.ErrNotFound) {
			return placeError(err)
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		was := v.named[t.Tag]
		if k := v.tags[t.Tag]; was == "" && k != nil {
			was = k.Digest
		}
		switch {
		case err != nil && was == "" && t.State != stateDue && v.passed[t.Tag].IsZero():
			why = "the tag " + t.Tag + " is listed, and cannot be read"
			return nil
		case err != nil || d.Digest == was:
			return nil
		}
		v.listed[t.Tag], v.named[t.Tag] = true, d.Digest
		known, err := v.addManifests(ctx, kept, d.Digest)
		if !known && err == nil {
			why = "what the tag " + t.Tag + " names cannot be read"
		}
		return err
	})
	return why, err
}

// toldSince returns the tags of which an event, or another process, has told since the visit looked at them, and of those that are not listed some: they may not be
// there.
func (v *visit) toldSince(ctx context.Context) (list []*seenTag, err error) {
	tags, err := v.a.tagsOf(ctx, v.r)
	unlisted := 0
	for name, t := range tags {
		if known := v.tags[name]; known != nil && known.rev == t.rev {
			continue
		}
		if !v.listed[name] {
			unlisted++
		}
		if v.listed[name] || unlisted <= visitUnlisted {
			list = append(list, &seenTag{Tag: name, State: stateDue})
		}
	}
	return list, err
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

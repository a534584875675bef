package service

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// scan is what the tags of a repository name, as visits have found out: of very many tags it takes several. It is kept while an image is gone whose manifests may
// be another's.
type scan struct {
	mu      sync.Mutex
	tags    map[string]scanned
	members map[digest.Digest][]digest.Digest // of what tags name, itself among them
}

// scanned is a tag that was asked for.
type scanned struct {
	digest digest.Digest
	at     time.Time
	gone   time.Time // since when it is listed, and cannot be read
}

// tagged returns the images that tags name, with all manifests of those that are indexes: what an image that is gone must leave alone. It is false if nobody
// knows, which the log says: while tags are left to ask for, and as long as what the registry says contradicts itself.
func (v *visit) tagged(ctx context.Context, m *madeFor) (used map[digest.Digest]bool, known bool, err error) {
	if !v.scanned { // once in a visit, whatever it finds out
		if _, err := v.list(ctx); err != nil {
			return nil, false, err
		}
	}
	// Registries keep the manifests of an index that is deleted, without a tag. But a list without any may be a mistake.
	switch {
	case len(v.listed) > 0 && m.Alone.IsZero():
	case len(v.listed) > 0:
		m.Alone = time.Time{}
		if err := v.a.setMade(ctx, m); err != nil {
			return nil, false, err
		}
	case m.Alone.IsZero():
		m.Alone = now()
		fallthrough
	case time.Since(m.Alone) < longMissing:
		v.doubt("the registry lists no tag of the repository: artifacts of deleted images stay until it has said so for a day")
		return nil, false, v.a.setMade(ctx, m)
	}
	if !v.scanned {
		var why string
		if v.used, why, err = v.scan(ctx); err != nil {
			return nil, false, err
		}
		if v.scanned = true; why != "" {
			v.doubt("artifacts of deleted images stay: " + why)
		}
	}
	return v.used, v.used != nil, nil
}

// scan finds out what tags name, those that are listed and those that were. The reason why nobody knows is returned.
func (v *visit) scan(ctx context.Context) (used map[digest.Digest]bool, why string, err error) {
	if !v.settings.Active { // else reconcile does it
		if err := v.noteMissing(ctx, slices.Collect(maps.Keys(v.listed))); err != nil {
			return nil, "", err
		}
	}
	used = map[digest.Digest]bool{}
	asked := 0
	for _, t := range v.tags {
		switch {
		case v.listed[t.Tag] && t.State == stateDue && v.settings.Active:
			return nil, "the tag " + t.Tag + " was pushed, and is not looked at yet", nil
		case !v.listed[t.Tag] && t.State == stateBefore && t.Digest == "" && (t.Missing.IsZero() || time.Since(t.Missing) < longMissing):
			return nil, "the tag " + t.Tag + " was there a moment ago, and was not looked at", nil
		case v.listed[t.Tag], t.Digest == "", !t.Missing.IsZero() && time.Since(t.Missing) > longMissing:
			continue
		}
		if asked++; asked > visitChecks {
			return nil, fmt.Sprintf("more than %d tags are not listed that were there a day ago", visitChecks), nil
		}
		if known, err := v.addTag(ctx, used, t); err != nil {
			return nil, "", err
		} else if !known {
			return nil, "the tag " + t.Tag + " was there a moment ago", nil
		}
	}
	sc := v.a.scanOf(v.r)
	ask := sc.unknown(v)
	left := len(ask) - visitChecks
	if err := v.each(ctx, window(ask, visitChecks), func(ctx context.Context, t *seenTag) error { return v.ask(ctx, sc, t.Tag) }); err != nil {
		return nil, "", err
	}
	sc.mu.Lock()
	defer sc.mu.Unlock()
	for tag := range v.listed {
		s := sc.tags[tag]
		members, ok := sc.members[s.digest]
		switch {
		case ok:
		case left > 0:
			return nil, "it takes several passes to ask what all of its tags name", nil
		case !s.gone.IsZero() && time.Since(s.gone) >= notYet:
			continue
		default:
			return nil, "the tag " + tag + " is listed, and cannot be read", nil
		}
		for _, d := range members {
			used[d] = true
		}
		// What an event told of since.
		if t := v.tags[tag]; t != nil && t.Digest != "" && t.Digest != s.digest {
			if _, err := v.addManifests(ctx, used, t.Digest); err != nil {
				return nil, "", err
			}
		}
	}
	return used, "", nil
}

// unknown returns the listed tags that are to be asked for, after it has taken over what the visit knows, and forgotten those that are not listed.
func (sc *scan) unknown(v *visit) (ask []*seenTag) {
	sc.mu.Lock()
	defer sc.mu.Unlock()
	maps.DeleteFunc(sc.tags, func(tag string, _ scanned) bool { return !v.listed[tag] })
	needed := map[digest.Digest]bool{}
	for tag := range v.listed {
		s := sc.tags[tag]
		if dgst := v.named[tag]; dgst != "" {
			s = scanned{digest: dgst, at: v.began}
			sc.tags[tag] = s
		}
		needed[s.digest] = true
		if _, ok := sc.members[s.digest]; !ok || time.Since(s.at) > longMissing {
			ask = append(ask, &seenTag{Tag: tag})
		}
	}
	maps.DeleteFunc(sc.members, func(d digest.Digest, _ []digest.Digest) bool { return !needed[d] })
	return ask
}

// ask finds out what a tag names, for scan.
func (v *visit) ask(ctx context.Context, sc *scan, tag string) error {
	sc.mu.Lock()
	s := sc.tags[tag]
	sc.mu.Unlock()
	if s.digest == "" || time.Since(s.at) > longMissing {
		d, err := v.p.Resolve(ctx, tag)
		if err != nil && !errors.Is(err, converter.ErrNotFound) {
			return placeError(err)
		}
		s.digest, s.at = d.Digest, now()
	}
	members := map[digest.Digest]bool{}
	known := false
	if s.digest != "" {
		var err error
		if known, err = v.addManifests(ctx, members, s.digest); err != nil {
			return err
		}
	}
	sc.mu.Lock()
	defer sc.mu.Unlock()
	if known {
		s.gone = time.Time{}
		sc.members[s.digest] = slices.Collect(maps.Keys(members))
	} else {
		s.digest = ""
		if s.gone.IsZero() {
			s.gone = now()
		}
	}
	sc.tags[tag] = s
	return nil
}

// scanOf returns what visits know of a repository's tags.
func (a *auto) scanOf(r repository) *scan {
	a.mu.Lock()
	defer a.mu.Unlock()
	sc := a.scans[r]
	if sc == nil {
		sc = &scan{tags: map[string]scanned{}, members: map[digest.Digest][]digest.Digest{}}
		a.scans[r] = sc
	}
	return sc
}

// addTag adds what a tag names, or did when it was there. It is false if nobody knows what that has: the registry says that it is gone, and has not said so for
// long.
func (v *visit) addTag(ctx context.Context, to map[digest.Digest]bool, t *seenTag) (known bool, err error) {
	gone := false
	passed := v.passed[t.Tag]
	if !v.listed[t.Tag] || !passed.IsZero() { // what it had is remembered, and no sign that it is there
		if gone, err = isGone(ctx, v.p, t.Digest); err != nil {
			return false, err
		}
	}
	if !gone {
		return v.addManifests(ctx, to, t.Digest)
	}
	for _, since := range []time.Time{t.Missing, v.made[t.Digest].Gone, passed} {
		known = known || !since.IsZero() && time.Since(since) >= notYet
	}
	return known, nil
}

// addManifests adds an image and, of an index, its manifests. It is false if the image is not there.
func (v *visit) addManifests(ctx context.Context, to map[digest.Digest]bool, dgst digest.Digest) (known bool, err error) {
	image := v.r.image(dgst)
	list, ok := v.a.members.get(image)
	if !ok {
		list, err = converter.Manifests(ctx, v.p, dgst.String())
		if err != nil && !errors.Is(err, converter.ErrNotFound) {
			return false, placeError(err)
		}
		if ok = err == nil; ok {
			v.a.members.put(image, list)
		}
	}
	to[dgst] = true
	for _, d := range list {
		to[d] = true
	}
	return ok, nil
}

// doubt says why nothing is deleted, once a day.
func (v *visit) doubt(why string) {
	key := v.r.String() + " " + why
	if at, ok := v.a.doubts.get(key); ok && time.Since(at) < longMissing {
		return
	}
	v.a.doubts.put(key, time.Now())
	v.a.log.Info(why, "repository", v.r.String())
}

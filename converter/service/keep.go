package service

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// keep deletes the artifacts of pushed images that are not among those of the newest tags, if the rules say so. Images that somebody asked for keep theirs.
func (v *visit) keep(ctx context.Context) error {
	n := v.settings.Rules.Keep
	if n == 0 {
		return nil
	}
	newest, known := newestTags(v.tags, v.listed, n)
	if !known {
		return nil
	}
	kept := map[digest.Digest]bool{}
	for _, t := range newest {
		if err := v.addManifests(ctx, kept, t.Digest); err != nil {
			return err
		}
	}
	for dgst, m := range v.made {
		if m.Asked || kept[dgst] {
			continue
		}
		for _, s := range m.unshared(v.made, kept) {
			if err := v.drop(ctx, m.Image, s, fmt.Sprintf("those of the %d newest tags are kept", n)); err != nil {
				return err
			}
		}
		if err := removeKey(ctx, v.a.made, madeKey(m.Image), m.rev); err != nil {
			return err
		}
		delete(v.made, dgst)
	}
	return nil
}

// newestTags returns the n newest of the tags whether the registry, which lists those in listed, has them all or not: the newest of all, of which it may lack
// some by mistake, and as many that it lists. It is false if nobody knows them.
func newestTags(all map[string]*seenTag, listed map[string]bool, n int) (newest []*seenTag, known bool) {
	var tags []*seenTag
	there := 0
	for _, t := range all {
		switch {
		case t.State == stateDue && !listed[t.Tag]:
			continue // an event told of it, and it is not there
		case t.State == stateDue:
			return nil, false
		case listed[t.Tag]:
			there++
		case !t.Missing.IsZero() && time.Since(t.Missing) > longMissing:
			continue
		}
		tags = append(tags, t)
	}
	if there == 0 {
		return nil, false // a list without any is the registry's mistake, or the images go too, and their artifacts with them
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
			return nil, false // it was not looked at yet
		}
		newest = append(newest, t)
	}
	return newest, true
}

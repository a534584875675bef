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
	var tags []*seenTag
	listed := 0
	for _, t := range v.tags {
		switch {
		case t.State == stateDue && !v.listed[t.Tag]:
			continue // an event told of it, and it is not there
		case t.State == stateDue:
			return nil // nobody knows yet what is the newest
		case t.Missing.IsZero():
			listed++
		case time.Since(t.Missing) > longMissing:
			continue
		}
		tags = append(tags, t)
	}
	if listed == 0 {
		return nil // a list without any is the registry's mistake, or the images go too, and their artifacts with them
	}
	slices.SortFunc(tags, newestFirst)
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

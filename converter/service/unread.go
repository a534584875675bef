package service

import (
	"context"
	"errors"
	"maps"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// resolve asks what a tag names, and notes the answer.
func (v *visit) resolve(ctx context.Context, tag string) (digest.Digest, error) {
	d, err := v.p.Resolve(ctx, tag)
	gone := errors.Is(err, converter.ErrNotFound)
	if err != nil && !gone {
		return "", placeError(err)
	}
	if gone {
		v.unreadable(tag)
		return "", placeError(err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.named[tag] = d.Digest
	return d.Digest, nil
}

// unreadable notes that there is no such tag as one that is listed, or that it names what is no image, or not all of one.
func (v *visit) unreadable(tag string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.a.mu.Lock()
	defer v.a.mu.Unlock()
	unread := v.a.unread[v.r]
	if v.unread[tag] = true; v.listed[tag] && unread[tag].IsZero() {
		if unread == nil {
			unread = map[string]time.Time{}
			v.a.unread[v.r] = unread
		}
		unread[tag] = time.Now()
	}
}

// readable notes the opposite.
func (v *visit) readable(tag string) {
	v.a.mu.Lock()
	defer v.a.mu.Unlock()
	unread := v.a.unread[v.r]
	if delete(unread, tag); len(unread) == 0 {
		delete(v.a.unread, v.r)
	}
}

// passOver returns the listed tags that could not be read twice, now and notYet before, with the time since when. An error of the registry does not count.
func (v *visit) passOver() map[string]time.Time {
	v.a.mu.Lock()
	defer v.a.mu.Unlock()
	passed := maps.Clone(v.a.unread[v.r])
	maps.DeleteFunc(passed, func(tag string, since time.Time) bool { return !v.unread[tag] || time.Since(since) < notYet })
	return passed
}

// absent is for a tag that is due and is not there: not yet, or not any more.
func (v *visit) absent(ctx context.Context, t *seenTag) error {
	if time.Since(t.Pushed) < notYet {
		return nil
	}
	v.mu.Lock()
	t.State = stateDone
	delete(v.tags, t.Tag)
	v.mu.Unlock()
	if t.rev == 0 {
		return nil
	}
	return removeKey(ctx, v.a.seen, v.r.tagKey(t.Tag), t.rev)
}

// unreadFirst returns as many tags as a visit may ask for, those that could not be read first.
func (v *visit) unreadFirst(list []*seenTag) []*seenTag {
	v.a.mu.Lock()
	defer v.a.mu.Unlock()
	var first, rest []*seenTag
	for _, t := range list {
		if v.a.unread[v.r][t.Tag].IsZero() {
			rest = append(rest, t)
		} else {
			first = append(first, t)
		}
	}
	first = append(first, rest...)
	return first[:min(len(first), visitChecks)]
}

// there returns the tags that are known and those that are listed as newestTags wants them: what cannot be read counts as not listed, and as nothing if nobody knows what
// it named, or it is so for long.
func (v *visit) there() (tags map[string]*seenTag, listed map[string]bool) {
	tags, listed = maps.Clone(v.tags), maps.Clone(v.listed)
	for tag, since := range v.passed {
		delete(listed, tag)
		if t := tags[tag]; t != nil && (t.Digest == "" || time.Since(since) > longMissing) {
			delete(tags, tag)
		}
	}
	return tags, listed
}

package service

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// base is what is known of a repository since it became active.
type base struct {
	Registry   string `json:"registry"`
	Repository string `json:"repository"`
	// Since is the bucket's revision at which it became active; 0 is that of this very value. What was noted of a tag before counts no more.
	Since uint64 `json:"since,omitempty"`
	// Before are the tags that were there then, a line each, zstd: they are not new.
	Before []byte `json:"before,omitempty"`
	// Pending: Before is not known yet. Until it is, no tag is new because it is not known.
	Pending bool `json:"pending,omitempty"`
	// Existing: what was noted before counts as not noted: it is to be converted, too.
	Existing bool `json:"existing,omitempty"`

	rev uint64
}

// Bounds on base.Before: as bytes in NATS, which takes a megabyte, and as the names.
const (
	maxBefore      = 900 << 10
	maxBeforeNames = 64 << 20
)

func (b *base) since() uint64 { return cmp.Or(b.Since, b.rev) }

func (b *base) setBefore(tags []string) error {
	b.Before = nil
	if len(tags) == 0 {
		return nil
	}
	w, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return err
	}
	defer w.Close()
	names := []byte(strings.Join(tags, "\n"))
	if b.Before = w.EncodeAll(names, nil); len(b.Before)*4/3 > maxBefore || len(names) > maxBeforeNames {
		return fmt.Errorf("%w: %s/%s has %d tags, which are too many to be told from new ones: delete some, or convert what is there, too", ErrInvalid, b.Registry, b.Repository, len(tags))
	}
	return nil
}

func (b *base) before() ([]string, error) {
	if len(b.Before) == 0 {
		return nil, nil
	}
	r, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxBeforeNames))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	names, err := r.DecodeAll(b.Before, nil)
	if err != nil {
		return nil, fmt.Errorf("tags of %s/%s when it became active: %w", b.Registry, b.Repository, err)
	}
	return strings.Split(string(names), "\n"), nil
}

// States of a tag.
const (
	stateBefore = "before" // it was there when the repository became active, and is not converted
	stateDue    = "due"    // it was pushed, and is to be looked at
	stateDone   = "done"   // it was looked at: an operation was asked for, or is not needed
)

// seenTag is what is known of a tag.
type seenTag struct {
	Tag       string        `json:"tag"`
	State     string        `json:"state"`
	Digest    digest.Digest `json:"digest,omitempty"` // that it named when it was last looked at; "" if it never was
	Pushed    time.Time     `json:"pushed,omitzero"`  // when that was told or found; of what was there before it is the image's creation, or zero
	Was       time.Time     `json:"was,omitzero"`     // of what is due: Pushed, as it was before that was told
	Anew      bool          `json:"anew,omitempty"`   // of what is due: it was there before, and is to be converted although it names what it did
	Created   time.Time     `json:"created,omitzero"` // the image's creation
	Missing   time.Time     `json:"missing,omitzero"` // since when the registry does not list it
	Source    string        `json:"source,omitempty"` // of the event that told it
	By        string        `json:"by,omitempty"`     // who pushed
	Operation string        `json:"operation,omitempty"`
	Tries     int           `json:"tries,omitempty"` // how often the image was asked for again because its operation failed

	rev uint64 // 0 if it is not in the bucket
}

// due makes t one that is to be looked at, because it was pushed at that time, as somebody says.
func (t *seenTag) due(pushed time.Time) {
	if t.State != stateDue {
		t.Was = t.Pushed
	}
	t.State, t.Pushed, t.Missing, t.Tries = stateDue, pushed, time.Time{}, 0
}

// newestFirst orders tags by when they were pushed. What was found at the same time is in the order of its making.
func newestFirst(x, y *seenTag) int {
	return cmp.Or(y.Pushed.Compare(x.Pushed), y.Created.Compare(x.Created), cmp.Compare(y.Tag, x.Tag))
}

func (r repository) tagKey(tag string) string { return r.key() + "." + hashKey(tag) }

// getJSON reads a key into v and returns its revision, 0 if it is not there.
func getJSON(ctx context.Context, kv jetstream.KeyValue, key string, v any) (uint64, error) {
	e, err := kv.Get(ctx, key)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("%w: read %s of %s: %w", ErrUnavailable, key, kv.Bucket(), err)
	}
	if err := json.Unmarshal(e.Value(), v); err != nil {
		return 0, fmt.Errorf("read %s of %s: %w", key, kv.Bucket(), err)
	}
	return e.Revision(), nil
}

// setJSON writes v if the key's revision is still rev, or, with rev 0, if it is not there. Otherwise the error is errContested.
func setJSON(ctx context.Context, kv jetstream.KeyValue, key string, v any, rev uint64) (uint64, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return 0, err
	}
	if rev == 0 {
		rev, err = kv.Create(ctx, key, raw)
	} else {
		rev, err = kv.Update(ctx, key, raw, rev)
	}
	switch {
	case errors.Is(err, jetstream.ErrKeyExists), errors.Is(err, jetstream.ErrKeyRevisionMismatch):
		return 0, errContested
	case err != nil:
		return 0, fmt.Errorf("%w: write %s of %s: %w", ErrUnavailable, key, kv.Bucket(), err)
	}
	return rev, nil
}

// removeKey deletes a key if its revision is still rev. That it is not is no error.
func removeKey(ctx context.Context, kv jetstream.KeyValue, key string, rev uint64) error {
	err := kv.Purge(ctx, key, jetstream.LastRevision(rev), jetstream.PurgeTTL(markerTTL))
	if err != nil && !errors.Is(err, jetstream.ErrKeyExists) && !errors.Is(err, jetstream.ErrKeyRevisionMismatch) {
		return fmt.Errorf("%w: delete %s of %s: %w", ErrUnavailable, key, kv.Bucket(), err)
	}
	return nil
}

// eachKey calls f for each key that fits filter ("*" is one part of a key). A value that cannot be parsed is f's to skip.
func eachKey(ctx context.Context, kv jetstream.KeyValue, filter string, f func(e jetstream.KeyValueEntry) error) error {
	w, err := kv.Watch(ctx, filter, jetstream.IgnoreDeletes())
	if err != nil {
		return fmt.Errorf("%w: list %s of %s: %w", ErrUnavailable, filter, kv.Bucket(), err)
	}
	defer w.Stop()
	for {
		select {
		case e, ok := <-w.Updates():
			if !ok {
				return fmt.Errorf("%w: list %s of %s: interrupted", ErrUnavailable, filter, kv.Bucket())
			}
			if e == nil {
				return nil
			}
			if err := f(e); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (a *auto) getTag(ctx context.Context, r repository, tag string) (seenTag, error) {
	var t seenTag
	rev, err := getJSON(ctx, a.seen, r.tagKey(tag), &t)
	t.Tag, t.rev = tag, rev
	return t, err
}

// putTag writes t whatever is there.
func (a *auto) putTag(ctx context.Context, r repository, t seenTag) error {
	raw, err := json.Marshal(t)
	if err != nil {
		return err
	}
	if _, err := a.seen.Put(ctx, r.tagKey(t.Tag), raw); err != nil {
		return fmt.Errorf("%w: note tag %s of %s: %w", ErrUnavailable, t.Tag, r, err)
	}
	return nil
}

// setTag writes t if it is what it was when it was read; errContested otherwise.
func (a *auto) setTag(ctx context.Context, r repository, t *seenTag) error {
	rev, err := setJSON(ctx, a.seen, r.tagKey(t.Tag), t, t.rev)
	if err == nil {
		t.rev = rev
	}
	return err
}

// tagsOf returns what is known of a repository's tags, by their names.
func (a *auto) tagsOf(ctx context.Context, r repository) (map[string]*seenTag, error) {
	tags := map[string]*seenTag{}
	err := eachKey(ctx, a.seen, r.key()+".*", func(e jetstream.KeyValueEntry) error {
		t := &seenTag{rev: e.Revision()}
		if err := json.Unmarshal(e.Value(), t); err != nil {
			return fmt.Errorf("tag of %s in %s: %w", r, e.Key(), err)
		}
		tags[t.Tag] = t
		return nil
	})
	return tags, err
}

// bases returns what is known of the repositories that are or were active.
func (a *auto) bases(ctx context.Context) (map[repository]base, error) {
	all := map[repository]base{}
	err := eachKey(ctx, a.seen, "*", func(e jetstream.KeyValueEntry) error {
		var b base
		if json.Unmarshal(e.Value(), &b) == nil && b.Repository != "" { // a lease is none
			b.rev = e.Revision()
			all[repository{b.Registry, b.Repository}] = b
		}
		return nil
	})
	return all, err
}

func (a *auto) getBase(ctx context.Context, r repository) (b base, err error) {
	b.rev, err = getJSON(ctx, a.seen, r.key(), &b)
	b.Registry, b.Repository = r.registry, r.name
	return b, err
}

// setBase begins anew with a repository that becomes active: what is there now is not to be converted, or with existing, is. Without existing the
// tags are noted by noteTags. b is what was known before.
func (a *auto) setBase(ctx context.Context, r repository, b base, existing bool) (base, error) {
	for {
		rev := b.rev
		b = base{Registry: r.registry, Repository: r.name, Existing: existing, Pending: !existing}
		var err error
		if b.rev, err = setJSON(ctx, a.seen, r.key(), b, rev); !errors.Is(err, errContested) {
			return b, err
		}
		if b, err = a.getBase(ctx, r); err != nil {
			return b, err
		}
	}
}

// ensureBase returns the base of an active repository. One that has none came into being after the pattern was switched on that makes it active, if all
// repositories that were there then are known; otherwise nobody knows, and what is in it now counts as there before.
func (a *auto) ensureBase(ctx context.Context, r repository, list []storedSettings) (base, error) {
	for {
		b, err := a.getBase(ctx, r)
		if err != nil || b.rev != 0 {
			return b, err
		}
		b.Pending = !countingFor(list, r).Catalogued
		if b.rev, err = setJSON(ctx, a.seen, r.key(), b, 0); !errors.Is(err, errContested) {
			return b, err
		}
	}
}

// noteTags notes which tags are there as having been there before. What they name is not asked for now; reconcile does that, so that a repository of any
// size is switched on with a few requests. What an event told of since b was written is newer than b, and stays so.
// It returns what b is then.
func (a *auto) noteTags(ctx context.Context, r repository, p converter.Place, b base) (base, error) {
	tags, err := p.Tags(ctx)
	if err != nil && !errors.Is(err, converter.ErrNotFound) { // it may come into being with the first push
		return b, placeError(err)
	}
	b.Pending = false
	if err := b.setBefore(tags); err != nil {
		return b, err
	}
	b.Since = b.since()
	rev, err := setJSON(ctx, a.seen, r.key(), b, b.rev)
	if errors.Is(err, errContested) { // another process was faster, or it is switched on anew
		if b, err = a.getBase(ctx, r); err == nil && b.Pending {
			err = unavailable("note the tags of "+r.String(), errContested)
		}
		return b, err
	}
	b.rev = rev
	return b, err
}

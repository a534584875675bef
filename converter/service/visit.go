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
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/plain"
)

// Bounds on what one visit of a repository asks its registry. What is left over is for the next one.
const (
	visitLooks    = 500 // tags that are new, each a HEAD, its manifests and a config
	visitChecks   = 500 // tags that are known, and images with artifacts, each a HEAD
	visitAtOnce   = 4   // requests: what is converted and who looks at the console have their share of the registry's rate
	visitUnlisted = 100 // tags that are due, and that the registry does not list, each a HEAD and a GET
	visitFails    = 3   // errors after which a registry is left alone
)

const (
	notYet      = 10 * time.Minute    // how long a tag that was pushed, or an image, may not be readable: registries are distributed
	longMissing = 24 * time.Hour      // how long a tag must be missing in lists before images lose their artifacts for it
	forget      = 30 * 24 * time.Hour // how long a tag that is gone is remembered: that a list lacks it may be the list's mistake
	oftenTime   = 24 * time.Hour      // in which an image that is found anew is asked for maxTries times more
	maxTries    = 3                   // how often an image whose operation failed is asked for again
	pushTo      = "push to "          // begins Operation.By of what was converted because it was pushed
)

// visit is a look at a repository.
type visit struct {
	a        *auto
	r        repository
	p        converter.Place
	settings storedSettings
	base     base
	began    time.Time
	made     map[digest.Digest]madeFor // read before the tags: what is made for a tag is not in it before the tag is
	tags     map[string]*seenTag

	scanned bool
	passed  map[string]time.Time // by keep, since when they cannot be read

	mu     sync.Mutex               // guards tags, too, while several are looked at
	listed map[string]bool          // tags; nil until they are listed
	named  map[string]digest.Digest // what tags name that were asked for
	unread map[string]bool          // tags that were asked for, and of which the registry says that there is no such
	used   map[digest.Digest]bool   // see tagged: nil if nobody knows, once they were scanned
}

// visit begins a look at a repository. Of an inactive one the tags are not read.
func (a *auto) visit(ctx context.Context, r repository) (*visit, error) {
	v := &visit{a: a, r: r, began: now(), named: map[string]digest.Digest{}, unread: map[string]bool{}}
	list, _, err := a.readSettings(ctx, r.registry)
	if err != nil {
		return nil, err
	}
	if _, v.p, err = a.reach(r.registry, r.name); err != nil {
		return nil, err
	}
	if v.made, err = a.madeIn(ctx, r); err != nil {
		return nil, err
	}
	for dgst, m := range v.made {
		if !m.isLeaving() { // whose process died
			v.stay(ctx, m)
		}
		if m.Gone.After(v.began.Add(notYet)) { // the clock was ahead
			m = v.made[dgst]
			m.Gone = time.Time{}
			v.made[dgst] = m
		}
	}
	if v.settings = countingFor(list, r); !v.settings.Active {
		return v, nil
	}
	if v.base, err = a.ensureBase(ctx, r, list); err != nil {
		return nil, err
	}
	if v.base.Pending {
		if v.base, err = a.noteTags(ctx, r, v.p, v.base); err != nil {
			return nil, err
		}
	}
	if v.tags, err = a.tagsOf(ctx, r); err != nil {
		return nil, err
	}
	before, err := v.base.before()
	for _, name := range before {
		t := v.tags[name]
		if t == nil {
			t = &seenTag{}
			v.tags[name] = t
		}
		if t.rev < v.base.since() {
			*t = seenTag{Tag: name, State: stateBefore, rev: t.rev}
		}
	}
	return v, err
}

// list lists the tags; none of a repository that does not exist.
func (v *visit) list(ctx context.Context) ([]string, error) {
	tags, err := v.p.Tags(ctx)
	if err != nil && !errors.Is(err, converter.ErrNotFound) {
		return nil, placeError(err)
	}
	tags = slices.DeleteFunc(tags, func(name string) bool { return !IsTag(name) }) // what lists other names lists what cannot be asked for
	v.listed = make(map[string]bool, len(tags))
	for _, name := range tags {
		v.listed[name] = true
	}
	v.a.mu.Lock()
	v.a.tagCounts[v.r] = len(tags)
	maps.DeleteFunc(v.a.unread[v.r], func(tag string, _ time.Time) bool { return !v.listed[tag] })
	v.a.mu.Unlock()
	return tags, nil
}

// stale says that a tag was noted before it was asked to convert what is there.
func (v *visit) stale(t *seenTag) bool { return v.base.Existing && t.rev < v.base.since() }

// due looks at the tags that are due, and at those of the listed ones that are new. It says whether something is left.
func (v *visit) due(ctx context.Context, listed []string) (left bool, err error) {
	var work []*seenTag
	for _, name := range listed {
		t := v.tags[name]
		switch {
		case t == nil:
			t = &seenTag{Tag: name}
			t.due(v.began)
		case v.stale(t) && t.State != stateDue:
			t.due(v.began)
			t.Digest = ""
		default:
			continue
		}
		if v.base.Existing {
			t.Pushed = time.Time{} // the image's creation then: nobody knows
		}
		v.tags[name] = t
	}
	for _, t := range v.tags {
		if t.State == stateDue {
			work = append(work, t)
		}
	}
	work, left, err = v.credible(ctx, work)
	if err != nil {
		return true, err
	}
	more, err := v.look(ctx, work)
	return left || more, err
}

// credible bounds what is looked at because an event told of it: of many tags, those that the registry lists, and some others, which it may list later. It
// says whether something is left out.
func (v *visit) credible(ctx context.Context, work []*seenTag) (list []*seenTag, left bool, err error) {
	if len(work) <= visitUnlisted {
		return work, false, nil
	}
	if v.listed == nil {
		if _, err := v.list(ctx); err != nil {
			return nil, true, err
		}
	}
	slices.SortFunc(work, func(x, y *seenTag) int { return newestFirst(y, x) }) // those that waited longest first
	unlisted := 0
	for _, t := range work {
		switch {
		case v.listed[t.Tag]:
		case unlisted < visitUnlisted:
			unlisted++
		case len(v.listed) > 0 && time.Since(t.Pushed) > notYet:
			if err := v.absent(ctx, t); err != nil {
				return nil, true, err
			}
			continue
		default:
			left = true
			continue
		}
		list = append(list, t)
	}
	return list, left, nil
}

// countDue counts the tags that are left to look at: none of an inactive repository.
func (v *visit) countDue() {
	n := 0
	for _, t := range v.tags {
		if t.State == stateDue && v.settings.Active {
			n++
		}
	}
	v.a.mu.Lock()
	defer v.a.mu.Unlock()
	if delete(v.a.deeds.due, v.r); n > 0 {
		v.a.deeds.due[v.r] = n
	}
}

// candidate is a tag that was looked at.
type candidate struct {
	t     *seenTag
	image Image
	desc  *converter.Description // nil if the tag names what it did
}

// look looks at tags, which are due, and asks for what is to be converted, the newest first. It says whether something is left to look at.
func (v *visit) look(ctx context.Context, work []*seenTag) (left bool, err error) {
	slices.SortFunc(work, newestFirst)
	if len(work) > visitLooks {
		work, left = work[:visitLooks], true
	}
	var candidates []candidate
	err = v.each(ctx, work, func(ctx context.Context, t *seenTag) error {
		c, err := v.examine(ctx, t)
		v.mu.Lock()
		defer v.mu.Unlock()
		if c != nil {
			candidates = append(candidates, *c)
		}
		return err
	})
	passed := v.passOver()
	left = left || slices.ContainsFunc(work, func(t *seenTag) bool {
		return t.State == stateDue && passed[t.Tag].IsZero() && !slices.ContainsFunc(candidates, func(c candidate) bool { return c.t == t })
	})
	slices.SortFunc(candidates, func(x, y candidate) int { return newestFirst(x.t, y.t) })
	errs := []error{err}
	for _, c := range candidates {
		again, err := v.decide(ctx, c)
		left = left || again
		errs = append(errs, err)
	}
	return left, errors.Join(errs...)
}

// each calls f for each tag, several at once, until visitFails failed.
func (v *visit) each(ctx context.Context, tags []*seenTag, f func(ctx context.Context, t *seenTag) error) error {
	var mu sync.Mutex
	var errs []error
	var g errgroup.Group
	g.SetLimit(visitAtOnce)
	for _, t := range tags {
		g.Go(func() error {
			mu.Lock()
			stop := len(errs) >= visitFails || ctx.Err() != nil
			mu.Unlock()
			if stop {
				return nil
			}
			if err := f(ctx, t); err != nil {
				mu.Lock()
				errs = append(errs, fmt.Errorf("tag %s: %w", t.Tag, err))
				mu.Unlock()
			}
			return nil
		})
	}
	_ = g.Wait()
	if err := ctx.Err(); err != nil {
		return err
	}
	return errors.Join(errs...)
}

// examine finds out what a tag names. Nil says that it names nothing: t is not due any more, or is to be examined again.
func (v *visit) examine(ctx context.Context, t *seenTag) (*candidate, error) {
	d, err := v.resolve(ctx, t.Tag)
	if errors.Is(err, ErrNotFound) {
		return nil, v.absent(ctx, t)
	}
	if err != nil {
		return nil, err
	}
	c := &candidate{t: t, image: v.r.image(d)}
	if d == t.Digest { // whoever told that it was pushed to, it was not
		t.Pushed = t.Was
		if !t.Anew {
			v.readable(t.Tag)
			return c, nil
		}
	}
	desc, err := v.a.describe(ctx, v.p, c.image)
	switch gone := errors.Is(err, converter.ErrNotFound); {
	case err != nil && !gone && (unreachable(err) || ctx.Err() != nil):
		return nil, placeError(err)
	case err != nil:
		if !gone { // else it is not readable yet, not all of it
			v.doubt("the tag " + t.Tag + " names what cannot be read as an image: " + plain.Cut(err.Error(), maxMessage))
		}
		v.unreadable(t.Tag)
		return nil, nil
	}
	v.readable(t.Tag)
	c.desc = &desc
	if t.Created = desc.Created.UTC(); t.Created.After(v.began) {
		t.Created = v.began
	}
	if t.Pushed.IsZero() {
		t.Pushed = t.Created
	}
	return c, nil
}

// decide asks for the conversion of what a tag names, if the rules want it, and notes that. It says whether the tag is to be looked at again.
func (v *visit) decide(ctx context.Context, c candidate) (again bool, err error) {
	t := c.t
	if c.desc != nil {
		request, wanted := v.request(c)
		if wanted {
			if often, err := v.a.often(ctx, c.t, c.image); often || err != nil {
				if often {
					v.doubt("the tag " + t.Tag + " comes and goes, and is not asked for again before a day is over")
				}
				return true, err
			}
			op, existed, err := v.a.ops.Submit(ctx, request)
			var refused *converter.Error
			switch {
			case err == nil:
				t.Operation = op.ID
				if !existed {
					v.a.done(Deed{Action: "convert", Image: c.image, Target: op.ID, Detail: request.By})
				}
			case errors.Is(err, ErrExists):
				if err := v.a.found(ctx, v.p, c); err != nil {
					return true, err
				}
			case errors.Is(err, ErrNotFound):
				return true, nil // gone, or not readable yet
			case errors.Is(err, ErrInvalid), errors.As(err, &refused):
				v.a.log.Info("pushed, and cannot be converted", "image", c.image.String(), "tag", t.Tag, "error", err)
			default:
				return true, fmt.Errorf("ask for the conversion of %s: %w", c.image, err)
			}
		}
	}
	t.State, t.Digest, t.Missing, t.Was, t.Anew = stateDone, c.image.Digest, time.Time{}, time.Time{}, false
	err = v.a.setTag(ctx, v.r, t)
	if errors.Is(err, errContested) {
		return true, nil // pushed again meanwhile, or another process looked at it, too
	}
	return err != nil, err
}

// often says that an image was asked for again and again because it was found anew, and no event told of a push: a registry whose copies differ may have it
// come and go. Then it is left alone for a while.
func (a *auto) often(ctx context.Context, t *seenTag, i Image) (bool, error) {
	if t.Source != "" {
		return false, nil
	}
	if _, err := a.ops.Last(ctx, i); err != nil {
		if errors.Is(err, ErrNotFound) {
			err = nil
		}
		return false, err
	}
	list, err := a.ops.Operations(ctx, Filter{Registry: i.Registry, Repository: i.Repository, Digest: i.Digest, Limit: maxTries + 1})
	return len(list) > maxTries && time.Since(list[maxTries].Asked) < oftenTime, err
}

// request says what of an image is to be converted; false if nothing is.
func (v *visit) request(c candidate) (Request, bool) {
	rules := v.settings.Rules
	by := pushTo + c.t.Tag
	switch {
	case c.t.Source != "" && c.t.By != "":
		by += " by " + c.t.By + " (" + c.t.Source + ")"
	case c.t.Source != "":
		by += " (" + c.t.Source + ")"
	}
	r := Request{Image: c.image, Tag: c.t.Tag, By: by, pushed: true}
	if c.desc.Subject != "" || rules.Keep > 0 && v.newer(c.t) >= rules.Keep {
		return r, false
	}
	var want []ocispec.Platform
	for _, p := range rules.Platforms {
		if parsed, err := converter.ParsePlatform(p); err == nil { // SetSettings checked it
			want = append(want, parsed)
		}
	}
	all := true
	for _, img := range c.desc.Platforms {
		if img.Platform.OS != "linux" {
			continue
		}
		if len(img.Layers) == 0 || !img.Wanted(want) || img.Size() < rules.MinSize {
			all = false
			continue
		}
		r.Platforms = append(r.Platforms, img.String())
	}
	wanted := len(r.Platforms) > 0
	if all {
		r.Platforms = nil
	}
	return r, wanted
}

// newer is how many tags are newer than t, of those that are known to be there and to be images.
func (v *visit) newer(t *seenTag) (n int) {
	for _, o := range v.tags {
		there := o.State != stateDue && o.Missing.IsZero() || v.named[o.Tag] != ""
		if there && !v.unread[o.Tag] && newestFirst(o, t) < 0 {
			n++
		}
	}
	return n
}

// found notes the artifacts of an image that has all it needs, so that they go when the image does.
func (a *auto) found(ctx context.Context, p converter.Place, c candidate) error {
	known, err := a.getMade(ctx, c.image)
	if err != nil || known.rev != 0 {
		return err
	}
	for _, img := range c.desc.Platforms {
		list, err := p.Referrers(ctx, img.Desc.Digest)
		if err != nil {
			return placeError(err)
		}
		for _, d := range list {
			if d.ArtifactType == artifact.ArtifactType {
				known.Artifacts = append(known.Artifacts, Artifact{Platform: img.String(), Subject: img.Desc.Digest, Digest: d.Digest, Existed: true})
			}
		}
	}
	known.Asked = true // by whoever made them
	_, err = a.noteMade(ctx, known)
	return err
}

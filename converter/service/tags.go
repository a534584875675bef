package service

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// TagNames returns a repository's tags by name, with the digests that are known of them and nothing else: those pushed last first, as far as that is known,
// and then those whose names are last in order, which versions mostly are.
func (a *auto) TagNames(ctx context.Context, registry, repositoryName string) ([]TagInfo, error) {
	r, p, err := a.reach(registry, repositoryName)
	if err != nil {
		return nil, err
	}
	names, err := p.Tags(ctx)
	if err != nil {
		return nil, placeError(err)
	}
	a.mu.Lock()
	a.tagCounts[r] = len(names)
	a.mu.Unlock()
	known, err := a.tagsOf(ctx, r)
	if err != nil {
		return nil, err
	}
	pushed := func(name string) (t seenTag) {
		if k := known[name]; k != nil {
			t = *k
		}
		return t
	}
	slices.SortFunc(names, func(x, y string) int {
		return cmp.Or(pushed(y).Pushed.Compare(pushed(x).Pushed), cmp.Compare(y, x))
	})
	tags := []TagInfo{}
	for _, name := range names {
		tags = append(tags, TagInfo{Name: name, Digest: pushed(name).Digest})
	}
	return tags, nil
}

// FillTags returns the tags with all that there is to know of them, without those that are gone.
func (a *auto) FillTags(ctx context.Context, registry, repositoryName string, tags []TagInfo) ([]TagInfo, error) {
	r, p, err := a.reach(registry, repositoryName)
	if err != nil {
		return nil, err
	}
	tags = slices.Clone(tags)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(viewAtOnce)
	for i := range tags {
		g.Go(func() (err error) {
			tags[i], err = a.lookAtTag(gctx, r, p, tags[i].Name)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, placeError(err)
	}
	return slices.DeleteFunc(tags, func(t TagInfo) bool { return t.Name == "" }), nil
}

// Tags returns a repository's tags, those with the newest images first. In one with very many tags the last of the list are names only.
func (a *auto) Tags(ctx context.Context, registry, repositoryName string) ([]TagInfo, error) {
	names, err := a.TagNames(ctx, registry, repositoryName)
	if err != nil {
		return nil, err
	}
	n := min(len(names), tagDetails)
	tags, err := a.FillTags(ctx, registry, repositoryName, names[:n])
	if err != nil {
		return nil, err
	}
	tags = append(tags, names[n:]...)
	slices.SortStableFunc(tags, func(x, y TagInfo) int { return y.Created.Compare(x.Created) })
	return tags, nil
}

// lookedAt is a tag as it was.
type lookedAt struct {
	TagInfo
	at time.Time
}

// How long it is not asked again what a tag is, whoever looks; and how long asking may take.
const (
	tagTime  = 5 * time.Second
	lookTime = time.Minute
)

// lookAtTag asks what a tag is, once for all who want to know.
func (a *auto) lookAtTag(ctx context.Context, r repository, p converter.Place, name string) (TagInfo, error) {
	key := r.key() + " " + name
	if t, ok := a.tags.get(key); ok && time.Since(t.at) < tagTime {
		return t.TagInfo, nil
	}
	found := a.looking.DoChan(key, func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookTime)
		defer cancel()
		t := TagInfo{Name: name}
		err := a.fillTag(ctx, r, p, &t)
		if err == nil {
			a.tags.put(key, lookedAt{t, time.Now()})
		}
		return t, err
	})
	select {
	case f := <-found:
		return f.Val.(TagInfo), f.Err
	case <-ctx.Done():
		return TagInfo{}, ctx.Err()
	}
}

// fillTag fills in what t names. One that was deleted since it was listed loses its name.
func (a *auto) fillTag(ctx context.Context, r repository, p converter.Place, t *TagInfo) error {
	d, err := p.Resolve(ctx, t.Name)
	if errors.Is(err, converter.ErrNotFound) {
		*t = TagInfo{}
		return nil
	}
	if err != nil {
		return err
	}
	t.Digest, t.MediaType = d.Digest, d.MediaType
	desc, err := a.describe(ctx, p, r.image(d.Digest))
	if err != nil {
		if ctx.Err() != nil {
			return err
		}
		return nil // a manifest that cannot be read is no reason to show none
	}
	t.Created = desc.Created
	t.Streaming, err = streams(ctx, p, desc)
	return err
}

// streams says whether each Linux platform has an artifact.
func streams(ctx context.Context, p converter.Place, desc converter.Description) (bool, error) {
	linux := 0
	for _, img := range desc.Platforms {
		if img.Platform.OS != "linux" {
			continue
		}
		linux++
		list, err := p.Referrers(ctx, img.Desc.Digest)
		if err != nil {
			return false, err
		}
		if !slices.ContainsFunc(list, isStreaming) {
			return false, nil
		}
	}
	return linux > 0, nil
}

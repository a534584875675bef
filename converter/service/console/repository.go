package console

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
)

// tagRow is a row of a repository's tags.
type tagRow struct {
	service.TagInfo
	Path  string
	Badge badge
}

// repositoryBody is what the page of a repository shows.
type repositoryBody struct {
	Registry, Name string
	Row            repositoryRow // its switch
	Tags           rows[tagRow]
	Storage        *service.StorageInfo
	Operations     []operationView // the last few
	PullOnly       bool
}

// patience is how long the page of a repository waits for its storage, which takes a request for each manifest: after that, it has a
// link to a page that waits.
const patience = 700 * time.Millisecond

func (c *Console) repository(w http.ResponseWriter, r *http.Request, at place) error {
	return c.showRepository(w, r, at, patience)
}

// storage is the same page with the storage worked out, however long that takes.
func (c *Console) storage(w http.ResponseWriter, r *http.Request, at place) error {
	return c.showRepository(w, r, at, slow)
}

func (c *Console) showRepository(w http.ResponseWriter, r *http.Request, at place, wait time.Duration) error {
	ctx := r.Context()
	tags, err := c.Service.TagNames(ctx, at.Registry, at.Repository)
	if err != nil {
		return err
	}
	settings, err := c.Service.Settings(ctx, at.Registry, at.Repository)
	if err != nil {
		return err
	}
	info, _ := c.registryInfo(at.Registry)
	body := repositoryBody{Registry: at.Registry, Name: at.Repository, PullOnly: info.PullOnly}
	body.Row = c.settingsRow(r, at.Registry, at.Repository, settings, info.PullOnly)
	body.Row.Tags = len(tags)
	few := len(tags) <= perPage
	body.Tags.pager, tags = pageOf(r, repositoryPath(at.Registry, at.Repository), "tag", tags, func(t service.TagInfo) string { return t.Name })
	if tags, err = c.Service.FillTags(ctx, at.Registry, at.Repository, tags); err != nil {
		return err
	}
	for _, t := range tags {
		body.Tags.Items = append(body.Tags.Items, tagRow{t, imagePath(at.Registry, at.Repository, t.Name), tagBadge(t)})
	}
	if few || wait == slow { // of many tags it takes requests by the hundred, which nobody has asked for
		if body.Storage, err = c.storageWithin(ctx, at, wait); err != nil {
			return err
		}
	}
	ops, err := c.Service.Operations(ctx, service.Filter{Registry: at.Registry, Repository: at.Repository, Limit: 5})
	if err != nil {
		return err
	}
	for _, o := range ops {
		body.Operations = append(body.Operations, c.operationView(r, o))
	}
	return c.show(w, r, "repository", http.StatusOK, page{
		Title: at.Repository, Section: "registries", Body: body,
		Crumbs: []crumb{{"Registries", "/registries"}, {at.Registry, registryPath(at.Registry)}, {at.Repository, ""}},
	})
}

// storageWithin returns what a repository takes, nil if that is not known in time.
func (c *Console) storageWithin(ctx context.Context, at place, wait time.Duration) (*service.StorageInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	s, err := c.Service.Storage(ctx, at.Registry, at.Repository)
	switch {
	case err == nil:
		return &s, nil
	case ctx.Err() != nil, errors.Is(err, service.ErrUnavailable):
		return nil, nil
	}
	return nil, err
}

// tagBadge says whether a tag's image streams.
func tagBadge(t service.TagInfo) badge {
	switch {
	case t.Streaming:
		return badge{"Streaming", "bolt", "good"}
	case t.Digest == "":
		return badge{"Not looked at", "info", "quiet"}
	}
	return badge{"Not streaming", "off", "quiet"}
}

// mayOperations are the operations that who asks may see.
func (c *Console) mayOperations(r *http.Request, f service.Filter) ([]service.Operation, error) {
	id, within := access.From(r.Context()), f.May
	f.May = func(registry, repository string) bool {
		return (within == nil || within(registry, repository)) && id.May(access.Reader, registry, repository)
	}
	return c.Service.Operations(r.Context(), f)
}

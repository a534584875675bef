package client

import (
	"cmp"
	"context"
	"net/http"
	"net/url"
	"strconv"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

// Paths. A registry that is not named is the server's default.

func ofRegistry(registry string, more ...string) []string {
	return append([]string{"v1", "registries", cmp.Or(registry, "_")}, more...)
}

func ofRepository(registry, repository string, more ...string) []string {
	return append(ofRegistry(registry, "repositories", repository), more...)
}

func ofImage(registry, repository, ref string, more ...string) []string {
	return append(ofRepository(registry, repository, "_images", ref), more...)
}

// get reads what is at path.
func get[T any](ctx context.Context, c *Client, path []string, query url.Values) (v T, err error) {
	_, err = c.ask(ctx, request{method: http.MethodGet, path: path, query: query}, &v)
	return v, err
}

// Submit asks for a conversion. existed says that the image has an ongoing operation, which is returned. Request.By is not sent: the
// server knows who asks.
func (c *Client) Submit(ctx context.Context, r service.Request) (op service.Operation, existed bool, err error) {
	body := struct {
		Tag       string   `json:"tag,omitempty"`
		Platforms []string `json:"platforms,omitempty"`
		Force     bool     `json:"force,omitempty"`
	}{r.Tag, r.Platforms, r.Force}
	path := ofImage(r.Image.Registry, r.Image.Repository, r.Image.Digest.String(), "_artifacts")
	status, err := c.ask(ctx, request{method: http.MethodPost, path: path, body: body}, &op)
	return op, status == http.StatusOK, err
}

// Operation returns the operation id.
func (c *Client) Operation(ctx context.Context, id string) (service.Operation, error) {
	return get[service.Operation](ctx, c, []string{"v1", "operations", id}, nil)
}

// Operations lists operations, the newest first. Filter.Registry "" is all registries.
func (c *Client) Operations(ctx context.Context, f service.Filter) ([]service.Operation, error) {
	query := url.Values{}
	for name, value := range map[string]string{"registry": f.Registry, "repository": f.Repository, "digest": f.Digest.String()} {
		if value != "" {
			query.Set(name, value)
		}
	}
	if f.Limit > 0 {
		query.Set("limit", strconv.Itoa(f.Limit))
	}
	for _, s := range f.States {
		query.Add("status", string(s))
	}
	answer, err := get[struct{ Operations []service.Operation }](ctx, c, []string{"v1", "operations"}, query)
	return answer.Operations, err
}

// Last returns the image's last operation.
func (c *Client) Last(ctx context.Context, i service.Image) (service.Operation, error) {
	return get[service.Operation](ctx, c, ofImage(i.Registry, i.Repository, i.Digest.String(), "_operation"), nil)
}

// Cancel cancels the operation id. by is not sent: the server knows who asks.
func (c *Client) Cancel(ctx context.Context, id, by string) (op service.Operation, err error) {
	_, err = c.ask(ctx, request{method: http.MethodPost, path: []string{"v1", "operations", id + ":cancel"}}, &op)
	return op, err
}

// Registries lists the registries that the server looks after.
func (c *Client) Registries(ctx context.Context) ([]service.RegistryInfo, error) {
	answer, err := get[struct{ Registries []service.RegistryInfo }](ctx, c, []string{"v1", "registries"}, nil)
	return answer.Registries, err
}

// Repositories lists the repositories of a registry whose names contain filter.
func (c *Client) Repositories(ctx context.Context, registry, filter string) ([]service.RepositoryInfo, error) {
	query := url.Values{}
	if filter != "" {
		query.Set("filter", filter)
	}
	answer, err := get[struct{ Repositories []service.RepositoryInfo }](ctx, c, ofRegistry(registry, "repositories"), query)
	return answer.Repositories, err
}

// Settings returns those that count for the repository.
func (c *Client) Settings(ctx context.Context, registry, repository string) (service.Settings, error) {
	return get[service.Settings](ctx, c, ofRepository(registry, repository, "_settings"), nil)
}

// AllSettings lists the settings of repositories and patterns of a registry.
func (c *Client) AllSettings(ctx context.Context, registry string) ([]service.Settings, error) {
	answer, err := get[struct{ Settings []service.Settings }](ctx, c, ofRegistry(registry, "settings"), nil)
	return answer.Settings, err
}

// SetSettings sets those of a repository or a pattern. existing converts what was pushed before, too. s.By and s.Changed are not sent.
func (c *Client) SetSettings(ctx context.Context, s service.Settings, existing bool) (set service.Settings, err error) {
	body := struct {
		Active bool          `json:"convertPushedImages"`
		Rules  service.Rules `json:"rules,omitzero"`
	}{s.Active, s.Rules}
	q := request{method: http.MethodPut, path: ofRepository(s.Registry, s.Repository, "_settings"), body: body}
	if existing {
		q.query = url.Values{"existing": {"true"}}
	}
	_, err = c.ask(ctx, q, &set)
	return set, err
}

// ForgetSettings takes the settings of a repository or a pattern away: those of a pattern that matches count again.
func (c *Client) ForgetSettings(ctx context.Context, registry, repository string) error {
	var counts service.Settings
	_, err := c.ask(ctx, request{method: http.MethodDelete, path: ofRepository(registry, repository, "_settings")}, &counts)
	return err
}

// Resolve returns the image that a tag or digest names.
func (c *Client) Resolve(ctx context.Context, registry, repository, ref string) (service.Image, error) {
	return get[service.Image](ctx, c, ofImage(registry, repository, ref, "_digest"), nil)
}

// Tags lists a repository's tags.
func (c *Client) Tags(ctx context.Context, registry, repository string) ([]service.TagInfo, error) {
	answer, err := get[struct{ Tags []service.TagInfo }](ctx, c, ofRepository(registry, repository, "_tags"), nil)
	return answer.Tags, err
}

// Image describes the image that a tag or digest names.
func (c *Client) Image(ctx context.Context, registry, repository, ref string) (service.ImageInfo, error) {
	return get[service.ImageInfo](ctx, c, ofImage(registry, repository, ref), nil)
}

// DeleteArtifacts deletes the image's artifacts and returns them; the image stays. by is not sent: the server knows who asks.
func (c *Client) DeleteArtifacts(ctx context.Context, i service.Image, by string) ([]digest.Digest, error) {
	var answer struct{ Deleted []digest.Digest }
	_, err := c.ask(ctx, request{method: http.MethodDelete, path: ofImage(i.Registry, i.Repository, i.Digest.String(), "_artifacts")}, &answer)
	return answer.Deleted, err
}

// Storage says what a repository's images and artifacts take.
func (c *Client) Storage(ctx context.Context, registry, repository string) (service.StorageInfo, error) {
	return get[service.StorageInfo](ctx, c, ofRepository(registry, repository, "_storage"), nil)
}

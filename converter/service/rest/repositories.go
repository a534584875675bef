package rest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/starts"
)

// Operations that are listed, if nobody says how many, and if somebody says too many.
const (
	defaultOperations = 100
	maxOperations     = 1000
)

// operations lists the newest of those that may be seen.
func (c *call) operations() (any, error) {
	q := c.r.URL.Query()
	f := service.Filter{Registry: q.Get("registry"), Repository: q.Get("repository"), Digest: digest.Digest(q.Get("digest")), Limit: defaultOperations}
	if f.Registry == "_" {
		registry, err := c.unnamed()
		if err != nil {
			return nil, err
		}
		f.Registry = registry
	}
	if f.Digest != "" && f.Digest.Validate() != nil {
		return nil, invalid("digest %q: want one as sha256:...", f.Digest)
	}
	states := []service.State{service.NotStarted, service.Running, service.Succeeded, service.Failed, service.Canceled}
	for _, s := range q["status"] {
		if !slices.Contains(states, service.State(s)) {
			return nil, invalid("status %q: want one of %s", s, strings.Trim(fmt.Sprint(states), "[]"))
		}
		f.States = append(f.States, service.State(s))
	}
	if q.Has("limit") {
		n, err := strconv.Atoi(q.Get("limit"))
		if err != nil || n < 1 || n > maxOperations {
			return nil, invalid("limit %q: want a number from 1 to %d", q.Get("limit"), maxOperations)
		}
		f.Limit = n
	}
	f.May = func(registry, repository string) bool { return c.who.May(access.Reader, registry, repository) }
	found, err := c.Operations(c.r.Context(), f)
	if err != nil {
		return nil, err
	}
	return map[string]any{"operations": list(found)}, nil
}

func (c *call) operation() (any, error) { return c.op, nil }

func (c *call) cancel() (any, error) {
	op, err := c.Cancel(c.r.Context(), c.op.ID, c.who.Name)
	if err != nil {
		return nil, err
	}
	c.accepted(op.ID, "/v1/operations/"+op.ID)
	return op, nil
}

func (c *call) registries() (any, error) {
	found := []service.RegistryInfo{}
	for _, r := range c.Registries() {
		if c.who.MaySome(access.Reader, r.Name) {
			found = append(found, r)
		}
	}
	return map[string]any{"registries": found}, nil
}

func (c *call) repositories() (any, error) {
	found, err := c.Repositories(c.r.Context(), c.registry, c.r.URL.Query().Get("filter"))
	if err != nil {
		return nil, err
	}
	found = slices.DeleteFunc(found, func(r service.RepositoryInfo) bool { return !c.who.May(access.Reader, c.registry, r.Name) })
	return map[string]any{"repositories": list(found)}, nil
}

func (c *call) allSettings() (any, error) {
	found, err := c.AllSettings(c.r.Context(), c.registry)
	if err != nil {
		return nil, err
	}
	found = slices.DeleteFunc(found, func(s service.Settings) bool { return !c.who.May(access.Reader, c.registry, s.Repository) })
	return map[string]any{"settings": list(found)}, nil
}

func (c *call) settings() (any, error) {
	return c.Settings(c.r.Context(), c.registry, c.repository)
}

// change is what settings are set to.
type change struct {
	Active *bool         `json:"convertPushedImages"`
	Rules  service.Rules `json:"rules"`
}

func (c *call) setSettings() (any, error) {
	var q change
	if err := c.body(&q); err != nil {
		return nil, err
	}
	if q.Active == nil {
		return nil, invalid("the body lacks convertPushedImages: want true or false")
	}
	existing := false
	if p := c.r.URL.Query(); p.Has("existing") {
		var err error
		if existing, err = strconv.ParseBool(p.Get("existing")); err != nil {
			return nil, invalid("existing %q: want true or false", p.Get("existing"))
		}
	}
	c.target = fmt.Sprintf("convertPushedImages=%t rules=%+v existing=%t", *q.Active, q.Rules, existing)
	return c.SetSettings(c.r.Context(), service.Settings{Registry: c.registry, Repository: c.repository, Active: *q.Active, Rules: q.Rules, By: c.who.Name}, existing)
}

// forgetSettings answers with the settings that count from then on.
func (c *call) forgetSettings() (any, error) {
	c.target = "none"
	if err := c.ForgetSettings(c.r.Context(), c.registry, c.repository); err != nil {
		return nil, err
	}
	return c.settings()
}

func (c *call) tags() (any, error) {
	found, err := c.Tags(c.r.Context(), c.registry, c.repository)
	if err != nil {
		return nil, err
	}
	return map[string]any{"tags": list(found)}, nil
}

// report takes what a node tells of starts.
func (c *call) report() (any, error) {
	var r starts.Report
	if err := c.body(&r); err != nil {
		return nil, err
	}
	return c.Report(c.r.Context(), c.registry, c.repository, r)
}

func (c *call) storage() (any, error) {
	return c.Storage(c.r.Context(), c.registry, c.repository)
}

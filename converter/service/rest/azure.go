package rest

import (
	"errors"
	"fmt"
	"net/http"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

// azureFormat names a format of artifacts in Azure's bodies. az asks for "overlaybd", Azure's only one; it is taken for ours, because
// az cannot ask for another.
type azureFormat struct {
	Format  string `json:"conversionFormat"`
	Version string `json:"conversionVersion"`
}

func (f azureFormat) check() error {
	switch {
	case f.Format != "" && f.Format != "overlaybd" && f.Format != artifact.Format:
		return invalid("conversionFormat %q: want %s, or overlaybd, which is taken for it", f.Format, artifact.Format)
	case f.Version != "" && f.Version != artifact.Version:
		return invalid("conversionVersion %q: want %s", f.Version, artifact.Version)
	}
	return nil
}

// azureState is what a conversion is answered with.
type azureState struct {
	ID    string        `json:"id,omitempty"`
	State service.State `json:"status"`
}

// azureChange is what a repository's settings are set to.
type azureChange struct {
	azureFormat
	Active *bool `json:"convertPushedImages"`
}

func (c *call) image() service.Image {
	return service.Image{Registry: c.registry, Repository: c.repository, Digest: c.digest}
}

// accepted makes the answer that of an operation which goes on.
func (c *call) accepted(id, location string) {
	c.status = http.StatusAccepted
	c.w.Header().Set("Operation-Id", id)
	c.w.Header().Set("Operation-Location", location)
	c.w.Header().Set("Location", location)
}

func (c *call) azureLocation(id string) string {
	return fmt.Sprintf("/acr/v1/%s/_operations/%s", c.repository, id)
}

func (c *call) azureConvert() (any, error) {
	var f azureFormat
	if err := c.body(&f); err != nil {
		return nil, err
	}
	if err := f.check(); err != nil {
		return nil, err
	}
	op, _, err := c.Submit(c.r.Context(), service.Request{Image: c.image(), By: c.who.Name})
	if errors.Is(err, service.ErrExists) {
		// az has looked for Azure's own artifacts before it asks. As it takes one of those for success, it shall take ours.
		last, _ := c.Last(c.r.Context(), c.image())
		if last.State != service.Succeeded {
			last.ID = ""
		}
		return azureState{last.ID, service.Succeeded}, nil
	}
	if err != nil {
		return nil, err
	}
	c.accepted(op.ID, c.azureLocation(op.ID))
	return azureState{op.ID, op.State}, nil
}

func (c *call) azureLast() (any, error) {
	op, err := c.Last(c.r.Context(), c.image())
	if err != nil {
		return nil, err
	}
	return azureState{op.ID, op.State}, nil
}

func (c *call) azureSettings() (any, error) {
	s, err := c.Settings(c.r.Context(), c.registry, c.repository)
	if err != nil {
		return nil, err
	}
	return s.Azure(""), nil
}

// azureSwitch activates a repository or ends that. The rules that counted for it so far, its own or a pattern's, become its own.
func (c *call) azureSwitch() (any, error) {
	var q azureChange
	if err := c.body(&q); err != nil {
		return nil, err
	}
	if q.Active == nil {
		return nil, invalid("the body lacks convertPushedImages: want true or false")
	}
	if err := q.check(); err != nil {
		return nil, err
	}
	s, err := c.Settings(c.r.Context(), c.registry, c.repository)
	if err != nil {
		return nil, err
	}
	s = service.Settings{Registry: c.registry, Repository: c.repository, Active: *q.Active, Rules: s.Rules, By: c.who.Name}
	c.target = fmt.Sprintf("convertPushedImages=%t", s.Active)
	if s, err = c.SetSettings(c.r.Context(), s, false); err != nil {
		return nil, err
	}
	return s.Azure(service.Succeeded), nil
}

func (c *call) azureOperation() (any, error) { return c.op.Azure(), nil }

func (c *call) azureCancel() (any, error) {
	op, err := c.Cancel(c.r.Context(), c.op.ID, c.who.Name)
	if err != nil {
		return nil, err
	}
	c.accepted(op.ID, c.azureLocation(op.ID))
	return op.Azure(), nil
}

package rest

import (
	"context"
	"net/http"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

// list makes an empty list of what is none, which JSON would have as null.
func list[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

func (c *call) showImage() (any, error) {
	return c.Image(c.r.Context(), c.registry, c.repository, c.reference())
}

func (c *call) resolved() (any, error) {
	return c.Resolve(c.r.Context(), c.registry, c.repository, c.reference())
}

func (c *call) last() (any, error) {
	image, err := c.named()
	if err != nil {
		return nil, err
	}
	return c.Last(c.r.Context(), image)
}

// manifest is a referrer of an index, or of a platform of an image.
type manifest struct {
	service.ReferrerInfo
	Platform string        `json:"platform,omitempty"`
	Subject  digest.Digest `json:"subject"`
}

// artifacts lists what refers to the image, as az acr manifest list-referrers does, and to its platforms.
func (c *call) artifacts() (any, error) {
	i, err := c.Image(c.r.Context(), c.registry, c.repository, c.reference())
	if err != nil {
		return nil, err
	}
	manifests := []manifest{}
	for _, r := range i.Referrers {
		manifests = append(manifests, manifest{r, "", i.Digest})
	}
	for _, p := range i.Platforms {
		for _, r := range p.Referrers {
			manifests = append(manifests, manifest{r, p.Platform, p.Digest})
		}
	}
	kind := c.r.URL.Query().Get("artifactType")
	manifests = slices.DeleteFunc(manifests, func(m manifest) bool { return kind != "" && m.ArtifactType != kind })
	return map[string]any{"manifests": manifests}, nil
}

// conversion asks for one, and may leave all of it out.
type conversion struct {
	Tag       string   `json:"tag"` // that a digest was found by, for people
	Platforms []string `json:"platforms"`
	Force     bool     `json:"force"`
}

func (c *call) convert() (any, error) {
	q := conversion{Tag: c.tag}
	if err := c.body(&q); err != nil {
		return nil, err
	}
	if q.Tag != "" && !service.IsTag(q.Tag) || c.tag != "" && q.Tag != c.tag {
		return nil, invalid("tag %q: want the one that named the image", q.Tag)
	}
	image, err := c.named()
	if err != nil {
		return nil, err
	}
	op, existed, err := c.Submit(c.r.Context(), service.Request{Image: image, Tag: q.Tag, Platforms: q.Platforms, Force: q.Force, By: c.who.Name})
	if err != nil {
		return nil, err
	}
	c.accepted(op.ID, "/v1/operations/"+op.ID)
	if existed {
		c.status = http.StatusOK
	}
	return op, nil
}

// named returns the image of the path.
func (c *call) named() (service.Image, error) {
	if c.digest != "" {
		return c.image(), nil
	}
	return c.Resolve(c.r.Context(), c.registry, c.repository, c.tag)
}

func (c *call) reference() string {
	if c.digest != "" {
		return c.digest.String()
	}
	return c.tag
}

func (c *call) deleteArtifacts() (any, error) {
	image, err := c.named()
	if err != nil {
		return nil, err
	}
	deleted, err := c.DeleteArtifacts(c.r.Context(), image, c.who.Name)
	if err != nil {
		return nil, err
	}
	return map[string]any{"deleted": list(deleted)}, nil
}

// verify reads the image and its artifacts whole, which takes minutes. Who accepts events is sent comments until then, so that no
// proxy takes the silence for the end. The reading ends with the request.
func (c *call) verify() (any, error) {
	image, err := c.named()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(c.r.Context())
	defer cancel()
	var found []converter.Verified
	done := make(chan error, 1)
	go func() {
		select {
		case c.verifying <- struct{}{}:
			defer func() { <-c.verifying }()
			var err error
			found, err = c.Verify(ctx, image)
			done <- err
		case <-ctx.Done():
			done <- ctx.Err()
		}
	}()
	var s *stream
	if accepts(c.r, eventStream) {
		s = c.stream()
		defer s.close()
	}
	for closing, tick := c.config.Closing, s.ticks(); ; {
		select {
		case err := <-done:
			for n := range found {
				found[n].Profiles = list(found[n].Profiles)
			}
			answer := map[string]any{"artifacts": list(found)}
			if s == nil {
				return answer, err
			}
			if err != nil {
				return nil, s.fail(err)
			}
			return nil, s.send("verified", answer)
		case <-tick:
			s.send("", nil)
		case <-closing:
			closing = nil
			cancel()
		}
	}
}

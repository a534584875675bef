package rest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
)

// call is a request on its way. What the path names is checked before a handler sees it.
type call struct {
	*api
	w   http.ResponseWriter
	r   *http.Request
	who *access.Identity

	registry   string
	repository string            // a pattern where the route says so
	digest     digest.Digest     // of an image; "" where it is named by a tag
	tag        string            // that it is named by
	op         service.Operation // of {id}

	admitted bool   // may do this
	status   int    // of the answer, unless that is an error
	streamed bool   // the answer is written
	target   string // in the audit log: an operation's id, or what the path calls an image
}

var operationID = regexp.MustCompile(`^[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$`)

// run checks what is asked against the route and the rights of who asks, and answers.
func (c *call) run(rt *route, vars map[string]string) (any, error) {
	if err := c.names(rt, vars); err != nil {
		return nil, err
	}
	if rt.role != access.None {
		if err := c.authorize(rt, vars["id"]); err != nil {
			return nil, err
		}
	}
	c.admitted = true
	if !strings.HasPrefix(rt.path, "/acr/") {
		for name, values := range c.r.URL.Query() {
			if !slices.Contains(rt.query, name) {
				return nil, invalid("query parameter %q: %s %s has %s", name, rt.method, rt.path, orNone(rt.query))
			}
			if len(values) > 1 && name != "status" {
				return nil, invalid("query parameter %q is given %d times: want one", name, len(values))
			}
		}
	}
	if rt.method != http.MethodGet && !rt.body {
		if err := c.body(&struct{}{}); err != nil {
			return nil, err
		}
	}
	return rt.serve(c)
}

func orNone(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// names reads the variables of the path.
func (c *call) names(rt *route, vars map[string]string) error {
	if id, ok := vars["id"]; ok && !operationID.MatchString(id) {
		return invalid("operation %q: want the UUID that a conversion was answered with", id)
	}
	if ref, ok := vars["digest"]; ok {
		if c.digest = digest.Digest(ref); c.digest.Validate() != nil {
			return invalid("image %q: want a digest, as sha256:...", ref)
		}
		c.target = ref
	}
	if ref, ok := vars["reference"]; ok {
		c.target = ref
		switch c.digest = digest.Digest(ref); {
		case c.digest.Validate() == nil:
		case service.IsTag(ref):
			c.digest, c.tag = "", ref
		default:
			return invalid("image %q: want a tag, or a digest as sha256:...", ref)
		}
	}
	var named bool
	c.repository, named = vars["repository"]
	switch {
	case !named || service.CheckRepository(c.repository) == nil:
	case rt.pattern && service.CheckPattern(c.repository) == nil:
	case rt.pattern:
		return invalid("repository %q: want a name of lower-case letters and digits, as team/app, or a pattern of such, as team/*", c.repository)
	default:
		return invalid("repository %q: want a name of lower-case letters and digits, as team/app", c.repository)
	}
	if c.registry, named = vars["registry"]; !named && c.repository == "" {
		return nil // the request names an operation, or nothing
	}
	return c.nameRegistry(rt.role)
}

// nameRegistry puts a registry's name where the request has none, and refuses what is none that the service looks after.
func (c *call) nameRegistry(role access.Role) error {
	if c.registry == "" || c.registry == "_" {
		registry, err := c.unnamed()
		if err != nil {
			return err
		}
		c.registry = registry
	}
	if !c.known(c.registry) || !c.who.MaySome(access.Reader, c.registry) && !c.who.MaySome(role, c.registry) {
		return notFound("registry %q is not looked after here, or not yours to see: /v1/registries lists those that are", c.registry)
	}
	return nil
}

// unnamed returns the registry of a request that names none.
func (c *call) unnamed() (string, error) {
	all := c.Registries()
	host, _, _ := strings.Cut(c.r.Host, ":") // a registry's name has no port if it is the scheme's; the service listens where it likes
	switch {
	case c.known(c.r.Host):
		return c.r.Host, nil
	case c.known(host):
		return host, nil
	case c.config.Default != "":
		return c.config.Default, nil
	case len(all) == 1:
		return all[0].Name, nil
	}
	return "", notFound("the request names no registry, %q is none, and the server has no default of its %d: name one (/v1/registries lists them)", c.r.Host, len(all))
}

// authorize fetches the operation of the path and holds the rights of who asks against the repository.
func (c *call) authorize(rt *route, id string) error {
	if id != "" {
		unseen := notFound("operation %s is not here, or not yours to see: ended operations are forgotten after a while", id)
		op, err := c.Operation(c.r.Context(), id)
		switch {
		case errors.Is(err, service.ErrNotFound):
			return unseen
		case err != nil:
			return err
		case c.repository == "":
			c.registry, c.repository = op.Registry, op.Repository
		case op.Registry != c.registry || op.Repository != c.repository:
			return unseen
		}
		if !c.who.May(access.Reader, c.registry, c.repository) {
			return unseen
		}
		c.op, c.target = op, id
	}
	switch sees := c.who.May(access.Reader, c.registry, c.repository) || c.who.May(rt.role, c.registry, c.repository); {
	case !sees && !strings.Contains(c.repository, "*"):
		return notFound("repository %s of %s is not here, or not yours to see", c.repository, c.registry)
	case !c.who.May(rt.role, c.registry, c.repository):
		return &problem{http.StatusForbidden, "DENIED", fmt.Sprintf("%s may not do this in %s of %s: it takes the role %s there", c.who.Name, c.repository, c.registry, rt.role), nil}
	}
	return nil
}

// body reads the request's JSON into v. No body at all leaves v as it is.
func (c *call) body(v any) error {
	raw, err := io.ReadAll(http.MaxBytesReader(c.w, c.r.Body, maxBody))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return &problem{http.StatusRequestEntityTooLarge, "INVALID", fmt.Sprintf("the body has more than %d bytes", maxBody), nil}
	case err != nil:
		return invalid("read the body: %v", err)
	case len(raw) == 0:
		return nil
	}
	// A form of another site's page cannot send this type without asking first.
	if kind, _, err := mime.ParseMediaType(c.r.Header.Get("Content-Type")); err != nil || kind != "application/json" {
		return &problem{http.StatusUnsupportedMediaType, "INVALID", fmt.Sprintf("the body is of type %q: want Content-Type: application/json", c.r.Header.Get("Content-Type")), nil}
	}
	d := json.NewDecoder(strings.NewReader(string(raw)))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return invalid("the body: %s", strings.TrimPrefix(err.Error(), "json: "))
	}
	if _, err := d.Token(); err != io.EOF {
		return invalid("the body: something follows its object, at byte %d", d.InputOffset())
	}
	return nil
}

// audit writes what was done, or refused, to the audit log.
func (c *call) audit(rt *route, err error) {
	if rt.action == "" || c.config.Audit == nil || rt.quiet && err == nil {
		return
	}
	e := access.Entry{Action: rt.action, Registry: c.registry, Repository: c.repository, Target: c.target, Outcome: access.OutcomeOK}
	if err != nil {
		p := problemOf(err)
		e.Outcome, e.Detail = access.OutcomeFailed, p.code+": "+p.message
		if !c.admitted && (p.status == http.StatusForbidden || p.status == http.StatusNotFound) {
			e.Outcome = access.OutcomeDenied
		}
	}
	c.config.Audit(c.r.Context(), e)
}

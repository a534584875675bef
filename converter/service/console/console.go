// Package console is the web page of the conversion service: registries and their repositories, images with their layers and referrers,
// operations, and the forms that change them.
//
// The principle: each page is made here, whole, from html/template and one style sheet, and works without a script; the script makes
// progress live and digests easy to copy, and asks for nothing else. What changes something is a form sent with POST, answered by a
// redirect, so that reloading repeats nothing. What somebody may not see does not exist, what somebody may not do is not offered, and
// both are refused when asked for by hand.
//
// What it does not do: it knows no passwords or sessions, and does not look where a form comes from (package access does, whose Browser wraps
// it and shows its Login), and it decides nothing about operations or settings (package service does).
package console

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"html/template"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
)

// Service is what the console needs of *service.Service.
type Service interface {
	Registries() []service.RegistryInfo
	Repositories(ctx context.Context, registry, filter string) ([]service.RepositoryInfo, error)
	Settings(ctx context.Context, registry, repository string) (service.Settings, error)
	AllSettings(ctx context.Context, registry string) ([]service.Settings, error)
	SetSettings(ctx context.Context, s service.Settings, existing bool) (service.Settings, error)
	ForgetSettings(ctx context.Context, registry, repository string) error
	TagNames(ctx context.Context, registry, repository string) ([]service.TagInfo, error)
	FillTags(ctx context.Context, registry, repository string, tags []service.TagInfo) ([]service.TagInfo, error)
	Image(ctx context.Context, registry, repository, ref string) (service.ImageInfo, error)
	Storage(ctx context.Context, registry, repository string) (service.StorageInfo, error)
	DeleteArtifacts(ctx context.Context, image service.Image, by string) ([]digest.Digest, error)
	Submit(ctx context.Context, r service.Request) (op service.Operation, existed bool, err error)
	Operation(ctx context.Context, id string) (service.Operation, error)
	Operations(ctx context.Context, f service.Filter) ([]service.Operation, error)
	Cancel(ctx context.Context, id, by string) (service.Operation, error)
	Watch(ctx context.Context, id string) (<-chan service.Operation, error)
}

// Gate is what the console needs of *access.Gate, whose Browser is around it.
type Gate interface {
	Authenticated() bool // false: nobody signs in, so nobody signs out
	Audit(ctx context.Context, e access.Entry)
}

// Config says what the console is made of.
type Config struct {
	Service Service
	Gate    Gate
	Version string          // of the program, for the foot of each page
	Closing <-chan struct{} // closed when the server shuts down: ends the streams of events; nil never does
	Log     *slog.Logger    // of what failed inside; nil is slog's default
	Now     func() time.Time
}

// slow bounds what a page waits for registries.
const slow = 30 * time.Second

//go:embed templates static
var files embed.FS

// Console is an http.Handler.
type Console struct {
	Config
	pages   map[string]*template.Template
	static  map[string][]byte
	version string // of the static files: a digest
	routes  map[string]map[string]handler
}

// handler answers one request at a place. What it returns becomes an error page, unless it has written.
type handler func(w http.ResponseWriter, r *http.Request, at place) error

// New returns a console. It reads nothing but what is built in.
func New(c Config) (*Console, error) {
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	con := &Console{Config: c, static: map[string][]byte{}, pages: map[string]*template.Template{}}
	if err := con.load(); err != nil {
		return nil, err
	}
	con.routes = map[string]map[string]handler{
		"home":               {"GET": con.home},
		"static":             {"GET": con.file},
		"registry":           {"GET": con.registry},
		"registry/settings":  {"GET": con.settings, "POST": con.setSettings},
		"registry/switch":    {"POST": con.turn},
		"registry/forget":    {"POST": con.forget},
		"repository":         {"GET": con.repository},
		"repository/storage": {"GET": con.storage},
		"image":              {"GET": con.image},
		"image/start":        {"GET": con.start},
		"image/referrers":    {"GET": con.referrers},
		"image/create":       {"POST": con.create},
		"image/delete":       {"GET": con.confirmDelete, "POST": con.delete},
		"operations":         {"GET": con.operations},
		"operation":          {"GET": con.operation},
		"operation/events":   {"GET": con.events},
		"operation/cancel":   {"POST": con.cancel},
	}
	return con, nil
}

// load parses the templates, each page with the layout and the parts that pages share, and reads the static files.
func (c *Console) load() error {
	sum := sha256.New()
	err := fs.WalkDir(files, "static", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := files.ReadFile(name)
		if err != nil {
			return err
		}
		sum.Write(b)
		c.static[strings.TrimPrefix(name, "static/")] = b
		return nil
	})
	if err != nil {
		return err
	}
	c.version = hex.EncodeToString(sum.Sum(nil)[:6])
	shared, err := template.New("").Funcs(c.funcs()).ParseFS(files, "templates/layout.html", "templates/parts.html")
	if err != nil {
		return err
	}
	names, err := fs.Glob(files, "templates/page-*.html")
	if err != nil {
		return err
	}
	for _, name := range names {
		page, err := template.Must(shared.Clone()).ParseFS(files, name)
		if err != nil {
			return err
		}
		c.pages[strings.TrimSuffix(strings.TrimPrefix(name, "templates/page-"), ".html")] = page
	}
	return nil
}

// place is what a path names.
type place struct {
	what       string // a key of Console.routes
	Registry   string
	Repository string
	Ref        string // tag or digest
	ID         string // of an operation, or a file's name
}

// placeOf reads a path. A repository's name has slashes of its own; what belongs to it comes after a segment "-", which cannot be in such a
// name: /registries/HOST/team/app/-/image/v1/referrers.
func placeOf(path string) (place, bool) {
	var segs []string
	for s := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		s, err := url.PathUnescape(s)
		if err != nil {
			return place{}, false
		}
		segs = append(segs, s)
	}
	rest := segs[1:]
	switch segs[0] {
	case "":
		return place{what: "home"}, len(rest) == 0
	case "static":
		return place{what: "static", ID: strings.Join(rest, "/")}, true
	case "operations":
		if len(rest) == 0 {
			return place{what: "operations"}, true
		}
		return place{what: strings.Join(append([]string{"operation"}, rest[1:]...), "/"), ID: rest[0]}, true
	case "registries":
		if len(rest) == 0 {
			return place{what: "home"}, true
		}
		return inRegistry(rest[0], rest[1:])
	}
	return place{}, false
}

func inRegistry(registry string, rest []string) (place, bool) {
	at := place{what: "registry", Registry: registry}
	name, below := rest, []string(nil)
	for i, s := range rest {
		if s == "-" {
			name, below = rest[:i], rest[i+1:]
			break
		}
	}
	if len(name) > 0 {
		at.what, at.Repository = "repository", strings.Join(name, "/")
		if len(below) > 1 && below[0] == "image" {
			at.what, at.Ref, below = "image", below[1], below[2:]
		}
	}
	if len(below) > 0 {
		at.what += "/" + strings.Join(below, "/")
	}
	return at, true
}

// ServeHTTP is http.Handler's.
func (c *Console) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	at, ok := placeOf(r.URL.EscapedPath())
	methods := c.routes[at.what]
	if !ok || methods == nil {
		c.fail(w, r, errNoPage)
		return
	}
	method := r.Method
	if method == http.MethodHead {
		method = http.MethodGet
	}
	h := methods[method]
	if h == nil {
		allowed := "GET, HEAD"
		if methods["GET"] == nil {
			allowed = "POST"
		} else if methods["POST"] != nil {
			allowed += ", POST"
		}
		w.Header().Set("Allow", allowed)
		c.fail(w, r, errMethod)
		return
	}
	if method == http.MethodPost {
		r.Body = http.MaxBytesReader(w, r.Body, 64<<10)
		if err := r.ParseForm(); err != nil {
			c.fail(w, r, errForm)
			return
		}
	}
	if at.what != "operation/events" {
		ctx, cancel := context.WithTimeout(r.Context(), slow)
		defer cancel()
		r = r.WithContext(ctx)
	}
	if err := c.exists(r, at); err != nil {
		c.fail(w, r, err)
		return
	}
	if err := h(w, r, at); err != nil {
		c.fail(w, r, err)
	}
}

// exists says whether the registry and the repository that a path names exist for who asks.
func (c *Console) exists(r *http.Request, at place) error {
	if at.Registry == "" {
		return nil
	}
	if at.Repository != "" && service.CheckRepository(at.Repository) != nil && service.CheckPattern(at.Repository) != nil {
		return service.ErrNotFound // what rights are of must be what is asked for: REPOSITORY:TAG is neither
	}
	id := access.From(r.Context())
	if !id.MaySome(access.Reader, at.Registry) || at.Repository != "" && !id.May(access.Reader, at.Registry, at.Repository) {
		return service.ErrNotFound
	}
	if _, ok := c.registryInfo(at.Registry); !ok {
		return service.ErrNotFound
	}
	return nil
}

func (c *Console) registryInfo(name string) (service.RegistryInfo, bool) {
	for _, info := range c.Service.Registries() {
		if info.Name == name {
			return info, true
		}
	}
	return service.RegistryInfo{}, false
}

// may says whether who asks has the role in the repository that a place names.
func may(r *http.Request, role access.Role, at place) bool {
	return access.From(r.Context()).May(role, at.Registry, at.Repository)
}

// need is errForbidden if who asks has not the role that an action needs, which is noted.
func (c *Console) need(r *http.Request, role access.Role, action string, at place) error {
	if may(r, role, at) {
		return nil
	}
	if r.Method == http.MethodPost {
		c.Gate.Audit(r.Context(), access.Entry{Action: action, Registry: at.Registry, Repository: at.Repository, Target: at.Ref + at.ID, Outcome: access.OutcomeDenied})
	}
	return errForbidden
}

func (c *Console) file(w http.ResponseWriter, r *http.Request, at place) error {
	b, ok := c.static[at.ID]
	if !ok {
		return errNoPage
	}
	kinds := map[string]string{"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}
	w.Header().Set("Content-Type", kinds[at.ID[strings.LastIndexByte(at.ID, '.')+1:]])
	w.Header().Set("Cache-Control", "no-cache")
	if r.URL.Query().Get("v") == c.version {
		w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
	}
	if r.Method != http.MethodHead {
		_, _ = w.Write(b) // who has gone does not want it
	}
	return nil
}

// audit notes what somebody did, and how it ended.
func (c *Console) audit(r *http.Request, action string, at place, target string, err error) {
	e := access.Entry{Action: action, Registry: at.Registry, Repository: at.Repository, Target: target, Outcome: access.OutcomeOK}
	if err != nil {
		e.Outcome, e.Detail = access.OutcomeFailed, err.Error()
	}
	c.Gate.Audit(r.Context(), e)
}

// What is wrong with a request itself.
var (
	errNoPage    = errors.New("no such page")
	errMethod    = errors.New("method not allowed")
	errForm      = errors.New("the form cannot be read")
	errForbidden = errors.New("not allowed")
)

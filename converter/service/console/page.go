package console

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"html/template"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
)

// page is what the layout shows; Body is the page's own.
type page struct {
	Title   string // of the document; the layout adds the product's name
	Heading string // the h1, where it is not the title
	Section string // which link of the navigation is the current one
	Crumbs  []crumb
	Notice  string // what was done
	Alert   string // what was not
	Refresh bool   // reload it without a script, as long as something goes on
	Body    any

	Who     string // "" when nobody is signed in
	SignOut bool
	Version string
	Static  string // version of the static files
}

// crumb is a step of the way to a page; the last one has no path.
type crumb struct{ Text, Path string }

// notices are what a page says after a redirect, by the query parameter "done": a text of our own, never one from the address.
var notices = map[string]string{
	"on":        "Artifact streaming is active: images that are pushed from now on are converted.",
	"existing":  "Artifact streaming is active: images that are pushed from now on are converted, and those pushed before are being queued.",
	"off":       "Artifact streaming is inactive: what is pushed from now on is not converted. Artifacts that exist stay.",
	"forgotten": "The setting is removed: what a pattern says counts now, or nothing.",
	"saved":     "The settings are saved.",
	"created":   "The conversion is queued.",
	"ongoing":   "The image is being converted already: this is its operation.",
	"exists":    "The streaming artifact for this image already exists. Skipping request.",
	"deleted":   "The streaming artifacts of this image are deleted. The image itself is untouched.",
	"none":      "The image had no streaming artifact to delete.",
	"canceling": "Cancellation is requested. The conversion stops within seconds.",
	"ended":     "The operation had ended already.",
}

// done adds to a path the notice that the page shows after a redirect.
func done(path, notice string) string {
	path, fragment, _ := strings.Cut(path, "#")
	sep := "?"
	if strings.Contains(path, "?") {
		sep = "&"
	}
	path += sep + "done=" + notice
	if fragment != "" {
		path += "#" + fragment
	}
	return path
}

// show writes a page. What cannot be drawn is an error, and nothing was written.
func (c *Console) show(w http.ResponseWriter, r *http.Request, name string, status int, p page) error {
	id := access.From(r.Context())
	p.Who, p.SignOut, p.Version, p.Static = id.Name, id.Kind != "" && c.Gate.Authenticated(), c.Version, c.version
	if p.Notice == "" {
		p.Notice = notices[r.URL.Query().Get("done")]
	}
	if p.Heading == "" {
		p.Heading = p.Title
	}
	var b bytes.Buffer
	if err := c.pages[name].ExecuteTemplate(&b, "layout", p); err != nil {
		return fmt.Errorf("page %s: %w", name, err)
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	if r.Method != http.MethodHead {
		_, _ = w.Write(b.Bytes()) // who has gone does not want it
	}
	return nil
}

// Login writes the page on which somebody signs in: access.Gate's Browser calls it.
func (c *Console) Login(w http.ResponseWriter, r *http.Request, l access.Login) {
	p := page{Title: "Sign in", Alert: l.Error, Body: l}
	if l.Error != "" {
		p.Title, p.Heading = "Error: Sign in", "Sign in"
	}
	if err := c.show(w, r, "login", http.StatusOK, p); err != nil {
		c.fail(w, r, err)
	}
}

// problem is what an error page says.
type problem struct {
	Status int
	Title  string
	What   string   // happened
	Do     []string // about it
	Path   string   // where to go on
	Link   string
	ID     string // of the request
}

// problemOf says what an error is for people. Errors from inside are not shown: they may name what is nobody's business.
func problemOf(err error) problem {
	home := problem{Path: "/", Link: "Go to the registries"}
	switch {
	case errors.Is(err, service.ErrNotFound), errors.Is(err, converter.ErrNotFound), errors.Is(err, errNoPage):
		home.Status, home.Title = http.StatusNotFound, "Not found"
		home.What = "There is nothing at this address, or nothing that you may see."
		home.Do = []string{
			"Look at the address: a tag or a repository may have been deleted or renamed.",
			"If you expected to see it, ask an owner for the role reader on its repository.",
		}
	case errors.Is(err, errForbidden):
		home.Status, home.Title = http.StatusForbidden, "Not allowed"
		home.What = "You may see this, and not change it."
		home.Do = []string{
			"Converting needs the role writer on the repository; switching streaming and deleting artifacts the role owner.",
			"Ask whoever runs this service for the role, or sign in as somebody who has it.",
		}
	case errors.Is(err, errMethod):
		home.Status, home.Title = http.StatusMethodNotAllowed, "That does not work from here"
		home.What = "This address takes requests of another kind."
		home.Do = []string{"Go back to the page with the form, and send it again."}
	case errors.Is(err, errForm), errors.Is(err, service.ErrInvalid):
		home.Status, home.Title = http.StatusBadRequest, "The request cannot be meant"
		home.What = err.Error()
		home.Do = []string{"Go back, and look at what was entered."}
	case errors.Is(err, service.ErrUnavailable), errors.Is(err, context.DeadlineExceeded):
		home.Status, home.Title = http.StatusServiceUnavailable, "Not available at the moment"
		home.What = "The queue or the registry does not answer."
		home.Do = []string{
			"Try again in a minute: nothing that was asked for is lost.",
			"If it stays so, whoever runs this service finds the reason at /readyz and in its log.",
		}
	default:
		home.Status, home.Title = http.StatusInternalServerError, "Something went wrong"
		home.What = "The service could not make this page. What was asked for before is not lost."
		home.Do = []string{
			"Try again.",
			"If it stays so, tell whoever runs this service, with the number of the request: its log has the reason.",
		}
	}
	return home
}

// fail writes the page of an error.
func (c *Console) fail(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil && errors.Is(err, context.Canceled) {
		return // who asked has gone
	}
	p := problemOf(err)
	p.ID = access.RequestID(r.Context())
	if p.Status >= 500 {
		c.Log.Error("console", "method", r.Method, "path", r.URL.Path, "request", p.ID, "error", err)
	}
	c.refuse(w, r, p)
}

// Refuse writes the page of what access refuses before the console is asked: a form that another site has sent, a name that is not this
// server's.
func (c *Console) Refuse(w http.ResponseWriter, r *http.Request, status int, why string) {
	c.refuse(w, r, problem{
		Status: status, Title: "Refused", What: why, Path: "/", Link: "Go to the registries", ID: access.RequestID(r.Context()),
		Do: []string{"Open the page anew in this browser, at the address that you were given for it, and do it again there."},
	})
}

func (c *Console) refuse(w http.ResponseWriter, r *http.Request, p problem) {
	if err := c.show(w, r, "error", p.Status, page{Title: p.Title, Body: p}); err != nil {
		c.Log.Error("console", "path", r.URL.Path, "error", err)
		http.Error(w, p.Title, p.Status)
	}
}

// redirect answers a form. The path is one of ours: no address that came with the request.
func redirect(w http.ResponseWriter, r *http.Request, path string) {
	http.Redirect(w, r, path, http.StatusSeeOther)
}

// funcs are what templates call.
func (c *Console) funcs() template.FuncMap {
	return template.FuncMap{
		"size": size, "count": count, "plural": plural, "share": share, "hash": hashOf, "icon": icon, "join": strings.Join,
		"moment":       func(t time.Time) moment { return momentAt(t, c.Now()) },
		"registry":     func(name string) string { return registryPath(name) },
		"repository":   func(registry, name string) string { return repositoryPath(registry, name) },
		"settings":     settingsPath,
		"operationsOf": operationsOf,
		"inc":          func(i int) int { return i + 1 },
	}
}

// icons are drawn on 16 by 16. They stand beside text that says the same, so that no state is told by colour alone.
var icons = map[string]string{
	"check":   `<circle cx="8" cy="8" r="7" fill="currentColor"/><path class="cut" d="M4.6 8.3 7 10.6l4.4-5" fill="none" stroke-width="1.8" stroke-linecap="round" stroke-linejoin="round"/>`,
	"half":    `<circle cx="8" cy="8" r="6.2" fill="none" stroke="currentColor" stroke-width="1.6"/><path d="M8 1.8a6.2 6.2 0 0 1 0 12.4z" fill="currentColor"/>`,
	"off":     `<circle cx="8" cy="8" r="6.2" fill="none" stroke="currentColor" stroke-width="1.6"/>`,
	"clock":   `<circle cx="8" cy="8" r="6.2" fill="none" stroke="currentColor" stroke-width="1.6"/><path d="M8 4.6V8l2.4 1.6" fill="none" stroke="currentColor" stroke-width="1.6" stroke-linecap="round"/>`,
	"running": `<circle cx="8" cy="8" r="6.2" fill="none" stroke="currentColor" stroke-width="1.6" opacity=".3"/><path class="turn" d="M8 1.8A6.2 6.2 0 0 1 14.2 8" fill="none" stroke="currentColor" stroke-width="2" stroke-linecap="round"/>`,
	"fail":    `<path d="M5.3 1h5.4L15 5.3v5.4L10.7 15H5.3L1 10.7V5.3z" fill="currentColor"/><path class="cut" d="M8 4.4v4.2M8 11.3v.2" fill="none" stroke-width="1.9" stroke-linecap="round"/>`,
	"slash":   `<circle cx="8" cy="8" r="6.2" fill="none" stroke="currentColor" stroke-width="1.6"/><path d="m3.8 12.2 8.4-8.4" stroke="currentColor" stroke-width="1.6"/>`,
	"copy":    `<rect x="5.5" y="5.5" width="8" height="8" rx="1.5" fill="none" stroke="currentColor" stroke-width="1.4"/><path d="M10.5 3.3A1.3 1.3 0 0 0 9.2 2.5H4A1.5 1.5 0 0 0 2.5 4v5.2c0 .6.3 1 .8 1.3" fill="none" stroke="currentColor" stroke-width="1.4" stroke-linecap="round"/>`,
	"next":    `<path d="m6 3.5 4.5 4.5L6 12.5" fill="none" stroke="currentColor" stroke-width="1.6" stroke-linecap="round" stroke-linejoin="round"/>`,
	"prev":    `<path d="M10 3.5 5.5 8l4.5 4.5" fill="none" stroke="currentColor" stroke-width="1.6" stroke-linecap="round" stroke-linejoin="round"/>`,
	"search":  `<circle cx="7" cy="7" r="4.5" fill="none" stroke="currentColor" stroke-width="1.5"/><path d="m10.5 10.5 3.2 3.2" stroke="currentColor" stroke-width="1.5" stroke-linecap="round"/>`,
	"bolt":    `<path d="M9.2 1 3 9.2h3.9L6.3 15 13 6.6H8.8z" fill="currentColor"/>`,
	"info":    `<circle cx="8" cy="8" r="6.2" fill="none" stroke="currentColor" stroke-width="1.6"/><path d="M8 7.3v4M8 4.7v.2" stroke="currentColor" stroke-width="1.8" stroke-linecap="round"/>`,
	"layers":  `<path d="m8 1.5 6.5 3.3L8 8.1 1.5 4.8z" fill="currentColor"/><path d="m1.8 8 6.2 3.1L14.2 8M1.8 11.2 8 14.3l6.2-3.1" fill="none" stroke="currentColor" stroke-width="1.4" stroke-linejoin="round"/>`,
}

// icon draws one; the words beside it are its name.
func icon(name string) (template.HTML, error) {
	paths, ok := icons[name]
	if !ok {
		return "", fmt.Errorf("no icon %q", name)
	}
	return template.HTML(`<svg class="icon" viewBox="0 0 16 16" width="16" height="16" aria-hidden="true" focusable="false">` + paths + `</svg>`), nil
}

// badge is a state: in words, with a shape, and a colour.
type badge struct{ Text, Icon, Tone string }

func activeBadge(active bool) badge {
	if active {
		return badge{"Active", "check", "good"}
	}
	return badge{"Inactive", "off", "quiet"}
}

// rows is one page of a list.
type rows[T any] struct {
	pager
	Items []T
}

// pager is where a page is in its list.
type pager struct {
	From, To    int // from 1
	Total       int
	Prev, Next  string // paths, "" for none
	Kind        string // "tag", for people
	Filter      string
	Unfiltered  int // how many there are without the filter
	Placeholder string
}

// perPage is how many rows a page has.
const perPage = 50

// paged finds those of a list whose names have the filter in them, and makes rows of the page of them that the query asks for.
func paged[T, U any](r *http.Request, path, kind string, list []T, name func(T) string, row func(T) U) rows[U] {
	p, list := pageOf(r, path, kind, list, name)
	out := rows[U]{pager: p}
	for _, i := range list {
		out.Items = append(out.Items, row(i))
	}
	return out
}

// pageOf returns the page of a list that the query asks for, of those whose names have the filter in them.
func pageOf[T any](r *http.Request, path, kind string, list []T, name func(T) string) (pager, []T) {
	unfiltered, filter := len(list), filterOf(r)
	list = slices.DeleteFunc(slices.Clone(list), func(i T) bool { return !strings.Contains(name(i), filter) })
	n, _ := strconv.Atoi(r.URL.Query().Get("page"))
	last := max(1, (len(list)+perPage-1)/perPage)
	n = min(max(n, 1), last)
	from, to := (n-1)*perPage, min(n*perPage, len(list))
	out := pager{From: from + 1, To: to, Total: len(list), Kind: kind, Filter: filter, Unfiltered: unfiltered, Placeholder: "Part of a name"}
	if n > 1 {
		out.Prev = listPath(path, filter, n-1)
	}
	if n < last {
		out.Next = listPath(path, filter, n+1)
	}
	return out, list[from:to]
}

func filterOf(r *http.Request) string { return strings.TrimSpace(r.URL.Query().Get("q")) }

// listPath is that of a page of a filtered list.
func listPath(path, filter string, n int) string {
	q := url.Values{}
	if filter != "" {
		q.Set("q", filter)
	}
	if n > 1 {
		q.Set("page", strconv.Itoa(n))
	}
	if len(q) == 0 {
		return path
	}
	return path + "?" + q.Encode()
}

// sortedKeys are those of a map, in order.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

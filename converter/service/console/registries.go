package console

import (
	"context"
	"errors"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
)

// registryRow is a row of the registries.
type registryRow struct {
	service.RegistryInfo
	Active  int // settings that are active: repositories and patterns
	Ongoing int // operations
}

func (c *Console) home(w http.ResponseWriter, r *http.Request, _ place) error {
	id := access.From(r.Context())
	ongoing, err := c.mayOperations(r, service.Filter{States: []service.State{service.Running, service.NotStarted}, Limit: oldest})
	if err != nil {
		return err
	}
	var list []registryRow
	for _, reg := range c.Service.Registries() {
		if !id.MaySome(access.Reader, reg.Name) {
			continue
		}
		row := registryRow{RegistryInfo: reg}
		all, err := c.Service.AllSettings(r.Context(), reg.Name)
		if err != nil {
			return err
		}
		for _, s := range all {
			if s.Active && id.May(access.Reader, reg.Name, s.Repository) {
				row.Active++
			}
		}
		for _, o := range ongoing {
			if o.Registry == reg.Name {
				row.Ongoing++
			}
		}
		list = append(list, row)
	}
	if len(list) == 1 && r.URL.Path == "/" {
		redirect(w, r, registryPath(list[0].Name))
		return nil
	}
	return c.show(w, r, "home", http.StatusOK, page{Title: "Registries", Section: "registries", Body: list})
}

// repositoryRow is a row of a registry's repositories, or of its patterns.
type repositoryRow struct {
	service.Settings        // that count for it
	Name             string // of the repository, or the pattern
	Tags             int
	Inherited        bool // the settings are a pattern's
	MayTurn          bool
	Badge            badge
	ID               string // of the switch
	Page             string // number of the page, to come back to
	Filter           string
}

// registryBody is what the page of a registry shows.
type registryBody struct {
	service.RegistryInfo
	Repositories rows[repositoryRow]
	Patterns     []repositoryRow
	Owns         bool // is owner of something in it, and may add patterns
}

func (c *Console) registry(w http.ResponseWriter, r *http.Request, at place) error {
	id := access.From(r.Context())
	all, err := c.Service.Repositories(r.Context(), at.Registry, "")
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(slices.Clone(all), func(i service.RepositoryInfo) bool { return !id.May(access.Reader, at.Registry, i.Name) })
	body := registryBody{Owns: id.MaySome(access.Owner, at.Registry)}
	body.RegistryInfo, _ = c.registryInfo(at.Registry)
	body.Repositories = paged(r, registryPath(at.Registry), "repository", all, func(i service.RepositoryInfo) string { return i.Name }, func(i service.RepositoryInfo) repositoryRow {
		row := c.settingsRow(r, at.Registry, i.Name, i.Settings, body.PullOnly)
		row.Tags = i.Tags
		return row
	})
	settings, err := c.Service.AllSettings(r.Context(), at.Registry)
	if err != nil {
		return err
	}
	for _, s := range settings {
		if strings.Contains(s.Repository, "*") && id.May(access.Reader, at.Registry, s.Repository) {
			body.Patterns = append(body.Patterns, c.settingsRow(r, at.Registry, s.Repository, s, body.PullOnly))
		}
	}
	return c.show(w, r, "registry", http.StatusOK, page{
		Title: at.Registry, Section: "registries", Crumbs: []crumb{{"Registries", "/registries"}, {at.Registry, ""}}, Body: body,
	})
}

func (c *Console) settingsRow(r *http.Request, registry, name string, s service.Settings, pullOnly bool) repositoryRow {
	s.Registry = registry
	return repositoryRow{
		Settings: s, Name: name, Inherited: s.Repository != "" && s.Repository != name, Badge: activeBadge(s.Active), ID: anchor("switch", name),
		MayTurn: !pullOnly && wrongName(name) == "" && access.From(r.Context()).May(access.Owner, registry, name), Page: r.URL.Query().Get("page"), Filter: filterOf(r),
	}
}

// turn switches streaming of a repository or pattern on or off, and goes back to where the switch is.
func (c *Console) turn(w http.ResponseWriter, r *http.Request, at place) error {
	name := r.PostForm.Get("repository")
	s, err := c.change(r, at, name)
	if err != nil {
		return err
	}
	s.Active = r.PostForm.Get("active") == "true"
	existing := s.Active && r.PostForm.Get("existing") == "true"
	if err := c.save(r, at, s, existing); err != nil {
		return err
	}
	notice := "off"
	if existing {
		notice = "existing"
	} else if s.Active {
		notice = "on"
	}
	if r.PostForm.Get("from") == "repository" {
		redirect(w, r, done(repositoryPath(at.Registry, name), notice))
		return nil
	}
	n, _ := strconv.Atoi(r.PostForm.Get("page"))
	redirect(w, r, done(listPath(registryPath(at.Registry), r.PostForm.Get("q"), n), notice)+"#"+anchor("switch", name))
	return nil
}

// change returns the settings to be changed: those of the name itself, or else what counts for it now, under its name.
func (c *Console) change(r *http.Request, at place, name string) (service.Settings, error) {
	if why := wrongName(name); why != "" {
		return service.Settings{}, errForm
	}
	at.Repository = name
	if err := c.exists(r, at); err != nil {
		return service.Settings{}, err
	}
	if err := c.need(r, access.Owner, "settings", at); err != nil {
		return service.Settings{}, err
	}
	s, err := c.settingsOf(r.Context(), at.Registry, name)
	s.Registry, s.Repository = at.Registry, name
	return s, err
}

// settingsOf returns what counts for a repository, or a pattern's own settings.
func (c *Console) settingsOf(ctx context.Context, registry, name string) (service.Settings, error) {
	if !strings.Contains(name, "*") {
		return c.Service.Settings(ctx, registry, name)
	}
	all, err := c.Service.AllSettings(ctx, registry)
	for _, s := range all {
		if s.Repository == name {
			return s, err
		}
	}
	return service.Settings{}, err
}

func (c *Console) save(r *http.Request, at place, s service.Settings, existing bool) error {
	s.By = access.From(r.Context()).Name
	_, err := c.Service.SetSettings(r.Context(), s, existing)
	at.Repository = s.Repository
	target := "inactive"
	if s.Active {
		target = "active"
	}
	c.audit(r, "settings", at, target, err)
	return err
}

// forget removes the settings of a repository or pattern, so that those of the pattern count that matches else.
func (c *Console) forget(w http.ResponseWriter, r *http.Request, at place) error {
	at.Repository = r.PostForm.Get("repository")
	if err := c.exists(r, at); err != nil {
		return err
	}
	if err := c.need(r, access.Owner, "settings", at); err != nil {
		return err
	}
	err := c.Service.ForgetSettings(r.Context(), at.Registry, at.Repository)
	c.audit(r, "settings", at, "removed", err)
	if err != nil {
		return err
	}
	redirect(w, r, done(registryPath(at.Registry), "forgotten"))
	return nil
}

// settingsBody is the form of settings: what was entered, and what is wrong with it.
type settingsBody struct {
	Registry, Repository, Action string
	New                          bool // the name is asked for
	Pattern                      bool
	Active, Existing             bool
	Platforms, MinSize, Keep     string
	Errors                       map[string]string // by field
	Fields                       []string          // with an error, in order
	Settings                     service.Settings
	Inherited                    bool // the settings are a pattern's
	Own                          bool // they are its own, and may be removed
	Back                         string
}

func (c *Console) settings(w http.ResponseWriter, r *http.Request, at place) error {
	name := r.URL.Query().Get("repository")
	body := settingsBody{Registry: at.Registry, New: name == "", Active: true}
	if name != "" {
		s, err := c.change(r, at, name)
		if err != nil {
			return err
		}
		known, err := c.settingsOf(r.Context(), at.Registry, name)
		if err != nil {
			return err
		}
		body = settingsBody{
			Registry: at.Registry, Repository: name, Active: s.Active, Platforms: strings.Join(s.Rules.Platforms, ", "), Settings: known,
			Inherited: known.Repository != "" && known.Repository != name, Own: known.Repository == name && !known.Changed.IsZero(),
		}
		if s.Rules.MinSize > 0 {
			body.MinSize = exactSize(s.Rules.MinSize)
		}
		if s.Rules.Keep > 0 {
			body.Keep = strconv.Itoa(s.Rules.Keep)
		}
	}
	return c.showSettings(w, r, at, http.StatusOK, body)
}

func (c *Console) showSettings(w http.ResponseWriter, r *http.Request, at place, status int, body settingsBody) error {
	body.Action = settingsPath(at.Registry, "")
	body.Pattern = strings.Contains(body.Repository, "*")
	body.Back = registryPath(at.Registry)
	body.Fields = sortedKeys(body.Errors)
	crumbs := []crumb{{"Registries", "/registries"}, {at.Registry, registryPath(at.Registry)}}
	title := "Settings of " + body.Repository
	switch {
	case body.New:
		title = "Settings for a pattern"
	case !body.Pattern:
		body.Back = repositoryPath(at.Registry, body.Repository)
		crumbs = append(crumbs, crumb{body.Repository, body.Back})
	default:
		crumbs = append(crumbs, crumb{body.Repository, ""})
	}
	p := page{Title: title, Section: "registries", Crumbs: append(crumbs, crumb{"Settings", ""}), Body: body}
	if body.Pattern {
		p.Crumbs = append(crumbs[:2:2], crumb{body.Repository, ""})
	}
	if len(body.Errors) > 0 {
		p.Title = "Error: " + title
		p.Heading = title
	}
	return c.show(w, r, "settings", status, p)
}

func (c *Console) setSettings(w http.ResponseWriter, r *http.Request, at place) error {
	f := r.PostForm
	body := settingsBody{
		Registry: at.Registry, Repository: strings.TrimSpace(f.Get("repository")), New: f.Get("new") == "true", Active: f.Get("active") == "true",
		Existing: f.Get("existing") == "true", Platforms: f.Get("platforms"), MinSize: f.Get("minsize"), Keep: f.Get("keep"), Errors: map[string]string{},
	}
	var rules service.Rules
	rules.Platforms, rules.MinSize, rules.Keep = body.rules()
	if why := wrongName(body.Repository); why != "" {
		body.Errors["repository"] = why
	} else if body.New && !may(r, access.Owner, place{Registry: at.Registry, Repository: body.Repository}) {
		body.Errors["repository"] = "You are no owner of all that this names."
	}
	if len(body.Errors) > 0 {
		return c.showSettings(w, r, at, http.StatusUnprocessableEntity, body)
	}
	s, err := c.change(r, at, body.Repository)
	if err != nil {
		return err
	}
	s.Active, s.Rules = body.Active, rules
	if err := c.save(r, at, s, body.Active && body.Existing); errors.Is(err, service.ErrInvalid) {
		body.Errors["repository"] = err.Error()
		return c.showSettings(w, r, at, http.StatusUnprocessableEntity, body)
	} else if err != nil {
		return err
	}
	if strings.Contains(s.Repository, "*") {
		redirect(w, r, done(registryPath(at.Registry), "saved")+"#"+anchor("switch", s.Repository))
		return nil
	}
	redirect(w, r, done(repositoryPath(at.Registry, s.Repository), "saved"))
	return nil
}

// rules reads the fields of the rules, and notes what is wrong with them.
func (b *settingsBody) rules() (list []string, minSize int64, keep int) {
	for _, p := range strings.FieldsFunc(b.Platforms, func(r rune) bool { return r == ',' || r == ' ' || r == '\n' || r == '\r' || r == '\t' }) {
		if !linuxPlatform.MatchString(p) {
			b.Errors["platforms"] = strconv.Quote(p) + " is no Linux platform: write linux/amd64 or linux/arm64, with commas between several."
			break
		}
		list = append(list, p)
	}
	var err error
	minSize, err = parseSize(b.MinSize)
	if err != nil {
		b.Errors["minsize"] = err.Error() + "."
	}
	if k := strings.TrimSpace(b.Keep); k != "" {
		if keep, err = strconv.Atoi(k); err != nil || keep < 0 {
			b.Errors["keep"] = strconv.Quote(k) + " is no number of tags: write 10, or nothing to keep all."
		}
	}
	return list, minSize, keep
}

// linuxPlatform is one that can be converted.
var linuxPlatform = regexp.MustCompile(`^linux/[a-z0-9]+(/[a-z0-9.]+)?$`)

// wrongName says what is wrong with a repository's name or a pattern.
func wrongName(name string) string {
	switch {
	case name == "":
		return "Write the name of a repository, or a pattern such as team/*."
	case service.CheckRepository(name) != nil && service.CheckPattern(name) != nil:
		return strconv.Quote(name) + " is no repository's name: small letters, digits and . _ - / only, and * for anything."
	}
	return ""
}

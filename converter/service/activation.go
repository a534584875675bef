package service

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// storedSettings are Settings in the bucket.
type storedSettings struct {
	Settings
	// Catalogued, of a pattern: the repositories were listed when it was switched on, and each that it made active has a base since.
	Catalogued bool `json:"catalogued,omitempty"`
}

// Bounds on the settings of a registry, which are one value in NATS, and which owners of a part of it share.
const (
	maxSettings   = 2000
	maxSettingsOf = 500       // that one identity has set
	maxSettingsIn = 900 << 10 // bytes
	maxPlatforms  = 64        // of a rule
)

// beginAtOnce is how many repositories are prepared at once, each by a write to NATS.
const beginAtOnce = 64

func (a *auto) readSettings(ctx context.Context, registry string) ([]storedSettings, uint64, error) {
	if _, ok := a.registries[registry]; !ok {
		return nil, 0, fmt.Errorf("%w: registry %q is not one of this service's: %s", ErrNotFound, registry, strings.Join(a.names, ", "))
	}
	var list []storedSettings
	rev, err := getJSON(ctx, a.settings, hashKey(registry), &list)
	return list, rev, err
}

// countingFor returns the settings that count for a repository: those of its name, or of the longest pattern. Without any it is inactive.
func countingFor(list []storedSettings, r repository) storedSettings {
	best := storedSettings{Settings: Settings{Registry: r.registry, Repository: r.name}}
	found := ""
	for _, s := range list {
		switch {
		case s.Repository == r.name:
			return s
		case !Match(s.Repository, r.name):
		case found == "" || len(s.Repository) > len(found) || len(s.Repository) == len(found) && s.Repository < found:
			best, found = s, s.Repository
		}
	}
	return best
}

// Settings returns the settings that count for a repository; of none they are inactive ones of its name.
func (a *auto) Settings(ctx context.Context, registry, repositoryName string) (Settings, error) {
	list, _, err := a.readSettings(ctx, registry)
	if err != nil {
		return Settings{}, err
	}
	if isPattern(repositoryName) {
		i := slices.IndexFunc(list, func(s storedSettings) bool { return s.Repository == repositoryName })
		if i < 0 {
			return Settings{Registry: registry, Repository: repositoryName}, nil
		}
		return list[i].Settings, nil
	}
	if err := CheckRepository(repositoryName); err != nil {
		return Settings{}, err
	}
	return countingFor(list, repository{registry, repositoryName}).Settings, nil
}

// AllSettings returns what SetSettings was told of a registry's repositories and patterns, sorted by those; registry "" is all.
func (a *auto) AllSettings(ctx context.Context, registry string) ([]Settings, error) {
	names := a.names
	if registry != "" {
		names = []string{registry}
	}
	all := []Settings{}
	for _, name := range names {
		list, _, err := a.readSettings(ctx, name)
		if err != nil {
			return nil, err
		}
		for _, s := range list {
			all = append(all, s.Settings)
		}
	}
	return all, nil
}

func isPattern(s string) bool { return strings.Contains(s, "*") }

func (a *auto) checkSettings(s Settings) error {
	reg, ok := a.registries[s.Registry]
	switch {
	case !ok:
		return fmt.Errorf("%w: registry %q is not one of this service's: %s", ErrNotFound, s.Registry, strings.Join(a.names, ", "))
	case s.Active && reg.PullOnly:
		return fmt.Errorf("%w: %s is only pulled from: nothing can be attached to its images", ErrInvalid, s.Registry)
	case len(s.Rules.Platforms) > maxPlatforms:
		return fmt.Errorf("%w: rules: %d platforms, and %d may be named", ErrInvalid, len(s.Rules.Platforms), maxPlatforms)
	case s.Rules.MinSize < 0 || s.Rules.Keep < 0:
		return fmt.Errorf("%w: rules: minimum size %d, keep %d", ErrInvalid, s.Rules.MinSize, s.Rules.Keep)
	}
	for _, p := range s.Rules.Platforms {
		if _, err := converter.ParsePlatform(p); err != nil {
			return fmt.Errorf("%w: rules: %w", ErrInvalid, err)
		}
	}
	if isPattern(s.Repository) {
		return CheckPattern(s.Repository)
	}
	return CheckRepository(s.Repository)
}

// SetSettings sets the settings of a name or pattern. What becomes active by it converts what is pushed from now on, and with existing what is there, too
// (also in what was active before). Turning it off keeps the artifacts. When the registry cannot be asked which tags it has now, nothing is set.
func (a *auto) SetSettings(ctx context.Context, s Settings, existing bool) (Settings, error) {
	if err := a.checkSettings(s); err != nil {
		return s, err
	}
	s.Changed = time.Now().UTC()
	return s, a.change(ctx, s.Registry, s.Repository, existing, func(after []storedSettings, i int, found bool) ([]storedSettings, error) {
		next := storedSettings{Settings: s}
		if found {
			next.Catalogued = after[i].Catalogued && after[i].Active
			after[i] = next
			return after, nil
		}
		own := 1
		for _, other := range after {
			if other.By == s.By {
				own++
			}
		}
		if len(after) >= maxSettings || own > maxSettingsOf {
			return nil, fmt.Errorf("%w: %s has settings of %d repositories, %d of them by %q: use a pattern", ErrInvalid, s.Registry, len(after), own-1, s.By)
		}
		return slices.Insert(after, i, next), nil
	})
}

// ForgetSettings takes the settings of a name or pattern away, so that those of the pattern count that matches else. That there are none is ErrNotFound.
func (a *auto) ForgetSettings(ctx context.Context, registry, repositoryName string) error {
	return a.change(ctx, registry, repositoryName, false, func(after []storedSettings, i int, found bool) ([]storedSettings, error) {
		if !found {
			return nil, fmt.Errorf("%w: no settings of %q", ErrNotFound, repositoryName)
		}
		return slices.Delete(after, i, i+1), nil
	})
}

// change changes the settings of a name or pattern, which are at index i, or are not found and belong there, and prepares what becomes active by that.
func (a *auto) change(ctx context.Context, registry, name string, existing bool, edit func(after []storedSettings, i int, found bool) ([]storedSettings, error)) error {
	for {
		before, rev, err := a.readSettings(ctx, registry)
		if err != nil {
			return err
		}
		at := func(list []storedSettings) (int, bool) {
			return slices.BinarySearchFunc(list, name, func(s storedSettings, name string) int { return cmp.Compare(s.Repository, name) })
		}
		i, found := at(before)
		after, err := edit(slices.Clone(before), i, found)
		if err != nil {
			return err
		}
		var started []repository
		if raw, err := json.Marshal(after); err != nil || len(raw) > maxSettingsIn {
			return cmp.Or(err, fmt.Errorf("%w: the settings of %s take %d bytes, and there is room for %d: use a pattern", ErrInvalid, registry, len(raw), maxSettingsIn))
		}
		i, found = at(after)
		if !found || after[i].Active { // turning it off asks the registry nothing
			var catalogued bool
			if started, catalogued, err = a.begin(ctx, registry, name, before, after, existing); err != nil {
				return err
			}
			if found && catalogued {
				after[i].Catalogued = true
			}
		}
		_, err = setJSON(ctx, a.settings, hashKey(registry), after, rev)
		if errors.Is(err, errContested) {
			continue
		}
		for _, r := range started {
			a.hint(r, hint{list: true})
		}
		return err
	}
}

// begin prepares the repositories that become active when the settings of a name or pattern change. It says whether all of the registry's are known.
func (a *auto) begin(ctx context.Context, registry, name string, before, after []storedSettings, existing bool) (started []repository, catalogued bool, err error) {
	candidates := []repository{{registry, name}}
	if isPattern(name) {
		if candidates, catalogued, err = a.known(ctx, registry, after); err != nil {
			return nil, false, err
		}
	}
	bases, err := a.bases(ctx)
	if err != nil {
		return nil, false, err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(beginAtOnce)
	for _, r := range candidates {
		if !Match(name, r.name) || !countingFor(after, r).Active || countingFor(before, r).Active && !existing {
			continue
		}
		started = append(started, r)
		b := bases[r]
		if isPattern(name) && b.rev != 0 && b.Existing == existing && b.Pending == !existing {
			continue // a try before this one came as far: of very many repositories, each takes some with it
		}
		g.Go(func() error {
			b, err := a.setBase(gctx, r, b, existing)
			// What a pattern makes active may be many: their tags are noted right after.
			if err != nil || existing || isPattern(name) {
				return err
			}
			_, p, err := a.reach(registry, name)
			if err == nil {
				_, err = a.noteTags(gctx, r, p, b)
			}
			return err
		})
	}
	return started, catalogued, g.Wait()
}

// known returns the repositories of a registry that are known: those that it lists, those that settings name, and those that were ever active. It says
// whether the registry lists them. With an error those are returned that are known without it.
func (a *auto) known(ctx context.Context, registry string, list []storedSettings) (repositories []repository, catalogued bool, err error) {
	add := func(name string) { repositories = append(repositories, repository{registry, name}) }
	for _, s := range list {
		if !isPattern(s.Repository) {
			add(s.Repository)
		}
	}
	bases, err := a.bases(ctx)
	if err != nil {
		return nil, false, err
	}
	for r := range bases {
		if r.registry == registry {
			add(r.name)
		}
	}
	names, err := a.catalog(ctx, registry)
	for _, name := range names {
		add(name)
	}
	if catalogued = err == nil; errors.Is(err, converter.ErrNoCatalog) {
		err = nil
	}
	slices.SortFunc(repositories, func(x, y repository) int { return cmp.Compare(x.name, y.name) })
	return slices.Compact(repositories), catalogued, err
}

// catalog lists the repositories of a registry; converter.ErrNoCatalog if it does not, which Registries then says.
func (a *auto) catalog(ctx context.Context, registry string) ([]string, error) {
	list := a.registries[registry].Catalog
	if list == nil {
		return nil, converter.ErrNoCatalog
	}
	names, err := list(ctx)
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case err == nil:
		delete(a.noCatalog, registry)
	case errors.Is(err, converter.ErrNoCatalog):
		a.noCatalog[registry] = err.Error()
	default:
		return nil, placeError(err)
	}
	// What lists other names than a repository may have lists what cannot be asked for.
	return slices.DeleteFunc(names, func(name string) bool { return CheckRepository(name) != nil }), err
}

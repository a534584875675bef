package credentials

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

const (
	pluginTimeout = time.Minute // kubelet's
	// others is how long plugins that have answered wait for those that have not.
	others = patience / 2

	// doubtful is how old an answer must be to be asked for anew because a registry refuses it.
	doubtful = 30 * time.Second

	protocolGroup = "credentialprovider.kubelet.k8s.io/"
	configGroup   = "kubelet.config.k8s.io/"
)

// apiVersions are those that kubelet accepts, of the configuration and of the protocol.
var apiVersions = []string{"v1", "v1beta1", "v1alpha1"}

// Plugins runs kubelet's credential provider plugins: ECR's, ACR's and GCR's need no secret on the node. The configuration is kubelet's own
// (--image-credential-provider-config, a file or a directory), and so is the protocol: which images a plugin is asked for, its arguments and environment, how long
// which answers are kept. It is read again when it changes.
//
// A plugin that is given service account tokens (tokenAttributes) is run only if it does without: only kubelet can ask for a pod's token. Where
// requireServiceAccount is true, the credentials come through the CRI proxy.
type Plugins struct {
	config, bin string
	timeout     time.Duration
	calls       *calls

	mu        sync.Mutex
	stamp     string // of the configuration
	providers []*provider
}

// NewPlugins returns a source of the plugins in bin (--image-credential-provider-bin-dir). Nothing is read before the first Lookup.
func NewPlugins(config, bin string) *Plugins {
	return &Plugins{config: config, bin: bin, timeout: pluginTimeout, calls: newCalls()}
}

// Close kills the plugins that are running.
func (s *Plugins) Close() error {
	s.calls.close()
	return nil
}

// Name implements Source.
func (s *Plugins) Name() string { return "credential provider plugin" }

// Lookup implements Source. All plugins that match are asked at once, and those that have answered do not wait long for those that have not.
func (s *Plugins) Lookup(ctx context.Context, p registryclient.Place) ([]Login, error) {
	providers, err := s.load()
	errs := []error{err}
	type answer struct {
		i      int
		logins []Login
		err    error
	}
	answers := make(chan answer, len(providers)*len(p.Names))
	logins := make([][]Login, len(providers)*len(p.Names)) // in order
	asked := 0
	for n, image := range p.Names {
		for k, pr := range providers {
			if !slices.ContainsFunc(pr.MatchImages, func(m string) bool { return matches(m, string(image)) }) {
				continue
			}
			asked++
			go func() {
				l, err := pr.lookup(ctx, s, string(image), p.Refused)
				answers <- answer{n*len(providers) + k, l, err}
			}()
		}
	}
	found := false
	late := time.NewTimer(others)
	defer late.Stop()
	for timer := late.C; asked > 0; {
		select {
		case a := <-answers:
			asked--
			logins[a.i], found = a.logins, found || len(a.logins) > 0
			errs = append(errs, a.err)
			if found && timer == nil {
				asked = 0
			}
		case <-timer:
			timer = nil
			if found {
				asked = 0
			}
		}
	}
	return slices.Concat(logins...), errors.Join(errs...)
}

// load returns the providers, read again if the configuration has changed. If that is wrong those before stay, and there is an error as well.
func (s *Plugins) load() ([]*provider, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	files, stamp, err := configFiles(s.config)
	if err != nil {
		return s.providers, err
	}
	if stamp == s.stamp {
		return s.providers, nil
	}
	var list []*provider
	for _, f := range files {
		of, err := readProviders(f)
		if err != nil {
			return s.providers, fmt.Errorf("%s: %w", f, err)
		}
		list = append(list, of...)
	}
	s.providers, s.stamp = list, stamp
	return list, nil
}

// configFiles returns the files of a configuration in order, and what changes when they do.
func configFiles(config string) (files []string, stamp string, err error) {
	fi, err := os.Stat(config)
	if err != nil {
		return nil, "", err
	}
	files = []string{config}
	if fi.IsDir() {
		entries, err := os.ReadDir(config) // sorted
		if err != nil {
			return nil, "", err
		}
		files = nil
		for _, e := range entries {
			if slices.Contains([]string{".json", ".yaml", ".yml"}, filepath.Ext(e.Name())) && !e.IsDir() {
				files = append(files, filepath.Join(config, e.Name()))
			}
		}
	}
	var b strings.Builder
	for _, f := range files {
		fi, err := os.Stat(f)
		if err != nil {
			return nil, "", err
		}
		fmt.Fprintf(&b, "%s %d %d\n", f, fi.Size(), fi.ModTime().UnixNano())
	}
	return files, b.String(), nil
}

// duration is written as in "12h".
type duration time.Duration

func (d *duration) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	v, err := time.ParseDuration(s)
	*d = duration(v)
	return err
}

// provider is an entry of a CredentialProviderConfig, and what its plugin has answered.
type provider struct {
	Name                 string
	MatchImages          []string
	DefaultCacheDuration *duration
	APIVersion           string
	Args                 []string
	Env                  []struct{ Name, Value string }
	TokenAttributes      *struct{ RequireServiceAccount bool }

	mu    sync.Mutex
	cache map[string]cached // by "image/", "registry/" or "global/" and what is behind the slash
}

type cached struct {
	auths    auths
	at, till time.Time
}

func readProviders(file string) ([]*provider, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var c struct {
		APIVersion, Kind string
		Providers        []*provider
	}
	if err := yaml.Unmarshal(b, &c); err != nil {
		return nil, err
	}
	if !isVersion(c.APIVersion, configGroup) || c.Kind != "CredentialProviderConfig" {
		return nil, fmt.Errorf("want a CredentialProviderConfig of %sv1, not %q of %q", configGroup, c.Kind, c.APIVersion)
	}
	for i, p := range c.Providers {
		switch {
		case p == nil || p.Name == "" || p.Name == "." || p.Name == ".." || strings.ContainsAny(p.Name, "/ "):
			return nil, fmt.Errorf("provider %d: name is not that of a file in the plugins' directory", i)
		case len(p.MatchImages) == 0:
			return nil, fmt.Errorf("provider %s: no matchImages", p.Name)
		case p.DefaultCacheDuration == nil || *p.DefaultCacheDuration < 0:
			return nil, fmt.Errorf("provider %s: want a defaultCacheDuration, as in \"12h\"", p.Name)
		case !isVersion(p.APIVersion, protocolGroup):
			return nil, fmt.Errorf("provider %s: apiVersion %q is none of %s%s", p.Name, p.APIVersion, protocolGroup, strings.Join(apiVersions, ", "))
		}
	}
	return c.Providers, nil
}

func isVersion(s, group string) bool {
	v, ok := strings.CutPrefix(s, group)
	return ok && slices.Contains(apiVersions, v)
}

// lookup returns what the plugin has for image, from its cache or by running it. Other than kubelet's, the cache is passed over once a registry has refused what is in it.
func (p *provider) lookup(ctx context.Context, s *Plugins, image string, refused []registryclient.Credential) ([]Login, error) {
	if p.TokenAttributes != nil && p.TokenAttributes.RequireServiceAccount {
		return nil, fmt.Errorf("%s wants a token of the pod's service account, which only kubelet can get: pull through the CRI proxy (`cri_proxy`) for its credentials", p.Name)
	}
	if a, ok := p.cached(image, refused); ok {
		return a.lookup(registryclient.Repository(image))
	}
	a, err := s.calls.once(ctx, fmt.Sprintf("%p %s", p, image), func(ctx context.Context) (any, error) {
		return p.ask(ctx, s, image)
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Name, err)
	}
	return a.(auths).lookup(registryclient.Repository(image))
}

// keys are where an answer for image may be kept, in the order in which kubelet looks.
func keys(image string) map[string]string {
	registry, _, _ := strings.Cut(image, "/")
	return map[string]string{"Image": "image/" + image, "Registry": "registry/" + registry, "Global": "global/"}
}

func (p *provider) cached(image string, refused []registryclient.Credential) (auths, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	of, now := keys(image), time.Now()
	for _, k := range []string{"Image", "Registry", "Global"} {
		c, ok := p.cache[of[k]]
		if !ok || !now.Before(c.till) {
			continue
		}
		wrong := func(r registryclient.Credential) bool {
			list, _ := c.auths.lookup(registryclient.Repository(image)) // plugins' have no errors
			return slices.Contains(list, Login{r.User, r.Secret})
		}
		if now.Sub(c.at) < doubtful || !slices.ContainsFunc(refused, wrong) {
			return c.auths, true
		}
	}
	return nil, false
}

// ask runs the plugin and keeps its answer for as long as that says.
func (p *provider) ask(ctx context.Context, s *Plugins, image string) (auths, error) {
	request, err := json.Marshal(map[string]string{"apiVersion": p.APIVersion, "kind": "CredentialProviderRequest", "image": image})
	if err != nil {
		return nil, err
	}
	cmd := program{path: filepath.Join(s.bin, p.Name), args: p.Args, timeout: s.timeout}
	for _, e := range p.Env {
		cmd.env = append(cmd.env, e.Name+"="+e.Value)
	}
	b, err := cmd.run(ctx, request)
	if err != nil {
		return nil, err
	}
	var r struct {
		APIVersion, Kind, CacheKeyType string
		CacheDuration                  *duration
		Auth                           map[string]struct{ Username, Password string }
	}
	if json.Unmarshal(b, &r) != nil {
		return nil, errors.New("its answer is no JSON") // and may show a secret
	}
	key, ok := keys(image)[r.CacheKeyType]
	switch {
	case r.APIVersion != p.APIVersion || r.Kind != "CredentialProviderResponse":
		return nil, fmt.Errorf("its answer is %.100q of %.100q, not a CredentialProviderResponse of %s", r.Kind, r.APIVersion, p.APIVersion)
	case !ok:
		return nil, fmt.Errorf("its answer has the cacheKeyType %.100q, not Image, Registry or Global", r.CacheKeyType)
	}
	a := auths{}
	for pattern, c := range r.Auth {
		if c.Username != "" && c.Password != "" {
			a.add(pattern, entry{Login: Login{c.Username, c.Password}})
		}
	}
	life := *p.DefaultCacheDuration
	if r.CacheDuration != nil {
		life = *r.CacheDuration
	}
	p.keep(key, a, time.Duration(life))
	return a, nil
}

func (p *provider) keep(key string, a auths, life time.Duration) {
	if life <= 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for k, c := range p.cache {
		if !now.Before(c.till) {
			delete(p.cache, k)
		}
	}
	if p.cache == nil {
		p.cache = map[string]cached{}
	}
	p.cache[key] = cached{a, now, now.Add(life)}
}

package credentials

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"path"
	"slices"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

// dockerHub is the name that docker login and kubectl keep Docker Hub's credentials under.
const dockerHub = "index.docker.io"

// auths are logins by pattern, as kubelet knows them: HOST[:PORT][/PATH], the host's parts globs.
type auths map[string]entry

// entry is a login, or what is wrong with it.
type entry struct {
	Login
	err error
}

// add takes e under key: a pattern, or a registry's address as docker has it, with a scheme and /v1/ or /v2/.
func (a auths) add(key string, e entry) {
	_, rest, ok := strings.Cut(key, "://")
	if !ok {
		rest = key
	}
	host, below, _ := strings.Cut(rest, "/")
	if below = strings.TrimSuffix(below, "/"); below == "v1" || below == "v2" {
		below = ""
	}
	for _, version := range []string{"v1/", "v2/"} {
		below = strings.TrimPrefix(below, version)
	}
	if below != "" {
		host += "/" + below
	}
	a[host] = e
}

// lookup returns the logins whose pattern matches image, in kubelet's order: long patterns before their beginnings, and names before globs.
func (a auths) lookup(image registryclient.Repository) (list []Login, err error) {
	var errs []error
	take := func(e entry) {
		if e.err != nil {
			errs = append(errs, e.err)
		} else {
			list = append(list, e.Login)
		}
	}
	keys := make([]string, 0, len(a))
	for k := range a {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range slices.Backward(keys) {
		if matches(k, string(image)) {
			take(a[k])
		}
	}
	if e, ok := a[dockerHub]; ok && len(list) == 0 && strings.HasPrefix(string(image), "docker.io/") {
		take(e)
	}
	return list, errors.Join(errs...)
}

// matches reports whether an image (HOST[:PORT]/PATH) matches a pattern, by kubelet's rule (pkg/credentialprovider URLsMatch): as many parts of the host,
// each matching as a glob; the same port, or none on both sides; the pattern's path is how the image's begins.
func matches(pattern, image string) bool {
	p, err := url.Parse("https://" + pattern)
	if err != nil {
		return false
	}
	i, err := url.Parse("https://" + image)
	if err != nil {
		return false
	}
	globs, port := splitHost(p.Host)
	parts, imagePort := splitHost(i.Host)
	if port != imagePort || len(globs) != len(parts) || !strings.HasPrefix(i.Path, p.Path) {
		return false
	}
	for n, g := range globs {
		if ok, err := path.Match(g, parts[n]); err != nil || !ok {
			return false
		}
	}
	return true
}

func splitHost(s string) (parts []string, port string) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		host, port = s, ""
	}
	return strings.Split(host, "."), port
}

// errRegistryToken: containerd cannot use those either.
var errRegistryToken = errors.New("a registrytoken is not supported: use an identity token or a credential helper")

// dockerAuth is an entry of docker's config.json.
type dockerAuth struct {
	Username      string `json:"username"`
	Password      string `json:"password"`
	Auth          string `json:"auth"` // base64 of USER:PASSWORD
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

// login returns what the entry says; without a secret that is nothing.
func (d dockerAuth) login() (Login, error) {
	switch {
	case d.IdentityToken != "":
		return Login{Secret: d.IdentityToken}, nil
	case d.Username != "" && d.Password != "":
		return Login{d.Username, d.Password}, nil
	case d.Auth != "":
		b, err := base64.StdEncoding.DecodeString(strings.TrimRight(d.Auth, "\n"))
		user, secret, ok := strings.Cut(string(b), ":")
		if err != nil || !ok {
			return Login{}, errors.New("auth is not base64 of USER:PASSWORD")
		}
		if user == "" {
			secret = "" // no identity token
		}
		return Login{user, strings.Trim(secret, "\x00")}, nil
	case d.RegistryToken != "":
		return Login{}, errRegistryToken
	}
	return Login{}, nil
}

// parseAuths reads the entries of docker's config.json, or of a .dockercfg, which is nothing else.
func parseAuths(entries map[string]json.RawMessage) auths {
	a := auths{}
	for key, raw := range entries {
		var d dockerAuth
		err := json.Unmarshal(raw, &d)
		if err != nil {
			err = errors.New("malformed") // the text of err may show some of a secret
		}
		var e entry
		if err == nil {
			e.Login, err = d.login()
		}
		if err != nil {
			e.err = fmt.Errorf("entry of %s: %w", key, err)
		}
		if err != nil || e.Secret != "" {
			a.add(key, e)
		}
	}
	return a
}

package credentials

import (
	"context"
	"errors"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

// Docker is docker's config.json with its credential helpers, or podman's auth.json where there is
// none, found as go-containerregistry's DefaultKeychain finds them ($HOME, $DOCKER_CONFIG, $REGISTRY_AUTH_FILE, $XDG_RUNTIME_DIR). They are read
// at each lookup, so a new login is seen. A helper that hangs is not interrupted.
type Docker struct{}

// Name implements Source.
func (Docker) Name() string { return "docker config" }

// Lookup implements Source.
func (Docker) Lookup(ctx context.Context, p registryclient.Place) (list []Login, err error) {
	for _, image := range p.Names {
		repo, err := name.NewRepository(string(image))
		if err != nil {
			return list, err
		}
		a, err := authn.Resolve(ctx, authn.DefaultKeychain, repo)
		if err != nil {
			return list, err
		}
		c, err := authn.Authorization(ctx, a)
		switch {
		case err != nil:
			return list, err
		case c.IdentityToken != "":
			list = append(list, Login{Secret: c.IdentityToken})
		case c.RegistryToken != "":
			return list, errors.New("a registrytoken is not supported: use an identity token or a credential helper")
		case c.Username != "" && c.Password != "":
			list = append(list, Login{c.Username, c.Password})
		}
	}
	return list, nil
}

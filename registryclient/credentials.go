package registryclient

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// DockerCredentials returns Options.Credentials out of docker's config.json with its credential helpers, or podman's auth.json where there is
// none, found as go-containerregistry's DefaultKeychain finds them ($HOME, $DOCKER_CONFIG, $REGISTRY_AUTH_FILE, $XDG_RUNTIME_DIR). They are read
// at each call, so a new login is seen. A host that is in neither is anonymous. A helper that hangs is not interrupted.
func DockerCredentials() func(ctx context.Context, host string) (user, secret string, err error) {
	return func(ctx context.Context, host string) (user, secret string, err error) {
		if host == "registry-1.docker.io" {
			host = name.DefaultRegistry // the name that docker login keeps Docker Hub's under
		}
		registry, err := name.NewRegistry(host)
		if err != nil {
			return "", "", err
		}
		a, err := authn.Resolve(ctx, authn.DefaultKeychain, registry)
		if err != nil {
			return "", "", fmt.Errorf("docker config: %w", err)
		}
		c, err := authn.Authorization(ctx, a)
		if err != nil {
			return "", "", fmt.Errorf("docker config: %w", err)
		}
		switch {
		case c.IdentityToken != "":
			return "", c.IdentityToken, nil
		case c.RegistryToken != "":
			return "", "", errors.New("docker config: a registrytoken is not supported: use an identity token or a credential helper")
		}
		return c.Username, c.Password, nil
	}
}

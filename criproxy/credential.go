package criproxy

import (
	"encoding/base64"
	"net/url"
	"strings"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Credential is what a pull came with.
type Credential struct {
	Host   string `json:"host,omitempty"` // it is for this one only, as in "registry.example.com:5000"; "" is every host of the repository, mirrors too
	User   string `json:"user,omitempty"` // "" says that the secret is an identity token
	Secret string `json:"secret"`
}

// credentialOf takes out of auth what containerd takes (2.4.2, internal/cri/server/images.ParseAuth), so that the snapshotter has the rights of the pull and no others. false is an anonymous pull, or one
// that containerd refuses because auth is malformed. A registry token is none: containerd does not use it.
func credentialOf(auth *runtime.AuthConfig) (c Credential, ok bool) {
	if a := auth.GetServerAddress(); a != "" {
		u, err := url.Parse(a)
		if err != nil || u.Host == "" {
			return Credential{}, false
		}
		c.Host = u.Host
	}
	switch {
	case auth.GetUsername() != "":
		c.User, c.Secret = auth.Username, auth.Password
	case auth.GetIdentityToken() != "":
		c.Secret = auth.IdentityToken
	case auth.GetAuth() != "":
		b, err := base64.StdEncoding.DecodeString(auth.Auth)
		if err != nil {
			return Credential{}, false
		}
		c.User, c.Secret, _ = strings.Cut(string(b), ":")
		c.Secret = strings.Trim(c.Secret, "\x00")
	}
	return c, c.Secret != ""
}

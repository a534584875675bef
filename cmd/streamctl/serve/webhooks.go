package serve

import (
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/webhook"
)

// webhookFrom is who tells of pushed images. Exactly one of header, query, hmac, username and issuer says how it is authenticated.
type webhookFrom struct {
	Name          string            `toml:"name" comment:"It posts to /hooks/NAME."`
	Kind          string            `toml:"kind" comment:"distribution, harbor, acr, eventgrid, zot, ecr, gar, jfrog or dockerhub."`
	Registry      string            `toml:"registry" comment:"Of which it tells: the name of one above."`
	RepositoryKey string            `toml:"repository_key" comment:"JFrog: the key of the repository that is the registry; empty for others."`
	SecretFile    string            `toml:"secret_file" comment:"File of the secret that one of the following has:"`
	Header        string            `toml:"header" comment:"a header of this name, as in \"Authorization\" (with or without Bearer), or"`
	Query         string            `toml:"query" comment:"a parameter of the URL of this name, or"`
	HMAC          string            `toml:"hmac" comment:"a header of this name, as the HMAC-SHA256 of the body in hex, or"`
	Username      string            `toml:"username" comment:"basic authentication by this user, or"`
	Issuer        string            `toml:"issuer" comment:"no secret, but a token of this OIDC issuer, for"`
	Audience      string            `toml:"audience" comment:"this audience, with"`
	Claims        map[string]string `toml:"claims,inline" comment:"these claims, as in { email = \"push@project.iam.gserviceaccount.com\" }."`
	CA            string            `toml:"ca" comment:"PEM file of certificates to trust for the issuer beside the system's."`
}

func exampleWebhook() webhookFrom {
	return webhookFrom{Name: "registry", Kind: "distribution", Registry: "registry.example.com", SecretFile: "/run/credentials/streamctl.service/secrets_hook", Header: "Authorization", Claims: map[string]string{}}
}

// source is what package webhook calls it, without the secret and the client.
func (w webhookFrom) source() webhook.Source {
	return webhook.Source{
		Name: w.Name, Kind: w.Kind, Registry: w.Registry, RepositoryKey: w.RepositoryKey, Header: w.Header, Query: w.Query, HMAC: w.HMAC, Username: w.Username,
		Issuer: w.Issuer, Audience: w.Audience, Claims: w.Claims,
	}
}

// sources makes the webhooks of the configuration.
func sources(c Config) (list []webhook.Source, err error) {
	for _, w := range c.Webhooks {
		s := w.source()
		if w.SecretFile != "" {
			b, err := os.ReadFile(w.SecretFile)
			if err != nil {
				return nil, fmt.Errorf("webhook %s: %w", w.Name, err)
			}
			s.Secret = []byte(strings.TrimSpace(string(b)))
		}
		if w.CA != "" {
			t, err := trusting(w.CA)
			if err != nil {
				return nil, fmt.Errorf("webhook %s: %w", w.Name, err)
			}
			s.Client = &http.Client{Transport: t, Timeout: 30 * time.Second}
		}
		list = append(list, s)
	}
	return list, nil
}

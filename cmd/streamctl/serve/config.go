package serve

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/tomlfile"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
)

// DefaultConfig is read if it is there and no other is named.
const DefaultConfig = "/etc/streamctl/serve.toml"

// Config is the configuration file. It is decoded over the defaults, so a zero can be said; a key that is not here is an error. Secrets are
// in files of their own, never in this one.
type Config struct {
	Listen      string         `toml:"listen" comment:"TCP address of the API, the console and the webhooks. Beyond loopback it takes tokens or OIDC, and TLS."`
	URL         string         `toml:"url" comment:"What browsers reach the console by, as in \"https://convert.example.com\"; OIDC and behind_proxy need it. Empty for what each request says."`
	BehindProxy bool           `toml:"behind_proxy" comment:"Whether a proxy in front has the TLS: then this may listen beyond loopback without."`
	Proxies     []string       `toml:"trusted_proxies" comment:"Networks of proxies whose X-Forwarded-For is believed, as in \"10.0.0.0/8\"."`
	Data        string         `toml:"data_dir" comment:"Where the embedded NATS keeps operations, settings and the queue, and where the key of sessions is. On a local disk."`
	Temp        string         `toml:"temp_dir" comment:"Where converted layers wait for their push; empty for the system's."`
	Default     string         `toml:"default_registry" comment:"Registry of requests that name none, as Azure's do. Empty for the first."`
	Metrics     string         `toml:"metrics" comment:"TCP address, as in \"127.0.0.1:9468\", at which anybody gets /metrics (of Prometheus), /healthz and /readyz: counts, and no name of an image. It has no authentication\nand no TLS: beyond loopback, keep it to the network that scrapes. Empty for none. The address above has the last two for everybody, and /metrics for who may read."`
	AuditLog    string         `toml:"audit_log" comment:"File that gets a line of JSON for each action, opened anew when it was moved away; \"-\" is standard output, empty is none."`
	LogFormat   string         `toml:"log_format" comment:"text or json, on standard error."`
	LogLevel    tomlfile.Level `toml:"log_level" comment:"debug, info, warn or error."`
	SessionKey  string         `toml:"session_key_file" comment:"File with 32 bytes or more that seal the console's sessions: replicas must have the same. Empty for one that is made in data_dir."`
	Convert     convert        `toml:"convert"`
	Signing     signing        `toml:"signing"`
	Limits      limits         `toml:"limits"`
	Times       times          `toml:"times"`
	NATS        natsConfig     `toml:"nats"`
	TLS         tlsFiles       `toml:"tls"`
	Registries  []registry     `toml:"registry,omitempty" comment:"The registries that are looked after. All others are not found."`
	Tokens      []token        `toml:"token,omitempty" comment:"Who may do what, by bearer token. Without any, and without OIDC, everybody may do all, on loopback alone."`
	OIDC        *oidc          `toml:"oidc,omitempty"`
	Webhooks    []webhookFrom  `toml:"webhook,omitempty" comment:"Who tells of pushed images, at /hooks/NAME. Each must be authenticated."`
}

type convert struct {
	Jobs      int           `toml:"jobs" comment:"Layers at once of one conversion; 0 is one for each processor, two at least."`
	ChunkSize tomlfile.Size `toml:"chunk_size" comment:"Most bytes of tar in a chunk."`
	Profile   string        `toml:"profile" comment:"static: find out from an image's files what its start reads, and attach that; or none."`
}

type limits struct {
	Conversions int           `toml:"conversions" comment:"At once, in this process."`
	Memory      tomlfile.Size `toml:"memory" comment:"Bytes that all of them, and what is verified, may hold; 0 is half of the machine's or cgroup's. Go's collector is told to keep the process\nwithin 512 MiB more, unless GOMEMLIMIT says something else."`
	Disk        tomlfile.Size `toml:"disk" comment:"Bytes of converted layers that may wait in temp_dir; 0 is three quarters of what is free there at the start: name it where others write to the same file system."`
}

type times struct {
	Lease     tomlfile.Duration `toml:"lease" comment:"How long a process that is not heard of keeps an operation."`
	Retention tomlfile.Duration `toml:"retention" comment:"How long ended operations are kept."`
	Reconcile tomlfile.Duration `toml:"reconcile" comment:"How often registries are asked what no webhook told."`
	Shutdown  tomlfile.Duration `toml:"shutdown" comment:"How long requests in progress may go on when the service stops. Conversions are handed back at once."`
	Drain     tomlfile.Duration `toml:"drain" comment:"How long, before that, requests are taken on while /readyz says that the service stops: as long as load balancers need to see it. Conversions go on."`
	Session   tomlfile.Duration `toml:"session" comment:"How long a login at the console lasts."`
}

type natsConfig struct {
	URL          string `toml:"url" comment:"NATS servers with JetStream that replicas share, as in \"nats://nats-0:4222,nats://nats-1:4222\", or tls://; empty for one in this process."`
	Username     string `toml:"username" comment:"With password_file; empty for none."`
	PasswordFile string `toml:"password_file" comment:"Read again for each connection."`
	Credentials  string `toml:"credentials" comment:"File of credentials (a .creds file), read again for each connection; empty for none."`
	CA           string `toml:"ca" comment:"PEM file of the certificates to trust for it, instead of the system's; empty for those."`
	Certificate  string `toml:"certificate" comment:"PEM file of a client certificate for it; empty for none."`
	Key          string `toml:"key"`
	Replicas     int    `toml:"replicas" comment:"Servers of a cluster that keep each message: 1, 3 or 5; 0 is 3 in a cluster, and else 1."`
}

type tlsFiles struct {
	Certificate string `toml:"certificate" comment:"PEM files. They are read again when they change."`
	Key         string `toml:"key"`
}

type registry struct {
	Name         string  `toml:"name" comment:"Its host, as in images' names."`
	Username     string  `toml:"username" comment:"With password_file; empty for docker's config.json of the user that runs the service, with its credential helpers."`
	PasswordFile string  `toml:"password_file" comment:"Read again for each conversion."`
	CA           string  `toml:"ca" comment:"PEM file of certificates to trust beside the system's."`
	PlainHTTP    bool    `toml:"plain_http" comment:"HTTP instead of HTTPS. Loopback and private addresses are tried with both in any case."`
	Insecure     bool    `toml:"insecure" comment:"HTTPS without verifying the certificate."`
	PullOnly     bool    `toml:"pull_only" comment:"Nothing can be attached to its images (a proxy's cache, say): they are shown and verified, and none is converted because it was pushed."`
	Requests     float64 `toml:"requests_per_second" comment:"At most, of this process; 0 is any number."`
}

type token struct {
	Name   string  `toml:"name" comment:"Who has it."`
	File   string  `toml:"file" comment:"File with the token, read again when it changes (without it the token is not valid), or"`
	SHA256 string  `toml:"sha256" comment:"the SHA-256 of the token in hex."`
	Grants []grant `toml:"grants,inline" comment:"role: reader, writer, owner or reporter (what nodes have); registry: empty for all; repository: a name or a pattern as in \"team/*\", empty for all."`
}

type grant struct {
	Role       access.Role `toml:"role"`
	Registry   string      `toml:"registry,omitempty"`
	Repository string      `toml:"repository,omitempty"`
}

type oidc struct {
	Issuer           string   `toml:"issuer"`
	ClientID         string   `toml:"client_id" comment:"Of the console at the issuer; empty for no login at the console."`
	ClientSecretFile string   `toml:"client_secret_file" comment:"Empty for a public client."`
	Scopes           []string `toml:"scopes" comment:"Beside openid."`
	Audiences        []string `toml:"audiences" comment:"That bearer tokens of the API may have; none is client_id."`
	NameClaim        string   `toml:"name_claim" comment:"Empty for preferred_username, or else a verified email, or else sub."`
	CA               string   `toml:"ca" comment:"PEM file of certificates to trust for the issuer beside the system's."`
	Rules            []rule   `toml:"rules,inline" comment:"Who has which role, by claims of the token."`
}

type rule struct {
	Claim  string  `toml:"claim"`
	Value  string  `toml:"value"`
	Grants []grant `toml:"grants,inline"`
}

// Defaults are what a file does not say.
func Defaults() Config {
	return Config{
		Listen:   "127.0.0.1:8480",
		Data:     "/var/lib/streamctl",
		AuditLog: "-",
		LogLevel: tomlfile.Level(slog.LevelInfo), LogFormat: "text",
		Proxies: []string{},
		Convert: convert{ChunkSize: 128 << 10, Profile: "static"},
		Signing: signing{Format: "jws", Required: true},
		Limits:  limits{Conversions: 2},
		Times: times{
			Lease: tomlfile.Duration{D: 30 * time.Second}, Retention: tomlfile.Duration{D: 30 * 24 * time.Hour}, Reconcile: tomlfile.Duration{D: 10 * time.Minute},
			Shutdown: tomlfile.Duration{D: 10 * time.Second}, Session: tomlfile.Duration{D: 8 * time.Hour},
		},
	}
}

// example is a configuration in which each key has a value.
func example() Config {
	c := Defaults()
	grants := []grant{{access.Writer, "registry.example.com", "team/*"}}
	c.Proxies = []string{"10.0.0.0/8"}
	c.Registries = []registry{{Name: "registry.example.com", Username: "streaming", PasswordFile: "/run/credentials/streamctl.service/secrets_registry"}}
	c.Tokens = []token{{Name: "ci", File: "/run/credentials/streamctl.service/secrets_ci", Grants: grants}}
	c.OIDC = &oidc{Issuer: "https://login.example.com", ClientID: "streaming", Scopes: []string{"profile", "email"}, Audiences: []string{"streaming"}, Rules: []rule{{"groups", "platform-team", grants}}}
	c.Webhooks = []webhookFrom{exampleWebhook()}
	return c
}

// Load reads file, or the default file if file is empty, which need not exist then. Its error names the line and the key.
func Load(file string) (Config, error) {
	c := Defaults()
	name := file
	if name == "" {
		name = DefaultConfig
	}
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) && file == "" {
		return c, nil
	}
	if err != nil {
		return c, err
	}
	if err := tomlfile.Decode(name, b, &c, "streamctl serve --print-config", example()); err != nil {
		return c, err
	}
	if err := c.validate(); err != nil {
		return c, fmt.Errorf("%s: %w", name, err)
	}
	return c, nil
}

// Log returns a log that writes to w as c says.
func (c Config) Log(w io.Writer) *slog.Logger {
	o := &slog.HandlerOptions{Level: slog.Level(c.LogLevel)}
	if c.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

// Write prints c as a configuration file, with an example, as comments, of each table that there is none of.
func (c Config) Write(w io.Writer) error {
	if err := tomlfile.Write(w, c); err != nil {
		return err
	}
	e := example()
	for _, table := range []struct {
		missing bool
		v       any
	}{
		{len(c.Registries) == 0, struct {
			V []registry `toml:"registry"`
		}{e.Registries}},
		{len(c.Tokens) == 0, struct {
			V []token `toml:"token"`
		}{e.Tokens}},
		{c.OIDC == nil, struct {
			V *oidc `toml:"oidc"`
		}{e.OIDC}},
		{len(c.Webhooks) == 0, struct {
			V []webhookFrom `toml:"webhook"`
		}{e.Webhooks}},
	} {
		if !table.missing {
			continue
		}
		var b strings.Builder
		if err := tomlfile.Write(&b, table.v); err != nil {
			return err
		}
		for line := range strings.Lines("\n" + strings.TrimLeft(b.String(), "\n")) {
			if line = strings.TrimSpace(line); line != "" {
				line = "# " + line
			}
			if _, err := fmt.Fprintln(w, line); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *Config) validate() error {
	for key, addr := range map[string]string{"listen": c.Listen, "metrics": c.Metrics} {
		if _, _, err := net.SplitHostPort(addr); err != nil && (addr != "" || key == "listen") {
			return fmt.Errorf("%s = %q: want an address and a port, as in \"127.0.0.1:8480\"", key, addr)
		}
	}
	for _, p := range c.Proxies {
		if _, err := netip.ParsePrefix(p); err != nil {
			return fmt.Errorf("trusted_proxies: %q is no network, as in \"10.0.0.0/8\"", p)
		}
	}
	if c.BehindProxy && !strings.HasPrefix(c.URL, "https://") {
		return fmt.Errorf("behind_proxy: the proxy has the TLS, so give the address that it has it at: url = \"https://...\", not %q", c.URL)
	}
	if !filepath.IsAbs(c.Data) {
		return fmt.Errorf("data_dir = %q: want an absolute path", c.Data)
	}
	if c.LogFormat != "text" && c.LogFormat != "json" {
		return fmt.Errorf("log_format = %q: want text or json", c.LogFormat)
	}
	if c.Convert.ChunkSize < 512 || c.Convert.ChunkSize > artifact.MaxChunkSize {
		return fmt.Errorf("convert.chunk_size: want 512 to %d bytes", artifact.MaxChunkSize)
	}
	if c.Convert.Profile != "static" && c.Convert.Profile != "none" {
		return fmt.Errorf("convert.profile = %q: want static or none", c.Convert.Profile)
	}
	if err := c.Signing.validate(); err != nil {
		return err
	}
	if c.Convert.Jobs < 0 || c.Limits.Conversions < 1 {
		return errors.New("convert.jobs is 0 or more, and limits.conversions 1 or more")
	}
	for key, d := range map[string]tomlfile.Duration{"lease": c.Times.Lease, "retention": c.Times.Retention, "reconcile": c.Times.Reconcile, "shutdown": c.Times.Shutdown, "session": c.Times.Session} {
		if d.D <= 0 {
			return fmt.Errorf("times.%s = %q: want more than nothing", key, d.D)
		}
	}
	if c.Times.Drain.D < 0 {
		return fmt.Errorf("times.drain = %q: want nothing or more", c.Times.Drain.D)
	}
	if err := c.NATS.validate(); err != nil {
		return fmt.Errorf("nats%w", err)
	}
	if (c.TLS.Certificate == "") != (c.TLS.Key == "") {
		return errors.New("tls: certificate and key go together")
	}
	return c.validateRegistries()
}

func (n natsConfig) validate() error {
	switch {
	case n.URL == "" && n != (natsConfig{}):
		return errors.New(": every other key is of external servers: give their url")
	case strings.Contains(n.URL, "@"):
		return errors.New(".url has a user: names and passwords are in username and password_file")
	case n.Replicas != 0 && n.Replicas != 1 && n.Replicas != 3 && n.Replicas != 5:
		return fmt.Errorf(".replicas = %d: want 0, 1, or on a cluster 3 or 5", n.Replicas)
	case (n.Certificate == "") != (n.Key == ""):
		return errors.New(": certificate and key go together")
	case (n.Username == "") != (n.PasswordFile == ""):
		return errors.New(": username and password_file go together")
	}
	return nil
}

func (c *Config) validateRegistries() error {
	names := map[string]bool{}
	for _, r := range c.Registries {
		switch {
		case r.Name == "" || strings.Contains(r.Name, "/"):
			return fmt.Errorf("registry.name = %q: want a host, as in \"registry.example.com\"", r.Name)
		case names[r.Name]:
			return fmt.Errorf("registry %s is there twice", r.Name)
		case (r.Username == "") != (r.PasswordFile == ""):
			return fmt.Errorf("registry %s: username and password_file go together", r.Name)
		case r.Requests < 0:
			return fmt.Errorf("registry %s: requests_per_second is 0 or more", r.Name)
		}
		names[r.Name] = true
	}
	if c.Default != "" && !names[c.Default] {
		return fmt.Errorf("default_registry = %q is none of the registries", c.Default)
	}
	for _, w := range c.Webhooks {
		if !names[w.Registry] {
			return fmt.Errorf("webhook %s: registry = %q is none of the registries", w.Name, w.Registry)
		}
		if err := w.source().Check(); err != nil {
			return fmt.Errorf("webhook %s: %w", w.Name, err)
		}
		if (w.SecretFile == "") != (w.Issuer != "") {
			return fmt.Errorf("webhook %s: want a secret_file, or an issuer without one", w.Name)
		}
	}
	return nil
}

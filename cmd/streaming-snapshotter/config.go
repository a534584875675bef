package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/report"
	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/tomlfile"
	nodefs "github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// config is the configuration file. It is decoded over the defaults, so a zero can be said; a key that is not here is an error.
type config struct {
	Root           string            `toml:"root" comment:"Snapshots, the records of streamed images, the chunk cache and the FUSE mount of the data devices. On a local file system."`
	Address        string            `toml:"address" comment:"Unix socket of the snapshots service: the address in containerd's proxy_plugins."`
	MountMode      nodefs.Mode       `toml:"mount_mode" comment:"auto (the first that works here), file, loop or tree."`
	Stream         patterns          `toml:"stream" comment:"Repositories to stream from: HOST/REPOSITORY, each part a glob; a last part of * stands for everything below.\nSnapshots are shared by chain ID: list only what you would let provide the base layers of every image. Nothing is listed by default."`
	TrustDefault   trust.Policy      `toml:"trust_default" comment:"What must be true of an artifact of those repositories before it is streamed, where no [[trust]] says more: open (nothing; what was tampered with is found\nlater), signed, proven (all of it is fetched and proven before the image is used) or off (nothing is streamed). Snapshots are shared by chain ID, so open\nis not possible beside signed or proven."`
	Trust          []trustRule       `toml:"trust" comment:"The policy of some repositories. The first that matches counts."`
	ProofDeadline  tomlfile.Duration `toml:"proof_deadline" comment:"How long after the first mount of an image all of its layers are proven: hashed, and compared with the image's own config, and fetched for that\nwhere nobody has read them."`
	NotaryDir      string            `toml:"notation_dir" comment:"For the policy signed: the files of the Notary Project's notation command, trustpolicy.json and truststore/x509/ca/NAME/ with certificates. They are read\nagain when they change."`
	NotaryPlugins  string            `toml:"notation_plugin_dir" comment:"notation's directory of plugins, for signatures that name one; empty runs none."`
	ReadAhead      bool              `toml:"read_ahead" comment:"Whether files that are read from start to end are fetched ahead of their reader. false fetches exactly the chunks that are read:\nfor links that are paid by the byte, and for measuring what a container needs."`
	CacheSize      size              `toml:"cache_size" comment:"How much disk the chunk cache may use: a share of root's file system, as in \"25%\", or as in \"20GiB\". \"0\" for no limit.\nThe chunks used least recently are given back, also those of running containers, which fetch them again. kubelet removes images when the\nfile system is 85% full, and evicts pods soon after: leave it room for unpacked images, logs and what containers write."`
	Background     size              `toml:"background_bandwidth" comment:"How much per second, as in \"8MiB\", is fetched of what containers did not read at their start, once that is over and while no container waits for the\nregistry: so that the node needs it no more. It stops before chunks that were used would have to go. \"0\" for nothing."`
	HostsDir       string            `toml:"hosts_dir" comment:"containerd's registry host configuration (certs.d); empty for none."`
	Plugins        string            `toml:"credential_provider_config" comment:"The kubelet's credential provider plugins: its --image-credential-provider-config, a file or a directory; empty for none.\nWhat the plugins have is tried first."`
	PluginDir      string            `toml:"credential_provider_bin_dir" comment:"Where the plugins are: the kubelet's --image-credential-provider-bin-dir; empty for where their configuration is."`
	Kubeconfig     string            `toml:"kubeconfig" comment:"With which to get the image pull secrets of this node's pods from the API server; the kubelet's own has just the rights for that. Empty for none."`
	Events         string            `toml:"events_kubeconfig" comment:"With which to put an event on each pod whose image is pulled, streamed or not and why. It takes the rights to create events and to list this node's\npods; the kubelet's own has them. Empty for no events."`
	NodeName       string            `toml:"node_name" comment:"What the node is called in Kubernetes; empty for this machine's name, as the kubelet has it."`
	DockerConfig   bool              `toml:"docker_config" comment:"Whether docker's config.json with its credential helpers (of the user that runs the daemon), or podman's auth.json, is tried last."`
	ResolveTimeout tomlfile.Duration `toml:"resolve_timeout" comment:"How long a pull may wait for the search for an artifact before it goes on as a normal pull."`
	PullWait       tomlfile.Duration `toml:"pull_wait" comment:"How long a pull or a container's start may wait for a proof, or for layers that are unpacked in the place of what must not be used. Then a pull of a repository\nthat must be proven goes on as a normal pull, and what stands on such layers fails, to be tried again. containerd may let other pulls and starts wait meanwhile:\nmore than a minute fails them. Large images of such repositories may need more than the default."`
	RegistryWait   tomlfile.Duration `toml:"registry_wait" comment:"How long a read of file data that is not on the node waits while the registry is away, before the container gets an I/O error."`
	CRIProxy       string            `toml:"cri_proxy" comment:"Unix socket of a proxy of containerd's CRI, for the kubelet's image service endpoint: what a pull comes with (imagePullSecrets) then serves the\nreads of its image, too. Empty for none."`
	Containerd     string            `toml:"cri_containerd" comment:"Unix socket of containerd, where the proxy passes everything on, where the daemon asks for containerd's version if that matters,\nand has it unpack the layers of what must not be streamed any more."`
	CRIKey         string            `toml:"cri_credentials_key" comment:"File of the key with which the credentials of images that are streamed are kept in root over restarts of the daemon. On a tmpfs, so that a reboot\nends them. Empty keeps them in memory only: after a restart images are read with other credentials, or have to be pulled again."`
	Metrics        string            `toml:"metrics" comment:"TCP address, as in \"127.0.0.1:9465\", at which anybody gets /metrics (of Prometheus), /healthz and /readyz. Empty for none:\nthe socket admin.sock in root has them, too."`
	OTLPEndpoint   string            `toml:"otlp_endpoint" comment:"Where traces of pulls go, as in \"http://127.0.0.1:4318\": an OpenTelemetry collector, by HTTP. Empty for what OTEL_EXPORTER_OTLP_ENDPOINT says, and no\ntraces without that; the other OTEL_ variables hold with either."`
	Report         string            `toml:"report" comment:"URL of the conversion service, as in \"https://streaming.example.com\", that is to be told how long the first starts of streamed images took on this node. What is told\nnames images and this node by a random number, and no host or pod. Empty for none."`
	ReportToken    string            `toml:"report_token_file" comment:"File with a token for it, of the role reporter. Empty for none."`
	ReportCA       string            `toml:"report_ca_file" comment:"PEM file of certificates that are trusted for it, beside the system's. Empty for none."`
	LogLevel       tomlfile.Level    `toml:"log_level" comment:"debug, info, warn or error."`
}

func defaults() config {
	return config{
		Root:           "/var/lib/streaming-snapshotter",
		Address:        "/run/streaming-snapshotter/snapshotter.sock",
		MountMode:      nodefs.ModeAuto,
		Stream:         patterns{},
		TrustDefault:   trust.Open,
		Trust:          []trustRule{},
		ProofDeadline:  tomlfile.Duration{D: time.Hour},
		NotaryDir:      "/etc/streaming-snapshotter/notation",
		ReadAhead:      true,
		CacheSize:      "25%",
		Background:     "8MiB",
		HostsDir:       "/etc/containerd/certs.d",
		DockerConfig:   true,
		ResolveTimeout: tomlfile.Duration{D: 15 * time.Second},
		PullWait:       tomlfile.Duration{D: snapshot.Wait},
		RegistryWait:   tomlfile.Duration{D: 5 * time.Minute},
		Containerd:     "/run/containerd/containerd.sock",
		CRIKey:         "/run/streaming-snapshotter/credentials.key",
		LogLevel:       tomlfile.Level(slog.LevelInfo),
	}
}

// loadConfig reads file, or the default file if file is empty, which need not exist then.
func loadConfig(file string) (config, error) {
	c := defaults()
	name := file
	if name == "" {
		name = defaultConfig
	}
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) && file == "" {
		return c, nil
	}
	if err != nil {
		return c, err
	}
	if err := tomlfile.Decode(name, b, &c, "streaming-snapshotter config", example()); err != nil {
		return c, err
	}
	if err := c.validate(); err != nil {
		return c, fmt.Errorf("%s: %w", name, err)
	}
	return c, nil
}

// example is the defaults with a value for what has none.
func example() config {
	c := defaults()
	c.Stream = patterns{"registry.example.com/team/*"}
	c.Trust = []trustRule{{c.Stream, trust.Open}}
	return c
}

func (c *config) validate() error {
	for _, p := range []struct {
		key, path string
		optional  bool
	}{{"root", c.Root, false}, {"address", c.Address, false}, {"cri_proxy", c.CRIProxy, true}, {"cri_containerd", c.Containerd, false}, {"cri_credentials_key", c.CRIKey, true},
		{"credential_provider_config", c.Plugins, true}, {"credential_provider_bin_dir", c.PluginDir, true}, {"kubeconfig", c.Kubeconfig, true}, {"events_kubeconfig", c.Events, true},
		{"report_token_file", c.ReportToken, true}, {"report_ca_file", c.ReportCA, true},
		{"notation_dir", c.NotaryDir, false}, {"notation_plugin_dir", c.NotaryPlugins, true}} {
		if !filepath.IsAbs(p.path) && (p.path != "" || !p.optional) {
			return fmt.Errorf("%s = %q: want an absolute path", p.key, p.path)
		}
	}
	if p := filepath.Clean(c.CRIProxy); p == filepath.Clean(c.Address) || p == filepath.Clean(c.Containerd) {
		return fmt.Errorf("cri_proxy = %q: want a socket of its own", c.CRIProxy)
	}
	if !slices.Contains([]nodefs.Mode{nodefs.ModeAuto, nodefs.ModeFile, nodefs.ModeLoop, nodefs.ModeTree}, c.MountMode) {
		return fmt.Errorf("mount_mode = %q: want auto, file, loop or tree", c.MountMode)
	}
	if _, _, err := net.SplitHostPort(c.Metrics); err != nil && c.Metrics != "" {
		return fmt.Errorf("metrics = %q: want an address and a port, as in \"127.0.0.1:9465\"", c.Metrics)
	}
	if u, err := url.Parse(c.OTLPEndpoint); c.OTLPEndpoint != "" && (err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "") {
		return fmt.Errorf("otlp_endpoint = %q: want the URL of a collector, as in \"http://127.0.0.1:4318\"", c.OTLPEndpoint)
	}
	if c.Report != "" {
		if err := report.CheckServer(c.Report, c.ReportToken != ""); err != nil {
			return fmt.Errorf("report = %w", err)
		}
	}
	if c.ResolveTimeout.D <= 0 {
		return fmt.Errorf("resolve_timeout = %q: want more than nothing", c.ResolveTimeout.D)
	}
	if c.PullWait.D < time.Second {
		return fmt.Errorf("pull_wait = %q: want a second or more", c.PullWait.D)
	}
	if c.RegistryWait.D <= 0 {
		return fmt.Errorf("registry_wait = %q: want more than nothing", c.RegistryWait.D)
	}
	if _, err := c.CacheSize.of(100); err != nil {
		return fmt.Errorf("cache_size: %w", err)
	}
	if _, err := c.Background.of(0); err != nil || strings.HasSuffix(string(c.Background), "%") {
		return fmt.Errorf("background_bandwidth = %q: want bytes per second, as in \"8MiB\", or \"0\"", c.Background)
	}
	if err := c.Stream.validate(); err != nil {
		return err
	}
	return c.validateTrust()
}

// write prints c as a configuration file with comments.
func (c config) write(w io.Writer) error { return tomlfile.Write(w, c) }

// size is bytes, as in "20GiB", or a share of a file system, as in "25%".
type size string

// of returns the bytes that s is on a file system of total bytes.
func (s size) of(total int64) (int64, error) {
	if share, ok := strings.CutSuffix(string(s), "%"); ok {
		if n, err := strconv.ParseUint(share, 10, 7); err == nil && n > 0 && n <= 100 {
			return total / 100 * int64(n), nil
		}
	} else if n, err := tomlfile.ParseSize(string(s)); err == nil {
		return n, nil
	}
	return 0, fmt.Errorf("%q is no size, as in \"25%%\" of the file system or \"20GiB\"", string(s))
}

// in returns the bytes that s is on the file system of dir.
func (s size) in(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("size of the file system of %s: %w", dir, err)
	}
	return s.of(int64(st.Blocks) * st.Bsize)
}

// patterns are repositories, see trust.Match.
type patterns []string

func (ps patterns) validate() error {
	for _, p := range ps {
		if err := trust.ValidPattern(p); err != nil {
			return fmt.Errorf("stream: %w", err)
		}
	}
	return nil
}

// allow says why images of repo are not streamed, as a *reason.Error; nil if they are.
func (ps patterns) allow(repo registryclient.Repository) error {
	for _, p := range ps {
		if trust.Match(p, string(repo)) {
			return nil
		}
	}
	return reason.New(reason.NotListed, fmt.Errorf("%s is not listed in `stream` in the configuration", repo))
}

// String says what is listed.
func (ps patterns) String() string {
	if len(ps) == 0 {
		return "nothing is listed in the configuration: every image is pulled in the normal way"
	}
	return strings.Join(ps, " ")
}

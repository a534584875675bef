package main

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

func load(t *testing.T, text string) (config, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return loadConfig(file)
}

// What `config` prints is a configuration file that says the same.
func TestConfigPrintsItself(t *testing.T) {
	for _, text := range []string{"", "stream = ['r.example/a/*', 'q.example/b']\nmount_mode = 'tree'\nlog_level = 'debug'\nresolve_timeout = '3s'\nregistry_wait = '1h'\nhosts_dir = ''\ncache_size = '3GiB'\nproof_deadline = '2h0m0s'\ntrust_default = 'off'\n[[trust]]\nrepositories = ['r.example/a/*']\npolicy = 'open'\n"} {
		c, err := load(t, text)
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := c.write(&b); err != nil {
			t.Fatal(err)
		}
		again, err := load(t, b.String())
		if err != nil {
			t.Fatalf("%v in\n%s", err, b.String())
		}
		if !reflect.DeepEqual(c, again) {
			t.Errorf("got %+v, want %+v", again, c)
		}
	}
}

func TestConfigErrors(t *testing.T) {
	cases := map[string]struct{ text, want string }{
		"unknown key":           {"root = '/r'\nmount_mod = 'file'\n", `line 2: unknown key "mount_mod"`},
		"unknown table":         {"[cache]\nsize = 1\n", `unknown key "cache"`},
		"syntax":                {"root = \n", "line 1"},
		"relative root":         {"root = 'var'\n", "root"},
		"relative plugins":      {"credential_provider_config = 'config.yaml'\n", "want an absolute path"},
		"relative kubeconfig":   {"events_kubeconfig = 'kubeconfig'\n", "want an absolute path"},
		"report":                {"report = 'streaming.example.com'\n", "want the URL of a conversion service"},
		"report's token":        {"report = 'http://streaming.example.com'\nreport_token_file = '/token'\n", "want https"},
		"collector":             {"otlp_endpoint = '127.0.0.1:4318'\n", "want the URL of a collector"},
		"relative proxy":        {"cri_proxy = 'p.sock'\n", "cri_proxy"},
		"proxy to itself":       {"cri_proxy = '/r/c.sock'\ncri_containerd = '/r/../r/c.sock'\n", "want a socket of its own"},
		"proxy at address":      {"cri_proxy = '/a'\naddress = '/a'\n", "want a socket of its own"},
		"no containerd":         {"cri_containerd = ''\n", "cri_containerd"},
		"mode":                  {"mount_mode = 'nfs'\n", "want auto, file, loop or tree"},
		"duration":              {"resolve_timeout = 'soon'\n", `line 1, column 19: toml: "soon" is no duration`},
		"duration without unit": {"registry_wait = 5\n", `"5" is no duration`},
		"one string":            {"stream = 'a/b'\n", "line 1, column 10: the value of stream is of another type than expected, as in: stream = ['registry.example.com/team/*']"},
		"table":                 {"[stream]\na = 1\n", "the value of stream is of another type"},
		"no string":             {"root = ['/r']\n", "as in: root = '/var"},
		"no boolean":            {"read_ahead = 'no'\n", "as in: read_ahead = true"},
		"share without quotes":  {"cache_size = 25\n", "as in: cache_size = '25%'"},
		"no duration":           {"resolve_timeout = '0s'\n", "resolve_timeout"},
		"no wait":               {"registry_wait = '0s'\n", "registry_wait"},
		"level":                 {"log_level = 'loud'\n", `"loud" is no level: want debug, info, warn or error`},
		"pattern":               {"stream = ['registry.example.com']\n", "HOST/REPOSITORY"},
		"pattern with URL":      {"stream = ['https://registry.example.com/*']\n", "HOST/REPOSITORY"},
		"size":                  {"cache_size = '10 potatoes'\n", `cache_size: "10 potatoes" is no size`},
		"size of nothing":       {"cache_size = ''\n", "is no size"},
		"share too large":       {"cache_size = '101%'\n", "is no size"},
		"share of nothing":      {"cache_size = '0%'\n", "is no size"},
		"size too large":        {"cache_size = '9000000TiB'\n", "is no size"},
		"no policy":             {"[[trust]]\nrepositories = ['r.example/*']\n", `trust rule 1: policy = ""`},
		"no such policy":        {"[[trust]]\nrepositories = ['r.example/*']\npolicy = 'strict'\n", "want open, signed, proven or off"},
		"no such default":       {"trust_default = 'none'\n", "want open, signed, proven or off"},
		"rule of nothing":       {"[[trust]]\npolicy = 'off'\n", "trust rule 1: it has no repositories"},
		"rule of a host":        {"[[trust]]\nrepositories = ['r.example/*', 'q.example']\npolicy = 'off'\n", `trust rule 1: repositories: "q.example"`},
		"key of a rule":         {"[[trust]]\nrepos = []\n", `unknown key "trust.repos"`},
		"signed beside open":    {"[[trust]]\nrepositories = ['r.example/*']\npolicy = 'signed'\n", "snapshots are shared by chain ID"},
		"proven beside open":    {"trust_default = 'proven'\n[[trust]]\nrepositories = ['r.example/*']\npolicy = 'open'\n", "snapshots are shared by chain ID"},
		"relative notation_dir": {"notation_dir = 'notation'\n", "want an absolute path"},
		"no time for a proof":   {"proof_deadline = '59s'\n", "want 1m0s or more"},
		"bad glob":              {"stream = ['registry.example.com/[a']\n", "HOST/REPOSITORY"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			if _, err := load(t, c.text); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want an error with %q", err, c.want)
			}
		})
	}
	if _, err := loadConfig(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a configuration file that was named and is not there is no error")
	}
}

func TestSizes(t *testing.T) {
	for s, want := range map[size]int64{"25%": 250, "100%": 1000, "0": 0, "7": 7, "20GiB": 20 << 30, "1KiB": 1024, "8388607TiB": 8388607 << 40} {
		if got, err := s.of(1000); err != nil || got != want {
			t.Errorf("%s of 1000: got %d, %v, want %d", s, got, err, want)
		}
	}
	if got, err := size("50%").in(t.TempDir()); err != nil || got < 1<<20 {
		t.Errorf("half of a file system is %d bytes, %v", got, err)
	}
}

func TestPatterns(t *testing.T) {
	cases := []struct {
		pattern, repo string
		want          bool
	}{
		{"r.example/team/*", "r.example/team/app", true},
		{"r.example/team/*", "r.example/team/sub/app", true},
		{"r.example/team/*", "r.example/team", false},
		{"r.example/team/*", "r.example/teams/app", false},
		{"r.example/*", "r.example/a/b/c", true},
		{"r.example/app", "r.example/app", true},
		{"r.example/app", "r.example/app/sub", false},
		{"r.example/app-*", "r.example/app-1", true},
		{"r.example/*/app", "r.example/team/app", true},
		{"r.example/*/app", "r.example/a/b/app", false},
		{"*.example/app", "r.example/app", true},
		{"*.example/app", "evil.test/r.example/app", false},
		{"*/app", "r.example/app", true},
		{"127.0.0.1:5000/*", "127.0.0.1:5000/app", true},
		{"127.0.0.1:5000/*", "127.0.0.1:5001/app", false},
		{"docker.io/library/*", "docker.io/library/debian", true},
	}
	for _, c := range cases {
		p := patterns{c.pattern}
		if err := p.validate(); err != nil {
			t.Error(err)
		}
		if got := p.allow(registryclient.Repository(c.repo)) == nil; got != c.want {
			t.Errorf("%s allows %s: got %v, want %v", c.pattern, c.repo, got, c.want)
		}
	}
	if (patterns{}).allow("r.example/app") == nil {
		t.Error("an empty list allows a repository")
	}
}

// Of a damaged file, the lines that are right are kept.
func TestSalvage(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.toml")
	text := "root = \"/data\"\nstreem = []\naddress = \"relative\"\ncache_size = \"1GiB\"\nbackground_bandwidth = \"0\"\nregistry_wait = \n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	want := defaults()
	want.Root, want.CacheSize, want.Background = "/data", "1GiB", "0"
	if got := salvage(file); !reflect.DeepEqual(got, want) {
		t.Errorf("salvaged %+v, want %+v", got, want)
	}
}

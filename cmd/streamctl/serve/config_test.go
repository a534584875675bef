package serve

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

func load(t *testing.T, text string) (Config, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "serve.toml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load(file)
}

// all is a configuration with something in each table.
const all = `data_dir = '/data'
limits = { memory = '2GiB', conversions = 3 }
[times]
lease = '1m'
[[registry]]
name = 'r.example'
username = 'me'
password_file = '/p'
[[token]]
name = 'ci'
file = '/t'
grants = [{ role = 'writer', repository = 'team/*' }]
[oidc]
issuer = 'https://login.example'
rules = [{ claim = 'groups', value = 'x', grants = [{ role = 'owner' }] }]
[[webhook]]
name = 'h'
kind = 'distribution'
registry = 'r.example'
secret_file = '/s'
header = 'Authorization'
`

// What --print-config prints is a configuration file that says the same.
func TestConfigPrintsItself(t *testing.T) {
	for _, text := range []string{"", all} {
		c, err := load(t, text)
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := c.Write(&b); err != nil {
			t.Fatal(err)
		}
		again, err := load(t, b.String())
		if err != nil {
			t.Fatalf("%v in\n%s", err, b.String())
		}
		var c2 bytes.Buffer
		if err := again.Write(&c2); err != nil {
			t.Fatal(err)
		}
		if b.String() != c2.String() {
			t.Errorf("printed\n%s\nand again\n%s", b.String(), c2.String())
		}
	}
}

// The tables that a configuration lacks are printed as comments, which are right when they are made none.
func TestConfigExamples(t *testing.T) {
	var b bytes.Buffer
	if err := Defaults().Write(&b); err != nil {
		t.Fatal(err)
	}
	_, examples, ok := strings.Cut(b.String(), "\n# [[registry]]")
	if !ok {
		t.Fatalf("no example of a registry in\n%s", b.String())
	}
	text := regexp.MustCompile(`(?m)^# `).ReplaceAllString("# [[registry]]"+examples, "")
	c, err := load(t, "data_dir = '/data'\n"+text)
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	want := example()
	for name, pair := range map[string][2]any{"registry": {c.Registries, want.Registries}, "token": {c.Tokens, want.Tokens}, "oidc": {c.OIDC, want.OIDC}} {
		if !reflect.DeepEqual(pair[0], pair[1]) {
			t.Errorf("%s: %+v, want %+v", name, pair[0], pair[1])
		}
	}
	if len(c.Webhooks) != 1 || c.Webhooks[0].Header != "Authorization" {
		t.Errorf("webhooks: %+v", c.Webhooks)
	}
}

func TestConfigErrors(t *testing.T) {
	const registry = "\n[[registry]]\nname = 'r.example'\n"
	cases := map[string]struct{ text, want string }{
		"unknown key":        {"data_dri = '/r'\n", `line 1: unknown key "data_dri" (` + "`streamctl serve --print-config`"},
		"unknown key below":  {registry + "passwort = 'x'\n", `unknown key "registry.passwort"`},
		"listen":             {"listen = '8480'\n", "want an address and a port"},
		"metrics":            {"metrics = 'here'\n", "want an address and a port"},
		"relative":           {"data_dir = 'data'\n", "want an absolute path"},
		"proxies":            {"trusted_proxies = ['10.0.0.1']\n", "is no network"},
		"size":               {"[limits]\nmemory = 'much'\n", `"much" is no size`},
		"no string":          {"[convert]\nprofile = true\n", "the value of convert.profile is of another type than expected, as in: profile = 'static'"},
		"duration":           {"[times]\nlease = 30\n", `"30" is no duration`},
		"no lease":           {"[times]\nlease = '0s'\n", "times.lease"},
		"level":              {"log_level = 'loud'\n", "is no level"},
		"chunks":             {"[convert]\nchunk_size = '1GiB'\n", "convert.chunk_size"},
		"profile":            {"[convert]\nprofile = 'learned'\n", "want static or none"},
		"no conversions":     {"[limits]\nconversions = 0\n", "limits.conversions"},
		"two replicas":       {"[nats]\nurl = 'nats://h:4222'\nreplicas = 2\n", "nats.replicas"},
		"embedded replicas":  {"[nats]\nreplicas = 3\n", "give their url"},
		"user in the URL":    {"[nats]\nurl = 'nats://me:secret@h:4222'\n", "nats.url has a user"},
		"half of NATS":       {"[nats]\nurl = 'nats://h:4222'\nusername = 'me'\n", "nats: username and password_file go together"},
		"no URL of NATS":     {"[nats]\npassword_file = '/p'\nusername = 'me'\n", "give their url"},
		"half of TLS":        {"[nats]\nurl = 'nats://h:4222'\nkey = '/k'\n", "nats: certificate and key go together"},
		"no URL":             {"behind_proxy = true\n", "url = \"https://...\""},
		"clear URL":          {"behind_proxy = true\nurl = 'http://convert.example.com'\n", "url = \"https://...\""},
		"log format":         {"log_format = 'xml'\n", "want text or json"},
		"webhook's kind":     {registry + "[[webhook]]\nname = 'h'\nkind = 'quay'\nregistry = 'r.example'\n", "webhook h: kind \"quay\""},
		"open webhook":       {registry + "[[webhook]]\nname = 'h'\nkind = 'acr'\nregistry = 'r.example'\n", "webhook h: it has 0 of"},
		"webhook's secret":   {registry + "[[webhook]]\nname = 'h'\nkind = 'acr'\nregistry = 'r.example'\nheader = 'X'\n", "webhook h: want a secret_file"},
		"half a certificate": {"[tls]\ncertificate = '/c'\n", "tls: certificate and key go together"},
		"registry's path":    {"[[registry]]\nname = 'r.example/team'\n", "want a host"},
		"registry twice":     {registry + registry, "is there twice"},
		"half a login":       {registry + "username = 'me'\n", "go together"},
		"other default":      {"default_registry = 'q.example'\n" + registry, "is none of the registries"},
		"other webhook":      {registry + "[[webhook]]\nname = 'h'\nregistry = 'q.example'\n", "is none of the registries"},
		"role":               {"[[token]]\nname = 'x'\ngrants = [{ role = 'god' }]\n", "god"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			if _, err := load(t, c.text); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want an error with %q", err, c.want)
			}
		})
	}
	if _, err := Load(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a configuration file that was named and is not there is no error")
	}
}

// TestConfigsOfDocs: what docs/service.md shows of configurations is one.
func TestConfigsOfDocs(t *testing.T) {
	b, err := os.ReadFile("../../../docs/service.md")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, block := range regexp.MustCompile(`(?m)(^    .*\n|^\n)+`).FindAllString(string(b), -1) {
		if !strings.Contains(block, " = ") {
			continue
		}
		n++
		if _, err := load(t, strings.ReplaceAll(block, "\n    ", "\n")); err != nil {
			t.Errorf("%v in\n%s", err, block)
		}
	}
	if n < 3 {
		t.Errorf("%d configurations", n)
	}
}

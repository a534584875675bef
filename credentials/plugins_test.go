package credentials

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

const answer = `{"apiVersion":"credentialprovider.kubelet.k8s.io/v1","kind":"CredentialProviderResponse","cacheKeyType":"%s",%s"auth":{"%s":{"username":"u","password":"hush"}}}`

// plugin is an executable that speaks the protocol, and its configuration.
type plugin struct {
	dir  string
	runs string // file with a line for each run: the request, the arguments and $REGION
}

// newPlugin writes a plugin that answers a request with what the shell commands in body print.
func newPlugin(t *testing.T, body, match, more string) (plugin, *Plugins) {
	t.Helper()
	p := plugin{dir: t.TempDir()}
	p.runs = filepath.Join(p.dir, "runs")
	p.write(t, "test-provider", 0o755, "#!/bin/sh\necho \"$(cat) $* $REGION\" >>"+p.runs+"\n"+body+"\n")
	p.configure(t, match, more)
	s := NewPlugins(filepath.Join(p.dir, "config.yaml"), p.dir)
	t.Cleanup(func() { s.Close() })
	return p, s
}

func (p plugin) write(t *testing.T, name string, mode os.FileMode, text string) {
	t.Helper()
	writeFile(t, filepath.Join(p.dir, name), mode, text)
}

func (p plugin) configure(t *testing.T, match, more string) {
	t.Helper()
	p.write(t, "config.yaml", 0o600, fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: test-provider
  matchImages: [%q]
  defaultCacheDuration: 12h
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  args: [get-credentials, --v=3]
  env: [{name: REGION, value: north}]
%s`, match, more))
}

func (p plugin) ran(t *testing.T) []string {
	t.Helper()
	b, err := os.ReadFile(p.runs)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")[:strings.Count(string(b), "\n")]
}

// says is the shell command that prints an answer.
func says(cacheKeyType, more, pattern string) string {
	return fmt.Sprintf("cat <<'X'\n"+answer+"\nX", cacheKeyType, more, pattern)
}

func wantLogins(t *testing.T, s Source, image string, want ...Login) {
	t.Helper()
	if got, err := s.Lookup(t.Context(), at(image)); err != nil || !slices.Equal(got, want) {
		t.Errorf("%s: got %v, %v, want %v", image, got, err, want)
	}
}

// A plugin authorises the reads of an image, and is asked with the protocol's request, its arguments and environment.
func TestPlugin(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	r.RequireToken(registrytest.TokenOptions{User: "u", Password: "hush"})
	blob := r.PutBlob("team/app", []byte("x"))
	p, s := newPlugin(t, says("Registry", "", r.Host()), r.Host(), "")
	c, err := registryclient.New(registryclient.Options{Credentials: Chain(s)})
	if err != nil {
		t.Fatal(err)
	}
	repo := registryclient.Repository(r.Host() + "/team/app")
	for range 2 {
		if _, err := c.Blob(t.Context(), repo, blob, 1); err != nil {
			t.Fatal(err)
		}
		r.ExpireTokens()
	}
	want := `{"apiVersion":"credentialprovider.kubelet.k8s.io/v1","image":"` + string(repo) + `","kind":"CredentialProviderRequest"} get-credentials --v=3 north`
	if got := p.ran(t); len(got) != 1 || got[0] != want {
		t.Errorf("ran with %q, want %q", got, want)
	}
	if hosts := c.Hosts(); len(hosts) != 1 || !slices.Equal(hosts[0].Accepted, []string{"credential provider plugin"}) {
		t.Errorf("got %+v", hosts)
	}
}

// How long and for what an answer is kept is the answer's to say, and the configuration's where it does not.
func TestPluginCache(t *testing.T) {
	for name, tc := range map[string]struct {
		key, more string
		runs      int // for one image twice, another of its registry, and one of another registry
	}{
		"image":          {"Image", "", 3},
		"registry":       {"Registry", "", 2},
		"global":         {"Global", "", 1},
		"not at all":     {"Global", `"cacheDuration":"0s",`, 4},
		"for a moment":   {"Global", `"cacheDuration":"1ns",`, 4},
		"for an hour":    {"Image", `"cacheDuration":"1h",`, 3},
		"for nobody yet": {"Image", `"cacheDuration":null,`, 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, s := newPlugin(t, says(tc.key, tc.more, "*.example.com"), "*.example.com", "")
			for _, image := range []string{"a.example.com/x", "a.example.com/x", "a.example.com/y", "b.example.com/x"} {
				wantLogins(t, s, image, Login{"u", "hush"})
			}
			wantLogins(t, s, "a.example.org/x") // is not asked for
			if got := len(p.ran(t)); got != tc.runs {
				t.Errorf("ran %d times, want %d", got, tc.runs)
			}
		})
	}
}

// The versions that kubelet accepts are the same protocol, and a plugin that does without a service account's token is run without.
func TestPluginVersions(t *testing.T) {
	for _, v := range apiVersions {
		to := func(s string) string {
			return strings.NewReplacer(protocolGroup+"v1", protocolGroup+v, configGroup+"v1", configGroup+v).Replace(s)
		}
		p, s := newPlugin(t, to(says("Image", "", "example.com")), "example.com", "  tokenAttributes: {serviceAccountTokenAudience: x, cacheType: Token, requireServiceAccount: false}\n")
		config, err := os.ReadFile(s.config)
		if err != nil {
			t.Fatal(err)
		}
		p.write(t, "config.yaml", 0o600, to(string(config)))
		wantLogins(t, s, "example.com/x", Login{"u", "hush"})
		if got := p.ran(t); len(got) != 1 || !strings.HasPrefix(got[0], `{"apiVersion":"`+protocolGroup+v+`",`) {
			t.Errorf("%s: ran with %q", v, got)
		}
	}
}

// What a registry refuses is not waited for until its time is over, nor is the plugin run for each request.
func TestPluginAnswerRefused(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	blob := r.PutBlob("team/app", []byte("x"))
	p, s := newPlugin(t, `cat "$(dirname $0)/answer"`, r.Host(), "")
	answers := func(secret string) {
		p.write(t, "answer", 0o600, strings.Replace(fmt.Sprintf(answer, "Registry", "", r.Host()), "hush", secret, 1))
	}
	c, err := registryclient.New(registryclient.Options{Credentials: Chain(s)})
	if err != nil {
		t.Fatal(err)
	}
	read := func() error {
		_, err := c.Blob(t.Context(), registryclient.Repository(r.Host()+"/team/app"), blob, 1)
		return err
	}
	for name, require := range map[string]func(secret string){
		"basic": func(secret string) { r.RequireBasic("u", secret) },
		"token": func(secret string) { r.RequireToken(registrytest.TokenOptions{User: "u", Password: secret}) },
		"403": func(secret string) {
			r.RequireToken(registrytest.TokenOptions{User: "u", Password: secret, Refusal: 403})
		},
	} {
		old, now := name+" of old", name+" of now"
		answers(old)
		require(old)
		_ = read() // where it is another case's that is kept
		s.age(doubtful)
		if err := read(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		answers(now)
		require(now)
		s.age(0)
		runs := len(p.ran(t))
		for range 3 {
			if err := read(); err == nil {
				t.Errorf("%s: an answer of a moment ago was asked for again", name)
			}
		}
		if got := len(p.ran(t)) - runs; got != 0 {
			t.Errorf("%s: ran %d times", name, got)
		}
		s.age(doubtful)
		if err := read(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got := len(p.ran(t)) - runs; got != 1 {
			t.Errorf("%s: ran %d times", name, got)
		}
	}
}

// age makes what is kept as old as d.
func (s *Plugins) age(d time.Duration) {
	for _, p := range s.providers {
		for k, c := range p.cache {
			c.at = time.Now().Add(-d)
			p.cache[k] = c
		}
	}
}

// Who ask at the same time run it once.
func TestPluginRunsOnce(t *testing.T) {
	open := filepath.Join(t.TempDir(), "open")
	p, s := newPlugin(t, "while [ ! -e "+open+" ]; do sleep 0.01; done\n"+says("Image", "", "example.com"), "example.com", "")
	var wg sync.WaitGroup
	asked := make(chan struct{}, 20)
	for range 20 {
		wg.Go(func() {
			asked <- struct{}{}
			wantLogins(t, s, "example.com/x", Login{"u", "hush"})
		})
	}
	for range 20 {
		<-asked
	}
	if err := os.WriteFile(open, nil, 0o600); err != nil {
		t.Error(err)
	}
	wg.Wait()
	if got := len(p.ran(t)); got != 1 {
		t.Errorf("ran %d times", got)
	}
}

// What a plugin leaves behind is killed with it.
func TestPluginChildren(t *testing.T) {
	p, s := newPlugin(t, `sleep 3600 & echo $! >"$(dirname $0)/child"; wait`, "example.com", "")
	s.timeout = 2 * time.Second
	if _, err := s.Lookup(t.Context(), at("example.com/x")); err == nil {
		t.Error("no error")
	}
	b, err := os.ReadFile(filepath.Join(p.dir, "child"))
	if err != nil {
		t.Fatal(err)
	}
	stat := "/proc/" + strings.TrimSpace(string(b)) + "/cmdline" // empty for a zombie
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if b, err := os.ReadFile(stat); err != nil || len(b) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatal("its child lives")
		}
	}
}

// asker makes the test's process one that asks the plugin of a directory.
const asker = "STREAMING_SNAPSHOTTER_TEST_ASKER"

// A plugin that hangs does not outlive a daemon that is killed.
func TestPluginOfKilledProcess(t *testing.T) {
	if dir := os.Getenv(asker); dir != "" {
		NewPlugins(filepath.Join(dir, "config.yaml"), dir).Lookup(t.Context(), at("r.example.com/app"))
		return
	}
	p, _ := newPlugin(t, "cd $(dirname $0); echo $$ >new; mv new pid; exec sleep 1000", "r.example.com", "")
	process := exec.Command(os.Args[0], "-test.run=^TestPluginOfKilledProcess$")
	process.Env = append(os.Environ(), asker+"="+p.dir)
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	eventually := func(what string, f func() bool) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); !f(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("not within a minute: %s", what)
			}
		}
	}
	defer process.Wait()
	defer process.Process.Kill()
	var pid int
	eventually("the plugin runs", func() bool {
		b, _ := os.ReadFile(filepath.Join(p.dir, "pid"))
		_, err := fmt.Sscan(string(b), &pid)
		return err == nil
	})
	process.Process.Kill()
	defer syscall.Kill(pid, syscall.SIGKILL)
	eventually("the plugin has ended", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		return err != nil || len(b) == 0 // a zombie has none
	})
}

// The configuration is read again when it has changed, and one that is wrong leaves what was there.
func TestPluginConfigChanges(t *testing.T) {
	p, s := newPlugin(t, says("Image", "", "*.example.com"), "a.example.com", "")
	wantLogins(t, s, "b.example.com/x")
	p.configure(t, "b.example.com", "# longer")
	wantLogins(t, s, "b.example.com/x", Login{"u", "hush"})
	p.write(t, "config.yaml", 0o600, "kind: Other")
	if got, err := s.Lookup(t.Context(), at("b.example.com/x")); len(got) != 1 || err == nil {
		t.Errorf("got %v, %v, want what was there and an error", got, err)
	}
	// A directory is all its files in order.
	d := filepath.Join(p.dir, "config.d")
	if err := os.Mkdir(d, 0o700); err != nil {
		t.Fatal(err)
	}
	p.configure(t, "c.example.com", "")
	if err := os.Rename(filepath.Join(p.dir, "config.yaml"), filepath.Join(d, "10.yaml")); err != nil {
		t.Fatal(err)
	}
	s = NewPlugins(d, p.dir)
	defer s.Close()
	wantLogins(t, s, "c.example.com/x", Login{"u", "hush"})
}

// A plugin that is broken in any way is told, and does not hinder the source behind it.
func TestHostilePlugins(t *testing.T) {
	const more = "  tokenAttributes: {serviceAccountTokenAudience: x, cacheType: Token, requireServiceAccount: true}\n"
	for name, tc := range map[string]struct{ body, more, says string }{
		"hangs":             {"sleep 3600", "", "no answer within"},
		"hangs deaf":        {"trap '' TERM INT HUP; while :; do sleep 1; done", "", "no answer within"},
		"leaves a child":    {says("Image", "", "example.com") + "\nsleep 3600 &\nexit 1", "", "exit status 1"},
		"prints garbage":    {"echo hush", "", "no JSON"},
		"prints two":        {says("Image", "", "example.com") + "\necho hush", "", "no JSON"},
		"prints nothing":    {":", "", "no JSON"},
		"prints for ever":   {"yes hush", "", "more than 1048576 bytes"},
		"exits with 1":      {"echo out of luck >&2; exit 1", "", "exit status 1: out of luck"},
		"says a lot":        {"yes no | head -c 10000000 >&2; exit 1", "", "exit status 1: no"},
		"of another kind":   {strings.Replace(says("Image", "", "example.com"), "CredentialProviderResponse", "Pod", 1), "", "not a CredentialProviderResponse"},
		"of another time":   {strings.Replace(says("Image", "", "example.com"), "k8s.io/v1", "k8s.io/v1beta1", 1), "", "not a CredentialProviderResponse"},
		"keeps it as it is": {says("Forever", "", "example.com"), "", "cacheKeyType"},
		"is not there":      {"", "", "no such file"},
		"wants a token":     {says("Image", "", "example.com"), more, "CRI proxy"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, s := newPlugin(t, tc.body, "example.com", tc.more)
			if tc.says == "no answer within" {
				s.timeout = 3 * time.Second // less than what Chain waits for
			}
			if tc.body == "" {
				if err := os.Remove(filepath.Join(p.dir, "test-provider")); err != nil {
					t.Fatal(err)
				}
			}
			var got []registryclient.Credential
			var errs []string
			for c, err := range Chain(s, fixed{"behind", Login{"b", "bs"}})(t.Context(), at("example.com/x")) {
				if err != nil {
					errs = append(errs, err.Error())
				} else {
					got = append(got, c)
				}
			}
			if !slices.Equal(got, []registryclient.Credential{{Source: "behind", User: "b", Secret: "bs"}}) {
				t.Errorf("got %v", got)
			}
			if len(errs) != 1 || !strings.Contains(errs[0], tc.says) || strings.Contains(errs[0], "hush") || len(errs[0]) > 500 {
				t.Errorf("got %.1000q, want %q", errs, tc.says)
			}
		})
	}
}

// fixed is a source that has one login for everything.
type fixed struct {
	name  string
	login Login
}

func (f fixed) Name() string { return f.name }

func (f fixed) Lookup(context.Context, registryclient.Place) ([]Login, error) {
	return []Login{f.login}, nil
}

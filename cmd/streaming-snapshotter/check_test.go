package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/install"
	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/traps"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// What is wrong with the node itself has a name, too, and scripts can tell what was found from what could not be looked at.
func TestCheckNode(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	config := writeConfig(t, root, root+".sock")
	addConfig(t, config, "cache_size = '8000TiB'")
	p := start(t, "check", "-o", "json", "--config", config, "--containerd", root+".none")
	var r checkReport
	if err := json.NewDecoder(p.stdout).Decode(&r); err != nil {
		p.wait()
		t.Fatalf("%v\n%s", err, &p.stderr)
	}
	p.wait()
	if got := p.ProcessState.ExitCode(); got != 1 {
		t.Errorf("exit status %d, want 1", got)
	}
	for _, want := range []traps.Code{nothingListed, daemonDown, cacheTooLarge} {
		if !slices.ContainsFunc(r.Traps, func(t traps.Trap) bool { return t.Code == want && t.Text != "" && t.Remedy != "" }) {
			t.Errorf("no %s in %+v", want, r.Traps)
		}
	}
	for _, trap := range r.Traps {
		if trap.Code == daemonDown && (strings.Contains(trap.Remedy, "systemctl") != install.Systemd() || strings.Contains(trap.Remedy, install.Supervise) == install.Systemd()) {
			t.Errorf("where systemd runs is %v, and what to do: %s", install.Systemd(), trap.Remedy)
		}
	}
	if len(r.Unknown) == 0 || !strings.Contains(r.Unknown[0], root+".none") || r.MountMode == "" || r.Kernel == "" || r.Disk.Free == 0 {
		t.Errorf("got %+v", r)
	}
	for _, args := range [][]string{{"-o", "yaml"}, {"a", "b"}, {"--no-such-flag"}, {"::"}} {
		p := start(t, append([]string{"check", "--config", config}, args...)...)
		p.wait()
		if got := p.ProcessState.ExitCode(); got != 2 {
			t.Errorf("check %q: exit status %d, want 2\n%s", args, got, &p.stderr)
		}
		p.wantNothingLeft()
	}
}

// Mirrors of which the daemon knows nothing are a trap: containerd has them in another directory, or in its configuration itself.
func TestCheckHosts(t *testing.T) {
	some := filepath.Join(t.TempDir(), "certs.d")
	if err := os.MkdirAll(filepath.Join(some, "r.example"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ dump, hostsDir, want string }{
		"the same":             {"[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/a:/b/'\n", "/b", ""},
		"none":                 {"[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = ''\n", "/b", ""},
		"another":              {"[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/a:/b'\n", "/c", `hosts_dir = "/a"`},
		"another, 1.7":         {"[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '/a'\n", "/c", `hosts_dir = "/a"`},
		"the daemon's is none": {"[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/a'\n", "", `hosts_dir = "/a"`},
		"none, 1.7":            {"[plugins.'io.containerd.grpc.v1.cri']\n", "/none", ""},
		"not looked for, 1.7":  {"[plugins.'io.containerd.grpc.v1.cri']\n", some, "set config_path = "},
		"in the file itself":   {"[plugins.'io.containerd.grpc.v1.cri'.registry.mirrors.'r.example']\nendpoint = ['http://m.example']\n", "/c", "hosts.toml below /c"},
	} {
		var r checkReport
		conf := defaults()
		conf.HostsDir = c.hostsDir
		version := "version = 3\n"
		if strings.Contains(c.dump, "grpc") {
			version = "version = 2\n"
		}
		r.checkHosts(conf, traps.Find([]byte(version+c.dump), traps.Want{}))
		if c.want == "" && len(r.Traps) > 0 || c.want != "" && (len(r.Traps) != 1 || r.Traps[0].Code != otherHosts || !strings.Contains(r.Traps[0].Remedy, c.want)) {
			t.Errorf("%s: got %+v, want %q", name, r.Traps, c.want)
		}
	}
}

// Where the registry wants to know who asks, check says whose credentials it has let in, or that none are.
func TestCheckCredentials(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	ref := reg.Host() + "/app:v1"
	push(t, ref)
	convert(t, ref)
	reg.RequireToken(registrytest.TokenOptions{User: "joe", Password: "secret"})
	root := filepath.Join(t.TempDir(), "root")
	config := writeConfig(t, root, root+".sock")
	addConfig(t, config, "stream = ['"+reg.Host()+"/*']")
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	for _, password := range []string{"wrong", "secret"} {
		auth := base64.StdEncoding.EncodeToString([]byte("joe:" + password))
		if err := os.WriteFile(filepath.Join(dir, "config.json"), fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, reg.Host(), auth), 0o600); err != nil {
			t.Fatal(err)
		}
		p := start(t, "check", "-o", "json", "--config", config, "--containerd", root+".none", ref)
		var r checkReport
		if err := json.NewDecoder(p.stdout).Decode(&r); err != nil {
			p.wait()
			t.Fatalf("%v\n%s", err, &p.stderr)
		}
		p.wait()
		if r.Image == nil || len(r.Image.Hosts) != 1 {
			t.Fatalf("got %+v", r.Image)
		}
		h := r.Image.Hosts[0]
		if password == "wrong" && (r.Image.Reason != reason.Auth || len(h.Credentials) > 0 || h.Error == "") {
			t.Errorf("with a wrong password: %+v", r.Image)
		}
		if password == "secret" && (r.Image.Reason != "" || r.Image.Layers != 2 || h.Error != "" || len(h.Credentials) != 1 || !strings.Contains(h.Credentials[0], "docker")) {
			t.Errorf("with the right password: %+v", r.Image)
		}
		if strings.Contains(fmt.Sprintf("%+v", r), password) && password == "secret" {
			t.Error("check prints the password")
		}
	}
}

// What check prints is as safe for a terminal as what status does.
func TestCheckIsPrintable(t *testing.T) {
	const evil = "evil\x1b[2J\u009b\r\nname"
	r := checkReport{
		MountMode: evil, NotTaken: evil, Kernel: evil, Stream: patterns{evil}, Daemon: evil, Containerd: containerdReport{Version: evil, Config: evil},
		Traps: []traps.Trap{{Code: evil, Text: evil, Remedy: evil}}, Unknown: []string{evil},
	}
	image := imageReport{Ref: evil, Manifest: evil, Hosts: []hostReport{{Host: evil, Capabilities: evil, Credentials: []string{evil}, Error: evil}}, LastPull: &normalPull{At: evil, Error: evil}}
	unknown, not := image, image
	unknown.Unknown, not.Reason, not.Error, not.Remedy = evil, evil, evil, evil
	for _, i := range []imageReport{image, unknown, not} {
		for _, asJSON := range []bool{false, true} {
			r.Image = &i
			var b strings.Builder
			if err := r.print(&b, asJSON); err != nil {
				t.Fatal(err)
			}
			if at := strings.IndexFunc(b.String(), func(r rune) bool { return r != '\n' && !strconv.IsPrint(r) }); at >= 0 || strings.Contains(b.String(), "\nname") {
				t.Errorf("JSON %v: byte %d of\n%s", asJSON, at, &b)
			}
		}
	}
}

// An image in quarantine is a trap, and so are those whose proof is overdue, in one; not one that waits for its proof, or is proven.
func TestCheckProofs(t *testing.T) {
	now := time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)
	image := func(ref string, due time.Duration, quarantine string) imageStatus {
		i := imageStatus{Ref: ref, ImageStatus: stream.ImageStatus{Layers: 3, Proven: 1, Quarantine: quarantine}}
		if due != 0 {
			at := now.Add(due)
			i.ProofDue = &at
		}
		return i
	}
	var r checkReport
	r.checkProofs(status{Images: []imageStatus{image("proven", 0, ""), image("waits", time.Second, "")}}, now)
	if len(r.Traps) > 0 {
		t.Errorf("got %+v", r.Traps)
	}
	s := status{Images: []imageStatus{image("waits", time.Second, ""), image("lies", 0, "artifact sha256:1 lies")}}
	for i := range maxLate + 2 {
		s.Images = append(s.Images, image(fmt.Sprint("late-", i), -time.Second, ""))
	}
	r.checkProofs(s, now)
	if len(r.Traps) != 2 || r.Traps[0].Code != quarantined || r.Traps[1].Code != unproven || r.Traps[1].Remedy == "" {
		t.Fatalf("got %+v", r.Traps)
	}
	if got, want := r.Traps[0], (traps.Trap{Code: quarantined, Text: "lies: artifact sha256:1 lies", Remedy: reason.Tampered.Remedy()}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if text := r.Traps[1].Text; !strings.Contains(text, "late-0, 1 of 3 layers proven, due 2026-11-30T11:59:59Z; late-1") || !strings.HasSuffix(text, "; and 2 more") || strings.Contains(text, "waits") {
		t.Errorf("got %s", text)
	}
}

// docs/operations.md has all traps.
func TestTrapsAreDocumented(t *testing.T) {
	b, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(b), "\n## Check\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var documented []traps.Code
	for _, row := range regexp.MustCompile("(?m)^\\| (`[^|]*) \\|").FindAllStringSubmatch(section, -1) {
		for _, code := range regexp.MustCompile("[A-Z_]+").FindAllString(row[1], -1) {
			documented = append(documented, traps.Code(code))
		}
	}
	want := append(traps.All(), nothingListed, paused, daemonDown, safeMode, cacheTooLarge, noHoles, noHTTPProxy, quarantined, unproven, otherContainerd, otherHosts)
	slices.Sort(want)
	slices.Sort(documented)
	if !slices.Equal(documented, want) {
		t.Errorf("documented: %v\nthere are:  %v", documented, want)
	}
}

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestConfigure: a flag counts more than the environment, and that more than the file, which only the user can read.
func TestConfigure(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("XDG_CONFIG_HOME", dir)
	file := filepath.Join(dir, "streamctl", "config.toml")
	succeed(t, "configure", "--registry", "file.example", "--server", "https://file.example", "--token-file", "token")
	st, err := os.Stat(file)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v; want mode 0600", st, err)
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	want := [][]string{
		{"KEY", "VALUE", "FROM"}, {"registry", "file.example", file}, {"server", "https://file.example", file},
		{"token_file", filepath.Join(here, "token"), file}, {"server_ca", "-", "-"},
	}
	checkListed(t, want)

	t.Setenv("STREAMCTL_SERVER", "https://env.example")
	t.Setenv("STREAMCTL_TOKEN", "secret")
	want[2] = []string{"server", "https://env.example", "STREAMCTL_SERVER"}
	want = append(want[:4:4], []string{"token", "(not", "shown)", "STREAMCTL_TOKEN"}, want[4])
	checkListed(t, want)
	p, err := effective()
	if err != nil || p.Registry != "file.example" || p.Server != "https://env.example" {
		t.Errorf("effective: %+v, %v", p, err)
	}

	// One is changed, another forgotten, and the rest stay.
	succeed(t, "configure", "--registry", "other.example", "--token-file", "")
	p, err = readPreferences()
	if err != nil || p.Registry != "other.example" || p.Server != "https://file.example" || p.TokenFile != "" {
		t.Errorf("after a change: %+v, %v", p, err)
	}

	if got, err := (&hostFlags{}).host(); err != nil || got != "other.example" {
		t.Errorf("without -n: %q, %v", got, err)
	}
	t.Setenv("STREAMCTL_REGISTRY", "env.example")
	for want, f := range map[string]hostFlags{"env.example": {}, "flag.example": {name: "flag.example"}, "my-tenant.azurecr.io": {name: "my", suffix: "tenant"}} {
		if got, err := f.host(); err != nil || got != want {
			t.Errorf("%+v: %q, %v; want %q", f, got, err, want)
		}
	}

	if err := os.WriteFile(file, []byte("sever = \"x\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if status, _, stderr := streamctl(t, "create", "-t", "a:b"); status != 1 || !strings.Contains(stderr, file+": line 1: unknown key \"sever\"") {
		t.Errorf("a file with a wrong key: %d, %s", status, stderr)
	}
}

func checkListed(t *testing.T, want [][]string) {
	t.Helper()
	stdout, _ := succeed(t, "configure", "--list")
	lines := strings.Split(strings.TrimSpace(stdout), "\n")
	if len(lines) != len(want) {
		t.Fatalf("configure --list prints\n%s, want %d lines", stdout, len(want))
	}
	for i, line := range lines {
		if got := strings.Fields(line); strings.Join(got, " ") != strings.Join(want[i], " ") {
			t.Errorf("configure --list, line %d: %q, want %q", i, got, want[i])
		}
	}
}

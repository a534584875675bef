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
	succeed(t, "configure", "--registry", "file.example")
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v; want mode 0600", st, err)
	}
	checkListed(t, [][]string{{"KEY", "VALUE", "FROM"}, {"registry", "file.example", file}})
	if got, err := (&hostFlags{}).host(); err != nil || got != "file.example" {
		t.Errorf("without -n: %q, %v", got, err)
	}
	t.Setenv("STREAMCTL_REGISTRY", "env.example")
	checkListed(t, [][]string{{"KEY", "VALUE", "FROM"}, {"registry", "env.example", "STREAMCTL_REGISTRY"}})
	for want, f := range map[string]hostFlags{"env.example": {}, "flag.example": {name: "flag.example"}, "my-tenant.azurecr.io": {name: "my", suffix: "tenant"}} {
		if got, err := f.host(); err != nil || got != want {
			t.Errorf("%+v: %q, %v; want %q", f, got, err, want)
		}
	}
	os.Unsetenv("STREAMCTL_REGISTRY")
	succeed(t, "configure", "--registry", "")
	checkListed(t, [][]string{{"KEY", "VALUE", "FROM"}, {"registry", "-", "-"}})
	if err := os.WriteFile(file, []byte("regsitry = \"x\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if status, _, stderr := streamctl(t, "create", "-t", "a:b"); status != 1 || !strings.Contains(stderr, file+": line 1: unknown key \"regsitry\"") {
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

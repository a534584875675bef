package layers

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Each attack in docs/security.md names tests, and there are such.
func TestAttacksHaveTests(t *testing.T) {
	b, err := os.ReadFile("docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`([a-z/]+)` `(Test[A-Za-z0-9]+)`")
	has := func(dir, test string) bool {
		files, _ := filepath.Glob(filepath.Join(dir, "*_test.go"))
		return slices.ContainsFunc(files, func(f string) bool {
			src, err := os.ReadFile(f)
			return err == nil && strings.Contains(string(src), "func "+test+"(t *testing.T)")
		})
	}
	for _, m := range named.FindAllStringSubmatch(string(b), -1) {
		if !has(m[1], m[2]) {
			t.Errorf("%s has no %s", m[1], m[2])
		}
	}
	_, table, _ := strings.Cut(string(b), "\n## Attacks\n")
	table, _, _ = strings.Cut(table, "\n## ")
	rows := 0
	for line := range strings.Lines(table) {
		if !strings.HasPrefix(line, "| ") || strings.HasPrefix(line, "| attack |") {
			continue
		}
		rows++
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		if !named.MatchString(cells[len(cells)-1]) {
			t.Errorf("no test in: %s", line)
		}
	}
	if rows < 20 {
		t.Errorf("%d rows", rows)
	}
}

// registryBytes are the packages that decode what comes from registries, and those that judge it.
var registryBytes = []string{"artifact", "registryclient", "trust", "trust/notary", "snapshot/stream", "snapshot/ledger", "fs/tree", "fs/cache", "fs/erofs", "plain"}

// What comes from registries is decoded without unsafe.
func TestNoUnsafe(t *testing.T) {
	for _, file := range sources(t) {
		if !slices.Contains(registryBytes, filepath.Dir(file)) {
			continue
		}
		src, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(src), "\"unsafe\"") || strings.Contains(string(src), "//go:linkname") {
			t.Errorf("%s is unsafe: bytes of registries come there", file)
		}
	}
}

// starters are the files that start programs. Beside them notation-go starts its plugins.
var starters = []string{
	"credentials/docker.go", "credentials/programs.go", // the daemon's
	"cmd/streaming-snapshotter/install/dump.go", "cmd/streaming-snapshotter/install/enter.go", "cmd/streaming-snapshotter/install/services.go", // install, uninstall and check
	"cmd/streaming-snapshotter/record.go", "cmd/streaming-snapshotter/supervise.go",
}

// Nothing but install starts a shell, for --restart-containerd, and no file more than these starts a program.
func TestStartsNoShell(t *testing.T) {
	elsewhere := []string{"converter/startup/", "deploy/image/", "integration/", "registryclient/registrytest/"} // in no program, or where scripts of images are read
	shell := regexp.MustCompile(`["` + "`" + `](/usr)?(/bin/)?(ba|da)?sh["` + "`" + `]`)
	starts := regexp.MustCompile(`"os/exec"|os\.StartProcess|\.ForkExec\(|(syscall|unix)\.Exec\(`)
	found := map[string]bool{}
	for _, file := range sources(t) {
		if slices.ContainsFunc(elsewhere, func(dir string) bool { return strings.HasPrefix(file, dir) }) {
			continue
		}
		src, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if shell.Match(src) && file != "cmd/streaming-snapshotter/install_command.go" {
			t.Errorf("%s names a shell", file)
		}
		if found[file] = starts.Match(src); found[file] && !slices.Contains(starters, file) {
			t.Errorf("%s starts programs", file)
		}
	}
	for _, file := range starters {
		if !found[file] {
			t.Errorf("%s starts no program", file)
		}
	}
}

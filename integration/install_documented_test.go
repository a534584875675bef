package integration_test

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

// documented is the form of a host that is equipped by the words of docs/operations.md.
const documented = "as documented"

// documentedRegistry is the registry of these words.
const documentedRegistry = "registry.example.com"

// installDocumented types what the section "A first node" of docs/operations.md says, as it stands and in its order, on a host where documentedRegistry is another name for a registry that has
// team/app:v1, without artifact. The one exception is streamctl, which knows no such names. It looks at what each command comes to.
func (h *hosted) installDocumented(registry string) {
	h.Helper()
	hosts, dir := filepath.Join("/etc/containerd/certs.d", documentedRegistry), tempDir(h.T)
	if err := errors.Join(os.MkdirAll(hosts, 0o755), os.WriteFile(filepath.Join(hosts, "hosts.toml"), []byte("server = 'http://"+registry+"'\n"), 0o644)); err != nil {
		h.Fatal(err)
	}
	h.was = h.files()
	program := filepath.Join(dir, "streaming-snapshotter")
	h.must("cp", newProgram, program)
	const ref = documentedRegistry + "/team/app:v1"
	lines := documentedLines(h, "A first node")
	for _, step := range []struct {
		line   string   // begins so
		fails  bool     // by its exit status
		before func()   // it
		want   []string // regular expressions that match what it prints
		after  func(out string)
	}{
		{line: "./streaming-snapshotter check ", fails: true, want: []string{"(?m)^TRAP NO_PROXY_PLUGIN: .*\n  what to do: run `streaming-snapshotter install`", "(?m)^TRAP DAEMON_DOWN: .*\n  what to do: run `streaming-snapshotter install`"}},
		{line: "./streaming-snapshotter install --stream ", want: []string{`(?m)^run systemctl restart containerd`}, after: func(string) { h.unchanged("dry run") }},
		{line: "./streaming-snapshotter install --stream ", want: []string{`(?m)^installed$`}},
		{line: "streamctl create ", want: []string{`(?m)^linux/`}},
		{line: "streaming-snapshotter check ", want: []string{`(?m)^STREAMED: artifact `}},
		{line: "crictl pull "},
		{line: "streaming-snapshotter status ", want: []string{`(?m)^` + regexp.QuoteMeta(ref)}},
		{line: "ctr -n k8s.io run ", after: func(out string) { checkSumsBelow(h.T, out, systemdSeed+2, "/data") }},
		{line: "./streaming-snapshotter install ", before: func() { h.must("cp", h.newer(), program) }, want: []string{`(?m)^installed$`}, after: func(string) { h.serves(program) }},
		{line: "streaming-snapshotter pause "},
		{line: "streaming-snapshotter resume "},
		{line: "streaming-snapshotter uninstall ", want: []string{regexp.QuoteMeta(ref)}},
		{line: "streaming-snapshotter uninstall ", want: []string{`(?m)^uninstalled`}},
	} {
		if len(lines) == 0 || !strings.HasPrefix(lines[0]+" ", step.line) {
			h.Fatalf("the next lines of the document are %q, want %q", lines, step.line)
		}
		line := lines[0]
		lines = lines[1:]
		switch {
		case strings.HasPrefix(line, "streamctl "):
			line = strings.ReplaceAll(line, documentedRegistry, registry)
		case strings.HasPrefix(line, "ctr "): // for this machine
			line = strings.Replace(line, " run ", " run "+node.NoShares+" ", 1)
		}
		if step.before != nil {
			step.before()
		}
		out, err := tryRun(h.T, "sh", "-c", "cd "+dir+" && "+line)
		if (err != nil) != step.fails {
			h.Fatalf("%s: %v\n%s", line, err, out)
		}
		for _, want := range step.want {
			if !regexp.MustCompile(want).MatchString(out) {
				h.Errorf("%s: want %q in\n%s", line, want, out)
			}
		}
		if step.after != nil {
			step.after(out)
		}
	}
	if len(lines) > 0 {
		h.Errorf("nobody has tried %q", lines)
	}
	h.unchanged("uninstall")
	h.reads(ref, systemdSeed+2, "overlayfs")
	h.uninstalled()
}

// documentedLines are the lines of the blocks of a section of docs/operations.md, without comments.
func documentedLines(h *hosted, section string) (lines []string) {
	h.Helper()
	b, err := os.ReadFile(filepath.Join(checkout(h.T), "docs/operations.md"))
	if err != nil {
		h.Fatal(err)
	}
	_, text, ok := strings.Cut(string(b), "\n## "+section+"\n")
	if !ok {
		h.Fatalf("docs/operations.md has no section %q", section)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	for line := range strings.Lines(text) {
		if command, ok := strings.CutPrefix(line, "    "); ok {
			command, _, _ = strings.Cut(command, " # ")
			lines = append(lines, strings.TrimSpace(command))
		}
	}
	return slices.DeleteFunc(lines, func(l string) bool { return l == "" })
}

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/traps"
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
	want := append(traps.All(), nothingListed, daemonDown, safeMode, cacheTooLarge, noHoles)
	slices.Sort(want)
	slices.Sort(documented)
	if !slices.Equal(documented, want) {
		t.Errorf("documented: %v\nthere are:  %v", documented, want)
	}
}

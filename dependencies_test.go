package layers

import (
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestDependencies: docs/dependencies.md lists the modules that our packages and their tests import, no more and no less.
func TestDependencies(t *testing.T) {
	imported := importedModules(t)
	b, err := os.ReadFile("docs/dependencies.md")
	if err != nil {
		t.Fatal(err)
	}
	listed := map[string]bool{}
	for _, row := range regexp.MustCompile(`(?m)^\| ([a-z][^|]*\.[^|]*) \|`).FindAllStringSubmatch(string(b), -1) {
		for m := range strings.SplitSeq(row[1], ", ") {
			listed[m] = true
		}
	}
	for m := range imported {
		if !listed[m] {
			t.Errorf("%s is imported and not listed", m)
		}
	}
	for m := range listed {
		if !imported[m] {
			t.Errorf("%s is listed and not imported", m)
		}
	}
}

// importedModules asks go list for the modules of what our packages and their tests import directly.
func importedModules(t *testing.T) map[string]bool {
	t.Helper()
	c := exec.Command("go", "list", "-deps", "-test", "-json=ImportPath,Imports,TestImports,XTestImports,Module", "./...")
	c.Stderr = os.Stderr
	out, err := c.Output()
	if err != nil {
		t.Fatal(err)
	}
	type pkg struct {
		ImportPath                         string
		Imports, TestImports, XTestImports []string
		Module                             *struct {
			Path string
			Main bool
		}
	}
	packages := map[string]pkg{}
	for d := json.NewDecoder(strings.NewReader(string(out))); d.More(); {
		var p pkg
		if err := d.Decode(&p); err != nil {
			t.Fatal(err)
		}
		packages[p.ImportPath] = p
	}
	modules := map[string]bool{}
	for _, p := range packages {
		if p.Module == nil || !p.Module.Main || strings.Contains(p.ImportPath, " [") { // a test's variant of a package
			continue
		}
		for _, i := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			if m := packages[i].Module; m != nil && !m.Main {
				modules[m.Path] = true
			}
		}
	}
	return modules
}

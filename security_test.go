package layers

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Each attack in docs/security.md has a cell for each policy and names tests; there are such, and they can fail. Cells that name integration/attack are what that suite holds nodes against.
func TestAttacksHaveTests(t *testing.T) {
	b, err := os.ReadFile("docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`([a-z/]+)` `(Test[A-Za-z0-9]+)`")
	packages := map[string]map[string]*ast.FuncDecl{}
	for _, m := range named.FindAllStringSubmatch(string(b), -1) {
		if packages[m[1]] == nil {
			packages[m[1]] = testFunctions(t, m[1])
		}
		if packages[m[1]][m[2]] == nil {
			t.Errorf("%s has no %s", m[1], m[2])
		} else if !canFail(packages[m[1]], m[2], map[string]bool{}) {
			t.Errorf("%s %s cannot fail", m[1], m[2])
		}
	}
	_, table, _ := strings.Cut(string(b), "\n## Attacks\n")
	table, _, _ = strings.Cut(table, "\n## ")
	rows := 0
	for line := range strings.Lines(table) {
		if !strings.HasPrefix(line, "| ") {
			continue
		}
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		if rows++; rows == 1 {
			if want := []string{"attack", "`open`", "`signed`", "`proven`", "test"}; strings.TrimSpace(strings.Join(cells, " ")) != strings.Join(want, " ") {
				t.Errorf("the table begins with %q", cells)
			}
			continue
		}
		if len(cells) != 5 || slices.ContainsFunc(cells, func(c string) bool { return strings.TrimSpace(c) == "" }) || !named.MatchString(cells[len(cells)-1]) {
			t.Errorf("no cell for each policy, or no test, in: %s", line)
		}
	}
	if rows < 25 {
		t.Errorf("%d rows", rows)
	}
	for _, m := range regexp.MustCompile(`(?m)^\trow\w+ += "(.*)"$`).FindAllStringSubmatch(read(t, "integration/attack/attack_test.go"), -1) {
		if !regexp.MustCompile(`(?m)^\| ` + regexp.QuoteMeta(m[1]) + " \\|.*`integration/attack` `Test").MatchString(table) {
			t.Errorf("no row of the table, with a test of integration/attack: %s", m[1])
		}
	}
}

// testFunctions are the functions in a package's tests.
func testFunctions(t *testing.T, dir string) map[string]*ast.FuncDecl {
	t.Helper()
	files, _ := filepath.Glob(filepath.Join(dir, "*_test.go"))
	functions := map[string]*ast.FuncDecl{}
	for _, file := range files {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Body != nil {
				functions[fn.Name.Name] = fn
			}
		}
	}
	return functions
}

// canFail reports whether a function of tests, or one that it names, calls Error or Fatal of a test.
func canFail(functions map[string]*ast.FuncDecl, name string, seen map[string]bool) (can bool) {
	fn := functions[name]
	if fn == nil || seen[name] {
		return false
	}
	seen[name] = true
	ast.Inspect(fn.Body, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.SelectorExpr:
			of, _ := n.X.(*ast.Ident) // t.Error, and not err.Error or fmt.Errorf
			if in, ok := n.X.(*ast.SelectorExpr); ok {
				of = in.Sel // n.t.Error
			}
			ours := of != nil && slices.Contains([]string{"t", "tb", "T", "TB"}, of.Name)
			can = can || ours && slices.Contains([]string{"Error", "Errorf", "Fatal", "Fatalf"}, n.Sel.Name) || canFail(functions, n.Sel.Name, seen)
		case *ast.Ident:
			can = can || canFail(functions, n.Name, seen)
		}
		return !can
	})
	return can
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// unsafes are the files with unsafe, for the structures of the kernel's calls and of FUSE. They are of package fs, which fetches and decodes nothing that comes from a registry (layers); what it is given
// of that are bytes for somebody who reads.
var unsafes = []string{"fs/ahead.go", "fs/aside.go", "fs/invalidate.go", "fs/resume.go", "fs/session.go", "fs/state.go"}

// What comes from registries is decoded without unsafe: nothing else has it, nor C or assembly.
func TestNoUnsafe(t *testing.T) {
	found := map[string]bool{}
	for _, file := range sources(t) {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, spec := range f.Imports {
			found[file] = found[file] || spec.Path.Value == `"unsafe"` || spec.Path.Value == `"C"`
		}
		found[file] = found[file] || strings.Contains(read(t, file), "\n//go:linkname")
		if found[file] && !slices.Contains(unsafes, file) {
			t.Errorf("%s is unsafe", file)
		}
	}
	for _, file := range unsafes {
		if !found[file] {
			t.Errorf("%s is not unsafe", file)
		}
	}
	for _, own := range layers["fs"].ours {
		if !slices.Contains([]string{"fs/erofs", "fs/mapped"}, own) {
			t.Errorf("fs imports %s, and has unsafe: does that decode what comes from registries?", own)
		}
	}
	for _, file := range assembly(t) {
		t.Errorf("%s is assembly or C", file)
	}
}

// assembly lists files that Go builds, and that are not Go.
func assembly(t *testing.T) (files []string) {
	t.Helper()
	dirs := map[string]bool{}
	for _, file := range sources(t) {
		dirs[filepath.Dir(file)] = true
	}
	for dir := range dirs {
		for _, ext := range []string{"s", "S", "c", "h", "syso"} {
			found, err := filepath.Glob(filepath.Join(dir, "*."+ext))
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, found...)
		}
	}
	return files
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

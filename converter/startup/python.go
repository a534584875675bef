package startup

import (
	"path"
	"regexp"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

// interpreter is a Python with where it looks for modules.
type interpreter struct {
	f       *finder
	program *program
	tag     string // "cpython-311": of its bytecode
	dirs    []string
	seen    map[string]bool // names of modules looked for
	frozen  map[string]bool // modules in the interpreter itself: no file is read
	count   int
}

const (
	maxModules = 20000

	pythonEntry = "PyInit_" // what an extension module's entry is called, before its name
	pyModExec   = 2         // Py_mod_exec, the slot of the function that fills in a module
)

// What every start imports before the program, and which of it newer interpreters have inside.
const (
	pythonStart  = "encodings encodings.aliases encodings.utf_8 codecs io abc site os stat posixpath genericpath _collections_abc _sitebuiltins sitecustomize usercustomize"
	python311Has = "abc codecs io _collections_abc _sitebuiltins genericpath ntpath posixpath os site stat importlib importlib.util importlib.machinery importlib._bootstrap importlib._bootstrap_external runpy zipimport"
)

var pythonVersion = regexp.MustCompile(`^python([23])\.?([0-9]{1,2})`)

// python follows a Python program: its module search path, what every start imports, and the closure of what the program does.
func (f *finder) python(p *program, depth int) {
	py := &interpreter{f: f, program: p, seen: map[string]bool{}, frozen: map[string]bool{}}
	version := py.findVersion()
	if version == "" {
		return
	}
	if major, minor, _ := strings.Cut(strings.TrimPrefix(version, "python"), "."); major == "3" && len(minor) == 2 && minor >= "11" {
		for _, m := range strings.Fields(python311Has) {
			py.frozen[m] = true
		}
	}
	py.readPaths(version)
	for _, m := range strings.Fields(pythonStart) {
		py.importModule(m)
	}
	py.run(p.args, depth)
}

// findVersion returns "python3.11", of the file or of the library that it needs.
func (py *interpreter) findVersion() string {
	names := []string{py.program.name()}
	if obj, err := parseELF(fileReader{py.f, py.program.n}, py.program.n.Size); err == nil {
		for _, lib := range obj.needed {
			names = append(names, strings.TrimPrefix(lib, "lib"))
		}
	}
	for _, name := range names {
		if m := pythonVersion.FindStringSubmatch(name); m != nil && m[2] != "" {
			py.tag = "cpython-" + m[1] + m[2]
			return "python" + m[1] + "." + m[2]
		}
	}
	return ""
}

// readPaths finds the directories of modules as getpath and site do. A program's own directory comes before them.
func (py *interpreter) readPaths(version string) {
	f := py.f
	if v := f.env["PYTHONPATH"]; v != "" {
		py.dirs = append(py.dirs, strings.Split(v, ":")...)
	}
	home, venv := path.Dir(py.program.real), ""
	cfg := path.Join(path.Dir(py.program.path), "../pyvenv.cfg")
	if n := f.regular(cfg); n != nil {
		venv = path.Dir(cfg)
		f.takeWhole(n)
		for line := range strings.Lines(string(f.text(n))) {
			if k, v, ok := strings.Cut(line, "="); ok && strings.TrimSpace(k) == "home" {
				home = strings.TrimSpace(v)
			}
		}
	}
	for prefix := home; ; prefix = path.Dir(prefix) {
		lib := path.Join(prefix, "lib", version)
		if f.regular(lib+"/os.py") != nil || f.regular(lib+"/os.pyc") != nil {
			py.dirs = append(py.dirs, lib, lib+"/lib-dynload")
			sites := []string{lib + "/site-packages", path.Join("/usr/local/lib", version, "dist-packages"), "/usr/lib/python3/dist-packages", lib + "/dist-packages"}
			if venv != "" {
				sites = []string{path.Join(venv, "lib", version, "site-packages")}
			}
			for _, dir := range sites {
				py.addSite(dir)
			}
			return
		}
		if prefix == "/" || prefix == "." {
			return
		}
	}
}

// addSite adds a directory of packages and what its .pth files say.
func (py *interpreter) addSite(dir string) {
	if n, _ := py.f.lookup(dir); n == nil || !isDir(n) {
		return
	}
	py.dirs = append(py.dirs, dir)
	for _, pth := range py.f.glob(dir + "/*.pth") {
		n := py.f.regular(pth)
		py.f.takeWhole(n)
		for line := range strings.Lines(string(py.f.text(n))) {
			line = strings.TrimSpace(line)
			switch {
			case line == "" || strings.HasPrefix(line, "#") || len(py.dirs) > 100:
			case strings.HasPrefix(line, "import ") || strings.HasPrefix(line, "import\t"):
				py.scan(line, "", false)
			default:
				py.dirs = append(py.dirs, path.Join(dir, line))
			}
		}
	}
}

var objectReference = regexp.MustCompile(`^[A-Za-z_][\w.]*:[A-Za-z_]\w*`)

// run follows the command line.
func (py *interpreter) run(args []string, depth int) {
	f := py.f
	for i := 0; i < len(args); i++ {
		a := args[i]
		switch {
		case a == "-c" && i+1 < len(args):
			py.dirs = append([]string{f.workingDir}, py.dirs...)
			py.scan(args[i+1], "", true)
			return
		case a == "-m" && i+1 < len(args):
			py.dirs = append([]string{f.workingDir}, py.dirs...)
			py.importModule("runpy")
			py.main(args[i+1])
			py.references(args[i+2:])
			return
		case a == "-W" || a == "-X":
			i++
		case strings.HasPrefix(a, "-"):
		default:
			at := path.Join(f.workingDir, a)
			if path.IsAbs(a) {
				at = a
			}
			n, real := f.lookup(at)
			if n != nil && isDir(n) {
				at = path.Join(at, "__main__.py")
				n, real = f.lookup(at)
			}
			if n == nil || !isRegular(n) {
				return
			}
			py.dirs = append([]string{path.Dir(real)}, py.dirs...)
			f.takeWhole(n)
			py.scan(string(f.text(n)), "", true)
			py.references(args[i+1:])
			return
		}
	}
}

// main runs a module as -m does.
func (py *interpreter) main(name string) {
	py.importModule(name)
	if n, dir := py.find(name); n == nil && dir != "" {
		py.importModule(name + ".__main__")
	}
}

// references imports what arguments like "app.main:app" name: how servers are told what to run.
func (py *interpreter) references(args []string) {
	for _, a := range args {
		if objectReference.MatchString(a) {
			py.dirs = append(py.dirs, py.f.workingDir)
			module, _, _ := strings.Cut(a, ":")
			py.importModule(module)
		}
	}
}

// find returns the file of a module, or the directory of a package. Extension modules come before source.
func (py *interpreter) find(name string) (n *erofs.Inode, dirOrFile string) {
	if len(name) > maxPath {
		return nil, ""
	}
	rel := strings.ReplaceAll(name, ".", "/")
	for _, dir := range py.dirs {
		at := path.Join("/", dir, rel)
		parent, _ := py.f.lookup(path.Dir(at))
		if parent == nil || !isDir(parent) {
			continue
		}
		base := path.Base(at)
		if c := child(parent, base); c != nil && !isRegular(c) {
			if d, _ := py.f.lookup(at); d != nil && isDir(d) && (child(d, "__init__.py") != nil || child(d, "__init__.pyc") != nil) {
				return nil, at
			}
		}
		for _, e := range py.f.startingWith(parent, base+".") {
			rest := e.Name[len(base):]
			if strings.HasSuffix(rest, ".so") && (rest == ".so" || rest == ".abi3.so" || strings.HasPrefix(rest, "."+py.tag)) {
				return py.f.regular(path.Join(path.Dir(at), e.Name)), path.Join(path.Dir(at), e.Name)
			}
		}
		for _, suffix := range []string{".py", ".pyc"} {
			if n := py.f.regular(at + suffix); n != nil {
				return n, at + suffix
			}
		}
		if c := child(parent, base); c != nil && isDir(c) {
			return nil, at // without __init__.py it is a namespace, if nothing else has the name
		}
	}
	return nil, ""
}

// importModule imports a module by its full name, its packages first, and reports whether it is there.
func (py *interpreter) importModule(name string) bool {
	if name == "" || len(name) > 256 || strings.HasPrefix(name, ".") || strings.Contains(name, "..") {
		return false
	}
	if found, done := py.seen[name]; done {
		return found
	}
	if i := strings.LastIndex(name, "."); i > 0 && !py.importModule(name[:i]) {
		return false
	}
	if py.count++; py.count > maxModules || !py.f.step(16) {
		return false
	}
	n, at := py.find(name)
	py.seen[name] = at != ""
	switch {
	case py.frozen[name] || at == "":
	case n == nil:
		if init := py.f.regular(at + "/__init__.py"); init != nil {
			py.source(init, at+"/__init__.py", name)
		}
	case strings.HasSuffix(at, ".so"):
		py.extension(n, at, name)
	default:
		pkg := ""
		if i := strings.LastIndex(name, "."); i > 0 {
			pkg = name[:i]
		}
		py.source(n, at, pkg)
	}
	return py.seen[name]
}

// source takes a module's bytecode, or its source where there is none, and what it imports. Relative names are of pkg.
func (py *interpreter) source(n *erofs.Inode, at, pkg string) {
	base := strings.TrimSuffix(path.Base(at), ".py")
	pyc := path.Join(path.Dir(at), "__pycache__", base+"."+py.tag+".pyc")
	if c := py.f.regular(pyc); c != nil {
		py.f.takeWhole(c)
	} else {
		py.f.takeWhole(n)
	}
	if strings.HasSuffix(at, ".py") {
		py.scan(string(py.f.text(n)), pkg, false)
	}
}

var dottedName = regexp.MustCompile(`[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)+\x00`)

// extension takes an extension module with the libraries that it needs, and imports what modules its strings name: Cython's
// import others without a line of source.
func (py *interpreter) extension(n *erofs.Inode, at, name string) {
	py.f.plugin(n, at, pythonEntry)
	top, _, _ := strings.Cut(name, ".")
	for _, m := range dottedName.FindAll(py.f.strings(n), -1) {
		if other := string(m[:len(m)-1]); strings.HasPrefix(other, top+".") {
			if _, at := py.find(other); at != "" {
				py.importModule(other)
			}
		}
	}
}

// scan imports what source imports when it is run. Relative names are of the package pkg; main says that it is run as __main__.
func (py *interpreter) scan(source, pkg string, main bool) {
	if !py.f.step(int64(len(source) / 16)) {
		return
	}
	s := pythonScanner{text: source, main: main}
	for {
		words, ok := s.next()
		if !ok {
			return
		}
		switch words[0] {
		case "import":
			for _, clause := range splitWords(words[1:], ",") {
				if len(clause) > 0 {
					py.importModule(strings.Join(cutWords(clause, "as"), ""))
				}
			}
		case "from":
			from := cutWords(words[1:], "import")
			base := py.absolute(strings.Join(from, ""), pkg)
			if base == "" || len(from)+2 > len(words) {
				continue
			}
			py.importModule(base)
			for _, clause := range splitWords(words[len(from)+2:], ",") {
				// What is no attribute of the package is a module of it.
				if what := strings.Join(cutWords(clause, "as"), ""); what != "" && what != "*" {
					if _, at := py.find(base + "." + what); at != "" {
						py.importModule(base + "." + what)
					}
				}
			}
		}
	}
}

// absolute makes ".x" and "..x" of package pkg full names.
func (py *interpreter) absolute(name, pkg string) string {
	if !strings.HasPrefix(name, ".") {
		return name
	}
	name = name[1:]
	for strings.HasPrefix(name, ".") {
		i := strings.LastIndex(pkg, ".")
		if i < 0 {
			return ""
		}
		pkg, name = pkg[:i], name[1:]
	}
	if name == "" || pkg == "" {
		return pkg + name
	}
	return pkg + "." + name
}

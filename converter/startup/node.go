package startup

import (
	"encoding/json"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

// nodeRun is the loading of a Node program.
type nodeRun struct {
	f       *finder
	program *program
	seen    map[*erofs.Inode]bool
	pkgs    map[string]*nodePackage // by directory; nil is none there
}

// nodePackage is what counts of a package.json.
type nodePackage struct {
	Main    string          `json:"main"`
	Exports json.RawMessage `json:"exports"`
}

const maxNodeDepth = 200 // modules that load modules

// nodeReads are files that Debian's Node has outside of the executable.
var nodeReads = []string{"/usr/share/nodejs/undici/undici-fetch.js", "/usr/share/nodejs/acorn/dist/acorn.js", "/usr/share/nodejs/acorn/package.json",
	"/usr/share/nodejs/acorn-walk/dist/walk.js", "/usr/share/nodejs/cjs-module-lexer/lexer.js", "/usr/share/nodejs/cjs-module-lexer/dist/lexer.js"}

// node follows a Node program: its script and the closure of what that loads.
func (f *finder) node(p *program, depth int) {
	f.takeAll(nodeReads...)
	n := &nodeRun{f: f, program: p, seen: map[*erofs.Inode]bool{}, pkgs: map[string]*nodePackage{}}
	for i := 0; i < len(p.args); i++ {
		a := p.args[i]
		switch {
		case a == "-r" || a == "--require" || a == "--import":
			if i++; i < len(p.args) {
				n.require(p.args[i], f.workingDir, 0)
			}
		case a == "-e" || a == "--eval" || a == "-p":
			if i++; i < len(p.args) {
				for _, m := range jsImports(p.args[i]) {
					n.require(m, f.workingDir, 0)
				}
			}
			return
		case strings.HasPrefix(a, "-"):
		default:
			if !path.IsAbs(a) {
				a = path.Join(f.workingDir, a)
			}
			n.file(a, 0)
			return
		}
	}
}

// require loads a module by the name that a file in dir has for it.
func (n *nodeRun) require(name, dir string, depth int) bool {
	if name == "" || len(name) > maxPath || strings.HasPrefix(name, "node:") || depth > maxNodeDepth || !n.f.step(8) {
		return false
	}
	if name[0] == '.' || name[0] == '/' {
		if name[0] == '.' {
			name = dir + "/" + name
		}
		return n.file(path.Clean(name), depth)
	}
	pkg, rest := name, ""
	parts := strings.SplitN(name, "/", 3)
	if strings.HasPrefix(name, "@") && len(parts) > 1 {
		pkg = parts[0] + "/" + parts[1]
	} else {
		pkg = parts[0]
	}
	rest = strings.TrimPrefix(name[len(pkg):], "/")
	for d := dir; ; d = path.Dir(d) {
		if path.Base(d) != "node_modules" && n.inPackage(path.Join(d, "node_modules", pkg), rest, depth) {
			return true
		}
		if d == "/" || d == "." {
			break
		}
	}
	dirs := "/usr/share/nodejs:/usr/lib/nodejs"
	if v := n.f.env["NODE_PATH"]; v != "" {
		dirs = v + ":" + dirs
	}
	for _, d := range strings.Split(dirs, ":") {
		if n.inPackage(path.Join("/", d, pkg), rest, depth) {
			return true
		}
	}
	return false
}

// inPackage loads the file rest of the package in dir, or its main file.
func (n *nodeRun) inPackage(dir, rest string, depth int) bool {
	if d, _ := n.f.lookup(dir); d == nil {
		return false
	}
	p := n.readPackage(dir)
	if p != nil && len(p.Exports) > 0 && n.f.step(int64(len(p.Exports)/16)) {
		sub := "."
		if rest != "" {
			sub = "./" + rest
		}
		if target := exported(p.Exports, sub, 0); target != "" && n.file(path.Join(dir, target), depth) {
			return true
		}
	}
	return n.file(path.Join(dir, rest), depth)
}

// exported resolves package.json's "exports" for a program that uses require, or import.
func exported(raw json.RawMessage, sub string, depth int) string {
	var s string
	if json.Unmarshal(raw, &s) == nil {
		return s
	}
	var list []json.RawMessage
	if json.Unmarshal(raw, &list) == nil && len(list) > 0 && depth < 8 {
		return exported(list[0], sub, depth+1)
	}
	var m map[string]json.RawMessage
	if json.Unmarshal(raw, &m) != nil || depth > 8 {
		return ""
	}
	if r, ok := m[sub]; ok {
		return exported(r, ".", depth+1)
	}
	for _, condition := range []string{"node", "require", "module-sync", "default", "import"} {
		if r, ok := m[condition]; ok {
			if t := exported(r, sub, depth+1); t != "" {
				return t
			}
		}
	}
	for _, k := range slices.Sorted(maps.Keys(m)) {
		r := m[k]
		before, after, ok := strings.Cut(k, "*")
		if ok && strings.HasPrefix(sub, before) && strings.HasSuffix(sub, after) && len(sub) > len(before)+len(after) {
			target, part := exported(r, ".", depth+1), sub[len(before):len(sub)-len(after)]
			if len(target)+strings.Count(target, "*")*len(part) > maxPath {
				return ""
			}
			return strings.ReplaceAll(target, "*", part)
		}
	}
	return ""
}

// readPackage reads dir's package.json, which Node reads, too; nil if there is none.
func (n *nodeRun) readPackage(dir string) *nodePackage {
	p, done := n.pkgs[dir]
	if !done {
		if j := n.f.regular(dir + "/package.json"); j != nil {
			n.f.takeWhole(j)
			p = &nodePackage{}
			if json.Unmarshal(n.f.text(j), p) != nil {
				p = &nodePackage{}
			}
		}
		n.pkgs[dir] = p
	}
	return p
}

// file loads a file or directory as require resolves it: as it is, with an extension, or by its package.json and index.
func (n *nodeRun) file(at string, depth int) bool {
	for _, suffix := range []string{"", ".js", ".json", ".node", ".mjs", ".cjs"} {
		if j, real := n.f.lookup(at + suffix); j != nil && isRegular(j) {
			n.load(j, real, depth)
			return true
		}
	}
	if d, _ := n.f.lookup(at); d == nil || !isDir(d) || depth > maxNodeDepth {
		return false
	}
	if p := n.readPackage(at); p != nil && p.Main != "" && path.Clean(p.Main) != "." && n.file(path.Join(at, p.Main), depth+1) {
		return true
	}
	for _, index := range []string{"index.js", "index.json", "index.node"} {
		if j, real := n.f.lookup(at + "/" + index); j != nil && isRegular(j) {
			n.load(j, real, depth)
			return true
		}
	}
	return false
}

// load takes a file and what it loads.
func (n *nodeRun) load(j *erofs.Inode, at string, depth int) {
	if n.seen[j] {
		return
	}
	n.seen[j] = true
	// Whether a .js file is a module or a script, the package.json above it says.
	for d := path.Dir(at); ; d = path.Dir(d) {
		if n.readPackage(d) != nil || d == "/" || path.Base(d) == "node_modules" {
			break
		}
	}
	switch path.Ext(at) {
	case ".json":
		n.f.takeWhole(j)
	case ".node":
		n.f.plugin(j, at, "napi_register")
	default:
		n.f.takeWhole(j)
		if depth > maxNodeDepth {
			return
		}
		for _, m := range jsImports(string(n.f.text(j))) {
			// React and others have a build of each kind.
			if n.f.env["NODE_ENV"] == "production" && strings.Contains(m, ".development") {
				continue
			}
			n.require(m, path.Dir(at), depth+1)
		}
	}
}

package startup

import (
	"bytes"
	"path"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

// defaultPath is what containerd gives a container without a PATH.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// program is an executable file with its arguments.
type program struct {
	n    *erofs.Inode
	path string   // as it was found: symlinks may be part of it
	real string   // without symlinks
	args []string // from argv[1] on
}

// name is what the program is known by: the last element of the path without symlinks.
func (p *program) name() string { return path.Base(p.real) }

// find looks a command up as execvp would.
func (f *finder) find(name string) (n *erofs.Inode, at, real string) {
	if name == "" || len(name) > maxPath {
		return nil, "", ""
	}
	if strings.Contains(name, "/") {
		if !path.IsAbs(name) {
			name = path.Join(f.workingDir, name)
		}
		if n, real := f.lookup(name); n != nil && isExecutable(n) {
			return n, name, real
		}
		return nil, "", ""
	}
	dirs := f.env["PATH"]
	if dirs == "" {
		dirs = defaultPath
	}
	for _, dir := range strings.Split(dirs, ":") {
		at := path.Join("/", dir, name)
		if n, real := f.lookup(at); n != nil && isExecutable(n) {
			return n, at, real
		}
	}
	return nil, "", ""
}

// command follows a command line. It reports whether the command is in the image.
func (f *finder) command(args []string, depth int) bool {
	if len(args) == 0 || depth > maxDepth || !f.step(int64(len(args))) {
		return false
	}
	n, at, real := f.find(args[0])
	if n == nil {
		return false
	}
	key := strings.Join(args, "\x00")
	if len(key) > maxPath || f.commands[key] {
		return true
	}
	f.commands[key] = true
	f.program(&program{n: n, path: at, real: real, args: args[1:]}, depth)
	return true
}

// program follows an executable file: an ELF object, or a script with its interpreter.
func (f *finder) program(p *program, depth int) {
	head := make([]byte, min(p.n.Size, 256))
	if !f.readAt(p.n, head, 0) {
		return
	}
	if line, ok := bytes.CutPrefix(head, []byte("#!")); ok {
		interp := shebang(line)
		f.takeWhole(p.n)
		if len(interp) > 0 {
			f.command(append(append(interp, p.path), p.args...), depth+1)
		}
		return
	}
	if !bytes.HasPrefix(head, []byte(elfMagic)) {
		f.takeWhole(p.n) // the shell runs what has no magic number
		f.command(append([]string{"/bin/sh", p.path}, p.args...), depth+1)
		return
	}
	f.execute(p)
	f.runtime(p, depth)
}

// shebang splits the rest of a script's first line as the kernel does: the interpreter, and at most one argument.
func shebang(line []byte) []string {
	line, _, _ = bytes.Cut(line, []byte("\n"))
	s := strings.Trim(string(line), " \t\r")
	interp, arg, _ := strings.Cut(strings.ReplaceAll(s, "\t", " "), " ")
	switch arg = strings.TrimSpace(arg); {
	case interp == "":
		return nil
	case arg == "":
		return []string{interp}
	case path.Base(interp) == "env":
		return append([]string{interp}, strings.Fields(strings.TrimPrefix(arg, "-S"))...)
	}
	return []string{interp, arg}
}

// wrappers run the rest of their arguments: after options, and as many arguments of their own as the table says.
var wrappers = map[string]struct {
	own     int    // arguments before the command
	options string // letters of options that take a value, in the next argument
}{
	"tini": {0, "pe"}, "tini-static": {0, "pe"}, "docker-init": {0, "pe"}, "dumb-init": {0, "r"}, "catatonit": {},
	"gosu": {own: 1}, "su-exec": {own: 1}, "setpriv": {}, "chpst": {0, "ubnmodfcrte"}, "runuser": {0, "ugGc"}, "s6-setuidgid": {own: 1},
	"env": {0, "uCS"}, "nice": {0, "n"}, "nohup": {}, "stdbuf": {0, "ioe"}, "timeout": {1, "ks"}, "time": {}, "setsid": {}, "ionice": {0, "cn"}, "chroot": {own: 1},
	"xargs": {0, "IdEnPs"},
}

// wrapped returns the command that a wrapper runs.
func wrapped(name string, args []string) []string {
	w, ok := wrappers[name]
	if !ok {
		return nil
	}
	own := w.own
	for i := 0; i < len(args); i++ {
		switch a := args[i]; {
		case a == "--":
			if i+1+own < len(args) {
				return args[i+1+own:]
			}
			return nil
		case strings.HasPrefix(a, "-"):
			if len(a) == 2 && strings.Contains(w.options, a[1:]) {
				i++
			}
		case name == "env" && strings.Contains(a, "="):
		case own > 0:
			own--
		default:
			return args[i:]
		}
	}
	return nil
}

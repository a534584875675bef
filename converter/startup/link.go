package startup

import (
	"bytes"
	"encoding/binary"
	"path"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

const (
	maxObjects = 4096 // of one program
	// A library of at most so many bytes is taken whole: two chunks, of which linking reads most.
	smallObject = 400 << 10
	// An executable, or the library that is most of it, is taken whole up to this.
	maxProgram = 64 << 20
)

// lib is an object of a program's link map.
type lib struct {
	n    *erofs.Inode
	at   string // its path, symlinks and all
	obj  *object
	from *lib // that needs it
}

// execute takes what the kernel and the dynamic linker read to run the program.
func (f *finder) execute(p *program) {
	obj, err := parseELF(fileReader{f, p.n}, p.n.Size)
	if err != nil {
		f.takeWhole(p.n)
		return
	}
	f.take(p.n, 0, int64(obj.headers))
	if obj.interp != "" {
		n, _ := f.lookup(obj.interp)
		f.takeWhole(n)
	}
	libs := f.link(&lib{n: p.n, at: p.real, obj: obj})
	var whole []int
	for i, l := range libs {
		l.obj.readRelocations()
		if i == 0 || isMain(p, l) || isLibc(l) {
			whole = append(whole, i)
		}
		f.takeObject(l, len(whole) > 0 && whole[len(whole)-1] == i)
	}
	g := f.newCallGraph(libs)
	for _, i := range whole {
		for _, s := range libs[i].obj.symbols(maxSymbols) {
			if !s.defined {
				g.symbol(s.name)
			}
		}
	}
	for i := range libs {
		g.initializers(i, "")
	}
	g.follow()
}

// isLibc: who needs it reads nearly all of it.
func isLibc(l *lib) bool {
	name, _, _ := strings.Cut(path.Base(l.at), ".so")
	return name == "libc" || name == "libm" || name == "libstdc++"
}

// isMain reports whether l is most of the program: /usr/bin/node is a few KiB, and libnode.so.108 is what it runs.
func isMain(p *program, l *lib) bool {
	name := strings.TrimRight(p.name(), "0123456789.-")
	return p.n.Size < 128<<10 && len(name) > 2 && strings.HasPrefix(path.Base(l.at), "lib"+name)
}

// takeObject takes an object of a program, once: whole, or what linking reads.
func (f *finder) takeObject(l *lib, whole bool) {
	if f.whole[l.n] {
		return
	}
	if l.n.Size <= smallObject || whole && l.n.Size <= maxProgram {
		f.whole[l.n] = true
		for _, s := range l.obj.loaded() {
			f.take(l.n, s.off, s.size)
		}
		return
	}
	if f.linked[l.n] {
		return
	}
	f.linked[l.n] = true
	for _, s := range l.obj.linking() {
		f.take(l.n, s.off, s.size)
	}
}

// link returns the objects that the dynamic linker loads for main, in its order: breadth first.
func (f *finder) link(main *lib) []*lib {
	libs := []*lib{main}
	seen := map[*erofs.Inode]bool{main.n: true}
	names := map[string]bool{}
	for i := 0; i < len(libs) && len(libs) < maxObjects; i++ {
		for _, name := range libs[i].obj.needed {
			if names[name] || name == "" {
				continue
			}
			names[name] = true
			l := f.library(name, libs[i], main.obj)
			if l != nil && !seen[l.n] {
				seen[l.n] = true
				libs = append(libs, l)
			}
			if l != nil && strings.HasPrefix(name, "libcrypto.so") { // what OPENSSL_init_crypto reads, where distributions have it
				f.takeAll("/etc/ssl/openssl.cnf", "/etc/pki/tls/openssl.cnf")
			}
		}
	}
	return libs
}

// library finds a library as ld.so does: for an object that needs it, in a program of main's machine.
func (f *finder) library(name string, from *lib, main *object) *lib {
	open := func(at string) *lib {
		n := f.regular(at)
		if n == nil {
			return nil
		}
		obj, err := parseELF(fileReader{f, n}, n.Size)
		if err != nil || obj.machine != main.machine {
			return nil
		}
		return &lib{n: n, at: at, obj: obj, from: from}
	}
	if strings.Contains(name, "/") {
		return open(path.Join(f.workingDir, strings.Replace(name, "$ORIGIN", path.Dir(from.at), 1)))
	}
	var dirs []string
	list := func(paths string, origin *lib) {
		if paths == "" {
			return
		}
		for _, d := range strings.Split(paths, ":") {
			d = strings.NewReplacer("$ORIGIN", path.Dir(origin.at), "${ORIGIN}", path.Dir(origin.at)).Replace(d)
			dirs = append(dirs, path.Join("/", d))
		}
	}
	if from.obj.runpath == "" {
		for l := from; l != nil; l = l.from { // an RPATH holds for what is needed below, too
			list(l.obj.rpath, l)
		}
	}
	list(f.env["LD_LIBRARY_PATH"], from)
	list(from.obj.runpath, from)
	for _, d := range dirs {
		if l := open(path.Join(d, name)); l != nil {
			return l
		}
	}
	if strings.Contains(main.interp, "ld-musl") {
		dirs = []string{"/lib", "/usr/local/lib", "/usr/lib"}
	} else {
		for _, at := range f.ldCache()[name] {
			if l := open(at); l != nil {
				return l
			}
		}
		dirs = []string{path.Dir(main.interp), "/lib64", "/usr/lib64", "/lib", "/usr/lib"}
	}
	for _, d := range dirs {
		if l := open(path.Join("/", d, name)); l != nil {
			return l
		}
	}
	return nil
}

// ldCache reads /etc/ld.so.cache, which ld.so reads, too.
func (f *finder) ldCache() map[string][]string {
	if f.cache == nil {
		f.cache = map[string][]string{}
		if n := f.regular("/etc/ld.so.cache"); n != nil {
			f.takeWhole(n)
			f.cache = parseLdCache(f.text(n))
		}
	}
	return f.cache
}

// parseLdCache returns the paths of each library in ld.so.cache, in its order, in the format that glibc has written since 2.2
// (sysdeps/generic/dl-cache.h); those for special hardware come last.
func parseLdCache(b []byte) map[string][]string {
	const (
		magic     = "glibc-ld.so.cache1.1"
		header    = 48
		entrySize = 24 // int32 flags, uint32 key, uint32 value, uint32 osversion, uint64 hwcap
	)
	libs := map[string][]string{}
	i := bytes.Index(b, []byte(magic)) // behind the older format's, if that is there
	if i < 0 || len(b)-i < header {
		return libs
	}
	b = b[i:]
	order := binary.ByteOrder(binary.LittleEndian)
	n := uint64(order.Uint32(b[20:]))
	if n > uint64(len(b)) { // a big-endian machine's
		order = binary.BigEndian
		n = uint64(order.Uint32(b[20:]))
	}
	n = min(n, uint64(len(b)-header)/entrySize)
	str := func(off uint32) string {
		if uint64(off) >= uint64(len(b)) {
			return ""
		}
		s, _, _ := bytes.Cut(b[off:min(uint64(len(b)), uint64(off)+maxPath)], []byte{0})
		return string(s)
	}
	var special [][2]string
	for e := b[header : header+n*entrySize]; len(e) > 0; e = e[entrySize:] {
		key, value := str(order.Uint32(e[4:])), str(order.Uint32(e[8:]))
		switch {
		case key == "" || value == "":
		case order.Uint64(e[16:]) != 0:
			special = append(special, [2]string{key, value})
		default:
			libs[key] = append(libs[key], value)
		}
	}
	for _, s := range special {
		libs[s[0]] = append(libs[s[0]], s[1])
	}
	return libs
}

// plugin takes an object that a program opens at run time, with the libraries that it needs. The program calls functions whose names
// begin with entry.
func (f *finder) plugin(n *erofs.Inode, at, entry string) {
	obj, err := parseELF(fileReader{f, n}, n.Size)
	if err != nil {
		f.takeWhole(n)
		return
	}
	libs := f.link(&lib{n: n, at: at, obj: obj})
	for _, l := range libs {
		l.obj.readRelocations()
		f.takeObject(l, false)
	}
	g := f.newCallGraph(libs)
	for i := range libs {
		prefix := ""
		if i == 0 {
			prefix = entry
		}
		g.initializers(i, prefix)
	}
	if entry == pythonEntry {
		for _, fn := range g.codes[0].slots(pyModExec) {
			g.add(callee{0, fn})
		}
	}
	g.follow()
}

// strings returns what an object has that is not code: where the names are that it uses.
func (f *finder) strings(n *erofs.Inode) []byte {
	obj, err := parseELF(fileReader{f, n}, n.Size)
	if err != nil {
		return nil
	}
	var all []byte
	for _, s := range obj.segments {
		if s.typ == ptLoad && s.flags&(flagExec|flagWrite) == 0 && s.fileSize < maxText && uint64(len(all))+s.fileSize < maxText {
			p := make([]byte, s.fileSize)
			if f.readAt(n, p, int64(s.off)) {
				all = append(all, p...)
			}
		}
	}
	return all
}

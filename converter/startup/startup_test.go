package startup

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"sort"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

// testTree is an image's tree to be, with its data device.
type testTree struct {
	root   *erofs.Inode
	device []byte
	at     map[int64]string // where on the device a file begins
}

func newTree() *testTree {
	return &testTree{root: &erofs.Inode{Mode: unix.S_IFDIR | 0o755}, at: map[int64]string{}}
}

func (tr *testTree) put(p string, n *erofs.Inode) {
	dir := tr.root
	elems := strings.Split(strings.Trim(p, "/"), "/")
	for _, e := range elems[:len(elems)-1] {
		c := child(dir, e)
		if c == nil {
			c = &erofs.Inode{Mode: unix.S_IFDIR | 0o755}
			tr.insert(dir, e, c)
		}
		dir = c
	}
	tr.insert(dir, elems[len(elems)-1], n)
}

func (tr *testTree) insert(dir *erofs.Inode, name string, n *erofs.Inode) {
	dir.Entries = append(dir.Entries, erofs.Dirent{Name: name, Inode: n})
	slices.SortFunc(dir.Entries, func(a, b erofs.Dirent) int { return strings.Compare(a.Name, b.Name) })
}

func (tr *testTree) file(p, content string) *testTree {
	n := &erofs.Inode{Mode: unix.S_IFREG | 0o755, Size: int64(len(content))}
	if content != "" {
		off := int64(len(tr.device))
		n.Extents = []erofs.Extent{{DeviceOffset: off, Size: n.Size}}
		tr.device = append(tr.device, content...)
		tr.device = append(tr.device, make([]byte, -len(tr.device)&511)...)
		tr.at[off] = p
	}
	tr.put(p, n)
	return tr
}

func (tr *testTree) link(p, target string) *testTree {
	tr.put(p, &erofs.Inode{Mode: unix.S_IFLNK | 0o777, Data: []byte(target)})
	return tr
}

func (tr *testTree) readAt(_ context.Context, p []byte, off int64) error {
	if off < 0 || off+int64(len(p)) > int64(len(tr.device)) {
		return io.ErrUnexpectedEOF
	}
	copy(p, tr.device[off:])
	return nil
}

// find returns the files that a start reads, in the order of first use.
func (tr *testTree) find(t *testing.T, config ocispec.ImageConfig) (files []string) {
	t.Helper()
	ranges, err := Find(t.Context(), Image{Config: config, Root: tr.root, ReadAt: tr.readAt})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range ranges {
		begin := int64(-1)
		for off := range tr.at {
			if off <= r.Offset && off > begin {
				begin = off
			}
		}
		if f := tr.at[begin]; !slices.Contains(files, f) {
			files = append(files, f)
		}
	}
	return files
}

// noELF is an interpreter that says nothing of itself.
const noELF = "\x7fELF, but no more"

func TestFind(t *testing.T) {
	node := func() *testTree {
		return newTree().file("/usr/bin/node", noELF).
			file("/app/package.json", `{"main": "x.js"}`).
			file("/app/server.js", "const a = require('a'); import('./esm.mjs'); if (x) { require('./b') }\nfunction f() { require('./lazy') }\n(function () { require('./iife') })(); exports.x = () => { require('./lazy') }").
			file("/app/node_modules/a/package.json", `{"exports": {".": {"import": "./no.mjs", "require": "./lib/a.cjs"}, "./f/*": "./lib/*.js"}}`).
			file("/app/node_modules/a/lib/a.cjs", `require("@s/d/f.json"); /* require("./no") */ const s = '}'; /[/"']/.test(s); module.exports = require(`+"`./no`"+`)`).
			file("/app/node_modules/a/no.mjs", "").
			file("/app/node_modules/@s/d/package.json", "{}").file("/app/node_modules/@s/d/f.json", "{}").
			file("/app/b/index.js", "require('a/f/g')").file("/app/node_modules/a/lib/g.js", "module.exports = 1").
			file("/app/lazy.js", "no").file("/app/iife.js", "yes").file("/app/esm.mjs", "import x from './b'; export * from './b/more.js'").file("/app/b/more.js", "1").
			file("/app/node_modules/a/lib/no.js", "no")
	}
	python := func() *testTree {
		lib := "/usr/lib/python3.9/"
		return newTree().file("/usr/bin/python3.9", noELF).link("/usr/bin/python3", "python3.9").
			file(lib+"os.py", "import abc\n").file(lib+"abc.py", "x = 1\n").file(lib+"json/__init__.py", "from .decoder import J\nfrom . import scanner, J\n").
			file(lib+"json/decoder.py", "import re; import (\n").file(lib+"json/scanner.py", "pass").file(lib+"re.py", "pass").file(lib+"site.py", "import os").
			file(lib+"unused.py", "pass").file(lib+"lazy.py", "pass").file(lib+"typed.py", "pass").
			file(lib+"__pycache__/os.cpython-39.pyc", "bytecode of os").
			file(lib+"lib-dynload/_x.cpython-39-x86_64-linux-gnu.so", "no ELF object").
			file("/srv/main.py", "'''import unused\n'''\nimport json as j, _x\nif TYPE_CHECKING:\n    import typed\ndef f():\n    import lazy\n\n    import lazy\ntry:\n  from local import (a,\n    b)\nexcept ImportError: import unused2\n").
			file("/srv/local.py", "if __name__ == '__main__':\n import unused\nelse: pass\n").file(lib+"unused2.py", "pass")
	}
	tests := []struct {
		name   string
		tree   *testTree
		config ocispec.ImageConfig
		want   string
	}{
		{"path and links", newTree().file("/opt/real", "x").link("/usr/bin/run", "/etc/alternatives/run").link("/etc/alternatives/run", "../../opt/real").file("/bin/run", "no"),
			ocispec.ImageConfig{Cmd: []string{"run"}, Env: []string{"PATH=/nowhere:/usr/bin:/bin"}}, "/opt/real"},
		{"links above the root", newTree().file("/x", "x").link("/bin/run", "../../../../x"), ocispec.ImageConfig{Cmd: []string{"run"}}, "/x"},
		{"working directory", newTree().file("/srv/run", "x").file("/run", "no"), ocispec.ImageConfig{Cmd: []string{"./run"}, WorkingDir: "/srv"}, "/srv/run"},
		{"user", newTree().file("/etc/passwd", "x").file("/bin/run", "x"), ocispec.ImageConfig{Entrypoint: []string{"run"}}, "/etc/passwd /bin/run"},
		{"local time", newTree().link("/etc/localtime", "/usr/share/zoneinfo/Etc/UTC").file("/usr/share/zoneinfo/Etc/UTC", "x").file("/bin/run", "x"),
			ocispec.ImageConfig{Entrypoint: []string{"run"}}, "/bin/run /usr/share/zoneinfo/Etc/UTC"},
		{"TZ", newTree().file("/etc/localtime", "no").file("/usr/share/zoneinfo/Etc/GMT", "x").file("/bin/run", "x"),
			ocispec.ImageConfig{Entrypoint: []string{"run"}, Env: []string{"TZ=:Etc/GMT"}}, "/bin/run /usr/share/zoneinfo/Etc/GMT"},
		{"shebangs", newTree().file("/bin/run", "#! /usr/bin/env -S other -x\n").file("/usr/bin/env", noELF).file("/bin/other", "#!/bin/last").file("/bin/last", noELF),
			ocispec.ImageConfig{Cmd: []string{"run"}}, "/bin/run /usr/bin/env /bin/other /bin/last"},
		{"a shebang of itself", newTree().file("/bin/run", "#!/bin/run\n"), ocispec.ImageConfig{Cmd: []string{"run"}}, "/bin/run"},
		{"entrypoint script", newTree().file("/entry.sh", "#!/bin/sh\nset -e\nif [ \"$1\" = app ]; then\n  x=$(date +%s) chown -R \"$USER\" /data && exec gosu app \"$0\" \"$@\" # no\nfi\n. /lib/more.sh\nexec \"$@\"\n").
			file("/bin/sh", noELF).file("/bin/chown", noELF).file("/bin/date", noELF).file("/bin/gosu", noELF).file("/bin/app", noELF).file("/lib/more.sh", "`tool`").file("/bin/tool", noELF).file("/bin/no", noELF),
			ocispec.ImageConfig{Entrypoint: []string{"/entry.sh"}, Cmd: []string{"app", "-v"}}, "/entry.sh /bin/sh /bin/chown /bin/date /bin/gosu /lib/more.sh /bin/tool /bin/app"},
		{"wrappers", newTree().file("/tini", noELF).file("/bin/nice", noELF).file("/bin/app", noELF), ocispec.ImageConfig{Entrypoint: []string{"/tini", "-g", "-p", "SIGTERM", "--"}, Cmd: []string{"nice", "-n", "5", "app"}},
			"/tini /bin/nice /bin/app"},
		{"sh -c", newTree().file("/bin/sh", noELF).file("/bin/a", noELF).file("/bin/b", noELF), ocispec.ImageConfig{Cmd: []string{"/bin/sh", "-c", "a | FOO=1 b > no; echo no"}}, "/bin/sh /bin/a /bin/b"},
		{"node", node(), ocispec.ImageConfig{Cmd: []string{"node", "server.js"}, WorkingDir: "/app"},
			"/usr/bin/node /app/package.json /app/server.js /app/node_modules/a/package.json /app/node_modules/a/lib/a.cjs /app/node_modules/@s/d/package.json /app/node_modules/@s/d/f.json " +
				"/app/esm.mjs /app/b/index.js /app/node_modules/a/lib/g.js /app/b/more.js /app/iife.js"},
		{"python", python(), ocispec.ImageConfig{Cmd: []string{"python3", "main.py"}, WorkingDir: "/srv"},
			"/usr/bin/python3.9 /usr/lib/python3.9/abc.py /usr/lib/python3.9/site.py /usr/lib/python3.9/__pycache__/os.cpython-39.pyc /srv/main.py /usr/lib/python3.9/json/__init__.py " +
				"/usr/lib/python3.9/json/decoder.py /usr/lib/python3.9/re.py /usr/lib/python3.9/json/scanner.py /usr/lib/python3.9/lib-dynload/_x.cpython-39-x86_64-linux-gnu.so /srv/local.py /usr/lib/python3.9/unused2.py"},
		{"perl", newTree().file("/usr/bin/perl", noELF).file("/bin/run", "#!/usr/bin/perl -w\nuse strict;\nuse lib '/opt';\nuse My::Mod qw(a);\n__END__\nuse No;\n").
			file("/usr/share/perl/5.36/strict.pm", "1").file("/opt/My/Mod.pm", "use No::More::Here;\n").file("/usr/share/perl/5.36/No.pm", "1"),
			ocispec.ImageConfig{Cmd: []string{"run"}}, "/bin/run /usr/bin/perl /usr/share/perl/5.36/strict.pm /opt/My/Mod.pm"},
		{"nginx", newTree().file("/usr/sbin/nginx", noELF).file("/etc/nginx/nginx.conf", "include mime.types;\nhttp {\n  include conf.d/*.conf;\n}\nload_module modules/a.so;\n# include no.conf;\n").file("/etc/nginx/mime.types", "x").
			file("/etc/nginx/conf.d/a.conf", "ssl_certificate /etc/cert;").file("/etc/nginx/conf.d/a.off", "x").file("/etc/cert", "x").file("/usr/share/nginx/modules/a.so", "x").file("/etc/nginx/no.conf", "x"),
			ocispec.ImageConfig{Cmd: []string{"nginx"}}, "/usr/sbin/nginx /etc/nginx/nginx.conf /usr/share/nginx/modules/a.so /etc/nginx/mime.types /etc/nginx/conf.d/a.conf /etc/cert"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := strings.Join(tt.tree.find(t, tt.config), " "); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

// TestUnknown: no command, none that is there, one that is no file.
func TestUnknown(t *testing.T) {
	tree := newTree().file("/etc/passwd", "x").link("/bin/loop", "loop").file("/bin/dir/x", "x").link("/bin/a", "b").link("/bin/b", "a")
	for _, cmd := range [][]string{nil, {""}, {"none"}, {"loop"}, {"/bin/dir"}, {"a"}, {"/etc/passwd/x"}} {
		if _, err := Find(t.Context(), Image{Config: ocispec.ImageConfig{Cmd: cmd}, Root: tree.root, ReadAt: tree.readAt}); !errors.Is(err, ErrUnknown) {
			t.Errorf("%q: %v", cmd, err)
		}
	}
}

// TestUnreadable: a device that fails is an error, not a shorter answer.
func TestUnreadable(t *testing.T) {
	tree := newTree().file("/bin/run", "x")
	want := errors.New("broken")
	fail := func(context.Context, []byte, int64) error { return want }
	if _, err := Find(t.Context(), Image{Config: ocispec.ImageConfig{Cmd: []string{"run"}}, Root: tree.root, ReadAt: fail}); !errors.Is(err, want) {
		t.Errorf("%v, want %v", err, want)
	}
}

// TestLinkLikeLdd compares the libraries found with what this machine's dynamic linker finds.
func TestLinkLikeLdd(t *testing.T) {
	tree, host := newTree(), &hostDevice{}
	for _, dir := range []string{"/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/lib64", "/lib", "/usr/lib64"} {
		host.addDir(t, tree, dir)
	}
	host.addFile(t, tree, "/etc/ld.so.cache")
	for _, name := range []string{"bash", "git", "curl", "perl", "nginx", "skopeo"} {
		at, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		t.Run(name, func(t *testing.T) {
			out, err := exec.Command("ldd", at).Output()
			if err != nil {
				t.Skipf("ldd %s: %v", at, err)
			}
			var want []string
			for line := range strings.Lines(string(out)) {
				if f := strings.Fields(line); len(f) == 4 && f[1] == "=>" {
					want = append(want, path.Base(f[2]))
				}
			}
			b, err := os.ReadFile(at)
			if err != nil {
				t.Fatal(err)
			}
			f := &finder{root: tree.root, read: host.readAt, bytes: maxRead, taken: maxTaken, steps: maxSteps,
				whole: map[*erofs.Inode]bool{}, env: map[string]string{}}
			obj, err := parseELF(bytes.NewReader(b), int64(len(b)))
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, l := range f.link(&lib{n: &erofs.Inode{}, at: at, obj: obj})[1:] {
				got = append(got, path.Base(l.at))
			}
			got = slices.DeleteFunc(got, func(s string) bool { return strings.HasPrefix(s, "ld-linux") }) // ldd lists it otherwise
			slices.Sort(got)
			slices.Sort(want)
			if len(want) < 2 || !reflect.DeepEqual(got, want) {
				t.Errorf("got  %q\nwant %q", got, want)
			}
		})
	}
}

// hostDevice is a data device of files of this machine.
type hostDevice struct {
	names []string
	begin []int64
	end   int64
}

func (h *hostDevice) readAt(p []byte, off int64) error {
	i := sort.Search(len(h.begin), func(i int) bool { return h.begin[i] > off }) - 1
	f, err := os.Open(h.names[i])
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.ReadAt(p, off-h.begin[i])
	return err
}

// addDir adds the libraries and symlinks of a directory.
func (h *hostDevice) addDir(t *testing.T, tree *testTree, dir string) {
	t.Helper()
	if to, err := os.Readlink(dir); err == nil {
		tree.link(dir, to)
		return
	}
	if up := path.Dir(dir); up != "/" {
		if to, err := os.Readlink(up); err == nil {
			if child(tree.root, path.Base(up)) == nil {
				tree.link(up, to)
			}
			return
		}
	}
	names, err := filepath.Glob(dir + "/*.so*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		h.addFile(t, tree, name)
	}
}

func (h *hostDevice) addFile(t *testing.T, tree *testTree, name string) {
	t.Helper()
	if to, err := os.Readlink(name); err == nil {
		tree.link(name, to)
		return
	}
	st, err := os.Stat(name)
	if err != nil {
		t.Skipf("this machine has no %s", name)
	}
	n := &erofs.Inode{Mode: unix.S_IFREG | 0o755, Size: st.Size()}
	if st.Size() > 0 {
		n.Extents = []erofs.Extent{{DeviceOffset: h.end, Size: st.Size()}}
	}
	h.names, h.begin, h.end = append(h.names, name), append(h.begin, h.end), h.end+st.Size()
	tree.put(name, n)
}

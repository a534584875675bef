package startup

import (
	"path"
	"regexp"
	"strings"
)

// modules follows a language whose programs load files by name from directories of a search path.
type modules struct {
	f        *finder
	dirs     []string
	suffixes []string
	pattern  *regexp.Regexp // of a line that loads; its first group that matched is the name
	plugin   func(dir, name string) (path, entry string)
	seen     map[string]bool
}

// load loads a module by name, and what it loads.
func (m *modules) load(name string, depth int) {
	if len(name) > maxPath || m.seen[name] || len(m.seen) > maxModules || depth > maxNodeDepth {
		return
	}
	m.seen[name] = true
	for _, dir := range m.dirs {
		for _, suffix := range m.suffixes {
			at := path.Join(dir, name+suffix)
			n := m.f.regular(at)
			if n == nil {
				continue
			}
			if suffix == ".so" {
				m.f.plugin(n, at, "Init_")
				return
			}
			m.f.takeWhole(n)
			for _, dir := range m.dirs {
				if m.plugin == nil {
					break
				}
				if at, entry := m.plugin(dir, name); m.f.regular(at) != nil {
					m.f.plugin(m.f.regular(at), at, entry)
				}
			}
			m.text(string(m.f.text(n)), depth+1)
			return
		}
	}
}

func (m *modules) text(source string, depth int) {
	if !m.f.step(int64(len(source) / 16)) {
		return
	}
	for line := range strings.Lines(source) {
		if strings.HasPrefix(line, "__END__") || strings.HasPrefix(line, "=head1") {
			return
		}
		if g := m.pattern.FindStringSubmatch(line); g != nil {
			for _, name := range g[1:] {
				if name != "" {
					m.load(strings.ReplaceAll(name, "::", "/"), depth)
				}
			}
		}
	}
}

// script takes the program's own file and what it loads.
func (m *modules) script(p *program, depth int) {
	for _, a := range p.args {
		if strings.HasPrefix(a, "-") {
			continue
		}
		if !path.IsAbs(a) {
			a = path.Join(m.f.workingDir, a)
		}
		if n, real := m.f.lookup(a); n != nil && isRegular(n) {
			m.f.takeWhole(n)
			source := string(m.f.text(n))
			for _, g := range perlLib.FindAllStringSubmatch(source, 16) {
				m.dirs = append([]string{path.Join("/", g[1])}, m.dirs...)
			}
			m.dirs = append(m.dirs, path.Dir(real))
			m.text(source, 0)
			if path.Base(real) == "pg_wrapper" { // Debian's psql: runs that of the newest server
				if all := m.f.glob("/usr/lib/postgresql/*/bin/" + path.Base(a)); len(all) > 0 {
					m.f.command(all[len(all)-1:], depth+1)
				}
			}
		}
		return
	}
}

var (
	perlUse = regexp.MustCompile(`^(?:use|require)[ \t]+([A-Z][\w:]*|[a-z]+(?:::\w+)+|strict|warnings|vars|constant|overload|utf8|bytes|integer|feature|parent|base|re)\b`)
	perlLib = regexp.MustCompile(`(?m)^use[ \t]+lib[ \t]+['"]([^'"]+)['"]`)
	rubyUse = regexp.MustCompile(`^[ \t]{0,2}require(?:_relative)?[ \t(]+['"]([\w./-]+)['"]`)
)

// perl follows a Perl program and the modules that it uses.
func (f *finder) perl(p *program, depth int) {
	m := &modules{f: f, suffixes: []string{".pm"}, pattern: perlUse, seen: map[string]bool{}}
	for _, pattern := range []string{"/etc/perl", "/usr/local/lib/*/perl/5.*", "/usr/local/share/perl/5.*", "/usr/lib/*/perl5/5.*", "/usr/share/perl5", "/usr/lib/*/perl-base",
		"/usr/lib/*/perl/5.*", "/usr/share/perl/5.*", "/usr/local/lib/perl5/5.*", "/usr/local/lib/perl5/5.*/*-linux*", "/usr/lib/perl5/core_perl", "/usr/share/perl5/core_perl"} {
		m.dirs = append(m.dirs, f.glob(pattern)...)
	}
	m.plugin = func(dir, name string) (string, string) {
		return path.Join(dir, "auto", name, path.Base(name)+".so"), "boot_"
	}
	m.script(p, depth)
}

// ruby follows a Ruby program and what it requires.
func (f *finder) ruby(p *program, depth int) {
	m := &modules{f: f, suffixes: []string{".rb", ".so"}, pattern: rubyUse, seen: map[string]bool{}}
	for _, pattern := range []string{"/usr/local/lib/ruby/[23].*", "/usr/local/lib/ruby/[23].*/*-linux*", "/usr/lib/ruby/[23].*", "/usr/lib/*/ruby/[23].*", "/usr/lib/ruby/vendor_ruby"} {
		m.dirs = append(m.dirs, f.glob(pattern)...)
	}
	for _, name := range []string{"rubygems", "enc/encdb", "enc/trans/transdb", "monitor", "error_highlight", "did_you_mean", "syntax_suggest/core_ext"} {
		m.load(name, 0)
	}
	m.script(p, depth)
}

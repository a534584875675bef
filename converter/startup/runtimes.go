package startup

import (
	"path"
	"strings"
)

// runtime follows what the program does, as far as it is known what it is.
func (f *finder) runtime(p *program, depth int) {
	called := path.Base(p.path)
	if rest := wrapped(called, p.args); rest != nil {
		f.command(rest, depth+1)
		return
	}
	// By patterns of path.Match, of the name that the program was called by or of the file that it is.
	for _, r := range []struct {
		names  string
		follow func(*program, int)
	}{
		{"sh bash dash ash busybox ksh", f.shell},
		{"python python[23] python[23].[0-9] python[23].[0-9][0-9]", f.python},
		{"node nodejs", f.node},
		{"perl perl5*", f.perl},
		{"nginx", f.nginx},
		{"postgres", f.postgres},
		{"java", f.java},
		{"ruby ruby[23]*", f.ruby},
		{"php php[78]* php-fpm*", f.php},
	} {
		for _, pattern := range strings.Fields(r.names) {
			for _, name := range []string{called, p.name()} {
				if ok, _ := path.Match(pattern, name); ok {
					r.follow(p, depth)
					return
				}
			}
		}
	}
}

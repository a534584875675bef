package tree

import (
	"errors"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

var errTooManyLinks = errors.New("too many symlinks")

// resolve returns the path that p leads to inside root, every symlink followed, the last one included, and bounded to root.
// It is clean and has no leading slash; "" is the root. What does not exist is taken as it is written. The results are
// those of continuity's fs.RootPath, on which the applier relies.
func resolve(root *node, p string) (string, error) {
	if isPlain(root, p) {
		return strings.TrimPrefix(path.Join("/", p), "/"), nil
	}
	r := resolver{root: root}
	for {
		before := r.links
		next, err := r.pass(p)
		if err != nil {
			return "", err
		}
		p = next
		if clean := path.Join("/", p); r.links == before {
			if clean == p {
				return strings.TrimPrefix(p, "/"), nil
			}
			p = clean
		}
	}
}

// isPlain reports whether p has nothing to resolve, which is so for nearly all names.
func isPlain(root *node, p string) bool {
	n := root
	for p != "" {
		var name string
		name, p, _ = strings.Cut(p, "/")
		switch {
		case name == "" || name == ".":
			continue
		case name == ".." || len(name) > maxName:
			return false
		case n == nil:
			continue
		case !n.isDir():
			return false
		}
		n = n.children[name]
		if n != nil && n.is(unix.S_IFLNK) {
			return false
		}
	}
	return true
}

// resolver replaces symlinks pass by pass until a pass has found none.
//
// In one pass the target of a symlink is put in place of its name, but not resolved before the next component is looked up
// below it: that lookup is a plain lstat, so the kernel follows symlinks in the target, and a relative symlink found behind
// them is taken as relative to the path as written. The applier has it so, and layers are unpacked accordingly.
type resolver struct {
	root  *node
	links int
}

func (r *resolver) pass(p string) (string, error) {
	dir, name := path.Split(p)
	if dir == "" {
		target, _, err := r.link(name)
		return target, err
	}
	if name == "" {
		if dir == "/" {
			return dir, nil
		}
		return r.pass(dir[:len(dir)-1])
	}
	parent, err := r.pass(dir)
	if err != nil {
		return "", err
	}
	target, isLink, err := r.link(path.Join(parent, name))
	if err != nil {
		return "", err
	}
	if isLink && !path.IsAbs(target) {
		target = path.Join(parent, target)
	}
	return target, nil
}

// link returns the target of p if p is a symlink, else p itself.
func (r *resolver) link(p string) (target string, isLink bool, err error) {
	if r.links > 255 {
		return "", false, errTooManyLinks
	}
	p = path.Join("/", p)
	n, err := lstat(r.root, p)
	if err != nil || n == nil || !n.is(unix.S_IFLNK) {
		return p, false, err
	}
	r.links++
	return string(n.Data), true, nil
}

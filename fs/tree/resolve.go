package tree

import (
	"errors"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

var (
	// errHost: what the applier does depends on the host's file system.
	errHost = errors.New("its path leads through symlinks that the applier follows outside of the layer")

	errTooManyLinks = errors.New("too many symlinks")
	errTooManySteps = errors.New("paths and symlinks that take too long to follow")
)

// maxSteps is the number of path components that are looked up for a chain, some seconds' worth. Symlinks into deep
// directories make a short entry expensive.
const maxSteps = 1 << 28

// resolver follows paths in the trees of layers.
type resolver struct{ steps int }

// resolve returns the path that p leads to inside root, every symlink followed, the last one included, and bounded to root.
// It is clean and has no leading slash; "" is the root. What does not exist is taken as it is written. The results are
// those of continuity's fs.RootPath, on which the applier relies.
func (r *resolver) resolve(root *node, p string) (string, error) {
	if len(p) > maxPath {
		return "", unix.ENAMETOOLONG
	}
	if r.steps > maxSteps {
		return "", errTooManySteps
	}
	for links := 0; !r.isPlain(root, p); {
		before := links
		next, err := r.pass(root, p, &links)
		if err != nil {
			return "", err
		}
		p = next
		if clean := path.Join("/", p); links == before {
			if clean == p {
				break
			}
			p = clean
		}
	}
	return strings.TrimPrefix(path.Join("/", p), "/"), nil
}

// isPlain reports whether p has nothing to resolve, which is so for nearly all names.
func (r *resolver) isPlain(root *node, p string) bool {
	n := root
	for p != "" {
		var name string
		name, p, _ = strings.Cut(p, "/")
		r.steps++
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

// pass replaces the symlinks in p. It is repeated until there are none.
//
// In one pass the target of a symlink is put in place of its name, but not resolved before the next component is looked up
// below it: that lookup is a plain lstat, so the kernel follows symlinks in the target, and a relative symlink found behind
// them is taken as relative to the path as written. The applier has it so, and layers are unpacked accordingly.
func (r *resolver) pass(root *node, p string, links *int) (string, error) {
	dir, name := path.Split(p)
	if dir == "" {
		target, _, err := r.link(root, name, links)
		return target, err
	}
	if name == "" {
		if dir == "/" {
			return dir, nil
		}
		return r.pass(root, dir[:len(dir)-1], links)
	}
	parent, err := r.pass(root, dir, links)
	if err != nil {
		return "", err
	}
	target, isLink, err := r.link(root, path.Join(parent, name), links)
	if err != nil {
		return "", err
	}
	if isLink && !path.IsAbs(target) {
		target = path.Join(parent, target)
	}
	return target, nil
}

// link returns the target of p if p is a symlink, else p itself.
func (r *resolver) link(root *node, p string, links *int) (target string, isLink bool, err error) {
	if *links > 255 {
		return "", false, errTooManyLinks
	}
	p = path.Join("/", p)
	n, err := r.lstat(root, p)
	if err != nil || n == nil || !n.is(unix.S_IFLNK) {
		return p, false, err
	}
	*links++
	return string(n.Data), true, nil
}

// lstat is lstat(2) of root's directory joined with p: symlinks before the last component are followed as the kernel does.
// It returns nil without an error if there is no such file.
func (r *resolver) lstat(root *node, p string) (*node, error) {
	if len(p) > maxPath {
		return nil, unix.ENAMETOOLONG
	}
	at := []*node{root} // from the root to here
	links := 0
	for {
		p = strings.TrimLeft(p, "/")
		n := at[len(at)-1]
		if p == "" {
			return n, nil
		}
		name, rest, _ := strings.Cut(p, "/")
		p = rest
		if r.steps++; r.steps > maxSteps {
			return nil, errTooManySteps
		}
		switch {
		case !n.isDir():
			return nil, unix.ENOTDIR
		case name == ".":
			continue
		case name == "..":
			if len(at) == 1 {
				return nil, errHost
			}
			at = at[:len(at)-1]
			continue
		case len(name) > maxName:
			return nil, unix.ENAMETOOLONG
		}
		c := n.children[name]
		if c == nil {
			return nil, nil
		}
		if rest == "" || !c.is(unix.S_IFLNK) {
			at = append(at, c)
			continue
		}
		target := string(c.Data)
		if links++; links > 40 {
			return nil, unix.ELOOP
		}
		if target[0] == '/' {
			return nil, errHost
		}
		p = target + "/" + rest
	}
}

package startup

import (
	"path"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

const (
	maxLinks = 40   // symlinks followed for one path, as the kernel has it
	maxPath  = 4096 // bytes of a path
)

func is(n *erofs.Inode, format uint32) bool { return n.Mode&unix.S_IFMT == format }
func isRegular(n *erofs.Inode) bool         { return is(n, unix.S_IFREG) }
func isDir(n *erofs.Inode) bool             { return is(n, unix.S_IFDIR) }
func isExecutable(n *erofs.Inode) bool      { return isRegular(n) && n.Mode&0o111 != 0 }

// child returns the entry of directory n, or nil.
func child(n *erofs.Inode, name string) *erofs.Inode {
	i := sort.Search(len(n.Entries), func(i int) bool { return n.Entries[i].Name >= name })
	if i < len(n.Entries) && n.Entries[i].Name == name {
		return n.Entries[i].Inode
	}
	return nil
}

// lookup returns the file that an absolute path leads to, every symlink followed inside the image, and its path without symlinks;
// or nil.
func (f *finder) lookup(p string) (*erofs.Inode, string) {
	type at struct {
		n    *erofs.Inode
		name string
	}
	stack := []at{{f.root, ""}}
	for links := 0; ; {
		p = strings.TrimLeft(p, "/")
		cur := stack[len(stack)-1].n
		if p == "" {
			var real strings.Builder
			for _, a := range stack[1:] {
				real.WriteString("/" + a.name)
			}
			if real.Len() == 0 {
				return cur, "/"
			}
			return cur, real.String()
		}
		if !f.step(1) || !isDir(cur) || len(p) > maxPath {
			return nil, ""
		}
		name, rest, _ := strings.Cut(p, "/")
		p = rest
		switch name {
		case ".":
			continue
		case "..":
			stack = stack[:max(1, len(stack)-1)]
			continue
		}
		c := child(cur, name)
		if c == nil {
			return nil, ""
		}
		if !is(c, unix.S_IFLNK) {
			stack = append(stack, at{c, name})
			continue
		}
		if links++; links > maxLinks {
			return nil, ""
		}
		target := string(c.Data)
		if strings.HasPrefix(target, "/") {
			stack = stack[:1]
		}
		p = target + "/" + rest
	}
}

// exists returns the path if a regular file is there, else "".
func (f *finder) regular(p string) *erofs.Inode {
	if n, _ := f.lookup(p); n != nil && isRegular(n) {
		return n
	}
	return nil
}

// maxMatches bounds what one pattern yields.
const maxMatches = 4096

// glob returns the paths that match a pattern, sorted as the tree is; each element may be one of path.Match.
func (f *finder) glob(pattern string) []string {
	if !strings.ContainsAny(pattern, "*?[") {
		return []string{pattern}
	}
	found := []string{""}
	for _, elem := range strings.Split(strings.Trim(pattern, "/"), "/") {
		var next []string
		for _, dir := range found {
			if !strings.ContainsAny(elem, "*?[") {
				next = append(next, dir+"/"+elem)
				continue
			}
			n, _ := f.lookup(dir)
			if n == nil || !f.step(int64(len(n.Entries))) {
				continue
			}
			for _, e := range n.Entries {
				if ok, err := path.Match(elem, e.Name); ok && err == nil && len(next) < maxMatches {
					next = append(next, dir+"/"+e.Name)
				}
			}
		}
		found = next
	}
	return found
}

// startingWith returns the entries of directory n whose names begin so.
func (f *finder) startingWith(n *erofs.Inode, prefix string) []erofs.Dirent {
	i := sort.Search(len(n.Entries), func(i int) bool { return n.Entries[i].Name >= prefix })
	j := i
	for j < len(n.Entries) && strings.HasPrefix(n.Entries[j].Name, prefix) && f.step(1) {
		j++
	}
	return n.Entries[i:j]
}

package tree

import (
	"context"
	"slices"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

// overlay stacks layers as overlayfs does.
type overlay struct {
	ctx   context.Context
	files *files
}

// mergeDir fills in the entries of the directory that stack (topmost first) makes up, in its topmost.
func (o *overlay) mergeDir(stack []*node) error {
	if err := o.ctx.Err(); err != nil {
		return err
	}
	top := stack[0]
	top.Entries = make([]erofs.Dirent, 0, len(top.children))
	for i, dir := range stack {
		for name, n := range dir.children {
			if i > 0 {
				if top.children[name] != nil {
					continue
				}
				top.children[name] = n // hides those below
			}
			if n.isWhiteout() {
				continue
			}
			var err error
			if n.isDir() {
				err = o.mergeDir(below(stack[i:], name))
			} else {
				err = o.files.load(o.ctx, n)
			}
			if err != nil {
				return err
			}
			top.Entries = append(top.Entries, erofs.Dirent{Name: name, Inode: &n.Inode})
		}
	}
	slices.SortFunc(top.Entries, func(a, b erofs.Dirent) int { return strings.Compare(a.Name, b.Name) })
	for _, dir := range stack {
		dir.children = nil
	}
	return nil
}

// below returns the directories that merge under name, which is a directory in stack's topmost.
func below(stack []*node, name string) []*node {
	merged := make([]*node, 0, 1)
	for _, dir := range stack {
		n := dir.children[name]
		if n == nil {
			continue
		}
		if !n.isDir() {
			break
		}
		merged = append(merged, n)
		if n.opaque {
			break
		}
	}
	return merged
}

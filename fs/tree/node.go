package tree

import (
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

// Limits of the file system that a layer would be unpacked to.
const (
	maxName  = 255
	maxPath  = 4000 // of an entry: PATH_MAX without room for the directory that containerd unpacks to
	maxLink  = 4095 // of a symlink's target
	maxLinks = 65000
	maxFile  = 16 << 40
)

// node is a file of one layer, as the applier has made it. All its names in the layer share it.
type node struct {
	erofs.Inode                  // Nlink counts the names that the layer has now; Entries are filled in by overlay
	children    map[string]*node // directories
	opaque      bool             // a directory that does not merge with those below
}

func newRoot() *node {
	return &node{Inode: erofs.Inode{Mode: unix.S_IFDIR | 0o755}, children: map[string]*node{}}
}

func (n *node) is(format uint32) bool { return n.Mode&unix.S_IFMT == format }
func (n *node) isDir() bool           { return n.is(unix.S_IFDIR) }

// isWhiteout reports whether overlayfs takes n for a whiteout: also a device of this number that a tar has.
func (n *node) isWhiteout() bool { return n.is(unix.S_IFCHR) && n.Rdev == 0 }

// remove removes a name of directory n, with all that is below it.
func (n *node) remove(name string) {
	c := n.children[name]
	delete(n.children, name)
	c.unlinked()
}

func (n *node) unlinked() {
	if !n.isDir() {
		n.Nlink--
	}
	for _, c := range n.children {
		c.unlinked()
	}
}

package tree

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
)

// errNeedUnpacked: the bottom layer has an opaque marker, so the names that were unpacked must be known from its start.
var errNeedUnpacked = errors.New("opaque marker in the bottom layer")

// applier applies one layer to an empty directory. Its steps and their order are those of containerd's archive.Apply.
type applier struct {
	source
	files  *files
	lowers []*node // the layers below, topmost first; none: this is the bottom layer
	root   *node
	dirs   []dirTime
	// The bottom layer's paths that entries have named, which opaque markers keep; nil until a marker was seen.
	unpacked map[string]struct{}
	cleared  map[string]struct{} // directories whose opaque marker has had its effect
	last     parent              // of the entry before: mostly the next one's too
}

// dirTime is the time of a directory's entry, set when all entries are there.
type dirTime struct {
	name string
	time time.Time
}

// parent is a directory as an entry's name gives it.
type parent struct {
	name string // the directory part of the entry's name
	path string // resolved
	node *node  // nil: nothing is known
}

// applyLayer returns the tree of layer s alone.
func applyLayer(ctx context.Context, s *source, lowers []*node, files *files) (*node, error) {
	a := &applier{source: *s, files: files, lowers: lowers}
	err := a.applyAll(ctx)
	if errors.Is(err, errNeedUnpacked) {
		a.unpacked, a.cleared = map[string]struct{}{}, map[string]struct{}{}
		err = a.applyAll(ctx)
	}
	return a.root, err
}

func (a *applier) applyAll(ctx context.Context) error {
	a.root, a.dirs, a.last = newRoot(), nil, parent{}
	r := a.entries()
	defer r.Close()
	for n := 0; ; n++ {
		if n%256 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		e, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("read headers: %w", err)
		}
		if err := a.apply(e); err != nil {
			return entryError(e.Name, err)
		}
	}
	for _, d := range a.dirs {
		if err := a.setDirTime(d); err != nil {
			return entryError(d.name, err)
		}
	}
	return nil
}

func entryError(name string, err error) error {
	if errors.Is(err, errNeedUnpacked) {
		return err
	}
	if errors.Is(err, artifact.ErrInvalid) {
		return fmt.Errorf("entry %q: %w", name, err)
	}
	return fmt.Errorf("entry %q: %w: %w", name, ErrRefused, err)
}

func (a *applier) apply(e *artifact.Entry) error {
	dirName, name := path.Split(path.Clean(e.Name))
	if name == "." || name == ".." || name == "" {
		return nil // the root
	}
	if strings.IndexByte(e.Name, 0) >= 0 || strings.IndexByte(e.Linkname, 0) >= 0 {
		return unix.EINVAL
	}
	dir, err := a.parent(e, dirName)
	if err != nil {
		return err
	}
	switch {
	case len(dir.path)+1+len(name) > maxPath:
		return unix.ENAMETOOLONG
	case name == opaqueName:
		return a.setOpaque(dir)
	case strings.HasPrefix(name, whiteoutPrefix):
		return a.whiteout(dir.node, name[len(whiteoutPrefix):])
	}
	if old := dir.node.children[name]; old != nil && !(old.isDir() && e.Typeflag == tar.TypeDir) {
		a.remove(dir.node, name)
	}
	if err := a.create(e, dir, name); err != nil {
		return err
	}
	if a.unpacked != nil {
		p := path.Join(dir.path, name)
		a.unpacked[p] = struct{}{}
		a.files.held += len(p)
	}
	return nil
}

// parent resolves the directory part of an entry's name and makes what is missing of it.
func (a *applier) parent(e *artifact.Entry, dirName string) (parent, error) {
	if a.last.node != nil && a.last.name == dirName {
		return a.last, nil
	}
	resolved, err := a.files.resolve(a.root, dirName)
	if err == nil && len(resolved) > maxPath {
		err = unix.ENAMETOOLONG
	}
	if err != nil {
		return parent{}, err
	}
	n := a.root
	for end := 0; end < len(resolved); end++ {
		start := end
		for end < len(resolved) && resolved[end] != '/' {
			end++
		}
		name := resolved[start:end]
		c := n.children[name]
		if c == nil {
			if c, err = a.makeParent(e, n, name, resolved[:end]); err != nil {
				return parent{}, err
			}
		} else if !c.isDir() {
			return parent{}, fmt.Errorf("%s: %w", resolved[:end], unix.ENOTDIR)
		}
		n = c
	}
	a.last = parent{name: dirName, path: resolved, node: n}
	return a.last, nil
}

// makeParent makes a directory that no entry has described, after those of the layers below.
func (a *applier) makeParent(e *artifact.Entry, in *node, name, p string) (*node, error) {
	if len(name) > maxName {
		return nil, unix.ENAMETOOLONG
	}
	n := a.add(in, name, unix.S_IFDIR)
	n.chmod(0o755)
	n.setTime(e.ModTime)
	for _, root := range a.lowers {
		resolved, err := a.files.resolve(root, p)
		if err != nil {
			return nil, fmt.Errorf("%s in a lower layer: %w", p, err)
		}
		lower, err := a.files.lstat(root, resolved)
		if err != nil {
			return nil, fmt.Errorf("%s in a lower layer: %w", resolved, err)
		}
		if lower == nil {
			continue
		}
		if lower.isDir() {
			n.copyDirInfo(lower)
		}
		break
	}
	return n, a.files.account(n)
}

// add makes a file in directory in, as its creation does: before mode, owner and times are set.
func (a *applier) add(in *node, name string, format uint32) *node {
	n := a.files.newNode()
	n.Mode = format
	if format == unix.S_IFDIR {
		n.children = map[string]*node{}
	} else {
		n.Nlink = 1
	}
	if in.Mode&unix.S_ISGID != 0 {
		n.GID = in.GID
	}
	n.inheritACL(in)
	in.children[strings.Clone(name)] = n // the entry's whole name need not stay in memory
	return n
}

// remove is os.RemoveAll of a name in directory in.
func (a *applier) remove(in *node, name string) {
	in.remove(name)
	a.last = parent{} // may be gone
}

func (a *applier) setOpaque(dir parent) error {
	if len(a.lowers) > 0 {
		dir.node.opaque = true
		return nil
	}
	if a.unpacked == nil {
		return errNeedUnpacked
	}
	if _, ok := a.cleared[dir.path]; !ok {
		a.cleared[dir.path] = struct{}{}
		a.clear(dir.node, dir.path)
	}
	return nil
}

// clear removes what no entry has named.
func (a *applier) clear(dir *node, p string) {
	for name, n := range dir.children {
		child := path.Join(p, name)
		if _, ok := a.unpacked[child]; !ok {
			a.remove(dir, name)
		} else if n.isDir() {
			a.clear(n, child)
		}
	}
}

func (a *applier) whiteout(dir *node, name string) error {
	if name == "" || name == "." || name == ".." {
		return errors.New("invalid whiteout name")
	}
	if len(name) > maxName {
		return unix.ENAMETOOLONG
	}
	exists := dir.children[name] != nil
	if len(a.lowers) == 0 {
		if exists {
			a.remove(dir, name)
		}
		return nil
	}
	if exists {
		return fmt.Errorf("whiteout: %w", unix.EEXIST)
	}
	return a.files.account(a.add(dir, name, unix.S_IFCHR))
}

// create makes the file that e describes. Of its name there is nothing yet, unless both are directories.
func (a *applier) create(e *artifact.Entry, dir parent, name string) error {
	if len(name) > maxName {
		return unix.ENAMETOOLONG
	}
	n, err := a.make(e, dir.node, name)
	if n == nil || err != nil {
		return err
	}
	n.chown(e.Uid, e.Gid)
	if err := n.setXattrs(e.PAXRecords); err != nil {
		return err
	}
	n.chmod(uint32(e.Mode))
	n.setTime(e.ModTime)
	return a.files.account(n)
}

// make makes the file of e's type; nil if that type has none.
func (a *applier) make(e *artifact.Entry, dir *node, name string) (*node, error) {
	switch e.Typeflag {
	case tar.TypeDir:
		a.dirs = append(a.dirs, dirTime{strings.Clone(e.Name), e.ModTime}) // the name may be a part of its PAX records
		if n := dir.children[name]; n != nil {
			return n, nil
		}
		return a.add(dir, name, unix.S_IFDIR), nil
	case tar.TypeReg:
		n := a.add(dir, name, unix.S_IFREG)
		return n, a.setData(n, e)
	case tar.TypeSymlink:
		if e.Linkname == "" {
			return nil, unix.ENOENT
		}
		if len(e.Linkname) > maxLink {
			return nil, unix.ENAMETOOLONG
		}
		n := a.add(dir, name, unix.S_IFLNK)
		n.Mode |= 0o777
		n.Data = []byte(e.Linkname)
		return n, nil
	case tar.TypeLink:
		return a.link(e.Linkname, dir, name)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return a.mknod(e, dir, name)
	case tar.TypeXGlobalHeader:
		return nil, nil
	}
	return nil, fmt.Errorf("unhandled tar header type %q", e.Typeflag)
}

func (a *applier) mknod(e *artifact.Entry, dir *node, name string) (*node, error) {
	if e.Devmajor < 0 || e.Devmajor > math.MaxUint32 || e.Devminor < 0 || e.Devminor > math.MaxUint32 {
		return nil, fmt.Errorf("device number %d:%d out of range", e.Devmajor, e.Devminor)
	}
	if e.Typeflag == tar.TypeFifo {
		return a.add(dir, name, unix.S_IFIFO), nil
	}
	format := uint32(unix.S_IFCHR)
	if e.Typeflag == tar.TypeBlock {
		format = unix.S_IFBLK
	}
	n := a.add(dir, name, format)
	n.Rdev = uint32(unix.Mkdev(uint32(e.Devmajor), uint32(e.Devminor))) // mknod(2) takes 32 bits and drops the rest
	return n, nil
}

// link makes a hard link. A symlink as the last component of the target is not followed.
func (a *applier) link(target string, dir *node, name string) (*node, error) {
	targetDir, targetName := path.Split(target)
	resolved, err := a.files.resolve(a.root, targetDir)
	if err != nil {
		return nil, fmt.Errorf("link target %q: %w", target, err)
	}
	n, err := a.files.lstat(a.root, strings.TrimPrefix(path.Join("/", resolved, targetName), "/"))
	switch {
	case err != nil:
	case n == nil:
		err = unix.ENOENT
	case n.isDir():
		err = unix.EPERM
	case n.Nlink >= maxLinks:
		err = unix.EMLINK
	default:
		n.Nlink++
		dir.children[strings.Clone(name)] = n
		return n, nil
	}
	return nil, fmt.Errorf("link target %q: %w", target, err)
}

// setDirTime sets the time of whatever file the name of a directory's entry leads to in the end.
func (a *applier) setDirTime(d dirTime) error {
	resolved, err := a.files.resolve(a.root, path.Clean(d.name))
	if err != nil {
		return err
	}
	n, err := a.files.lstat(a.root, resolved)
	if err == nil && n == nil {
		err = unix.ENOENT
	}
	if err != nil {
		return fmt.Errorf("set time: %w", err)
	}
	n.setTime(d.time)
	return nil
}

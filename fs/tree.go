package fs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

// tree is the file system of one image in tree mode, served out of its memory-mapped metadata image. It has no state: a node id is a
// function of the EROFS inode number (nid), and nothing is remembered of an open file.
type tree struct {
	fuse.RawFileSystem
	id      string
	image   *erofs.Image
	mapped  []byte // what image reads; set and unmapped under Server.mu
	device  Device
	xattrs  bool
	session *session

	settling atomic.Bool // see settle
}

// mountTree mounts the metadata image at target as a tree.
func (s *Server) mountTree(m *mount, img Image, target string) error {
	metadata, err := os.Open(img.Metadata)
	if err != nil {
		return err
	}
	defer metadata.Close()
	t, err := openTree(img.ID, metadata, img.Device)
	if err != nil {
		return err
	}
	err = s.startTree(t, func(o sessionOptions) (*session, error) {
		st, err := newState()
		if err != nil {
			return nil, err
		}
		return newSession(target, t, st, o)
	})
	if err != nil {
		return err
	}
	m.metadata, m.bdi = img.Metadata, deviceBDI(t.session.dev)
	s.setReadAhead(m.bdi, false, img.Started)
	err = t.settle(target)
	if err == nil && s.keep != nil && img.ID != probeID {
		a := about{Kind: kindTree, Mode: ModeTree, Want: s.want, Reason: s.reason, ID: img.ID, Size: img.Device.Size()}
		err = t.session.keepAs(s.newName(), s.keep, a, metadata)
	}
	if err != nil {
		return errors.Join(err, t.session.close())
	}
	m.tree = t
	return nil
}

// startTree serves t by the session that start makes. When the session has ended, or cannot be made, t is unmapped.
func (s *Server) startTree(t *tree, start func(sessionOptions) (*session, error)) (err error) {
	s.mu.Lock()
	s.trees[t] = true
	s.mu.Unlock()
	o := s.options
	o.ended = func() {
		s.mu.Lock()
		unix.Munmap(t.mapped)
		t.mapped = nil
		s.mu.Unlock()
		if late, ok := t.device.(*lateDevice); ok {
			late.close()
		}
		s.mu.Lock()
		delete(s.trees, t)
		s.mu.Unlock()
	}
	o.proto.EnableSymlinkCaching = true
	o.proto.ExplicitDataCacheControl = true
	o.proto.IDMappedMount = true // from Linux 6.12
	o.proto.EnableAcl = t.xattrs // each permission check would ask for an ACL
	o.proto.ExtraCapabilities = fuse.CAP_NO_OPENDIR_SUPPORT
	if t.session, err = start(o); err != nil {
		o.ended()
	}
	return err
}

func openTree(id string, metadata *os.File, dev Device) (*tree, error) {
	mem, err := mapped.Open(metadata)
	if err != nil {
		return nil, err
	}
	image, err := erofs.Open(mem)
	if err != nil {
		unix.Munmap(mem)
		return nil, fmt.Errorf("open metadata image %s: %w", metadata.Name(), err)
	}
	t := &tree{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		id:            id,
		image:         image,
		mapped:        mem,
		device:        dev,
		xattrs:        image.HasXattrs(),
	}
	t.rest() // the kernel has mapped much around what was looked at
	return t, nil
}

// rest gives the pages of the metadata back to the kernel, which keeps them or not, until they are needed again.
func (t *tree) rest() { unix.Madvise(t.mapped, unix.MADV_DONTNEED) }

// settleNode is the node of a file that is there only while settle opens it. No nid is as large.
const settleNode = 1 << 62

// settle has the kernel ask its first and last questions about OPENDIR, OPEN, POLL and FLUSH.
func (t *tree) settle(target string) error {
	t.settling.Store(true)
	defer t.settling.Store(false)
	return errors.Join(settle(target), settle(filepath.Join(target, settleName)))
}

// node returns the node id of nid. FUSE wants 1 for the root, and 0 means no node, so the others begin at 2.
func (t *tree) node(nid uint64) uint64 {
	if nid == t.image.Root() {
		return fuse.FUSE_ROOT_ID
	}
	return nid + 2
}

func (t *tree) nid(node uint64) uint64 {
	if node == fuse.FUSE_ROOT_ID {
		return t.image.Root()
	}
	return node - 2
}

// read gives the bytes of a file: from the data device, from the image, or zeros.
func (t *tree) read(ctx context.Context, node uint64, off int64, p []byte) (int, error) {
	nid := t.nid(node)
	st, err := t.image.Stat(nid)
	if err != nil {
		return 0, err
	}
	if off >= st.Size {
		return 0, nil
	}
	p = p[:min(int64(len(p)), st.Size-off)]
	for done := 0; done < len(p); {
		data, dev, hole, n, err := t.image.Map(nid, off+int64(done))
		if err != nil {
			return 0, err
		}
		part := p[done:]
		part = part[:min(int64(len(part)), n)]
		switch {
		case hole:
			clear(part)
		case data != nil:
			if _, err := t.device.ReadAt(ctx, nil, 0); err != nil { // whether what is of the device's files may be read
				return 0, err
			}
			part = part[:copy(part, data)]
		default:
			if err := readFull(ctx, t.device, part, dev); err != nil {
				return 0, err
			}
		}
		if len(part) == 0 {
			return 0, fmt.Errorf("inode %d: no data at %d", nid, off+int64(done))
		}
		done += len(part)
	}
	return len(p), nil
}

// attr fills in the attributes of nid, which are EROFS's: it has one time, and counts blocks as if files had no holes.
func (t *tree) attr(nid uint64, a *fuse.Attr) fuse.Status {
	st, err := t.image.Stat(nid)
	if err != nil {
		return fuse.EIO
	}
	*a = fuse.Attr{
		Ino:       nid,
		Size:      uint64(st.Size),
		Blocks:    uint64(st.Size+511) / 512,
		Atime:     uint64(st.Mtime),
		Mtime:     uint64(st.Mtime),
		Ctime:     uint64(st.Mtime),
		Atimensec: st.MtimeNsec,
		Mtimensec: st.MtimeNsec,
		Ctimensec: st.MtimeNsec,
		Mode:      st.Mode,
		Nlink:     st.Nlink,
		Owner:     fuse.Owner{Uid: st.UID, Gid: st.GID},
		Rdev:      st.Rdev,
		Blksize:   4096,
	}
	return fuse.OK
}

func (t *tree) entry(nid uint64, out *fuse.EntryOut) fuse.Status {
	out.NodeId = t.node(nid)
	out.SetEntryTimeout(forever)
	out.SetAttrTimeout(forever)
	return t.attr(nid, &out.Attr)
}

// Lookup answers a name that is not there with node 0, which the kernel remembers, unlike an error.
func (t *tree) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if name == settleName && t.settling.Load() {
		out.NodeId, out.Attr = settleNode, fuse.Attr{Ino: settleNode, Mode: unix.S_IFREG, Nlink: 1}
		out.SetAttrTimeout(forever) // and none for the entry
		return fuse.OK
	}
	if len(name) > unix.NAME_MAX { // FUSE's own limit is higher
		return fuse.Status(unix.ENAMETOOLONG)
	}
	child, found, err := t.image.Lookup(t.nid(h.NodeId), name)
	if err != nil {
		return fuse.EIO
	}
	if !found {
		out.SetEntryTimeout(forever)
		return fuse.OK
	}
	return t.entry(child, out)
}

func (t *tree) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.SetTimeout(forever)
	return t.attr(t.nid(in.NodeId), &out.Attr)
}

func (t *tree) Readlink(_ <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	target, err := t.image.Readlink(t.nid(h.NodeId))
	if err != nil {
		return nil, fuse.EIO
	}
	return target, fuse.OK
}

// Open, OpenDir and Flush make the kernel stop asking: nothing is remembered of an open file, and the page cache is kept.
func (t *tree) Open(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status    { return fuse.ENOSYS }
func (t *tree) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.ENOSYS }
func (t *tree) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status                 { return fuse.ENOSYS }

func (t *tree) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	err := t.image.ReadDir(t.nid(in.NodeId), in.Offset, func(name []byte, child uint64, typ uint8, next uint64) bool {
		return out.AddDirEntry(fuse.DirEntry{Name: string(name), Mode: uint32(typ) << 12, Ino: child, Off: next})
	})
	if err != nil {
		return fuse.EIO
	}
	return fuse.OK
}

func (t *tree) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	status := fuse.OK
	err := t.image.ReadDir(t.nid(in.NodeId), in.Offset, func(name []byte, child uint64, typ uint8, next uint64) bool {
		e := out.AddDirLookupEntry(fuse.DirEntry{Name: string(name), Mode: uint32(typ) << 12, Ino: child, Off: next})
		if e == nil {
			return false
		}
		if string(name) != "." && string(name) != ".." { // of which the kernel wants no node
			status = t.entry(child, e)
		}
		return status.Ok()
	})
	if err != nil {
		return fuse.EIO
	}
	return status
}

// GetXAttr of an image without any makes the kernel stop asking: overlayfs asks for each file that it looks up.
func (t *tree) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	if !t.xattrs {
		return 0, fuse.ENOSYS
	}
	value, found, err := t.image.Xattr(t.nid(h.NodeId), name)
	switch {
	case err != nil:
		return 0, fuse.EIO
	case !found:
		return 0, fuse.ENOATTR
	case len(value) > len(dest):
		return uint32(len(value)), fuse.ERANGE
	}
	return uint32(copy(dest, value)), fuse.OK
}

func (t *tree) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	var list []byte
	err := t.image.Xattrs(t.nid(h.NodeId), func(name string) {
		list = append(append(list, name...), 0)
	})
	switch {
	case err != nil:
		return 0, fuse.EIO
	case len(list) > len(dest):
		return uint32(len(list)), fuse.ERANGE
	}
	return uint32(copy(dest, list)), fuse.OK
}

func (t *tree) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	const size = 4096
	*out = fuse.StatfsOut{
		Blocks:  uint64(t.device.Size()+int64(len(t.mapped))) / size,
		Files:   uint64(t.image.NumInodes()),
		Bsize:   size,
		Frsize:  size,
		NameLen: unix.NAME_MAX,
	}
	return fuse.OK
}

package fs

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// deviceAlign is what a data device's file is rounded up to, with zeros: the largest EROFS block size in use, and so also a
// multiple of the 512 bytes that a loop device counts in.
const deviceAlign = 4096

// devices is the file system of the data devices: a flat directory with one read-only file for each image ID in use.
//
// Files are opened with FOPEN_DIRECT_IO: EROFS caches what it reads, so a cache here would be a second copy, and its read-ahead,
// knowing nothing of files, would fetch what nobody asked for.
type devices struct {
	fuse.RawFileSystem
	session *session
	state   *state // the session's

	mu     sync.Mutex
	byNode map[uint64]*device
}

// device is a data device in use.
type device struct {
	id   string
	node uint64
	dev  Device
	size int64 // of the file: dev's, rounded up

	// Guarded by devices.mu.
	mounts  int           // that use it
	opens   int           // open files
	reads   int           // in progress
	records []int         // of mounts that are gone
	idle    chan struct{} // closed when nothing uses it any more; the device is forgotten then
}

func newDevices(st *state) *devices {
	return &devices{RawFileSystem: fuse.NewDefaultRawFileSystem(), state: st, byNode: map[uint64]*device{}}
}

// deviceNode is the node id, and the inode number, of the data device id: the same in every process, so that a successor of this one
// finds the kernel's references meaning what they meant. It is never 0, 1 (the root) or negative (go-fuse uses -1).
func deviceNode(id string) uint64 {
	sum := sha256.Sum256([]byte(id))
	return binary.BigEndian.Uint64(sum[:])>>2 | 1<<62
}

// acquire adds a mount's use of the data device id.
func (d *devices) acquire(id string, dev Device) (*device, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	e, err := d.add(id, dev)
	if err == nil {
		e.mounts++
	}
	return e, err
}

// add returns the data device id, which is made if there is none. The caller holds mu.
func (d *devices) add(id string, dev Device) (*device, error) {
	node := deviceNode(id)
	e := d.byNode[node]
	switch {
	case e == nil:
		// A predecessor may have opened it for a mount that it did not live to record.
		e = &device{id: id, node: node, dev: dev, opens: d.state.opensOf(node), idle: make(chan struct{})}
		e.size = (dev.Size() + deviceAlign - 1) &^ (deviceAlign - 1)
		d.byNode[node] = e
	case e.id != id:
		return nil, fmt.Errorf("data devices %s and %s have the same node id", e.id, id)
	}
	return e, nil
}

// noRecord is the place of no record.
const noRecord = -1

// release undoes acquire for a mount with a record, and reports whether no mount uses e any more. When e.idle is closed, its Device is
// not used any more.
func (d *devices) release(e *device, record int) (last bool) {
	d.update(e.node, func(e *device) {
		e.mounts--
		last = e.mounts == 0
		if record == noRecord {
			return
		}
		if last && e.opens > 0 {
			// The kernel closes its file in a moment, or when the last user of the mount is gone. A successor must know until then what
			// the file is of.
			if i, err := d.state.addRecord(mountRecord{ID: e.id, Size: e.dev.Size()}); err == nil {
				e.records = append(e.records, i)
			}
		}
		d.state.dropRecord(record)
	})
	return last
}

// use returns the device node for a read, and is followed by unuse.
func (d *devices) use(node uint64) *device {
	d.mu.Lock()
	defer d.mu.Unlock()
	e := d.byNode[node]
	if e != nil {
		e.reads++
	}
	return e
}

func (d *devices) unuse(node uint64) { d.update(node, func(e *device) { e.reads-- }) }

// update calls f with the device node, if there is one, and forgets it if nothing uses it then.
func (d *devices) update(node uint64, f func(e *device)) {
	d.mu.Lock()
	e := d.byNode[node]
	if e == nil {
		d.mu.Unlock()
		return
	}
	f(e)
	idle := e.mounts == 0 && e.opens == 0 && e.reads == 0
	if idle {
		delete(d.byNode, e.node)
		for _, i := range e.records {
			d.state.dropRecord(i)
		}
	}
	d.mu.Unlock()
	if !idle {
		return
	}
	if late, ok := e.dev.(*lateDevice); ok {
		late.close()
	}
	close(e.idle)
}

// list returns the devices by node id.
func (d *devices) list() []*device {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := make([]*device, 0, len(d.byNode))
	for _, e := range d.byNode {
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b *device) int { return int(int64(a.node - b.node)) })
	return all
}

func (d *devices) get(node uint64) *device {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.byNode[node]
}

func (d *devices) read(ctx context.Context, node uint64, off int64, p []byte) (int, error) {
	e := d.use(node)
	if e == nil {
		return 0, os.ErrNotExist
	}
	defer d.unuse(node)
	if off >= e.size {
		return 0, nil
	}
	p = p[:min(int64(len(p)), e.size-off)]
	data := p[:min(int64(len(p)), max(e.dev.Size()-off, 0))]
	if err := readFull(ctx, e.dev, data, off); err != nil {
		return 0, fmt.Errorf("data device %s: %w", e.id, err)
	}
	clear(p[len(data):])
	return len(p), nil
}

// readFull fills p from off of dev. A short read must not pass for success: EROFS takes what is missing for zeros.
func readFull(ctx context.Context, dev Device, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	n, err := dev.ReadAt(ctx, p, off)
	if err == nil && n != len(p) {
		err = fmt.Errorf("read of %d bytes at %d gave %d", len(p), off, n)
	}
	return err
}

// attr fills in the attributes of e, or of the root for nil.
func (e *device) attr(a *fuse.Attr) {
	if e == nil {
		*a = fuse.Attr{Ino: fuse.FUSE_ROOT_ID, Mode: unix.S_IFDIR | 0o500, Nlink: 2}
		return
	}
	*a = fuse.Attr{Ino: e.node, Mode: unix.S_IFREG | 0o400, Nlink: 1, Size: uint64(e.size), Blocks: uint64(e.size / 512)}
}

func (d *devices) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	e := d.get(deviceNode(name))
	if h.NodeId != fuse.FUSE_ROOT_ID || e == nil || e.id != name {
		return fuse.ENOENT
	}
	out.NodeId = e.node
	out.SetEntryTimeout(forever)
	out.SetAttrTimeout(forever)
	e.attr(&out.Attr)
	return fuse.OK
}

func (d *devices) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	e := d.get(in.NodeId)
	if e == nil && in.NodeId != fuse.FUSE_ROOT_ID {
		return fuse.ENOENT
	}
	out.SetTimeout(forever)
	e.attr(&out.Attr)
	return fuse.OK
}

// Open gives the request's unique, which never comes again, as the handle: executed twice, it opens once.
func (d *devices) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) (status fuse.Status) {
	status = fuse.ENOENT
	d.update(in.NodeId, func(e *device) {
		var isNew bool
		out.Fh = in.Unique &^ resent
		if isNew, status = d.state.addOpen(e.node, out.Fh); isNew {
			e.opens++
		}
	})
	out.OpenFlags = fuse.FOPEN_DIRECT_IO
	return status
}

func (d *devices) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	if !d.state.dropOpen(in.Fh) {
		return // released before
	}
	d.update(in.NodeId, func(e *device) { e.opens-- })
}

// load adds a data device that a predecessor served.
func (d *devices) load(r mountRecord, dev Device) (*device, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.add(r.ID, dev)
}

// forgetUnused forgets the devices that were loaded and that nothing uses.
func (d *devices) forgetUnused() {
	for _, e := range d.list() {
		d.update(e.node, func(*device) {})
	}
}

// Flush makes the kernel stop asking: a process that closes a file while no daemon serves it would hang.
func (d *devices) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

func (d *devices) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.OK }

// ReadDir lists the devices by node id, which is also the position after an entry.
func (d *devices) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	for i, name := range []string{".", ".."} {
		off := uint64(i + 1)
		if in.Offset < off && !out.AddDirEntry(fuse.DirEntry{Name: name, Mode: unix.S_IFDIR, Ino: fuse.FUSE_ROOT_ID, Off: off}) {
			return fuse.OK
		}
	}
	for _, e := range d.list() {
		if in.Offset < e.node && !out.AddDirEntry(fuse.DirEntry{Name: e.id, Mode: unix.S_IFREG, Ino: e.node, Off: e.node}) {
			break
		}
	}
	return fuse.OK
}

func (d *devices) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	*out = fuse.StatfsOut{Bsize: deviceAlign, Frsize: deviceAlign, NameLen: unix.NAME_MAX}
	for _, e := range d.list() {
		out.Blocks += uint64(e.size / deviceAlign)
		out.Files++
	}
	return fuse.OK
}

// mountDevices serves data devices at dir.
func mountDevices(dir string, o sessionOptions) (*devices, error) {
	st, err := newState()
	if err != nil {
		return nil, err
	}
	d := newDevices(st)
	if d.session, err = newSession(dir, d, st, deviceOptions(o)); err != nil {
		return nil, err
	}
	if err := d.settle(dir); err != nil {
		return nil, errors.Join(err, d.session.close())
	}
	return d, nil
}

func deviceOptions(o sessionOptions) sessionOptions {
	o.flags = unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOEXEC
	o.proto.DisableReadDirPlus = true
	o.proto.ExplicitDataCacheControl = true
	// For loop devices. In a tree it would make a container's O_DIRECT read wait, whatever kills it, until we answer.
	o.proto.ExtraCapabilities = fuse.CAP_ASYNC_DIO
	return o
}

// empty is a Device without bytes.
type empty struct{}

func (empty) ReadAt(context.Context, []byte, int64) (int, error) { return 0, nil }
func (empty) Size() int64                                        { return 0 }

// settle has the kernel ask its first and last questions about POLL and FLUSH, see settle.
func (d *devices) settle(dir string) error {
	e, err := d.acquire(settleName, empty{}) // no image has this ID
	if err != nil {
		return err
	}
	defer d.release(e, noRecord)
	return settle(filepath.Join(dir, settleName))
}

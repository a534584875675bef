package tree

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

const (
	xattrRecord = "SCHILY.xattr."
	capability  = "security.capability"
	aclAccess   = "system.posix_acl_access"
	aclDefault  = "system.posix_acl_default"

	maxXattr  = 65535     // of a value: what a metadata image can hold
	maxXattrs = 192 << 10 // of all names and values of an inode, likewise
)

// chown is lchown(2), to which 4294967295 means no change.
func (n *node) chown(uid, gid int) {
	if uint32(uid) != math.MaxUint32 {
		n.UID = uint32(uid)
	}
	if uint32(gid) != math.MaxUint32 {
		n.GID = uint32(gid)
	}
	if !n.isDir() {
		n.removeXattr(capability)
	}
}

// chmod is chmod(2), and nothing on a symlink.
func (n *node) chmod(mode uint32) {
	if n.is(unix.S_IFLNK) {
		return
	}
	n.Mode = n.Mode&unix.S_IFMT | mode&0o7777
	n.maskACL()
}

// setTime sets the time as the applier does, which takes what 64 bits of nanoseconds cannot express, or lies before 1970, for 1970.
func (n *node) setTime(t time.Time) {
	n.Mtime, n.MtimeNsec = 0, 0
	if !t.Before(time.Unix(0, 0)) && !t.After(time.Unix(0, math.MaxInt64)) {
		n.Mtime, n.MtimeNsec = t.Unix(), uint32(t.Nanosecond())
	}
}

// copyDirInfo makes directory n like that of a lower layer.
func (n *node) copyDirInfo(lower *node) {
	n.UID, n.GID = lower.UID, lower.GID
	n.chmod(lower.Mode)
	n.Mtime, n.MtimeNsec = lower.Mtime, lower.MtimeNsec
	for _, x := range lower.Xattrs {
		n.setXattr(x.Name, x.Value)
	}
}

// setXattrs sets the xattrs among an entry's PAX records.
func (n *node) setXattrs(records map[string]string) error {
	for key, value := range records {
		name, ok := strings.CutPrefix(key, xattrRecord)
		if !ok {
			continue
		}
		v, set, err := n.checkXattr(name, []byte(value))
		if err != nil {
			return fmt.Errorf("xattr %q: %w", name, err)
		}
		if set {
			n.setXattr(strings.Clone(name), v) // it is a part of all the records
		}
	}
	if n.xattrSize() > maxXattrs {
		return errors.New("xattrs too large")
	}
	return nil
}

func (n *node) xattrSize() (size int) {
	for _, x := range n.Xattrs {
		size += len(x.Name) + len(x.Value) + 8
	}
	return size
}

// checkXattr returns the value that setting name to value gives, or false if the applier goes on without it.
func (n *node) checkXattr(name string, value []byte) ([]byte, bool, error) {
	namespace, rest, _ := strings.Cut(name, ".")
	switch {
	case namespace == "trusted" && len(name) > len(namespace):
		return nil, false, nil
	case name == "" || len(name) > maxName:
		return nil, false, unix.ERANGE
	case len(value) > maxXattr:
		return nil, false, unix.E2BIG
	case name == aclAccess || name == aclDefault:
		return n.checkACL(name, value)
	case namespace == "user" && len(name) > len(namespace):
		if !n.is(unix.S_IFREG) && !n.isDir() {
			return nil, false, nil
		}
	case namespace == "security" && len(name) > len(namespace):
		if name == capability && !isCapability(value) {
			return nil, false, unix.EINVAL
		}
	default:
		return nil, false, nil // ENOTSUP
	}
	if rest == "" {
		return nil, false, unix.EINVAL
	}
	return value, true, nil
}

// isCapability reports whether v is a struct vfs_cap_data or vfs_ns_cap_data (linux/capability.h) that the kernel takes.
func isCapability(v []byte) bool {
	const effective = 1
	if len(v) < 4 {
		return false
	}
	switch uint32(v[3])<<24 | uint32(v[2])<<16 | uint32(v[1])<<8 | uint32(v[0])&^effective {
	case 0x02000000:
		return len(v) == 20
	case 0x03000000:
		return len(v) == 24 && string(v[20:]) != "\xff\xff\xff\xff"
	}
	return false
}

// setXattr sets an xattr, or removes it if it is an ACL without entries.
func (n *node) setXattr(name string, value []byte) {
	i, found := n.findXattr(name)
	switch {
	case value == nil && found:
		n.Xattrs = slices.Delete(n.Xattrs, i, i+1)
	case value == nil:
	case found:
		n.Xattrs[i].Value = value
	default:
		n.Xattrs = slices.Insert(n.Xattrs, i, erofs.Xattr{Name: name, Value: value})
	}
}

func (n *node) removeXattr(name string) { n.setXattr(name, nil) }

func (n *node) xattr(name string) []byte {
	if i, ok := n.findXattr(name); ok {
		return n.Xattrs[i].Value
	}
	return nil
}

// findXattr finds name in n's xattrs, which are in the order of names.
func (n *node) findXattr(name string) (int, bool) {
	return slices.BinarySearchFunc(n.Xattrs, name, func(x erofs.Xattr, name string) int { return strings.Compare(x.Name, name) })
}

package tree

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// A POSIX ACL as the value of an xattr (linux/posix_acl_xattr.h): a version, then entries of tag, permissions and id,
// little endian.
const (
	aclVersion   = 2
	aclHeader    = 4
	aclEntrySize = 8
)

// Tags of ACL entries, and their order in a valid ACL.
const (
	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

type acl []byte

func (a acl) len() int           { return (len(a) - aclHeader) / aclEntrySize }
func (a acl) entry(i int) []byte { return a[aclHeader+i*aclEntrySize:][:aclEntrySize] }
func (a acl) tag(i int) uint16   { return binary.LittleEndian.Uint16(a.entry(i)) }

func (a acl) setPerm(i int, perm uint32) {
	binary.LittleEndian.PutUint16(a.entry(i)[2:], uint16(perm&7))
}

// isExtended reports whether a says more than the nine bits of a mode.
func (a acl) isExtended() bool {
	for i := range a.len() {
		if t := a.tag(i); t != aclUserObj && t != aclGroupObj && t != aclOther {
			return true
		}
	}
	return false
}

// checkACL returns the ACL that setting an ACL xattr stores, as checkXattr; nil if that removes it.
func (n *node) checkACL(name string, value []byte) ([]byte, bool, error) {
	if n.is(unix.S_IFLNK) {
		return nil, false, nil
	}
	a, err := parseACL(value)
	if err == unix.EOPNOTSUPP {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	if name == aclDefault && !n.isDir() {
		if a != nil {
			return nil, false, unix.EACCES
		}
		return nil, false, nil
	}
	if name == aclAccess && a != nil && !a.isExtended() {
		a = nil // it becomes the mode, which the entry sets next
	}
	return a, true, nil
}

// parseACL checks value as the kernel does and returns it in the form in which it is read back; nil if it has no entries.
func parseACL(value []byte) (acl, error) {
	if len(value) == 0 {
		return nil, nil
	}
	if len(value) < aclHeader {
		return nil, unix.EINVAL
	}
	if binary.LittleEndian.Uint32(value) != aclVersion {
		return nil, unix.EOPNOTSUPP
	}
	if (len(value)-aclHeader)%aclEntrySize != 0 {
		return nil, unix.EINVAL
	}
	if len(value) == aclHeader {
		return nil, nil
	}
	a := acl(append([]byte(nil), value...))
	named, last := false, uint16(0)
	for i := range a.len() {
		e, tag := a.entry(i), a.tag(i)
		id := binary.LittleEndian.Uint32(e[4:])
		isNamed := tag == aclUser || tag == aclGroup
		if binary.LittleEndian.Uint16(e[2:])&^7 != 0 || tag < last || tag == last && !isNamed || isNamed && id == ^uint32(0) {
			return nil, unix.EINVAL
		}
		// The three entries of a mode are never left out, and named ones need a mask.
		switch tag {
		case aclUserObj:
		case aclUser, aclGroupObj:
			if last != aclUserObj && last != aclUser {
				return nil, unix.EINVAL
			}
		case aclGroup, aclMask:
			if last != aclGroupObj && last != aclGroup {
				return nil, unix.EINVAL
			}
		case aclOther:
			if last != aclMask && (last != aclGroupObj || named) {
				return nil, unix.EINVAL
			}
		default:
			return nil, unix.EINVAL
		}
		if !isNamed {
			binary.LittleEndian.PutUint32(e[4:], ^uint32(0))
		}
		named, last = named || isNamed, tag
	}
	if last != aclOther {
		return nil, unix.EINVAL
	}
	return a, nil
}

// inheritACL gives the new file n what the default ACL of its directory says.
func (n *node) inheritACL(dir *node) {
	a := acl(dir.xattr(aclDefault))
	if a == nil || n.is(unix.S_IFLNK) {
		return
	}
	if a.isExtended() {
		n.setXattr(aclAccess, a)
	}
	if n.isDir() {
		n.setXattr(aclDefault, a)
	}
}

// maskACL makes the ACL agree with a mode that was set.
func (n *node) maskACL() {
	old := acl(n.xattr(aclAccess))
	if old == nil {
		return
	}
	a := acl(append([]byte(nil), old...)) // may be shared
	group := -1
	for i := range a.len() {
		switch a.tag(i) {
		case aclUserObj:
			a.setPerm(i, n.Mode>>6)
		case aclGroupObj:
			if group < 0 {
				group = i
			}
		case aclMask:
			group = i
		case aclOther:
			a.setPerm(i, n.Mode)
		}
	}
	if group >= 0 {
		a.setPerm(group, n.Mode>>3)
	}
	n.setXattr(aclAccess, a)
}

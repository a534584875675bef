package tree

import (
	"bytes"
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
	a, err := parseACL(value)
	switch {
	case err == unix.EOPNOTSUPP:
		return nil, false, nil
	case err != nil:
		return nil, false, err
	case n.is(unix.S_IFLNK):
		return nil, false, nil // EOPNOTSUPP too
	case name == aclDefault && !n.isDir():
		if a != nil {
			return nil, false, unix.EACCES
		}
		return nil, false, nil
	case a == nil:
		return nil, true, nil
	case !a.isValid():
		return nil, false, unix.EINVAL
	case name == aclAccess && !a.isExtended():
		return nil, true, nil // it becomes the mode, which the entry sets next
	}
	return a, true, nil
}

// parseACL reads value as the kernel does (posix_acl_from_xattr) and returns it as it would be read back; nil if it has
// no entries.
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
	a := acl(bytes.Clone(value))
	for i := range a.len() {
		const unnamed = ^uint32(0)
		id := a.entry(i)[4:]
		switch a.tag(i) {
		case aclUserObj, aclGroupObj, aclMask, aclOther:
			binary.LittleEndian.PutUint32(id, unnamed)
		case aclUser, aclGroup:
			if binary.LittleEndian.Uint32(id) == unnamed {
				return nil, unix.EINVAL
			}
		default:
			return nil, unix.EINVAL
		}
	}
	return a, nil
}

// isValid reports whether the entries are in order (posix_acl_valid): user, named users, group, named groups, mask, other,
// where there must be a mask if anyone is named.
func (a acl) isValid() bool {
	named, last := false, uint16(0)
	for i := range a.len() {
		tag, ok := a.tag(i), false
		switch tag {
		case aclUserObj:
			ok = last == 0
		case aclUser, aclGroupObj:
			ok = last == aclUserObj || last == aclUser
		case aclGroup, aclMask:
			ok = last == aclGroupObj || last == aclGroup
		case aclOther:
			ok = last == aclMask || last == aclGroupObj && !named
		}
		if !ok || binary.LittleEndian.Uint16(a.entry(i)[2:]) > 7 {
			return false
		}
		named, last = named || tag == aclUser || tag == aclGroup, tag
	}
	return last == aclOther
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
	a := acl(bytes.Clone(old)) // may be shared
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

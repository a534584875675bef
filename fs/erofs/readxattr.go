package erofs

import "encoding/binary"

// xattrs calls f for each attribute of inode i until f returns false. The suffix and the value are parts of the image.
func (m *Image) xattrs(i *inode, f func(index uint8, suffix, value []byte) bool) error {
	if i.rest == i.xattrs {
		return nil
	}
	header, err := m.bytes(i.xattrs, xattrHeader)
	if err != nil {
		return err
	}
	off := i.xattrs + xattrHeader
	for n := header[4]; n > 0; n-- {
		id, err := m.bytes(off, 4)
		if err != nil {
			return err
		}
		index, suffix, value, err := m.xattr(m.xattrOff + uint64(binary.LittleEndian.Uint32(id))*xattrEntry)
		if err != nil || !f(index, suffix, value) {
			return err
		}
		off += 4
	}
	for off < i.rest {
		index, suffix, value, err := m.xattr(off)
		if err != nil || !f(index, suffix, value) {
			return err
		}
		off = (off + xattrEntry + uint64(len(suffix)+len(value)) + xattrEntry - 1) &^ (xattrEntry - 1)
	}
	if off > i.rest {
		return ErrCorrupt
	}
	return nil
}

// xattr returns the attribute at off.
func (m *Image) xattr(off uint64) (index uint8, suffix, value []byte, err error) {
	entry, err := m.bytes(off, xattrEntry)
	if err != nil {
		return 0, nil, nil, err
	}
	name, size := uint64(entry[0]), uint64(binary.LittleEndian.Uint16(entry[2:]))
	if index = entry[1]; int(index) >= len(xattrPrefixes) || xattrPrefixes[index] == "" {
		return 0, nil, nil, ErrCorrupt
	}
	b, err := m.bytes(off+xattrEntry, name+size)
	if err != nil {
		return 0, nil, nil, err
	}
	return index, b[:name:name], b[name:], nil
}

// Xattr returns the value of an attribute. Found is false if there is none.
func (m *Image) Xattr(nid uint64, name string) (value []byte, found bool, err error) {
	i, err := m.inode(nid)
	if err != nil {
		return nil, false, err
	}
	index, suffix, err := splitXattr(name)
	if err != nil {
		return nil, false, nil // no image has it
	}
	err = m.xattrs(&i, func(x uint8, s, v []byte) bool {
		if found = x == index && string(s) == suffix; found {
			value = v
		}
		return !found
	})
	if err != nil {
		return nil, false, err
	}
	return value, found, nil
}

// Xattrs calls f for each attribute's full name.
func (m *Image) Xattrs(nid uint64, f func(name string)) error {
	i, err := m.inode(nid)
	if err != nil {
		return err
	}
	return m.xattrs(&i, func(index uint8, suffix, _ []byte) bool {
		f(xattrPrefixes[index] + string(suffix))
		return true
	})
}

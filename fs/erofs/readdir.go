package erofs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// dirBlock is a block of a directory: entries, then names. It has at least one entry, and the table is in the block.
type dirBlock []byte

// block returns block n of directory i. Its offset is below the directory's size.
func (m *Image) block(i *inode, n uint64) (dirBlock, error) {
	b, err := m.flat(i, n<<m.blockBits)
	if err != nil {
		return nil, err
	}
	d := dirBlock(b[:min(len(b), 1<<m.blockBits)])
	if len(d) < direntSize {
		return nil, ErrCorrupt
	}
	if names := int(binary.LittleEndian.Uint16(d[8:])); names < direntSize || names > len(d) {
		return nil, ErrCorrupt
	}
	return d, nil
}

// len returns the number of entries: the first name begins where the table ends.
func (d dirBlock) len() int { return int(binary.LittleEndian.Uint16(d[8:])) / direntSize }

// name returns the name of entry k.
func (d dirBlock) name(k int) ([]byte, error) {
	off, end := int(binary.LittleEndian.Uint16(d[k*direntSize+8:])), len(d)
	last := k == d.len()-1
	if !last {
		end = int(binary.LittleEndian.Uint16(d[(k+1)*direntSize+8:]))
	}
	if off >= end || end > len(d) {
		return nil, ErrCorrupt
	}
	name := d[off:end]
	if last { // whatever space is left in the block is zeros
		if zero := bytes.IndexByte(name, 0); zero >= 0 {
			name = name[:zero]
		}
	}
	if len(name) == 0 || len(name) > maxName {
		return nil, ErrCorrupt
	}
	return name, nil
}

func (d dirBlock) nid(k int) uint64 { return binary.LittleEndian.Uint64(d[k*direntSize:]) }

func (m *Image) dir(nid uint64) (inode, error) {
	i, err := m.inode(nid)
	if err == nil && i.mode&typeMask != typeDir {
		err = fmt.Errorf("inode %d is not a directory", nid)
	}
	return i, err
}

// Lookup finds name in directory nid. Found is false if there is none; that is no error.
func (m *Image) Lookup(nid uint64, name string) (child uint64, found bool, err error) {
	i, err := m.dir(nid)
	if err != nil {
		return 0, false, err
	}
	// The last block whose first name is not above name, between low and high.
	low, high := uint64(0), (i.size+1<<m.blockBits-1)>>m.blockBits
	var d dirBlock
	for low < high {
		middle := low + (high-low)/2
		b, err := m.block(&i, middle)
		if err != nil {
			return 0, false, err
		}
		first, err := b.name(0)
		if err != nil {
			return 0, false, err
		}
		if name < string(first) {
			high = middle
		} else {
			d, low = b, middle+1
		}
	}
	if d == nil {
		return 0, false, nil
	}
	for first, last := 0, d.len(); first < last; {
		middle := first + (last-first)/2
		b, err := d.name(middle)
		if err != nil {
			return 0, false, err
		}
		switch {
		case name == string(b):
			return d.nid(middle), true, nil
		case name < string(b):
			last = middle
		default:
			first = middle + 1
		}
	}
	return 0, false, nil
}

// ReadDir calls f for each entry of directory nid from position pos on ("." and ".." included), with the position after the entry, until f returns false. Positions are stable.
// The name is only valid during the call. typ is a DT_ value as in getdents(2).
//
// A position is the offset of an entry in the directory's data, as in the kernel, zero the first's. Any number is allowed; between two entries means the next.
func (m *Image) ReadDir(nid uint64, pos uint64, f func(name []byte, child uint64, typ uint8, next uint64) bool) error {
	i, err := m.dir(nid)
	if err != nil {
		return err
	}
	k := int(pos&(1<<m.blockBits-1)+direntSize-1) / direntSize
	for n := pos >> m.blockBits; n < (i.size+1<<m.blockBits-1)>>m.blockBits; n++ {
		d, err := m.block(&i, n)
		if err != nil {
			return err
		}
		for ; k < d.len(); k++ {
			name, err := d.name(k)
			if err != nil {
				return err
			}
			next := n<<m.blockBits + uint64(k+1)*direntSize
			if k+1 == d.len() {
				next = (n + 1) << m.blockBits
			}
			if !f(name, d.nid(k), direntType[int(d[k*direntSize+10])%len(direntType)], next) {
				return nil
			}
		}
		k = 0
	}
	return nil
}

// maxPath is the kernel's bound for a path, bytes (PATH_MAX, its zero included).
const maxPath = 4096

// Walk calls f for each entry of the image but the root, directories before what is in them, with its path from the root; what has a longer path than the kernel takes is left out. The
// path is only valid during the call. typ is that of ReadDir.
func (m *Image) Walk(f func(path []byte, nid uint64, typ uint8) error) error {
	entries := len(m.b) / direntSize
	return m.walk(m.root, nil, &entries, f)
}

// walk walks dir. If there are more entries than these, damage has made a loop.
func (m *Image) walk(dir uint64, prefix []byte, entries *int, f func(path []byte, nid uint64, typ uint8) error) error {
	var fail error
	err := m.ReadDir(dir, 0, func(name []byte, nid uint64, typ uint8, _ uint64) bool {
		if *entries--; *entries < 0 {
			fail = fmt.Errorf("%w: more entries than it has room for", ErrCorrupt)
			return false
		}
		if string(name) == "." || string(name) == ".." {
			return true
		}
		path := append(prefix, name...)
		if len(path) >= maxPath {
			return true
		}
		if fail = f(path, nid, typ); fail == nil && typ == direntType[2] {
			fail = m.walk(nid, append(path, '/'), entries, f)
		}
		return fail == nil
	})
	if err != nil && !errors.Is(err, ErrCorrupt) { // an entry's type said that it is a directory, the inode is none
		err = fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return errors.Join(err, fail)
}

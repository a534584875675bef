package erofs

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
)

// ErrCorrupt: the image is damaged, or of a shape that this package does not write.
var ErrCorrupt = errors.New("corrupt metadata image")

// Image reads a metadata image, usually a memory map. It keeps no state per inode and allocates nothing for a lookup. It does not trust the image: damage gives errors, never a panic.
// Errors are ErrCorrupt, or of the argument: something that is no directory is looked up in, and so on. All methods may be called from many goroutines.
type Image struct {
	b         []byte
	blockBits uint
	root      uint64
	inodes    int64
	plain     bool // no inode has attributes
	metaOff   uint64
	xattrOff  uint64
	parts     []uint64 // the block of the data device at which each extra device ends
}

// Open checks the superblock of the image b.
func Open(b []byte) (*Image, error) {
	m := &Image{b: b}
	super, err := m.bytes(superOffset, superSize)
	if err != nil || binary.LittleEndian.Uint32(super) != superMagic {
		return nil, fmt.Errorf("%w: no superblock", ErrCorrupt)
	}
	le := binary.LittleEndian
	m.blockBits = uint(super[12])
	m.root = uint64(le.Uint16(super[14:]))
	m.inodes = int64(min(le.Uint64(super[16:]), math.MaxInt64))
	m.metaOff = uint64(le.Uint32(super[40:])) << (m.blockBits & 31)
	m.xattrOff = uint64(le.Uint32(super[44:])) << (m.blockBits & 31)
	m.plain = string(super[64:64+len(volumePlain)+1]) == volumePlain+"\x00"
	const compat, incompat = compatChecksum | compatMtime, incompatChunked | incompatDevices
	if m.blockBits != 9 && m.blockBits != 12 || le.Uint32(super[8:]) != compat || le.Uint32(super[80:]) != incompat || super[90] != 0 {
		return nil, fmt.Errorf("%w: its superblock is of a kind that is not written here", ErrCorrupt)
	}
	block, err := m.bytes(superOffset, max(uint64(1)<<m.blockBits, superOffset+512)-superOffset)
	if err != nil {
		return nil, err
	}
	crc := crc32.Update(0, crc32.MakeTable(crc32.Castagnoli), block[:4])
	for _, part := range [][]byte{make([]byte, 4), block[8:]} { // the checksum counts as zero
		crc = crc32.Update(crc, crc32.MakeTable(crc32.Castagnoli), part)
	}
	if ^crc != le.Uint32(super[4:]) {
		return nil, fmt.Errorf("%w: the superblock's checksum is wrong", ErrCorrupt)
	}
	n := uint64(le.Uint16(super[86:]))
	slots, err := m.bytes(uint64(le.Uint16(super[88:]))*deviceSize, n*deviceSize)
	if err != nil || n == 0 || n > maxParts {
		return nil, fmt.Errorf("%w: %d extra devices", ErrCorrupt, n)
	}
	end := uint64(0)
	for ; len(slots) > 0; slots = slots[deviceSize:] {
		end += uint64(le.Uint32(slots[64:]))
		m.parts = append(m.parts, end)
	}
	root, err := m.inode(m.root)
	if err != nil || root.mode&typeMask != typeDir {
		return nil, fmt.Errorf("%w: no root directory", ErrCorrupt)
	}
	return m, nil
}

// Verify reads the whole image and compares it with the digest in its superblock: an image that was damaged at rest is ErrCorrupt.
func (m *Image) Verify() error {
	h := sha256.New()
	h.Write(m.b[:superOffset])
	h.Write(make([]byte, superSize))
	h.Write(m.b[superOffset+superSize:])
	if imageID(h.Sum(nil)) != [16]byte(m.b[superOffset+superUUID:]) {
		return fmt.Errorf("%w: its bytes are not those that were written", ErrCorrupt)
	}
	return nil
}

// bytes returns n bytes at off. Every access to the image goes through it.
func (m *Image) bytes(off, n uint64) ([]byte, error) {
	if off > uint64(len(m.b)) || n > uint64(len(m.b))-off {
		return nil, ErrCorrupt
	}
	return m.b[off : off+n : off+n], nil
}

// Root returns the nid of the root directory.
func (m *Image) Root() uint64 { return m.root }

// HasXattrs reports whether any inode has extended attributes.
func (m *Image) HasXattrs() bool { return !m.plain }

// NumInodes returns the number of inodes, from the superblock.
func (m *Image) NumInodes() int64 { return m.inodes }

// Stat is an inode's attributes.
type Stat struct {
	Mode      uint32
	Nlink     uint32
	UID, GID  uint32
	Mtime     int64
	MtimeNsec uint32
	Rdev      uint32
	Size      int64
	Ino       uint64 // what the kernel shows as st_ino: the nid
}

// Stat returns the attributes of nid.
func (m *Image) Stat(nid uint64) (Stat, error) {
	i, err := m.inode(nid)
	if err != nil {
		return Stat{}, err
	}
	le := binary.LittleEndian
	s := Stat{
		Mode: i.mode, Nlink: le.Uint32(i.b[44:]), UID: le.Uint32(i.b[24:]), GID: le.Uint32(i.b[28:]),
		Mtime: int64(le.Uint64(i.b[32:])), MtimeNsec: le.Uint32(i.b[40:]), Size: int64(i.size), Ino: nid,
	}
	if i.mode&typeMask == typeChar || i.mode&typeMask == typeBlock {
		s.Rdev = i.address
	}
	return s, nil
}

// inode is an inode's fields that say where its parts are.
type inode struct {
	b       []byte // the inode itself
	mode    uint32
	layout  uint8
	address uint32
	size    uint64 // at most math.MaxInt64
	xattrs  uint64 // offset of the attributes
	rest    uint64 // offset of what follows the attributes
}

func (m *Image) inode(nid uint64) (inode, error) {
	if nid > math.MaxInt64/slotSize { // metaOff is at most 44 bits: no overflow
		return inode{}, ErrCorrupt
	}
	off := m.metaOff + nid*slotSize
	b, err := m.bytes(off, inodeSize)
	if err != nil {
		return inode{}, err
	}
	le := binary.LittleEndian
	format := le.Uint16(b)
	i := inode{b: b, mode: uint32(le.Uint16(b[4:])), layout: uint8(format >> 1), address: le.Uint32(b[16:]), size: le.Uint64(b[8:]), xattrs: off + inodeSize}
	i.rest = i.xattrs
	if n := uint64(le.Uint16(b[2:])); n > 0 {
		i.rest += xattrHeader + 4*(n-1)
	}
	chunked := i.layout == layoutChunked && i.mode&typeMask == typeRegular && i.address&^(chunkIndexes|chunkMaxShift) == 0 && i.address&chunkIndexes != 0
	if format&inodeExtended == 0 || format>>4 != 0 || i.layout != layoutPlain && i.layout != layoutInline && !chunked ||
		fileType(i.mode) == 0 || i.size > math.MaxInt64 || le.Uint32(b[40:]) >= 1e9 {
		return inode{}, ErrCorrupt
	}
	return i, nil
}

// flat returns the bytes from off on, below the size, of a file whose data is in the image: all up to the end, or up to the tail behind the inode.
func (m *Image) flat(i *inode, off uint64) ([]byte, error) {
	start, end := uint64(i.address)<<m.blockBits, i.size
	if i.layout == layoutInline {
		// The size is not zero: off is below it.
		if tail := (i.size - 1) >> m.blockBits << m.blockBits; off < tail {
			end = tail
		} else {
			start = i.rest - tail
		}
	}
	return m.bytes(start+off, end-off)
}

// Readlink returns the target of symlink nid.
func (m *Image) Readlink(nid uint64) ([]byte, error) {
	i, err := m.inode(nid)
	if err != nil {
		return nil, err
	}
	if i.mode&typeMask != typeSymlink {
		return nil, fmt.Errorf("read link %d: not a symlink", nid)
	}
	if i.size == 0 || i.size > maxTarget {
		return nil, ErrCorrupt
	}
	target, err := m.flat(&i, 0)
	if err != nil || uint64(len(target)) != i.size {
		return nil, ErrCorrupt
	}
	return target, nil
}

// maxMerge bounds how many chunk indexes a call of Map reads: neighbours in a file and on the device are one piece.
const maxMerge = 512

// Map says where the bytes of regular file nid at off lie: n bytes (n > 0, up to the file's end), in data (embedded in the image), or at
// device offset dev of the data device, or, with hole, nowhere. off is below the file's size.
func (m *Image) Map(nid uint64, off int64) (data []byte, dev int64, hole bool, n int64, err error) {
	i, err := m.inode(nid)
	if err != nil {
		return nil, 0, false, 0, err
	}
	if i.mode&typeMask != typeRegular || off < 0 || uint64(off) >= i.size {
		return nil, 0, false, 0, fmt.Errorf("map %d: no byte at %d of a regular file", nid, off)
	}
	if i.layout != layoutChunked {
		data, err = m.flat(&i, uint64(off))
		return data, 0, false, int64(len(data)), err
	}
	shift := m.blockBits + uint(i.address&chunkMaxShift)
	chunk := uint64(off) >> shift
	block, err := m.chunk(&i, chunk)
	if err != nil {
		return nil, 0, false, 0, err
	}
	end := chunk + 1
	for ; end-chunk < maxMerge && end <= (i.size-1)>>shift; end++ {
		next, err := m.chunk(&i, end)
		if err != nil {
			return nil, 0, false, 0, err
		}
		if block == nullBlock && next != nullBlock || block != nullBlock && next != block+(end-chunk)<<(shift-m.blockBits) {
			break
		}
	}
	stop := i.size
	if end <= (i.size-1)>>shift {
		stop = end << shift
	}
	if n = int64(stop) - off; block == nullBlock {
		return nil, 0, true, n, nil
	}
	if last := block + (stop-1-chunk<<shift)>>m.blockBits; last >= m.parts[len(m.parts)-1] {
		return nil, 0, false, 0, ErrCorrupt
	}
	return nil, int64(block<<m.blockBits) + off - int64(chunk<<shift), false, n, nil
}

// chunk returns the block of the data device at which chunk number n of a file begins, or nullBlock.
func (m *Image) chunk(i *inode, n uint64) (uint64, error) {
	b, err := m.bytes((i.rest+indexSize-1)&^(indexSize-1)+n*indexSize, indexSize)
	if err != nil {
		return 0, err
	}
	block := uint64(binary.LittleEndian.Uint32(b[4:]))
	if block == nullBlock {
		return block, nil
	}
	part := int(binary.LittleEndian.Uint16(b[2:])) - 1
	if part < 0 || part >= len(m.parts) {
		return 0, ErrCorrupt
	}
	if part > 0 {
		block += m.parts[part-1]
	}
	return block, nil
}

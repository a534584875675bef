package erofs

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"math/bits"
)

// Options of a metadata image.
type Options struct {
	BlockSize  int   // 512 or 4096; extents are multiples of it
	DeviceSize int64 // of the data device, bytes; rounded up to blocks. So must be the device itself: Linux fails reads of a last block that is not whole
	// Parts are where the parts of the data device begin, in order, each a multiple of BlockSize and the first 0: each part is an extra device of its own then,
	// up to where the next begins. A file's extents lie in one part. Nil: the data device is one.
	Parts []int64
}

// ErrUnsupported: a metadata image cannot express the tree. A normal pull is the answer.
var ErrUnsupported = errors.New("cannot be written as a metadata image")

// Write writes the metadata image of the tree under root. The same tree gives the same bytes. Errors are
// ErrUnsupported, and name the path of the inode that cannot be expressed, or w's.
//
// Directories get a link count of two and one for each subdirectory, other files their Nlink or else one for each name. Linux shows the counts as they are;
// overlayfs shows one for a directory that it merges. A map of a file shows the rest of its last block as the device has it, where other file systems show zeros. Memory is about 250 bytes for each inode, beside the tree. The tree is only read.
func Write(w io.Writer, root *Inode, o Options) error {
	if o.BlockSize != 512 && o.BlockSize != 4096 {
		return fmt.Errorf("write metadata image: block size %d is neither 512 nor 4096", o.BlockSize)
	}
	p := &plan{blockBits: bits.TrailingZeros(uint(o.BlockSize)), deviceSize: roundUp(max(o.DeviceSize, 0), int64(o.BlockSize))}
	if o.DeviceSize < 0 || p.deviceSize>>p.blockBits >= nullBlock {
		return fmt.Errorf("tree %w: a data device of %d bytes is beyond 32-bit block addresses", ErrUnsupported, o.DeviceSize)
	}
	if err := p.divide(o.Parts); err != nil {
		return fmt.Errorf("write metadata image: %w", err)
	}
	if err := p.discover(root); err != nil {
		return fmt.Errorf("tree %w: %w", ErrUnsupported, err)
	}
	if err := p.place(); err != nil {
		return fmt.Errorf("tree %w: %w", ErrUnsupported, err)
	}
	// The superblock at the front depends on all that follows, and w cannot seek: encode twice.
	d := &digester{hash: sha256.New(), super: bytes.NewBuffer(make([]byte, 0, superOffset+imageAlign))}
	if err := p.encode(d, make([]byte, superSize)); err != nil {
		return err
	}
	super := p.superblock(imageID(d.hash.Sum(nil)))
	block := d.super.Bytes()[superOffset:max(int64(o.BlockSize), superOffset+512)]
	copy(block, super)
	// The kernel's crc32c starts with all ones, as Go's, but does not invert the result.
	binary.LittleEndian.PutUint32(super[4:], ^crc32.Checksum(block, crc32.MakeTable(crc32.Castagnoli)))
	return p.encode(w, super)
}

// digester hashes an image, and keeps its beginning.
type digester struct {
	hash  hash.Hash
	super *bytes.Buffer
}

func (d *digester) Write(b []byte) (int, error) {
	d.super.Write(b[:min(len(b), d.super.Available())])
	return d.hash.Write(b)
}

// imageID makes the image's UUID of the SHA-256 of the image with zeros for its superblock.
func imageID(sum []byte) [16]byte {
	id := [16]byte(sum)
	id[6] = id[6]&0x0f | 0x80 // version 8 of RFC 9562: the content is ours to define
	id[8] = id[8]&0x3f | 0x80
	return id
}

// superblock returns the superblock, without its checksum.
func (p *plan) superblock(id [16]byte) []byte {
	b := make([]byte, superSize)
	le := binary.LittleEndian
	le.PutUint32(b, superMagic)
	le.PutUint32(b[8:], compatChecksum|compatMtime)
	b[12] = byte(p.blockBits)
	le.PutUint16(b[14:], uint16(p.nid(0)))
	le.PutUint64(b[16:], uint64(len(p.nodes)))
	le.PutUint32(b[36:], uint32(p.size>>p.blockBits))
	le.PutUint32(b[44:], uint32(p.sharedOff>>p.blockBits)) // inodes are addressed from block 0: offset 40 stays zero
	copy(b[superUUID:], id[:])
	if !p.xattrs.any {
		copy(b[64:], volumePlain)
	}
	le.PutUint32(b[80:], incompatChunked|incompatDevices)
	le.PutUint16(b[86:], uint16(len(p.parts))) // extra devices
	le.PutUint16(b[88:], deviceOffset/deviceSize)
	return b
}

package erofs

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
)

// encoder writes an image front to back. Its errors are the buffered writer's, which keeps the first for Flush.
type encoder struct {
	*plan
	w       *bufio.Writer
	off     int64
	scratch []byte
}

// encode writes the image with the given superblock to w.
func (p *plan) encode(w io.Writer, super []byte) error {
	e := &encoder{plan: p, w: bufio.NewWriterSize(w, 1<<16)}
	e.pad(superOffset)
	e.write(super)
	e.device()
	for i := range p.nodes {
		e.inode(int32(i))
	}
	e.pad(p.sharedOff)
	for _, x := range p.xattrs.list {
		e.xattr(x.Xattr)
	}
	for i := range p.nodes {
		e.blocks(&p.nodes[i])
	}
	e.pad(p.size)
	if err := e.w.Flush(); err != nil {
		return fmt.Errorf("write metadata image: %w", err)
	}
	return nil
}

func (e *encoder) write(b []byte) {
	e.w.Write(b)
	e.off += int64(len(b))
}

// pad writes zeros up to offset to.
func (e *encoder) pad(to int64) {
	for ; e.off < to; e.off++ {
		e.w.WriteByte(0)
	}
}

func (e *encoder) device() {
	b := make([]byte, deviceSize)
	binary.LittleEndian.PutUint32(b[64:], uint32(e.deviceSize>>e.blockBits))
	e.write(b)
}

// nid returns the number of node i.
func (p *plan) nid(i int32) uint64 { return uint64(p.nodes[i].off / slotSize) }

func (e *encoder) inode(i int32) {
	n := &e.nodes[i]
	e.pad(n.off)
	var b [inodeSize]byte
	le := binary.LittleEndian
	le.PutUint16(b[:], inodeExtended|uint16(n.layout)<<1)
	if body, _ := e.xattrs.bodySize(n.ino.Xattrs); body > 0 {
		le.PutUint16(b[2:], uint16((body-xattrHeader)/4+1))
	}
	le.PutUint16(b[4:], uint16(n.ino.Mode))
	le.PutUint64(b[8:], uint64(n.size))
	le.PutUint32(b[16:], e.address(n))
	le.PutUint32(b[20:], uint32(i)+1) // for 32-bit machines only; distinct
	le.PutUint32(b[24:], n.ino.UID)
	le.PutUint32(b[28:], n.ino.GID)
	le.PutUint64(b[32:], uint64(n.ino.Mtime))
	le.PutUint32(b[40:], n.ino.MtimeNsec)
	le.PutUint32(b[44:], n.nlink)
	e.write(b[:])
	e.xattrBody(n.ino.Xattrs)
	switch {
	case n.layout == layoutChunked:
		e.pad(roundUp(e.off, indexSize))
		e.chunkIndexes(n)
	case n.layout == layoutInline && n.dir != nil:
		e.dirBlock(n.dir[n.tail:])
	case n.layout == layoutInline:
		e.write(n.ino.Data[n.size&^(e.blockSize()-1):])
	}
}

// address returns the field of n's inode that says where its data is, or which device it is.
func (p *plan) address(n *node) uint32 {
	switch n.ino.Mode & typeMask {
	case typeChar, typeBlock:
		return n.ino.Rdev
	case typeRegular, typeDir, typeSymlink:
		if n.layout == layoutChunked {
			return chunkIndexes | uint32(int(n.shift)-p.blockBits)
		}
		if n.size >= p.blockSize() || n.layout == layoutPlain && n.size > 0 {
			return uint32(p.blocksOff>>p.blockBits + n.block)
		}
	}
	return 0
}

func (e *encoder) chunkIndexes(n *node) {
	rest := n.ino.Extents
	for chunk := range (n.size-1)>>n.shift + 1 {
		off := chunk << n.shift
		for len(rest) > 0 && rest[0].FileOffset+rest[0].Size <= off {
			rest = rest[1:]
		}
		var b [indexSize]byte
		if len(rest) > 0 && rest[0].FileOffset <= off {
			binary.LittleEndian.PutUint16(b[2:], 1) // device
			binary.LittleEndian.PutUint32(b[4:], uint32((rest[0].DeviceOffset+off-rest[0].FileOffset)>>e.blockBits))
		} else {
			binary.LittleEndian.PutUint32(b[4:], nullBlock)
		}
		e.write(b[:])
	}
}

// blocks writes what n has in the block area.
func (e *encoder) blocks(n *node) {
	size := n.size
	if n.layout == layoutInline {
		size &^= e.blockSize() - 1
	}
	if size == 0 || n.layout == layoutChunked {
		return
	}
	e.pad(e.blocksOff + n.block<<e.blockBits)
	if n.dir == nil {
		e.write(n.ino.Data[:size])
		return
	}
	rest := n.dir
	for range (size-1)>>e.blockBits + 1 {
		e.pad(roundUp(e.off, e.blockSize()))
		rest = rest[e.dirBlock(rest):]
	}
}

// dirBlock writes a directory block of as many entries as fit, and returns their number.
func (e *encoder) dirBlock(dir []dirent) int {
	n, used := 0, int64(0)
	for n < len(dir) && used+int64(direntSize+len(dir[n].name)) <= e.blockSize() {
		used += int64(direntSize + len(dir[n].name))
		n++
	}
	b := e.scratch[:0]
	name := n * direntSize
	for _, d := range dir[:n] {
		b = binary.LittleEndian.AppendUint64(b, e.nid(d.child))
		b = binary.LittleEndian.AppendUint16(b, uint16(name))
		b = append(b, fileType(e.nodes[d.child].ino.Mode), 0)
		name += len(d.name)
	}
	for _, d := range dir[:n] {
		b = append(b, d.name...)
	}
	e.scratch = b
	e.write(b)
	return n
}

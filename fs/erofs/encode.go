package erofs

import (
	"encoding/binary"
	"fmt"
	"io"
	"slices"
)

// encoder writes an image front to back.
type encoder struct {
	*plan
	w   io.Writer
	err error  // the first of w
	buf []byte // not yet written
	off int64  // of the end of buf
}

// encode writes the image with the given superblock to w.
func (p *plan) encode(w io.Writer, super []byte) error {
	e := &encoder{plan: p, w: w, buf: make([]byte, 0, 1<<16)}
	e.pad(superOffset)
	e.write(super)
	for i, at := range e.parts {
		binary.LittleEndian.PutUint32(e.next(deviceSize)[64:], uint32((e.partEnd(i)-at)>>e.blockBits))
	}
	for i := range p.nodes {
		e.inode(i)
	}
	for _, x := range p.xattrs.list {
		e.pad(p.sharedOff + x.off)
		e.xattr(x.Xattr)
	}
	for i := range p.nodes {
		e.blocks(&p.nodes[i])
	}
	e.pad(p.size)
	if e.flush(); e.err != nil {
		return fmt.Errorf("write metadata image: %w", e.err)
	}
	return nil
}

func (e *encoder) flush() {
	if e.err == nil {
		_, e.err = e.w.Write(e.buf)
	}
	e.buf = e.buf[:0]
}

// next returns the next n bytes of the image, zeros, to be filled at once.
func (e *encoder) next(n int) []byte {
	if len(e.buf)+n > cap(e.buf) {
		e.flush()
	}
	e.buf = slices.Grow(e.buf, n)
	b := e.buf[len(e.buf) : len(e.buf)+n]
	clear(b)
	e.buf, e.off = e.buf[:len(e.buf)+n], e.off+int64(n)
	return b
}

func (e *encoder) write(b []byte) {
	for len(b) > 0 {
		b = b[copy(e.next(min(len(b), cap(e.buf))), b):]
	}
}

// pad writes zeros up to offset to.
func (e *encoder) pad(to int64) {
	for e.off < to {
		e.next(int(min(to-e.off, int64(cap(e.buf)))))
	}
}

// nid returns the number of node i.
func (p *plan) nid(i int32) uint64 { return uint64(p.nodes[i].off / slotSize) }

func (e *encoder) inode(i int) {
	n := &e.nodes[i]
	e.pad(n.off)
	b, le := e.next(inodeSize), binary.LittleEndian
	le.PutUint16(b, inodeExtended|uint16(n.layout)<<1)
	if body, _ := e.xattrs.bodySize(n.ino.Xattrs); body > 0 {
		le.PutUint16(b[2:], uint16((body-xattrHeader)/4+1))
	}
	le.PutUint16(b[4:], uint16(n.ino.Mode))
	le.PutUint64(b[8:], uint64(n.size))
	le.PutUint32(b[16:], e.address(n))
	le.PutUint32(b[20:], uint32(i)+1) // i_ino, for 32-bit machines only: distinct
	le.PutUint32(b[24:], n.ino.UID)
	le.PutUint32(b[28:], n.ino.GID)
	le.PutUint64(b[32:], uint64(n.ino.Mtime))
	le.PutUint32(b[40:], n.ino.MtimeNsec)
	le.PutUint32(b[44:], n.nlink)
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
		b, block := e.next(indexSize), uint32(nullBlock)
		if len(rest) > 0 && rest[0].FileOffset <= off {
			part := e.part(rest[0].DeviceOffset)
			binary.LittleEndian.PutUint16(b[2:], uint16(part+1)) // device
			block = uint32((rest[0].DeviceOffset - e.parts[part] + off - rest[0].FileOffset) >> e.blockBits)
		}
		binary.LittleEndian.PutUint32(b[4:], block)
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
	n, used := 0, 0
	for n < len(dir) && used+direntSize+len(dir[n].name) <= 1<<e.blockBits {
		used += direntSize + len(dir[n].name)
		n++
	}
	b, name := e.next(used), n*direntSize
	for i, d := range dir[:n] {
		entry := b[i*direntSize:]
		binary.LittleEndian.PutUint64(entry, e.nid(d.child))
		binary.LittleEndian.PutUint16(entry[8:], uint16(name))
		entry[10] = fileType(e.nodes[d.child].ino.Mode)
		name += copy(b[name:], d.name)
	}
	return n
}

package erofs

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"path"
	"slices"
	"strings"
)

// maxIndexes bounds the chunk indexes of an image (128 MiB of them). A sparse file of a terabyte with data at an odd place would need gigabytes.
const maxIndexes = 1 << 24

// plan knows every inode of an image and where it goes.
type plan struct {
	blockBits  int
	deviceSize int64
	parts      []int64 // where the extra devices begin in the data device

	nodes  []node // in the order of their offsets
	index  map[*Inode]int32
	xattrs sharedXattrs

	pos       int64 // end of what is placed among the inodes
	blocks    int64 // placed in the block area
	indexes   int64 // chunk indexes placed
	sharedOff int64
	blocksOff int64 // of the block area
	size      int64 // of the image
}

// node is an inode of the image.
type node struct {
	ino    *Inode
	dir    []dirent // directories: all entries, sorted
	off    int64
	size   int64 // i_size
	block  int64 // first block in the block area
	parent int32 // the directory where it was seen first
	nlink  uint32
	tail   int32 // directories: the first entry of the last block
	layout uint8
	shift  uint8 // chunk-based files: log2 of the chunk size in bytes
}

type dirent struct {
	name  string
	child int32
}

func (p *plan) blockSize() int64 { return 1 << p.blockBits }

// divide makes an extra device of each part.
func (p *plan) divide(parts []int64) error {
	if p.parts = parts; parts == nil {
		p.parts = []int64{0}
	}
	if len(p.parts) == 0 || len(p.parts) > maxParts {
		return fmt.Errorf("a data device of %d parts", len(p.parts))
	}
	for i, at := range p.parts {
		if at&(p.blockSize()-1) != 0 || i == 0 && at != 0 || i > 0 && at <= p.parts[i-1] || at > p.deviceSize {
			return fmt.Errorf("a data device of %d bytes cannot have its %d parts at %d", p.deviceSize, len(p.parts), parts)
		}
	}
	return nil
}

// part returns the part that has offset off of the data device, from 0.
func (p *plan) part(off int64) int {
	i, found := slices.BinarySearch(p.parts, off)
	if !found {
		i--
	}
	return i
}

// partEnd returns where part i ends.
func (p *plan) partEnd(i int) int64 {
	if i+1 < len(p.parts) {
		return p.parts[i+1]
	}
	return p.deviceSize
}

// discover lists the inodes under root.
func (p *plan) discover(root *Inode) error {
	if root == nil || root.Mode&typeMask != typeDir {
		return errors.New("the root is not a directory")
	}
	p.index = make(map[*Inode]int32)
	p.add(root, 0)
	for todo := []int32{0}; len(todo) > 0; {
		d := todo[len(todo)-1]
		first := len(p.nodes)
		if err := p.expand(d); err != nil {
			return fmt.Errorf("%s: %w", p.path(d), err)
		}
		todo = todo[:len(todo)-1]
		for i := len(p.nodes) - 1; i >= first; i-- {
			if p.nodes[i].ino.Mode&typeMask == typeDir {
				todo = append(todo, int32(i))
			}
		}
	}
	for i := range p.nodes {
		if err := p.check(p.nodes[i].ino); err != nil {
			return fmt.Errorf("%s: %w", p.path(int32(i)), err)
		}
	}
	p.xattrs.layOut(p.blockSize())
	return nil
}

// expand lists the entries of directory d.
func (p *plan) expand(d int32) error {
	entries := p.nodes[d].ino.Entries
	byName := func(a, b Dirent) int { return strings.Compare(a.Name, b.Name) }
	if !slices.IsSortedFunc(entries, byName) {
		entries = slices.Clone(entries)
		slices.SortFunc(entries, byName)
	}
	dir := append(make([]dirent, 0, len(entries)+2), dirent{".", d}, dirent{"..", p.nodes[d].parent})
	nlink := uint32(2)
	for i, e := range entries {
		if err := checkName(e.Name); err != nil {
			return err
		}
		if i > 0 && entries[i-1].Name == e.Name {
			return fmt.Errorf("%q is there twice", e.Name)
		}
		child, seen := p.index[e.Inode]
		switch {
		case e.Inode == nil:
			return fmt.Errorf("%q has no inode", e.Name)
		case len(p.nodes) == math.MaxInt32:
			return errors.New("too many inodes")
		case !seen:
			child = p.add(e.Inode, d)
		case e.Inode.Mode&typeMask == typeDir:
			return fmt.Errorf("%q is a second name of directory %s", e.Name, p.path(child))
		}
		if e.Inode.Mode&typeMask == typeDir {
			nlink++
		} else if e.Inode.Nlink != 0 {
			p.nodes[child].nlink = e.Inode.Nlink
		} else {
			p.nodes[child].nlink++
		}
		dir = append(dir, dirent{e.Name, child})
	}
	// Names may come before "." and "..".
	slices.SortFunc(dir, func(a, b dirent) int { return strings.Compare(a.name, b.name) })
	p.nodes[d].dir, p.nodes[d].nlink = dir, nlink
	return nil
}

// add appends ino to the list, and returns its place.
func (p *plan) add(ino *Inode, parent int32) int32 {
	i := int32(len(p.nodes))
	p.index[ino] = i
	p.nodes = append(p.nodes, node{ino: ino, parent: parent})
	return i
}

// check looks at what all types of files have, and counts the attributes.
func (p *plan) check(ino *Inode) error {
	if fileType(ino.Mode) == 0 || ino.Mode > 0o177777 {
		return fmt.Errorf("mode %#o is not a file's", ino.Mode)
	}
	if ino.MtimeNsec >= 1e9 {
		return fmt.Errorf("%d is not a number of nanoseconds", ino.MtimeNsec)
	}
	return p.xattrs.add(ino.Xattrs)
}

func checkName(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > maxName || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("%q is not a file name", name)
	}
	return nil
}

// path returns the path of node i, for errors.
func (p *plan) path(i int32) string {
	name := ""
	for i != 0 {
		parent := p.nodes[i].parent
		for _, e := range p.nodes[parent].ino.Entries {
			if e.Inode == p.nodes[i].ino {
				name = path.Join(e.Name, name)
				break
			}
		}
		i = parent
	}
	return "/" + name
}

// place decides where all inodes and blocks go.
func (p *plan) place() error {
	p.pos = deviceOffset + int64(len(p.parts))*deviceSize
	for i := range p.nodes {
		if err := p.placeNode(&p.nodes[i]); err != nil {
			return fmt.Errorf("%s: %w", p.path(int32(i)), err)
		}
	}
	p.sharedOff = roundUp(p.pos, p.blockSize())
	p.blocksOff = roundUp(p.sharedOff+p.xattrs.size, p.blockSize())
	p.size = roundUp(p.blocksOff+p.blocks<<p.blockBits, imageAlign)
	if p.size>>p.blockBits >= nullBlock || p.xattrs.size > xattrEntry<<32 {
		return fmt.Errorf("an image of %d bytes is beyond 32-bit addresses", p.size)
	}
	return nil
}

func (p *plan) placeNode(n *node) error {
	head, err := p.xattrs.bodySize(n.ino.Xattrs)
	if err != nil {
		return err
	}
	head += inodeSize
	p.pos = roundUp(p.pos, slotSize)
	if p.pos&(p.blockSize()-1) > p.blockSize()-inodeSize {
		p.pos = roundUp(p.pos, p.blockSize()) // an inode in two blocks costs the kernel a copy
	}
	switch n.ino.Mode & typeMask {
	case typeDir:
		n.size, n.tail = dirSize(n.dir, p.blockSize())
		p.placeFlat(n, head, true)
	case typeSymlink:
		if len(n.ino.Data) == 0 || len(n.ino.Data) > maxTarget || slices.Contains(n.ino.Data, 0) {
			return fmt.Errorf("%q cannot be the target of a symlink", n.ino.Data)
		}
		n.size = int64(len(n.ino.Data))
		p.placeFlat(n, head, n.size < p.blockSize()) // in one piece: Linux and Readlink then need no copy
	case typeRegular:
		n.size = n.ino.Size
		if len(n.ino.Data) == 0 && n.size != 0 {
			return p.placeChunked(n, head)
		}
		if int64(len(n.ino.Data)) != n.size || len(n.ino.Extents) > 0 {
			return fmt.Errorf("a file of %d bytes has %d bytes of embedded data and %d extents", n.size, len(n.ino.Data), len(n.ino.Extents))
		}
		p.placeFlat(n, head, true)
	default:
		p.placeFlat(n, head, false)
	}
	return nil
}

// placeFlat places an inode whose data is in the image: whole blocks in the block area, and the rest behind the inode if inline allows it and it saves space.
func (p *plan) placeFlat(n *node, head int64, inline bool) {
	bs := p.blockSize()
	n.off, n.layout, n.block = p.pos, layoutPlain, p.blocks
	tail := n.size & (bs - 1)
	if inline && tail > 0 && head+tail <= bs {
		off := p.pos
		if off&(bs-1)+head+tail > bs {
			off = roundUp(off, bs)
		}
		if off-p.pos < bs-tail { // the gap before it is smaller than the rest of its block
			n.off, n.layout = off, layoutInline
			p.pos = off + head + tail
			p.blocks += n.size >> p.blockBits
			return
		}
	}
	p.pos += head
	p.blocks += roundUp(n.size, bs) >> p.blockBits
}

// placeChunked places a regular file whose data is in the data device.
func (p *plan) placeChunked(n *node, head int64) error {
	if err := p.checkExtents(n.ino); err != nil {
		return err
	}
	n.off, n.layout, n.shift = p.pos, layoutChunked, chunkShift(n.ino, p.blockBits)
	indexes := (n.size-1)>>n.shift + 1
	if p.indexes += indexes; indexes > maxIndexes || p.indexes > maxIndexes {
		return fmt.Errorf("more than %d chunks for sparse files", maxIndexes)
	}
	p.pos = roundUp(p.pos+head, indexSize) + indexes*indexSize
	return nil
}

func (p *plan) checkExtents(ino *Inode) error {
	if ino.Size < 0 {
		return fmt.Errorf("a size of %d", ino.Size)
	}
	end := int64(0)
	for _, x := range ino.Extents {
		aligned := (x.FileOffset|x.DeviceOffset)&(p.blockSize()-1) == 0 && (x.Size&(p.blockSize()-1) == 0 || x.Size == ino.Size-x.FileOffset)
		if !aligned || x.FileOffset < end || x.Size <= 0 || x.Size > ino.Size-x.FileOffset || x.DeviceOffset < 0 || x.Size > p.deviceSize-x.DeviceOffset ||
			p.part(x.DeviceOffset) != p.part(ino.Extents[0].DeviceOffset) || x.Size > p.partEnd(p.part(x.DeviceOffset))-x.DeviceOffset {
			return fmt.Errorf("extent %+v cannot be part of a file of %d bytes with blocks of %d on a device of %d", x, ino.Size, p.blockSize(), p.deviceSize)
		}
		end = x.FileOffset + x.Size
	}
	return nil
}

// chunkShift returns log2 of the largest chunk such that each chunk of the file is one run of the data device or one hole.
func chunkShift(ino *Inode, blockBits int) uint8 {
	var edges, end, dev int64 // edges: all offsets at which one run ends and another begins, ORed
	for _, x := range ino.Extents {
		if x.FileOffset != end || x.DeviceOffset != dev {
			edges |= end | x.FileOffset
		}
		end, dev = x.FileOffset+x.Size, x.DeviceOffset+x.Size
	}
	if end < ino.Size {
		edges |= end
	}
	shift := min(bits.TrailingZeros64(uint64(edges)), bits.Len64(uint64(ino.Size-1)), blockBits+chunkMaxShift)
	return uint8(max(shift, blockBits))
}

// dirSize returns the size of a directory, and the first entry of its last block.
func dirSize(dir []dirent, bs int64) (size int64, tail int32) {
	used := int64(0)
	for i, d := range dir {
		n := int64(direntSize + len(d.name))
		if used+n > bs {
			size += bs
			used, tail = 0, int32(i)
		}
		used += n
	}
	return size + used, tail
}

package erofs

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"
)

// sharedXattrs finds the attributes that several inodes have with the same value. They are written once.
type sharedXattrs struct {
	any  bool                    // an inode has attributes
	seen map[string]*sharedXattr // by name, NUL and value
	list []*sharedXattr          // in the order of first sight; after layOut only what is shared
	size int64                   // of the shared attributes

	key    []byte // scratch space, as what follows
	sorted []Xattr
	inline []Xattr
	shared []*sharedXattr
}

type sharedXattr struct {
	Xattr
	inodes int // that have it
	shared bool
	off    int64 // from the beginning of the shared attributes
}

// byName returns the attributes sorted: the order in which they are given must not matter. Valid until the next call.
func (s *sharedXattrs) byName(xattrs []Xattr) []Xattr {
	s.sorted = append(s.sorted[:0], xattrs...)
	slices.SortFunc(s.sorted, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	return s.sorted
}

// lookup returns what is known of x, nil if it was never seen.
func (s *sharedXattrs) lookup(x Xattr) *sharedXattr {
	s.key = append(append(append(s.key[:0], x.Name...), 0), x.Value...)
	return s.seen[string(s.key)]
}

// add counts the attributes of an inode.
func (s *sharedXattrs) add(xattrs []Xattr) error {
	xattrs = s.byName(xattrs)
	for i, x := range xattrs {
		if _, _, err := splitXattr(x.Name); err != nil {
			return fmt.Errorf("extended attribute %q: %w", x.Name, err)
		}
		if len(x.Value) > maxXattrValue {
			return fmt.Errorf("extended attribute %q: a value of %d bytes, more than %d", x.Name, len(x.Value), maxXattrValue)
		}
		if i > 0 && x.Name == xattrs[i-1].Name {
			return fmt.Errorf("extended attribute %q is there twice", x.Name)
		}
		known := s.lookup(x)
		if known == nil {
			if s.seen == nil {
				s.seen = make(map[string]*sharedXattr)
			}
			known = &sharedXattr{Xattr: x}
			s.seen[string(s.key)] = known
			s.list = append(s.list, known)
		}
		known.inodes++
		s.any = true
	}
	return nil
}

// layOut places the shared attributes, once all are counted. Each is in one block: go-erofs demands it.
func (s *sharedXattrs) layOut(blockSize int64) {
	s.list = slices.DeleteFunc(s.list, func(x *sharedXattr) bool { return x.inodes < 2 || entrySize(x.Xattr) > blockSize })
	for _, x := range s.list {
		n := entrySize(x.Xattr)
		if s.size&(blockSize-1)+n > blockSize {
			s.size = roundUp(s.size, blockSize)
		}
		x.shared, x.off = true, s.size
		s.size += n
	}
}

// split returns, sorted by name, the attributes that go into the inode and those that it shares. Both are valid until the next call.
func (s *sharedXattrs) split(xattrs []Xattr) (inline []Xattr, shared []*sharedXattr) {
	s.inline, s.shared = s.inline[:0], s.shared[:0]
	for _, x := range s.byName(xattrs) {
		if known := s.lookup(x); known.shared && len(s.shared) < maxShared {
			s.shared = append(s.shared, known)
		} else {
			s.inline = append(s.inline, x)
		}
	}
	return s.inline, s.shared
}

// bodySize returns the size of the attributes behind an inode.
func (s *sharedXattrs) bodySize(xattrs []Xattr) (int64, error) {
	if len(xattrs) == 0 {
		return 0, nil
	}
	inline, shared := s.split(xattrs)
	n := int64(xattrHeader + 4*len(shared))
	for _, x := range inline {
		n += entrySize(x)
	}
	if n > xattrHeader+4*(math.MaxUint16-1) {
		return 0, fmt.Errorf("%d bytes of extended attributes", n)
	}
	return n, nil
}

// entrySize returns the size of an attribute in the image. It has been checked.
func entrySize(x Xattr) int64 {
	_, suffix, _ := splitXattr(x.Name)
	return roundUp(int64(xattrEntry+len(suffix)+len(x.Value)), xattrEntry)
}

// xattrBody writes an inode's attributes.
func (e *encoder) xattrBody(xattrs []Xattr) {
	if len(xattrs) == 0 {
		return
	}
	inline, shared := e.xattrs.split(xattrs)
	e.next(xattrHeader)[4] = byte(len(shared))
	for _, x := range shared {
		binary.LittleEndian.PutUint32(e.next(4), uint32(x.off/xattrEntry))
	}
	for _, x := range inline {
		e.xattr(x)
	}
}

func (e *encoder) xattr(x Xattr) {
	index, suffix, _ := splitXattr(x.Name)
	b := e.next(int(entrySize(x)))
	b[0], b[1] = byte(len(suffix)), index
	binary.LittleEndian.PutUint16(b[2:], uint16(len(x.Value)))
	copy(b[xattrEntry:], suffix)
	copy(b[xattrEntry+len(suffix):], x.Value)
}

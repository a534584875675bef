package erofs

// Image reads a metadata image, usually a memory map. It keeps no state per inode and allocates nothing for a lookup. It does not trust the image: damage gives errors, never a panic.
type Image struct{}

// Open checks the superblock of the image b.
func Open(b []byte) (*Image, error) { panic("todo") }

// Root returns the nid of the root directory.
func (m *Image) Root() uint64 { panic("todo") }

// HasXattrs reports whether any inode has extended attributes.
func (m *Image) HasXattrs() bool { panic("todo") }

// NumInodes returns the number of inodes, from the superblock.
func (m *Image) NumInodes() int64 { panic("todo") }

// Stat is an inode's attributes.
type Stat struct {
	Mode      uint32
	Nlink     uint32
	UID, GID  uint32
	Mtime     int64
	MtimeNsec uint32
	Rdev      uint32
	Size      int64
	Ino       uint64 // the 32-bit inode number that the kernel shows as st_ino is the nid
}

// Stat returns the attributes of nid.
func (m *Image) Stat(nid uint64) (Stat, error) { panic("todo") }

// Lookup finds name in directory nid. Found is false if there is none; that is no error.
func (m *Image) Lookup(nid uint64, name string) (child uint64, found bool, err error) { panic("todo") }

// ReadDir calls f for each entry of directory nid from position pos on ("." and ".." included), with the position after the entry, until f returns false. Positions are stable.
// The name is only valid during the call. typ is a DT_ value as in getdents(2).
func (m *Image) ReadDir(nid uint64, pos uint64, f func(name []byte, child uint64, typ uint8, next uint64) bool) error {
	panic("todo")
}

// Readlink returns the target of symlink nid.
func (m *Image) Readlink(nid uint64) ([]byte, error) { panic("todo") }

// Xattr returns the value of an attribute. Found is false if there is none.
func (m *Image) Xattr(nid uint64, name string) (value []byte, found bool, err error) { panic("todo") }

// Xattrs calls f for each attribute's full name.
func (m *Image) Xattrs(nid uint64, f func(name string)) error { panic("todo") }

// Map says where the bytes of regular file nid at off lie: n bytes (n > 0, up to the file's end), in data (embedded in the image), or at
// device offset dev of the data device, or, with hole, nowhere. off is below the file's size.
func (m *Image) Map(nid uint64, off int64) (data []byte, dev int64, hole bool, n int64, err error) {
	panic("todo")
}

package erofs

// Inode is a file of the tree to write. Names of one file (hard links) share a pointer; a directory has one name.
type Inode struct {
	Mode      uint32 // st_mode: type and permissions
	UID, GID  uint32
	Mtime     int64 // seconds since 1970, may be negative
	MtimeNsec uint32
	Nlink     uint32 // link count of a file that is not a directory; 0: the number of its names in the tree
	Rdev      uint32 // devices: as Linux's new_encode_dev
	Size      int64  // regular files: logical size, bytes
	Xattrs    []Xattr
	Data      []byte   // symlinks: the target. Regular files: the whole content, where Extents cannot express it
	Extents   []Extent // regular files: where the data is, in order of FileOffset, without overlaps; what is not covered is a hole
	Entries   []Dirent // directories: the entries, in any order, without "." and ".."
}

// Xattr is an extended attribute with its full name ("user.x", "security.capability", "system.posix_acl_access"). POSIX ACLs have
// the form that setxattr(2) takes. A value has at most 65,535 bytes, one less than Linux allows elsewhere.
type Xattr struct {
	Name  string
	Value []byte
}

// Extent says that Size bytes (at least one) of a file at FileOffset lie at DeviceOffset of the data device. Both offsets are multiples of
// the block size; so is Size, unless the extent ends where the file ends.
type Extent struct{ FileOffset, DeviceOffset, Size int64 }

// Dirent is a name in a directory.
type Dirent struct {
	Name  string
	Inode *Inode
}

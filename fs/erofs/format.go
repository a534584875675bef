// Package erofs writes the metadata image of a merged tree and reads it back by inode number (nid). A metadata image is an
// EROFS file system whose regular files' data lies in one extra device (the data device), or in several that are its parts, except for data
// that extents cannot express.
//
// The format's source is the kernel's fs/erofs/erofs_fs.h. All integers are little-endian. This package writes one shape of it:
//
//	offset  what
//	0       zeros
//	1024    superblock, 128 bytes
//	1152    device slots, 128 bytes each: of the data device, or of its parts
//	1280    (or behind the last device slot) the root directory's inode, then all others: the entries of a directory one after the other in the order of their
//	        names, directories in depth-first order. An inode is at a multiple of 32 and has nid offset/32; it is 64 bytes
//	        ("extended"), its extended attributes follow, then what belongs to it: the chunk indexes of a regular file (8-byte
//	        aligned), or the last part of a directory, of a symlink's target or of embedded data if that saves space. Such a
//	        tail is in one block with its inode
//	        blocks: extended attributes that several inodes share, each in one block, named by offset in this area / 4
//	        blocks: directories, long symlink targets, embedded data
//	        zeros up to a multiple of 4096
//
// A regular file is chunk-based with the largest chunk, a power of two, that is one run of the data device or one hole everywhere: a file in
// one piece has one index of 8 bytes. A directory block holds its entries (12 bytes each) sorted by name as bytes, then the names.
//
// The superblock's checksum covers its block only (from offset 1024 on); the rest of the image has none, for it never leaves the machine. The UUID is taken from
// a SHA-256 of everything but the superblock. Compressed files, compact inodes, 48-bit addresses and attribute prefixes or filters are neither
// written nor read. Linux mounts images with 4096-byte blocks from 5.16 on, with 512-byte blocks from 6.4 on.
package erofs

import (
	"errors"
	"strings"
)

const (
	superOffset  = 1024
	superSize    = 128
	superUUID    = 48 // offset in the superblock
	deviceOffset = superOffset + superSize
	deviceSize   = 128
	maxParts     = 4096 // of the data device: the nid of the root, which comes behind their slots, has only 16 bits in the superblock

	superMagic      = 0xe0f5e1e2
	compatChecksum  = 0x1 // the superblock's checksum is set
	compatMtime     = 0x2 // times are mtime, not ctime
	incompatChunked = 0x4 // chunk-based files
	incompatDevices = 0x8 // a device table

	// volumePlain is the volume name of an image in which no inode has extended attributes.
	volumePlain = "no-xattrs"

	slotSize    = 32 // of a nid
	inodeSize   = 64
	direntSize  = 12
	indexSize   = 8 // of a chunk index
	xattrHeader = 12
	xattrEntry  = 4

	inodeExtended = 1 // bit 0 of i_format; the layout is in bits 1 to 3
	layoutPlain   = 0
	layoutInline  = 2
	layoutChunked = 4

	chunkIndexes  = 0x20 // chunk format: 8-byte indexes; the low five bits are the chunk size in blocks, as a shift
	chunkMaxShift = 0x1f
	nullBlock     = 0xffffffff // a hole

	maxName       = 255
	maxTarget     = 4095 // of a symlink: PATH_MAX - 1
	maxXattrValue = 1<<16 - 1
	maxShared     = 255 // shared attributes of one inode

	imageAlign = 4096 // of an image's size: Linux reads the superblock of a loop device by the page
)

const (
	typeMask    = 0o170000
	typeSocket  = 0o140000
	typeSymlink = 0o120000
	typeRegular = 0o100000
	typeBlock   = 0o060000
	typeDir     = 0o040000
	typeChar    = 0o020000
	typeFifo    = 0o010000
)

// fileType returns the file type of a directory entry for a file of mode, zero if mode has no type that EROFS knows.
func fileType(mode uint32) byte {
	switch mode & typeMask {
	case typeRegular:
		return 1
	case typeDir:
		return 2
	case typeChar:
		return 3
	case typeBlock:
		return 4
	case typeFifo:
		return 5
	case typeSocket:
		return 6
	case typeSymlink:
		return 7
	}
	return 0
}

// direntType is the DT_ value of getdents(2) for each file type of a directory entry.
var direntType = [...]uint8{0, 8, 4, 2, 6, 1, 12, 10}

// xattrPrefixes are the attribute names' beginnings, by the index that stands for them.
var xattrPrefixes = [...]string{1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default", 4: "trusted.", 6: "security."}

var errXattrName = errors.New("a name that EROFS cannot express")

// splitXattr returns the index of name's prefix and the rest of name.
func splitXattr(name string) (index uint8, suffix string, err error) {
	for i, prefix := range xattrPrefixes {
		suffix, found := strings.CutPrefix(name, prefix)
		// An access control list has no suffix, all others do.
		if prefix != "" && found && (suffix == "") == !strings.HasSuffix(prefix, ".") && len(name) <= maxName && !strings.Contains(name, "\x00") {
			return uint8(i), suffix, nil
		}
	}
	return 0, "", errXattrName
}

func roundUp(n, to int64) int64 { return (n + to - 1) &^ (to - 1) } // to is a power of two

package erofs

import "io"

// Options of a metadata image.
type Options struct {
	BlockSize  int   // 512 or 4096; extents are multiples of it
	DeviceSize int64 // of the data device, bytes; rounded up to blocks
}

// Write writes the metadata image of the tree under root. The same tree gives the same bytes. Errors name the path of the inode that cannot be expressed.
func Write(w io.Writer, root *Inode, o Options) error { panic("todo") }

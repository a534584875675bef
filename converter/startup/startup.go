// Package startup finds out what a container of an image reads at its start, without running it: from the image's config and
// its merged tree. It follows what the kernel, the dynamic linker and the common runtimes would open, in their order: the
// command and its interpreters, shell scripts as far as they can be read, ELF objects with the libraries that they need, and the
// modules that a Python, Node, Perl or Ruby program imports.
//
// The principle: it is a guess, and a cheap one. What it cannot read it leaves out, what it cannot decide it takes if it is
// small, and nothing about an image is an error. The image may be hostile: all work is counted, in bytes read and in steps,
// and when that is used up the guess ends where it is; so the same image gives the same guess on any machine.
//
// What it does not do: it runs nothing, emulates no program, and knows no registry, no chunk and no layer. Its ranges are those of the
// data device that the tree's extents name.
package startup

import (
	"context"
	"errors"
	"io"
	"path"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

// Image is what a start is found from.
type Image struct {
	Config ocispec.ImageConfig
	Root   *erofs.Inode // the merged tree, entries sorted by name
	// ReadAt reads the data device: all of p, or an error.
	ReadAt func(ctx context.Context, p []byte, off int64) error
}

// Range is a run of the data device, bytes.
type Range struct{ Offset, Size int64 }

// ErrUnknown: the image's config names no command that is in the image.
var ErrUnknown = errors.New("the image has no command that could be followed")

// Limits of one call of Find.
const (
	maxRead   = 1 << 30 // bytes of file data read
	maxTaken  = 1 << 30 // bytes of file data found
	maxSteps  = 8 << 20 // directory entries looked up and files looked into
	maxRanges = 1 << 18
	maxText   = 4 << 20 // bytes of a text file that is looked into
	maxDepth  = 12      // commands that run commands
)

// Find returns what a start of a container reads, in the order of first use; ranges may overlap. Errors are ErrUnknown and ReadAt's.
func Find(ctx context.Context, img Image) ([]Range, error) {
	f := &finder{
		root: img.Root, workingDir: path.Join("/", img.Config.WorkingDir), env: map[string]string{},
		read:  func(p []byte, off int64) error { return img.ReadAt(ctx, p, off) },
		bytes: maxRead, taken: maxTaken, steps: maxSteps,
		whole: map[*erofs.Inode]bool{}, linked: map[*erofs.Inode]bool{}, commands: map[string]bool{},
	}
	for _, e := range img.Config.Env {
		if k, v, ok := strings.Cut(e, "="); ok {
			f.env[k] = v
		}
	}
	// The runtime looks up the user before it runs anything.
	f.takeAll("/etc/passwd", "/etc/group", "/etc/nsswitch.conf")
	args := append(append([]string{}, img.Config.Entrypoint...), img.Config.Cmd...)
	f.command(args, 0)
	f.locale()
	f.timeZone()
	if f.err != nil {
		return nil, f.err
	}
	if len(f.commands) == 0 {
		return nil, ErrUnknown
	}
	return f.ranges, nil
}

// finder is the state of one Find.
type finder struct {
	root       *erofs.Inode
	read       func(p []byte, off int64) error
	workingDir string
	env        map[string]string

	bytes, taken, steps int64 // that may still be spent
	err                 error // of read: ends everything

	ranges   []Range
	whole    map[*erofs.Inode]bool // files taken whole
	linked   map[*erofs.Inode]bool // ELF objects taken
	commands map[string]bool       // that were followed
	cache    map[string][]string   // of ld.so; nil until read
}

// step counts n steps and says whether there were that many left.
func (f *finder) step(n int64) bool {
	f.steps -= n
	return f.steps > 0 && f.err == nil
}

// readAt fills p from the file at off, and says whether it could: a hole is zeros, and beyond the end there is nothing.
func (f *finder) readAt(n *erofs.Inode, p []byte, off int64) bool {
	f.bytes -= int64(len(p)) + 512
	if off < 0 || off > n.Size-int64(len(p)) || f.bytes < 0 || f.err != nil {
		return false
	}
	if n.Data != nil {
		return off <= int64(len(n.Data)) && copy(p, n.Data[off:]) == len(p)
	}
	clear(p)
	for _, x := range n.Extents {
		from, to := max(off, x.FileOffset), min(off+int64(len(p)), x.FileOffset+x.Size)
		if from >= to {
			continue
		}
		if f.err = f.read(p[from-off:to-off], x.DeviceOffset+from-x.FileOffset); f.err != nil {
			return false
		}
	}
	return true
}

// text returns the file's content, up to maxText bytes of it, or nil.
func (f *finder) text(n *erofs.Inode) []byte {
	if n == nil || !isRegular(n) {
		return nil
	}
	p := make([]byte, min(n.Size, maxText, max(f.bytes, 0)))
	if !f.readAt(n, p, 0) {
		return nil
	}
	return p
}

// take notes that [off, off+size) of the file is read.
func (f *finder) take(n *erofs.Inode, off, size int64) {
	for _, x := range n.Extents {
		from, to := max(off, x.FileOffset), min(off+size, x.FileOffset+x.Size)
		if from < to && len(f.ranges) < maxRanges && f.taken >= to-from {
			f.taken -= to - from
			f.ranges = append(f.ranges, Range{x.DeviceOffset + from - x.FileOffset, to - from})
		}
	}
}

// takeWhole notes that all of the file is read.
func (f *finder) takeWhole(n *erofs.Inode) {
	if n != nil && isRegular(n) && !f.whole[n] {
		f.whole[n] = true
		f.take(n, 0, n.Size)
	}
}

// takeAll takes the regular files of those paths that are there. A last element may be a pattern of path.Match.
func (f *finder) takeAll(paths ...string) {
	for _, p := range paths {
		for _, p := range f.glob(p) {
			n, _ := f.lookup(p)
			f.takeWhole(n)
		}
	}
}

var _ io.ReaderAt = fileReader{}

// fileReader is a file as an io.ReaderAt.
type fileReader struct {
	f *finder
	n *erofs.Inode
}

func (r fileReader) ReadAt(p []byte, off int64) (int, error) {
	if !r.f.readAt(r.n, p, off) {
		return 0, io.ErrUnexpectedEOF
	}
	return len(p), nil
}

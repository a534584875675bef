package tree

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

// Limits of a chain.
const (
	maxData  = 64 << 20 // bytes of file data kept in the metadata image
	maxNodes = 2 << 20
	maxHeld  = 256 << 20 // bytes of symlinks, xattrs and sparse maps in all nodes, and of names remembered

	runSize = 24 // of a run of a sparse map, in memory
)

// files makes the nodes of all layers, follows paths through them, and knows the data of those that extents cannot express.
type files struct {
	resolver
	blockSize int64
	scattered map[*node]scattered
	dataSize  int64
	made      int // nodes
	held      int // bytes, as maxHeld counts them

	// Nodes and extents are allocated in runs: there is one for nearly every entry.
	nodes   []node
	extents []erofs.Extent
}

// scattered is the data of a file that extents cannot express: its parts in the layer's tar.
type scattered struct {
	runs  []artifact.SparseRun
	layer *source
}

func (f *files) newNode() *node {
	if len(f.nodes) == 0 {
		f.nodes = make([]node, 256)
	}
	n := &f.nodes[0]
	f.nodes = f.nodes[1:]
	f.made++
	return n
}

// account counts what n holds against the limits of memory.
func (f *files) account(n *node) error {
	f.held += len(n.Data) + n.xattrSize()
	if f.made > maxNodes || f.held > maxHeld {
		return errors.New("too many files, symlinks, xattrs and sparse maps for one image")
	}
	return nil
}

// newExtents returns n extents with the capacity of n.
func (f *files) newExtents(n int) []erofs.Extent {
	if n > len(f.extents) {
		f.extents = make([]erofs.Extent, max(n, 256))
	}
	x := f.extents[:n:n]
	f.extents = f.extents[n:]
	return x
}

// setData sets the size and the data of the regular file that e describes.
func (a *applier) setData(n *node, e *artifact.Entry) error {
	if e.Size > maxFile {
		return errors.New("file too large")
	}
	n.Size = e.Size
	runs := e.Sparse
	if runs == nil && e.Size > 0 {
		runs = []artifact.SparseRun{{TarOffset: e.DataOffset, Size: e.Size}}
	}
	runs, err := a.checkRuns(runs, e.Size)
	if err != nil || len(runs) == 0 {
		return err
	}
	if len(runs) > 1 {
		a.files.held += len(runs) * runSize
	}
	if !a.isAligned(runs, e.Size) {
		a.files.scattered[n] = scattered{runs, &a.source}
		return nil
	}
	n.Extents = a.files.newExtents(len(runs))
	for i, r := range runs {
		n.Extents[i] = erofs.Extent{FileOffset: r.FileOffset, DeviceOffset: a.base + r.TarOffset, Size: r.Size}
	}
	return nil
}

// checkRuns joins runs that follow each other, drops empty ones, and makes sure that they lie in the file and in the tar.
func (a *applier) checkRuns(runs []artifact.SparseRun, size int64) ([]artifact.SparseRun, error) {
	checked := runs[:0:0]
	end := int64(0)
	for _, r := range runs {
		if r.Size < 0 || r.FileOffset < end || r.FileOffset > size-r.Size || r.TarOffset < 0 || r.TarOffset > a.tarSize-r.Size {
			return nil, fmt.Errorf("data run outside of its file or the tar: %w", artifact.ErrInvalid)
		}
		end = r.FileOffset + r.Size
		if r.Size == 0 {
			continue
		}
		if i := len(checked) - 1; i >= 0 {
			if p := &checked[i]; p.FileOffset+p.Size == r.FileOffset && p.TarOffset+p.Size == r.TarOffset {
				p.Size += r.Size
				continue
			}
		}
		checked = append(checked, r)
	}
	return checked, nil
}

// isAligned reports whether extents can express runs: in whole blocks, but for the end of the file.
func (a *applier) isAligned(runs []artifact.SparseRun, size int64) bool {
	for _, r := range runs {
		bits := r.FileOffset | (a.base + r.TarOffset)
		if r.FileOffset+r.Size != size {
			bits |= r.Size
		}
		if bits%a.files.blockSize != 0 {
			return false
		}
	}
	return true
}

// load reads the data of n if extents cannot express it. It is called when n has turned out to be visible.
func (f *files) load(ctx context.Context, n *node) error {
	if len(f.scattered) == 0 {
		return nil
	}
	s, ok := f.scattered[n]
	if !ok {
		return nil
	}
	delete(f.scattered, n) // other names of n follow
	if f.dataSize += n.Size; f.dataSize > maxData {
		return fmt.Errorf("%w: more than %d MiB of sparse files with unaligned parts", ErrRefused, maxData>>20)
	}
	n.Data = make([]byte, n.Size)
	for _, r := range s.runs {
		p := n.Data[r.FileOffset:][:r.Size]
		if read, err := s.layer.readAt(ctx, p, r.TarOffset); read < len(p) {
			return fmt.Errorf("read data of a sparse file: %w", cmp.Or(err, io.ErrUnexpectedEOF))
		}
	}
	return nil
}

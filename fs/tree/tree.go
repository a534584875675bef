// Package tree computes an image's merged tree from its layers' headers: the tree that a container would see had
// containerd 2.4.2 unpacked the layers for its overlayfs snapshotter, entry after entry and one layer after the other.
//
// That is done the way containerd and the kernel do it, in two stages. Each layer is applied alone, as containerd's
// archive.Apply does into an upper directory: symlinks in the names of entries are followed inside that layer only, a
// whiteout becomes a character device 0:0, an opaque marker a flag on its directory. The bottom layer is applied as to a
// plain directory: there a whiteout deletes what came before it in the same tar. Then the layers are stacked as overlayfs
// stacks directories: a file hides what is below its name, directories merge down to an opaque one, and a merged directory
// shows the attributes of its topmost. Applying all layers to one tree instead gives different results: a lower symlink
// lib -> usr/lib and an upper entry lib/y must give a real directory that hides the link.
//
// What the applier refuses is ErrRefused, and so is what cannot be known or expressed here: a normal pull then decides.
// Beyond the applier's own errors these are:
//   - names whose resolution, by a mistake of the applier's, passes through a chain of symlinks on the host's file system
//   - paths longer than 4000 bytes (how long they may be depends on containerd's own directory), more than 65000 links to
//     a file (ext4's limit), files larger than 16 TiB, security.capability without a value
//   - xattrs of more than 64 KiB in one value or 192 KiB in one file, and sparse files whose parts are not aligned when
//     their sizes add up to more than 64 MiB
//   - more than 2 Mi files or 256 MiB of symlinks, xattrs and sparse maps in all layers, and symlinks that take very long to follow
//
// Where what containerd shows is not defined by the layers, this package decides:
//   - A directory that no entry describes gets its owner, mode, time and xattrs from the lower layers (as the applier does
//     when it unpacks one layer after the other, which is the default), and without one there 0755, root and the time of
//     the entry that needed it. containerd shows the time of unpacking for both.
//   - Times before 1970 and after 2262 are 1970, as containerd shows them.
//   - The link count of a file is that of its layer: a name hidden by a layer above still counts, as it does in overlayfs.
//     That of directories is left to the metadata image (overlayfs says 1 for merged ones).
//   - A whiteout never has a name. Overlayfs lists those that lie in a directory which is not merged, and fails to stat
//     them: a mistake, not repeated. That `.wh.d` beside `d/` in one layer does not hide the lower d/ is repeated.
//   - Of xattrs, what ext4 and XFS accept: user (files and directories only), security, and POSIX ACLs with their effects:
//     default ACLs are inherited by the entries of a directory, and the mode decides over the ACL. Other namespaces are
//     ignored, as the applier ignores them. How much fits beside one inode on ext4 (4 KiB) is not a limit here.
//   - The root's attributes are 0755, root and 1970: in a container they are the snapshot's, whatever a layer says of "./".
package tree

import (
	"context"
	"errors"
	"fmt"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

// ErrRefused: a layer that containerd's applier refuses, or that a metadata image cannot express. A normal pull is the answer.
var ErrRefused = errors.New("layer cannot be streamed")

// Layer is one layer of a chain, bottom first.
type Layer struct {
	Index *artifact.Index
	Base  int64 // of its tar in the data device, bytes, a multiple of 512
	// ReadAt reads the layer's tar. Called only for file data that extents cannot express.
	ReadAt func(ctx context.Context, p []byte, off int64) (int, error)
}

// Merge returns the merged tree of layers. The blockSize (512) is the alignment that extents need. Errors are ErrRefused,
// with the layer's number, the entry and the reason; artifact.ErrInvalid for headers that cannot be read; ctx's and ReadAt's.
// It takes memory for each entry of every layer, hidden ones included, about 300 bytes while it runs.
func Merge(ctx context.Context, layers []Layer, blockSize int) (*erofs.Inode, error) {
	sources := make([]source, len(layers))
	for i, l := range layers {
		sources[i] = source{
			entries: func() entryReader { return inBatches(l.Index.Entries()) },
			tarSize: l.Index.TarSize,
			base:    l.Base,
			readAt:  l.ReadAt,
		}
	}
	return merge(ctx, sources, int64(blockSize))
}

// source is a layer as merge sees it.
type source struct {
	entries       func() entryReader // a new reader from the start
	tarSize, base int64
	readAt        func(ctx context.Context, p []byte, off int64) (int, error)
}

// entryReader is an artifact.EntryReader.
type entryReader interface {
	Next() (*artifact.Entry, error)
	Close()
}

func merge(ctx context.Context, layers []source, blockSize int64) (*erofs.Inode, error) {
	files := &files{blockSize: blockSize, scattered: map[*node]scattered{}}
	lowers := []*node{} // topmost first
	for i := range layers {
		root, err := applyLayer(ctx, &layers[i], lowers, files)
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
		lowers = append([]*node{root}, lowers...)
	}
	if len(lowers) == 0 {
		lowers = append(lowers, newRoot())
	}
	o := overlay{ctx: ctx, files: files}
	if err := o.mergeDir(lowers); err != nil {
		return nil, err
	}
	return &lowers[0].Inode, nil
}

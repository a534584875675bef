// Package tree computes an image's merged tree from its layers' headers: what containerd's applier and overlayfs would have made of them.
package tree

import (
	"context"
	"errors"

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

// Merge returns the merged tree of layers. The blockSize (512) is the alignment that extents need.
func Merge(ctx context.Context, layers []Layer, blockSize int) (*erofs.Inode, error) { panic("todo") }

package converter

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"sort"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/startup"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/tree"
)

// blockSize is the alignment of the layers' bases in the data device.
const blockSize = 512

// addStatic attaches the profile that the image's files give, unless it is there. What is in the way of it is a warning: the
// image streams without. The error is ctx's.
func (c *Created) addStatic(ctx context.Context, p Place, img *image, a *artifact.Manifest, o CreateOptions) error {
	err := c.tryStatic(ctx, p, img, a, o)
	if c.Status == StatusExists && errors.Is(err, startup.ErrUnknown) {
		return nil // that was said when the artifact was made
	}
	if err != nil && ctx.Err() == nil {
		c.Warnings = append(c.Warnings, fmt.Sprintf("%s has no static profile: %v", c.Platform, err))
		err = nil
	}
	return err
}

func (c *Created) tryStatic(ctx context.Context, p Place, img *image, a *artifact.Manifest, o CreateOptions) error {
	if c.Status == StatusExists {
		old, err := profilesOf(ctx, p, img.desc.Digest)
		if err != nil {
			return err
		}
		for _, f := range old {
			if f.manifest != nil && f.manifest.Source == artifact.ProfileStatic {
				if _, err := readHead(ctx, p, f.manifest); !errors.Is(err, artifact.ErrUnsupported) {
					return nil
				}
			}
		}
	}
	profile, err := findStatic(ctx, p, img, a)
	if err != nil {
		return err
	}
	got, warnings, err := attachProfile(ctx, p, a, c.Artifact.Digest, profile, artifact.ProfileStatic, img.created, o.Options)
	c.Warnings = append(c.Warnings, warnings...)
	if err == nil {
		c.Profile = &got
	}
	return err
}

// findStatic returns the chunks that a start of the image reads, as far as its files tell.
func findStatic(ctx context.Context, p Place, img *image, a *artifact.Manifest) (*artifact.Profile, error) {
	indexed, err := readIndexes(ctx, p, a.Layers)
	if err != nil {
		return nil, err
	}
	d := &device{p: p, layers: indexed, chunks: map[chunkID]*list.Element{}, recent: list.New()}
	var layers []tree.Layer
	profile := &artifact.Profile{}
	seen := map[digest.Digest]int{}
	numbers := make([]int, len(a.Layers)) // of the layers in the profile
	end := int64(0)
	for i, l := range indexed {
		d.bases = append(d.bases, end)
		layers = append(layers, tree.Layer{Index: l.index, Base: end, ReadAt: func(ctx context.Context, p []byte, off int64) (int, error) {
			return len(p), d.readLayer(ctx, i, p, off)
		}})
		end = (end + l.index.TarSize + blockSize - 1) / blockSize * blockSize
		if _, dup := seen[l.IndexDigest]; !dup {
			seen[l.IndexDigest] = len(profile.Layers)
			profile.Layers = append(profile.Layers, l.IndexDigest)
		}
		numbers[i] = seen[l.IndexDigest]
	}
	root, err := tree.Merge(ctx, layers, blockSize)
	if err != nil {
		return nil, err
	}
	ranges, err := startup.Find(ctx, startup.Image{Config: img.run, Root: root, ReadAt: d.readAt})
	if err != nil {
		return nil, err
	}
	listed := map[artifact.HotChunk]bool{}
	for _, r := range ranges {
		i, off := d.at(r.Offset)
		x := d.layers[i].index
		if r.Size <= 0 || off+r.Size > x.TarSize {
			return nil, errors.New("a file's data lie outside of its layer")
		}
		for n := x.Find(off); n <= x.Find(off+r.Size-1); n++ {
			c := artifact.HotChunk{Layer: numbers[i], Chunk: n}
			if !listed[c] && len(profile.Chunks) < artifact.MaxHotChunks {
				listed[c] = true
				profile.Chunks = append(profile.Chunks, c)
			}
		}
	}
	return profile, nil
}

// device reads the tars of an artifact's layers laid end to end, and keeps the chunks used last. It is for one goroutine.
type device struct {
	p      Place
	layers []indexedLayer
	bases  []int64 // of the layers' tars

	chunks map[chunkID]*list.Element // of *chunk
	recent *list.List                // the latest first
	bytes  int64                     // of chunks
}

type chunkID struct{ layer, chunk int }

type chunk struct {
	chunkID
	b []byte
}

// deviceMemory is how many bytes of chunks a device keeps.
const deviceMemory = 64 << 20

// at returns the layer that holds an offset of the device, and the tar offset there.
func (d *device) at(off int64) (layer int, tarOffset int64) {
	i := sort.Search(len(d.bases), func(i int) bool { return d.bases[i] > off }) - 1
	return i, off - d.bases[i]
}

func (d *device) readAt(ctx context.Context, b []byte, off int64) error {
	i, off := d.at(off)
	return d.readLayer(ctx, i, b, off)
}

// readLayer reads all of b from the layer's tar.
func (d *device) readLayer(ctx context.Context, i int, b []byte, off int64) error {
	x := d.layers[i].index
	if off < 0 || off+int64(len(b)) > x.TarSize {
		return io.ErrUnexpectedEOF
	}
	for len(b) > 0 {
		n, last := x.Find(off), x.Find(off+int64(len(b))-1)
		c, err := d.chunk(ctx, i, n, last)
		if err != nil {
			return fmt.Errorf("read layer %s: %w", d.layers[i].Digest, err)
		}
		copied := copy(b, c[off-x.Chunk(n).TarOffset:])
		b, off = b[copied:], off+int64(copied)
	}
	return nil
}

// chunk returns the bytes of chunk n, and fetches with it what is missing up to chunk last.
func (d *device) chunk(ctx context.Context, layer, n, last int) ([]byte, error) {
	if e := d.chunks[chunkID{layer, n}]; e != nil {
		d.recent.MoveToFront(e)
		return e.Value.(*chunk).b, nil
	}
	l := d.layers[layer]
	begin := l.index.Chunk(n).BlobOffset
	end := n + 1
	for end <= last && d.chunks[chunkID{layer, end}] == nil && l.index.Chunk(end).TarOffset-l.index.Chunk(n).TarOffset < deviceMemory/4 {
		end++
	}
	z := l.index.Chunk(end - 1)
	rc, err := d.p.Blob(ctx, ocispec.Descriptor{Digest: l.Digest, Size: z.BlobOffset + z.BlobSize}, begin)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	var first []byte
	for ; n < end; n++ {
		raw := make([]byte, l.index.Chunk(n).BlobSize)
		if _, err := io.ReadFull(rc, raw); err != nil {
			return nil, err
		}
		b, err := l.index.Decompress(n, raw, nil)
		if err != nil {
			return nil, err
		}
		if first == nil {
			first = b
		}
		d.keep(&chunk{chunkID{layer, n}, b})
	}
	return first, nil
}

func (d *device) keep(c *chunk) {
	d.chunks[c.chunkID] = d.recent.PushFront(c)
	for d.bytes += int64(len(c.b)); d.bytes > deviceMemory; {
		old := d.recent.Remove(d.recent.Back()).(*chunk)
		delete(d.chunks, old.chunkID)
		d.bytes -= int64(len(old.b))
	}
}

package stream

import (
	"cmp"
	"errors"
	"os"
	"slices"
	"sort"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

// Bounds of what is read ahead of an image, whatever its profile and its tree are like: of chunks the profile's first count, of files the tree's.
const (
	maxAheadBytes  = 1 << 30  // of chunks: pages of the kernel's cache, which are taken from others on the node
	maxAheadMemory = 16 << 20 // bytes of this process, of paths and of
	pieceMemory    = 128      // a piece of a file
)

var errEnough = errors.New("it takes too much memory")

// ahead is what is to be read ahead of an image.
type ahead struct {
	extents []extent
	ranges  []fs.Range // that lie in them
}

// here reports whether all of a is on this node yet: the cache may have given something back.
func (a *ahead) here() bool {
	for i := range a.extents {
		if !a.extents[i].Layer.Has(a.extents[i].Chunk) {
			return false
		}
	}
	return true
}

// extent is a chunk of a profile on the data device.
type extent struct {
	cache.Frame
	off, end int64
	order    int // in the profile
}

// extents are the chunks of p on d that are on this node, by offset. The cache may not have taken all: what nobody reads must not be fetched for the kernel's cache.
func (d *device) extents(p *artifact.Profile) (all []extent) {
	at := make(map[digest.Digest][]int, len(d.digests)) // an image may have a layer twice
	for i, dgst := range d.digests {
		at[dgst] = append(at[dgst], i)
	}
	size := int64(0)
	mapped.Guard(func() { // of the indexes: what they say until then counts
		for order, c := range p.Chunks {
			for _, i := range at[p.Layers[c.Layer]] {
				if c.Chunk >= d.indexes[i].NumChunks() || !d.layers[i].Has(c.Chunk) {
					continue
				}
				chunk := d.indexes[i].Chunk(c.Chunk)
				if size += chunk.TarSize; size > maxAheadBytes {
					return
				}
				off := d.bases[i] + chunk.TarOffset
				all = append(all, extent{cache.Frame{Layer: d.layers[i], Chunk: c.Chunk}, off, off + chunk.TarSize, order})
			}
		}
	})
	slices.SortFunc(all, func(a, b extent) int { return cmp.Compare(a.off, b.off) })
	return all
}

// covered reports whether extents has all up to end without a gap.
func covered(extents []extent, end int64) bool {
	to := extents[0].end
	for _, x := range extents[1:] {
		if to >= end || x.off > to {
			break
		}
		to = x.end
	}
	return to >= end
}

// rangesIn are the whole pages that lie in extents of files of the metadata image mem, in the order of those.
func rangesIn(mem []byte, extents []extent) (ranges []fs.Range, err error) {
	if fault := mapped.Guard(func() {
		var m *erofs.Image
		if m, err = erofs.Open(mem); err == nil {
			ranges, err = rangesOf(m, extents)
		}
	}); fault != nil {
		return nil, fault
	}
	return ranges, err
}

func rangesOf(m *erofs.Image, extents []extent) ([]fs.Range, error) {
	page := int64(os.Getpagesize())
	type piece struct {
		fs.Range
		order int
		dev   int64
		last  bool // it ends with the file, and what pads its last block is here, too, which the kernel reads with it
	}
	var pieces []piece
	memory := 0
	seen := make(map[uint64]bool) // an inode may have several names
	err := m.Walk(func(path []byte, nid uint64, typ uint8) error {
		if typ != unix.DT_REG || seen[nid] {
			return nil
		}
		st, err := m.Stat(nid)
		if err != nil {
			return err
		}
		for off := int64(0); off < st.Size; {
			_, dev, hole, n, err := m.Map(nid, off)
			if err != nil {
				return err
			}
			if !hole && dev > 0 {
				for k := sort.Search(len(extents), func(k int) bool { return extents[k].end > dev }); k < len(extents) && extents[k].off < dev+n; k++ {
					if memory += len(path) + pieceMemory; memory > maxAheadMemory {
						return errEnough
					}
					x := &extents[k]
					from, end := max(x.off, dev), min(x.end, dev+n)
					pieces = append(pieces, piece{fs.Range{Path: string(path), Off: off + from - dev, Size: end - from}, x.order, from, off+end-dev == st.Size && covered(extents[k:], (end+blockSize-1)&^(blockSize-1))})
					seen[nid] = true
				}
			}
			off += n
		}
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) {
		return nil, err
	}
	slices.SortFunc(pieces, func(a, b piece) int { return cmp.Or(cmp.Compare(a.order, b.order), cmp.Compare(a.dev, b.dev)) })
	merged := pieces[:0]
	for _, p := range pieces {
		if n := len(merged); n > 0 && merged[n-1].Path == p.Path && merged[n-1].Off+merged[n-1].Size == p.Off {
			merged[n-1].Size += p.Size
			merged[n-1].last = p.last
			continue
		}
		merged = append(merged, p)
	}
	var ranges []fs.Range
	for _, p := range merged {
		// The kernel reads pages, and what else is in one may not be here.
		from, end := (p.Off+page-1)&^(page-1), p.Off+p.Size
		if !p.last {
			end &^= page - 1
		}
		if from < end {
			ranges = append(ranges, fs.Range{Path: p.Path, Off: from, Size: end - from})
		}
	}
	return ranges, nil
}

// warm has the kernel read what p lists and is on this node now, where the image is mounted, or will be before cool. What a container's start reads is then in the
// kernel's cache: it waits for none of the requests to this process that this takes.
func (img *image) warm(d *device, p *artifact.Profile) error {
	for _, l := range d.layers {
		l.Quiet()
	}
	path := img.metadataPath(len(img.rec.Layers))
	img.mu.Lock() // it may be being made
	mem, err := mapFile(path)
	img.mu.Unlock()
	if err != nil {
		return err
	}
	defer unix.Munmap(mem)
	a := &ahead{extents: d.extents(p)}
	if len(a.extents) == 0 {
		return nil
	}
	if a.ranges, err = rangesIn(mem, a.extents); err != nil {
		return err
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	if targets := img.store.o.Mounter.At(path); len(targets) > 0 {
		img.readAhead(targets[0], a)
	} else {
		img.hot = a
	}
	return nil
}

// cool undoes warm for mounts to come.
func (img *image) cool() {
	img.mu.Lock()
	defer img.mu.Unlock()
	img.hot = nil
}

// readAhead does not wait for its end, which may be as far away as the end of this process.
func (img *image) readAhead(target string, a *ahead) {
	go func() {
		if !a.here() {
			return
		}
		if err := img.store.o.Mounter.ReadAhead(target, a.ranges); err != nil {
			img.store.log.Debug("read ahead", "error", err)
		}
	}()
}

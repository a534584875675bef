package stream

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

// deepTree has n files of a page each in a directory of the longest path that the kernel takes, but for their names, and what of a data device is theirs.
func deepTree(t *testing.T, n int) (image []byte, extents []extent) {
	t.Helper()
	const page = 4096
	deep := &erofs.Inode{Mode: unix.S_IFDIR | 0o755}
	for i := range n {
		deep.Entries = append(deep.Entries, erofs.Dirent{Name: fmt.Sprintf("%06d", i), Inode: &erofs.Inode{
			Mode: unix.S_IFREG | 0o644, Size: page, Extents: []erofs.Extent{{DeviceOffset: int64(i+1) * page, Size: page}},
		}})
	}
	for range 15 {
		deep = &erofs.Inode{Mode: unix.S_IFDIR | 0o755, Entries: []erofs.Dirent{{Name: strings.Repeat("d", 255), Inode: deep}}}
	}
	var b bytes.Buffer
	if err := erofs.Write(&b, deep, erofs.Options{BlockSize: blockSize, DeviceSize: int64(n+1) * page}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), []extent{{off: page, end: int64(n+1) * page}}
}

// Many files with long paths cost bounded memory, not their number times 4 KiB.
func TestRangesAreBounded(t *testing.T) {
	for _, n := range []int{100, 10_000} {
		ranges, err := rangesIn(deepTree(t, n))
		memory := 0
		for _, r := range ranges {
			memory += len(r.Path) + pieceMemory
		}
		if err != nil || memory > maxAheadMemory || len(ranges) < min(n, 3000) {
			t.Errorf("%d ranges of %d files in %d bytes, %v", len(ranges), n, memory, err)
		}
	}
}

// A metadata image that is cut while it is looked at is an error, and not the end of the daemon.
func TestRangesOfCutImage(t *testing.T) {
	image, extents := deepTree(t, 1000)
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	mem, err := mapFile(path)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	if ranges, err := rangesIn(mem, extents); err == nil {
		t.Errorf("%d ranges, no error", len(ranges))
	}
}

// fileBlob is a layer blob in a file.
type fileBlob struct{ *os.File }

func (b fileBlob) ReadRange(_ context.Context, off, n int64, _ int) (io.ReadCloser, error) {
	return io.NopCloser(io.NewSectionReader(b.File, off, n)), nil
}

// Of a profile's chunks those count that the cache has, in every layer with this index, and an index that is cut while it is looked at costs the others.
func TestExtents(t *testing.T) {
	dir := t.TempDir()
	blob, err := os.Create(filepath.Join(dir, "blob"))
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	layer, err := artifact.EncodeLayer(t.Context(), blob, bytes.NewReader(make([]byte, 10<<20)), artifact.EncodeOptions{ChunkSize: 512})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "index")
	raw := make([]byte, layer.IndexSize)
	if _, err = blob.ReadAt(raw, layer.IndexOffset); err == nil {
		err = os.WriteFile(path, raw, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	x, err := mapIndex(path, layer.Layer)
	if err != nil {
		t.Fatal(err)
	}
	chunks, err := cache.Open(filepath.Join(dir, "cache"), cache.Options{NoReadAhead: true})
	if err != nil {
		t.Fatal(err)
	}
	defer chunks.Close()
	d := &device{}
	for range 2 {
		l, err := chunks.Layer(layer.IndexDigest, x, fileBlob{blob})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		d.layers, d.indexes, d.digests, d.bases = append(d.layers, l), append(d.indexes, x), append(d.digests, layer.IndexDigest), append(d.bases, d.size)
		d.size += x.TarSize
	}
	if _, err := d.layers[0].ReadAt(t.Context(), make([]byte, 512), 512); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); !d.layers[0].Has(1); time.Sleep(time.Millisecond) { // a read does not wait for the disk
		if time.Now().After(end) {
			t.Fatal("chunk 1 is not in the cache after it was read")
		}
	}
	p := &artifact.Profile{Layers: d.digests[:1], Chunks: []artifact.HotChunk{{Chunk: 0}, {Chunk: 1}, {Chunk: x.NumChunks() - 1}}}
	a := &ahead{extents: d.extents(p)}
	if len(a.extents) != 2 || a.extents[0].off != 512 || a.extents[1].off != 512+x.TarSize || !a.here() {
		t.Errorf("extents %+v, here %v; want chunk 1 of both layers", a.extents, a.here())
	}
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	if got := d.extents(p); len(got) != 0 {
		t.Errorf("of an index that was cut: %+v", got)
	}
}

package artifact

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"runtime"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

const (
	defaultChunkSize = 128 << 10
	// encoderVersion names what decides the bytes of the frames, and with chunkerVersion those of the blob. TestGolden fails when it must change.
	encoderVersion = "klauspost-1.20.4"
	chunkerVersion = 3

	// The first headChunks chunks of a data run are as small as others, 256 MiB: programs and libraries, and what says at the start of a large file what is
	// where. The rest has largeFactor times larger ones, of up to maxLarge: every pull pays 48 bytes for a chunk, and few start-ups read much at random there.
	headChunks  = 2048
	largeFactor = 4
	maxLarge    = 512 << 10

	// maxWorkers bounds the workers' memory, about 1.3 MiB each, 2 with large chunks; the one goroutine that reads the tar cannot feed more.
	maxWorkers = 16
	// maxPending bounds the bytes of tar that are in the pipeline at once, in chunks of the largest size too.
	maxPending = 8 << 20
)

// EncodeOptions are the parameters that decide a blob's bytes (but for Workers, which does not).
type EncodeOptions struct {
	ChunkSize int // most bytes of tar in a chunk, but in a data run's rest behind its first 2048 chunks, see largeChunkSize; 0 is 128 KiB
	Workers   int // chunks compressed at once; 0 is GOMAXPROCS
}

func (o EncodeOptions) withDefaults() EncodeOptions {
	if o.ChunkSize == 0 {
		o.ChunkSize = defaultChunkSize
	}
	if o.Workers <= 0 {
		o.Workers = runtime.GOMAXPROCS(0)
	}
	o.Workers = max(1, min(o.Workers, maxWorkers, maxPending/o.largeChunkSize()))
	return o
}

// largeChunkSize is the most bytes of tar in a chunk that begins headChunks chunks or more into its data run.
func (o EncodeOptions) largeChunkSize() int {
	return max(o.ChunkSize, min(largeFactor*o.ChunkSize, maxLarge))
}

// ID names everything that decides a blob's bytes, for records of layers converted before: format version, chunk size, encoder and its version.
func (o EncodeOptions) ID() string {
	return fmt.Sprintf("%s-%s/chunk=%d.%d/zstd=%s", Format, Version, chunkerVersion, o.withDefaults().ChunkSize, encoderVersion)
}

// EncodedLayer is what EncodeLayer has written.
type EncodedLayer struct {
	Layer                     // all but Source
	DiffID      digest.Digest // SHA-256 of the tar
	TarSize     int64
	HeadersSize int64
	Chunks      int
}

// EncodeLayer reads a tar and writes the layer blob: the chunks' frames and the index. Memory is bounded whatever the
// tar's size, but for the index. A tar that archive/tar cannot read to its end is ErrInvalid, one beyond the format's limits
// ErrUnsupported; errors of tar, w and ctx are returned as they are. When ctx ends, EncodeLayer returns after the
// Read or Write in progress.
func EncodeLayer(ctx context.Context, w io.Writer, tar io.Reader, o EncodeOptions) (EncodedLayer, error) {
	o = o.withDefaults()
	if o.ChunkSize < blockSize || o.ChunkSize > MaxChunkSize {
		return EncodedLayer{}, fmt.Errorf("chunk size %d: not between %d and %d", o.ChunkSize, blockSize, MaxChunkSize)
	}
	p, err := newPipeline(w, o)
	if err != nil {
		return EncodedLayer{}, err
	}
	g, ctx := errgroup.WithContext(ctx)
	r := &tarReader{ctx: ctx, tar: bufio.NewReaderSize(tar, 64<<10), diffID: sha256.New(), chunks: chunker{size: o.ChunkSize, large: o.largeChunkSize(), pipe: p}}
	g.Go(func() error { return r.run() })
	for range o.Workers {
		g.Go(func() error { return p.compress(ctx) })
	}
	g.Go(func() error { return p.write(ctx) })
	if err := g.Wait(); err != nil {
		return EncodedLayer{}, err
	}
	return p.finish(r)
}

// tarReader reads the tar once: it hashes it, takes it apart, and hands its chunks to the pipeline.
type tarReader struct {
	ctx    context.Context // of the one EncodeLayer call that this value lives for
	tar    io.Reader
	err    error // of tar, other than io.EOF
	size   int64
	diffID hash.Hash
	chunks chunker

	headers     limitedBuffer // compressed
	headersSize int64
}

func (r *tarReader) run() error {
	defer r.chunks.pipe.close()
	err := r.scan()
	if r.err != nil {
		return r.err // what the scanner makes of it says less
	}
	if err != nil && !errors.Is(err, ErrUnsupported) && r.ctx.Err() == nil {
		return fmt.Errorf("tar offset %d: %w: %w", r.size, err, ErrInvalid)
	}
	return err
}

func (r *tarReader) scan() error {
	// One goroutine, so that the frame does not depend on how fast it is read.
	zw, err := zstd.NewWriter(&r.headers, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false), zstd.WithZeroFrames(true), zstd.WithWindowSize(1<<20))
	if err != nil {
		return err
	}
	defer zw.Close()
	add := func(b []byte) error {
		if r.headersSize += int64(len(b)); r.headersSize > MaxHeadersSize {
			return fmt.Errorf("more than %d bytes of headers: %w", int64(MaxHeadersSize), ErrUnsupported)
		}
		_, err := zw.Write(b)
		return err
	}
	s := newScanner(r)
	for {
		e, err := s.next()
		if err != nil && err != io.EOF {
			return err
		}
		if err := add(s.raw); err != nil {
			return err
		}
		if err == io.EOF {
			break
		}
		if err := r.chunks.entry(r.ctx, e, s.raw); err != nil {
			return err
		}
	}
	if err := r.chunks.write(r.ctx, s.raw); err != nil {
		return err
	}
	for {
		b, err := s.tail()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if err := errors.Join(add(b), r.chunks.write(r.ctx, b)); err != nil {
			return err
		}
	}
	if err := zw.Close(); err != nil {
		return err
	}
	return r.chunks.finish(r.ctx)
}

// Read reads the tar and keeps count.
func (r *tarReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := r.tar.Read(p)
	r.size += int64(n)
	r.diffID.Write(p[:n])
	if err != nil && err != io.EOF {
		r.err = err
	}
	return n, err
}

func (r *tarReader) header(p []byte) (int, error) { return r.Read(p) }

// data reads data straight into chunks.
func (r *tarReader) data(n int64) error {
	for n > 0 {
		room, err := r.chunks.room(r.ctx)
		if err != nil {
			return err
		}
		got, err := r.Read(room[:min(int64(len(room)), n)])
		r.chunks.grow(got)
		n -= int64(got)
		if err == io.EOF && n > 0 {
			return io.ErrUnexpectedEOF
		}
		if err != nil && err != io.EOF {
			return err
		}
	}
	return nil
}

// limitedBuffer holds compressed headers, up to what fits in an index.
type limitedBuffer struct{ bytes.Buffer }

func (b *limitedBuffer) Write(p []byte) (int, error) {
	if b.Len()+len(p) > MaxIndexSize {
		return 0, errIndexSize
	}
	return b.Buffer.Write(p)
}

var errIndexSize = fmt.Errorf("index exceeds %d bytes: %w", MaxIndexSize, ErrUnsupported)

// finish writes the index.
func (p *pipeline) finish(r *tarReader) (EncodedLayer, error) {
	size := int64(indexHeaderSize + len(p.table) + r.headers.Len())
	if size > MaxIndexSize {
		return EncodedLayer{}, errIndexSize
	}
	h := appendIndexHeader(nil, &Index{TarSize: r.size, HeadersSize: r.headersSize, table: p.table, headers: r.headers.Bytes()}, r.diffID.Sum(nil))
	offset, index := p.size, sha256.New()
	for _, b := range [][]byte{h, p.table, r.headers.Bytes()} {
		index.Write(b)
		if err := p.emit(b); err != nil {
			return EncodedLayer{}, err
		}
	}
	return EncodedLayer{
		Layer: Layer{
			Digest:      digest.NewDigest(digest.SHA256, p.blob),
			Size:        p.size,
			IndexOffset: offset,
			IndexSize:   size,
			IndexDigest: digest.NewDigest(digest.SHA256, index),
		},
		DiffID:      digest.NewDigest(digest.SHA256, r.diffID),
		TarSize:     r.size,
		HeadersSize: r.headersSize,
		Chunks:      len(p.table) / tableEntrySize,
	}, nil
}

// appendIndexHeader appends what comes before the chunk table in the index.
func appendIndexHeader(b []byte, x *Index, diffID []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint32(b, skippableMagic)
	b = le.AppendUint32(b, uint32(indexHeaderSize-offIndexMagic+len(x.table)+len(x.headers)))
	b = append(b, indexMagic...)
	b = le.AppendUint32(b, indexVersion)
	b = le.AppendUint32(b, uint32(x.NumChunks()))
	b = le.AppendUint64(b, uint64(x.TarSize))
	b = le.AppendUint64(b, uint64(x.HeadersSize))
	return append(b, diffID...)
}

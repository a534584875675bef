package artifact

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"io"
	"math/bits"

	"github.com/klauspost/compress/zstd"
)

// pipeline compresses chunks on several workers and writes their frames in order. Jobs go round: free, filled by the chunker, compressed
// by a worker while they also queue for the writer, and free again. Their number bounds memory.
type pipeline struct {
	free  chan *job
	work  chan *job // to the workers
	order chan *job // to the writer
	zstd  *zstd.Encoder

	// The writer's.
	w       io.Writer
	blob    hash.Hash
	size    int64 // bytes of the blob written
	tarSize int64 // bytes of the tar in them
	table   []byte
}

// job is a chunk on its way.
type job struct {
	tar    []byte
	frame  []byte
	digest [32]byte
	done   chan struct{} // frame and digest are there
}

func newPipeline(w io.Writer, o EncodeOptions) (*pipeline, error) {
	window := 1 << bits.Len(uint(o.largeChunkSize()-1)) // no match is farther away
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(o.Workers), zstd.WithEncoderCRC(false), zstd.WithZeroFrames(true),
		zstd.WithWindowSize(max(window, zstd.MinWindowSize)), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, err
	}
	jobs := o.Workers + 2 // one being filled, one being written
	p := &pipeline{
		free:  make(chan *job, jobs),
		work:  make(chan *job, jobs),
		order: make(chan *job, jobs),
		zstd:  enc,
		w:     w,
		blob:  sha256.New(),
	}
	for range jobs {
		p.free <- &job{done: make(chan struct{}, 1)}
	}
	return p, nil
}

// take returns an empty job with room for a chunk of size bytes. Most layers have no large ones, and their jobs no memory for those.
func (p *pipeline) take(ctx context.Context, size int) (*job, error) {
	select {
	case j := <-p.free:
		if cap(j.tar) < size {
			j.tar, j.frame = make([]byte, 0, size), make([]byte, 0, maxFrameSize(uint64(size)))
		}
		j.tar = j.tar[:0]
		return j, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// submit hands a filled job over. It does not block: the channels have room for every job.
func (p *pipeline) submit(j *job) {
	p.order <- j
	p.work <- j
}

// close says that no more jobs will be submitted.
func (p *pipeline) close() {
	close(p.work)
	close(p.order)
}

func (p *pipeline) compress(ctx context.Context) error {
	for j := range p.work {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		j.digest = sha256.Sum256(j.tar)
		j.frame = p.zstd.EncodeAll(j.tar, j.frame[:0])
		j.done <- struct{}{}
	}
	return nil
}

func (p *pipeline) write(ctx context.Context) error {
	for j := range p.order {
		select {
		case <-j.done:
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := p.emit(j.frame); err != nil {
			return err
		}
		p.tarSize += int64(len(j.tar))
		p.table = binary.LittleEndian.AppendUint64(p.table, uint64(p.tarSize))
		p.table = binary.LittleEndian.AppendUint64(p.table, uint64(p.size))
		p.table = append(p.table, j.digest[:]...)
		if len(p.table) > MaxIndexSize {
			return errIndexSize
		}
		p.free <- j
	}
	return nil
}

// emit writes the next bytes of the blob.
func (p *pipeline) emit(b []byte) error {
	n, err := p.w.Write(b)
	p.blob.Write(b[:n])
	p.size += int64(n)
	return err
}

package stream

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

const (
	// proofRate is the least speed of proofs, bytes of blobs per second, and localFactor how much faster what is here is read.
	proofRate   = 8 << 20
	localFactor = 8
	// tarFactor is how many bytes of a tar count as one of a blob, at least: zeros take hardly a blob, and time to hash.
	tarFactor = 8
	// proofStall is how long one chunk may take, and, while others wait, a layer may take proofSlice and a second for each sliceRate bytes that it claims to have, at most the turns-th part of a deadline, and
	// twice as long each time that it and all that wait for it were tried before: one that was not tried yet waits for no more than the first turn of another.
	proofStall = time.Minute
	proofSlice = 2 * time.Minute
	sliceRate  = 4 << 20
	turns      = 8
)

// cost is what reading a chunk counts, bytes of a blob.
func cost(c artifact.Chunk) int64 { return max(c.BlobSize, c.TarSize/tarFactor) }

// costOf is what reading all of x's chunks counts.
func costOf(x *artifact.Index) (n int64, err error) {
	err = mapped.Guard(func() {
		for i := range x.NumChunks() {
			n += cost(x.Chunk(i))
		}
	})
	return n, err
}

// sliceOf is how long a layer of so many bytes may take after n tries.
func sliceOf(deadline time.Duration, size int64, n int) time.Duration {
	claimed := min(size/sliceRate, int64(deadline/time.Second)) // in seconds: the claim may be any number
	return min(proofSlice+time.Duration(claimed)*time.Second, deadline/turns) << min(n, 3)
}

// rateOf is how fast an image is read of which so many bytes are left and images have left together, bytes of blobs per second: what others claim to have is not looked at.
func rateOf(left int64, images int, until, deadline time.Duration) float64 {
	share := max((until-deadline/turns)/time.Duration(max(images, 1)), time.Second)
	return max(proofRate, float64(left)/share.Seconds())
}

// pace is asked before the next n bytes of a blob are read, or those of what is here in their place. It may pause what is under way.
type pace func(ctx context.Context, pause func(), here bool, n int64) error

// proofPacer is the pace of a proof in the background.
type proofPacer struct {
	store *Store
	job   *job
	stall *time.Timer
	long  time.Duration // of stall
	from  time.Time

	due    time.Duration // since from: when as much may have been read
	paused time.Duration
}

// newProofPacer begins j, which cancel ends if nothing comes.
func (s *Store) newProofPacer(j *job, cancel context.CancelCauseFunc) *proofPacer {
	long := min(proofStall, s.deadline()/20) << min(j.attempt.n, 3)
	return &proofPacer{
		store: s, job: j, from: time.Now(), long: long, stall: time.AfterFunc(long, func() { cancel(fmt.Errorf("nothing came for %v", long)) }),
	}
}

// slice is how long the layer may take now; without those that wait for it, for as long as it likes.
func (p *proofPacer) slice() time.Duration {
	tries := p.job.waited()
	if tries < 0 {
		return math.MaxInt64
	}
	return sliceOf(p.store.deadline(), p.job.image.rec.Layers[p.job.layer].Size, min(p.job.attempt.n, tries))
}

func (p *proofPacer) wait(ctx context.Context, pause func(), here bool, n int64) error {
	s, j := p.store, p.job
	if s.forgotten(j.image) {
		return errForgotten
	}
	p.stall.Stop()
	defer p.stall.Reset(p.long)
	if time.Since(p.from)-p.paused > p.slice() {
		return errSlow
	}
	if j.urgent {
		return ctx.Err()
	}
	half := j.begun.Add(s.deadline() / 2)
	if quiet := s.o.StartQuiet / quietShare; time.Since(s.o.Cache.Waited()) < quiet && time.Now().Before(half) {
		pause()
		began := time.Now()
		short, cancel := context.WithDeadline(ctx, half)
		s.waitQuiet(short)
		cancel()
		p.paused += time.Since(began)
	}
	rate := rateOf(j.left, int(s.proofs.images.Load()), time.Until(j.deadline), s.deadline())
	if here {
		rate *= localFactor
	}
	p.due += time.Duration(float64(n) / rate * float64(time.Second))
	if wait := p.due + p.paused - time.Since(p.from); wait > 0 {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

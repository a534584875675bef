package stream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
)

// Every layer of an image that is in use is proven: its tar is hashed, as the artifact's index has it, and compared with the diffID of the image's own config, and the index's headers with the tar's own. That
// takes one reading of the layer, from the cache or through it, whatever the cache has and may keep. It is done in the background, in the order and at the pace of proofqueue.go. What was proven is remembered
// (package ledger), by the digests of tar and index.
//
// A difference counts when it was found twice: the second time with an index that was read anew, by archive/tar alone, in bytes that have their digests. So neither a disk nor a
// page of memory that is damaged, nor a mistake in one of the two ways, stops what runs: see derive. What remains is a lie: see quarantine.go.
//
// A layer that cannot be read, because its registry is away say, is tried again, and its image told of when its time is over.
const (
	mountedName = "mounted" // in the image's directory: when it was mounted first, RFC 3339

	// defaultDeadline is how long after its first mount an image is proven at the latest.
	defaultDeadline = time.Hour
	// provenAtOnce is how many layers of an image are proven side by side when a pull waits for it.
	provenAtOnce = 4
)

var (
	errSlow      = errors.New("the layer takes so long that others are proven first")
	errForgotten = errors.New("the image was removed")
)

// Trust is what a Store proves, and remembers of that.
type Trust struct {
	Ledger   *ledger.Ledger // nil: nothing is proven, and nothing in quarantine. Without a Mounter it is only read
	Deadline time.Duration  // of an image's proof, from its first mount on; 0 is an hour
	// OnProof is told of what was proven, was not in time, or was put into quarantine. It must not block. Nil is nobody.
	OnProof func(Proof)
}

// ProofKind is what happened.
type ProofKind string

const (
	Proven      ProofKind = "proven"      // a layer
	Overdue     ProofKind = "overdue"     // an image, once in each life of the daemon
	Quarantined ProofKind = "quarantined" // a layer's index, and with it each image that names it
)

// Proof is what OnProof is told.
type Proof struct {
	Kind     ProofKind
	ID       string // of the image: the hex of the artifact's digest
	Image    string // repository and manifest digest
	Config   digest.Digest
	Layer    int // of Proven and Quarantined
	Key      ledger.Key
	Bytes    int64              // of Proven: of the tar
	Err      error              // of Overdue: why the last try has failed, or nil
	Evidence *ledger.Quarantine // of Quarantined
}

// ProofStatus is how far the proofs are.
type ProofStatus struct {
	Waiting     int `json:"waiting"`     // layers in use that are not proven
	Overdue     int `json:"overdue"`     // of them, those whose time is over
	Proven      int `json:"proven"`      // layers, in all
	Quarantined int `json:"quarantined"` // indexes, in all
}

func (rec *record) key(layer int) ledger.Key {
	return ledger.Key{DiffID: rec.DiffIDs[layer], Index: rec.Layers[layer].IndexDigest}
}

func (s *Store) deadline() time.Duration { return cmp.Or(s.o.Trust.Deadline, defaultDeadline) }

// proves reports whether images are proven here: who mounts nothing only looks what a pull would find.
func (s *Store) proves() bool { return s.o.Trust.Ledger != nil && s.o.Mounter != nil }

// proven reports whether all layers of rec are, or need not be.
func (s *Store) proven(rec *record) bool {
	if s.o.Trust.Ledger == nil {
		return true
	}
	for i := range rec.Layers {
		if !s.o.Trust.Ledger.Proven(rec.key(i)) {
			return false
		}
	}
	return true
}

// Lied has a chunk of the layer of an index looked at before all others: cache.Options.OnLie.
func (s *Store) Lied(index digest.Digest, chunk int, _ error) {
	s.proofs.mu.Lock()
	s.proofs.urgent[index] = chunk
	s.proofs.mu.Unlock()
	s.wakeProver()
}

func (s *Store) wakeProver() {
	select {
	case s.proofs.kick <- struct{}{}:
	default: // it is told already
	}
}

func (s *Store) tell(p Proof, img *image) {
	p.ID, p.Image, p.Config = img.id, img.name(), img.rec.Config
	if s.o.Trust.OnProof != nil {
		s.o.Trust.OnProof(p)
	}
}

// name is the image as the log has it.
func (img *image) name() string { return string(img.rec.Repository) + "@" + img.rec.Manifest.String() }

// Proofs returns how far the proofs are.
func (s *Store) Proofs() (st ProofStatus) {
	if s.o.Trust.Ledger == nil {
		return st
	}
	now := time.Now()
	for _, j := range s.toProve(now) {
		st.Waiting++
		if !j.deadline.After(now) {
			st.Overdue++
		}
	}
	st.Proven, st.Quarantined = s.o.Trust.Ledger.Count()
	return st
}

// proveJob proves a layer, or a chunk of it that was seen to lie.
func (s *Store) proveJob(ctx context.Context, j *job) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	img := j.image
	p := s.newProofPacer(j, cancel)
	defer p.stall.Stop()
	img.mu.Lock()
	use, err := img.use(ctx)
	img.mu.Unlock()
	if err != nil {
		return err
	}
	defer use.Close()
	if j.left, err = s.left(use); err != nil {
		return err
	}
	if j.urgent {
		err = s.proveChunk(ctx, use, j.layer, j.chunk, p.wait)
	} else {
		err = s.proveLayer(ctx, use, j.layer, p.wait)
	}
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	return err
}

// left is what reading the layers of an image that are not proven counts.
func (s *Store) left(use *deviceUse) (left int64, err error) {
	for i, x := range use.indexes {
		if s.o.Trust.Ledger.Proven(use.image.rec.key(i)) {
			continue
		}
		n, err := costOf(x)
		if err != nil {
			return 0, err
		}
		left += n
	}
	return left, nil
}

// Prove proves the layers of image id that are not yet, side by side and as fast as they come, for a pull that waits for it. progress is told of bytes of blobs before they come. An error that is ErrQuarantined
// says that the artifact lies.
func (s *Store) Prove(ctx context.Context, id string, progress func(n int64)) error {
	img, use, err := s.use(ctx, id)
	if err != nil {
		return err
	}
	defer use.Close()
	rec := img.rec
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(provenAtOnce)
	for i := range rec.Layers {
		if s.o.Trust.Ledger.Proven(rec.key(i)) || slices.IndexFunc(use.digests, func(d digest.Digest) bool { return d == use.digests[i] }) < i {
			continue
		}
		g.Go(func() error {
			return s.proveLayer(gctx, use, i, func(ctx context.Context, _ func(), _ bool, n int64) error {
				progress(n)
				return ctx.Err()
			})
		})
	}
	return g.Wait()
}

// proveChunk looks at one chunk of layer i, whose bytes were seen to have their digest and other headers than the index, and puts the index into quarantine if they have: it contradicts itself then, whatever
// the rest of it says. Where the blob does not give the chunk, the layer is proven as a whole.
func (s *Store) proveChunk(ctx context.Context, use *deviceUse, i, chunk int, pace pace) (err error) {
	defer s.caught(use.image, i, &err)
	b := use.image.blob(i)
	x, err := s.openIndex(ctx, b) // read anew: it may be memory that is damaged
	if err != nil {
		return err
	}
	var lie error
	if fault := mapped.Guard(func() { // of the index
		if chunk >= x.NumChunks() {
			return
		}
		if err = pace(ctx, func() {}, false, cost(x.Chunk(chunk))); err != nil {
			return
		}
		var bytes []byte
		if bytes, err = use.layers[i].Chunk(ctx, x, b, chunk); err != nil {
			return
		}
		var layout *artifact.Layout
		if layout, err = x.Layout(); err == nil {
			lie = layout.Check(chunk, bytes)
		}
	}); fault != nil {
		err = fault
	}
	switch {
	case lie != nil:
		return s.quarantine(use.image, i, lie)
	case b.Gone(err), errors.Is(err, artifact.ErrInvalid):
		return s.proveLayer(ctx, use, i, pace)
	}
	return err
}

// proveLayer proves a layer, and remembers it. An error that is ErrQuarantined says that it is none of the image's, and was put into quarantine; with others nothing is known.
func (s *Store) proveLayer(ctx context.Context, use *deviceUse, i int, pace pace) (err error) {
	img := use.image
	defer s.caught(img, i, &err)
	rec := img.rec
	x := use.indexes[i]
	err = s.derive(ctx, use, i, x, false, pace)
	if errors.As(err, new(difference)) {
		s.log.Warn("a layer differs from what the image's config promises; it is looked at again", "image", img.name(), "layer", i, "difference", err)
		if x, err = s.openIndex(ctx, use.image.blob(i)); err == nil {
			err = s.derive(ctx, use, i, x, true, pace)
		}
	}
	if d := (difference{}); errors.As(err, &d) {
		return s.quarantine(img, i, d.error)
	}
	if err != nil {
		return fmt.Errorf("prove layer %d: %w", i, err)
	}
	p := ledger.Proof{Key: rec.key(i), At: time.Now(), Bytes: x.TarSize, Artifact: rec.Artifact, Manifest: rec.Manifest, Repository: string(rec.Repository)}
	if err := s.o.Trust.Ledger.Prove(p); err != nil {
		return err
	}
	s.log.Info("a layer is proven", "image", img.name(), "layer", i, "diffID", p.DiffID, "bytes", p.Bytes)
	s.tell(Proof{Kind: Proven, Layer: i, Key: p.Key, Bytes: p.Bytes}, img)
	s.wake()
	return nil
}

// caught is deferred, and makes a panic an error: what a proof reads is anybody's, and a mistake of ours must not end the daemon, again and again.
func (s *Store) caught(img *image, layer int, err *error) {
	if p := recover(); p != nil {
		s.log.Error("panic", "image", img.name(), "layer", layer, "value", p, "stack", string(debug.Stack()))
		*err = fmt.Errorf("prove layer %d: panic: %v", layer, p)
	}
}

// readChunk reads a chunk's n bytes, into buf if it has room.
func readChunk(r io.Reader, buf []byte, n int64) ([]byte, error) {
	if int64(cap(buf)) < n {
		buf = make([]byte, n)
	}
	_, err := io.ReadFull(r, buf[:n])
	return buf[:n], err
}

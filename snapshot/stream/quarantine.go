package stream

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
)

// An artifact whose index lies is in quarantine, and each image of it: the merged tree was made from that index, so that the data of the other layers under it means nothing either. What runs on it gets
// I/O errors for what it reads, what the kernel has cached of it is dropped, and it is detached from where it was mounted: what starts next has the image's own layers, see package snapshot. That holds over restarts, and for whatever
// artifact names the index later, until somebody clears it.

// ErrQuarantined says that an artifact is in quarantine. Reads, mounts and pulls of it fail with it.
var ErrQuarantined = errors.New("the streaming artifact is in quarantine: it is not what the image's config promises")

// refusal is why an image is not read.
type refusal struct {
	q     ledger.Quarantine
	image string
	layer int
}

func (r *refusal) Error() string {
	return fmt.Sprintf("%v: image %s, layer %d, artifact %s, since %s: %s. Delete its pods: new ones have the image's own layers. The artifact is not used any more. "+
		"`streamctl verify` proves what is in the registry; whoever may push to the repository may have attached it",
		ErrQuarantined, r.image, r.layer, r.q.Artifact, r.q.At.Format(time.RFC3339), r.q.Why)
}

func (r *refusal) Unwrap() error { return ErrQuarantined }

// refuse returns why an image of rec must not be used, or nil.
func (s *Store) refuse(rec *record) error {
	if r := s.refusalOf(rec); r != nil {
		return r
	}
	return nil
}

func (s *Store) refusalOf(rec *record) *refusal {
	if s.o.Trust.Ledger == nil {
		return nil
	}
	for i, l := range rec.Layers {
		if q, ok := s.o.Trust.Ledger.Quarantined(l.IndexDigest); ok {
			return &refusal{q, string(rec.Repository) + "@" + rec.Manifest.String(), i}
		}
	}
	return nil
}

// refused returns why img is not read, or nil.
func (img *image) refused() error {
	if r := img.bad.Load(); r != nil {
		return r
	}
	return nil
}

// newImage is the image of a record. The caller holds mu: whoever puts an index into quarantine after this looked at the ledger finds the image in the set.
func (s *Store) newImage(id string, rec *record) *image {
	img := &image{store: s, id: id, rec: rec, places: newPlaces(rec)}
	img.waits.Store(newWaits())
	img.bad.Store(s.refusalOf(rec))
	s.images[id] = img
	return img
}

// waits is what the reads of an image have in common.
type waits struct {
	ctx context.Context
	end context.CancelFunc
}

func newWaits() *waits {
	w := &waits{}
	w.ctx, w.end = context.WithCancel(context.Background())
	return w
}

// until returns a context that ends when img is put into quarantine, too. Who is to read nothing of such an image asks refused after it, not before.
func (img *image) until(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(img.waits.Load().ctx, cancel)
	return ctx, func() {
		stop()
		cancel()
	}
}

// judge has img be what the ledger says of it now. If it is none that is to be read, what waits for it does so no more. An image whose quarantine the ledger has refused gets it as otherwise.
func (s *Store) judge(img *image, otherwise *refusal) *refusal {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.refusalOf(img.rec)
	if r == nil {
		r = otherwise
	}
	img.bad.Store(r)
	if r != nil {
		img.waits.Swap(newWaits()).end()
	}
	return r
}

// Usable says why image id must not be used for another pull, or nil. It asks nobody.
func (s *Store) Usable(id string) error {
	img, err := s.load(id)
	if err != nil {
		return err
	}
	if err := img.refused(); err != nil {
		return err
	}
	return s.trusted(img)
}

// quarantine puts the index of layer i of img into quarantine; why is the difference. Its error is ErrQuarantined.
func (s *Store) quarantine(img *image, i int, why error) error {
	rec := img.rec
	q := ledger.Quarantine{
		Key: rec.key(i), At: time.Now(), Artifact: rec.Artifact, Manifest: rec.Manifest, Repository: string(rec.Repository), Converter: rec.Converter, Why: why.Error(),
		Signer: s.Signature(img.id, rec.Repository).Signer,
	}
	var otherwise *refusal
	if err := s.o.Trust.Ledger.Quarantine(q); err != nil {
		s.log.Error("a quarantine counts in memory alone for now", "error", err)
		otherwise = &refusal{q, img.name(), i}
	}
	images := s.withIndex(q.Index)
	refusals := make([]*refusal, len(images))
	for k, other := range images { // all of them before anything that takes its time
		refusals[k] = s.judge(other, otherwise)
	}
	var all sync.WaitGroup
	for k, other := range images {
		r := refusals[k]
		if r == nil {
			continue // somebody has cleared it meanwhile
		}
		all.Go(func() {
			s.log.Error("a streaming artifact is in quarantine", "image", other.name(), "artifact", rec.Artifact, "signer", q.Signer, "converter", rec.Converter, "layer", r.layer, "difference", why)
			s.detach(other)
			s.tell(Proof{Kind: Quarantined, Layer: r.layer, Key: q.Key, Evidence: &q}, other)
		})
	}
	all.Wait()
	return &refusal{q, img.name(), i}
}

// withIndex loads the images on disk that name an index.
func (s *Store) withIndex(index digest.Digest) (list []*image) {
	for _, img := range s.onDisk() {
		if slices.ContainsFunc(img.rec.Layers, func(l artifact.Layer) bool { return l.IndexDigest == index }) {
			list = append(list, img)
		}
	}
	return list
}

// detach has the kernel forget what it has of an image in quarantine, and unmounts it, so that the next container finds nothing there. What uses it goes on, and gets errors.
func (s *Store) detach(img *image) {
	img.mu.Lock() // a mount that began before is there now, or failed
	targets := s.o.Mounter.Targets(img.id)
	s.mu.Lock()
	for target, other := range s.targets {
		if other == img && !slices.Contains(targets, target) {
			targets = append(targets, target)
		}
	}
	s.mu.Unlock()
	img.mu.Unlock()
	if err := s.o.Mounter.Invalidate(img.id); err != nil {
		s.log.Error("the kernel may have data of an artifact in quarantine in its cache: delete the pods of the image", "image", img.name(), "error", err)
	}
	for _, target := range targets {
		if err := s.Unmount(target); err != nil && !errors.Is(err, unix.EBUSY) {
			s.log.Error("an image in quarantine is mounted still", "image", img.name(), "mount", target, "error", err)
		}
	}
}

// ClearQuarantine ends the quarantine of an index, which is then proven anew; fs.ErrNotExist if there is none. Images of it are mounted again when a container starts.
func (s *Store) ClearQuarantine(index digest.Digest) error {
	if err := s.o.Trust.Ledger.Clear(index); err != nil {
		return err
	}
	for _, img := range s.withIndex(index) {
		s.judge(img, nil)
	}
	s.log.Warn("a quarantine was ended by hand", "index", index)
	s.wakeProver()
	return nil
}

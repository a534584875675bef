// Package stream holds the images that this node streams: it finds an image's artifact in the registry, keeps what a mount
// needs (manifests' facts, indexes, metadata images) on disk, and mounts chains of its layers.
//
// What was found once needs the registry no more but for chunks: images are loaded and mounted without network after a
// restart. Indexes are verified against the artifact's manifest whenever they are opened, and fetched again if damaged. It
// does not decide which snapshot is streamed (package snapshot does) and verifies no chunk (package fs/cache does).
//
// An image's profile, if there is one, is found beside its artifact, and its hot blob is brought into the cache meanwhile: see hot.go and hotblob.go.
//
// On disk, below Options.Root:
//
//	images/<hex of the artifact manifest's digest>/
//	    image.json         record: where the image came from, its chain IDs, the artifact's layers
//	    trust.json         verdicts on the artifact's signatures, with the envelopes, see trust.go
//	    first-use.json     record of the image's first start on this node (.part: in the making), see firstuse.go: a profile in its JSON form
//	    completed          all of the image was fetched, see complete.go
//	    mounted            when the image was mounted first, from when its proof is due, see proof.go
//	    direct.erofs       metadata image of the whole chain for the cache's files, see direct.go
//	    <n>.erofs          metadata image of the chain of the first n layers: of the whole chain made when the image is
//	                       found, so that what cannot be mounted falls back, of others when they are first mounted
//	indexes/<hex of the index's digest>
//	                       the index's skippable frame as it lies in the blob
//
// An index is named by what it is, not by the blob that it was in: what the bytes of a blob are is not known before all of it was read, and an
// artifact that names another's blob, with an index of its own, must not take the other's place. The cache has its layers under the same name.
//
// Records of older releases are read; one of a newer release stays, with all indexes, because it may name them. Indexes and metadata images
// prove themselves, and are made anew if they do not. A release that makes other metadata images of the same layers gives them other names.
package stream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// Registry is where artifacts are looked for and read from. *registryclient.Client is one.
type Registry interface {
	// Referrers lists the referrers of subject of some artifact types; none is no error.
	Referrers(ctx context.Context, repo registryclient.Repository, subject digest.Digest, artifactTypes ...string) ([]ocispec.Descriptor, error)
	// Manifest and Blob return verified bytes, at most max of them.
	Manifest(ctx context.Context, repo registryclient.Repository, dgst digest.Digest, max int64) ([]byte, error)
	Blob(ctx context.Context, repo registryclient.Repository, dgst digest.Digest, max int64) ([]byte, error)
	// ReadRange returns n unverified bytes at off of a blob; a higher try turns to another host.
	ReadRange(ctx context.Context, repo registryclient.Repository, dgst digest.Digest, off, n int64, try int) (io.ReadCloser, error)
}

// Files are written under a name of their own with this at its end.
const (
	tmpInfix  = ".tmp"
	tmpSuffix = tmpInfix + "*"
)

// Options of a Store.
type Options struct {
	Root     string // directory; created
	Registry Registry
	Cache    *cache.Cache
	Mounter  Mounter
	// Allow says why images of a repository may not be streamed; nil if they may. Nil allows all.
	Allow func(repo registryclient.Repository) error
	// Policy is what an image of a repository must satisfy, to be taken and as long as it is here, and, if that is trust.Signed, what checks signatures: trust.Rules.Kept. Whether a
	// repository is off is Allow's to say. Nil is trust.Open for all.
	Policy func(repo registryclient.Repository) (trust.Policy, trust.Verifier)
	// Timeout bounds a search for an artifact, so that a pull never waits long for what may not be there. 0 is 15 s.
	Timeout time.Duration
	// PullWait bounds a search with the proof of what it has found, if the policy wants that before an image is used: the pull is a normal one then, and what was fetched is dropped. Less than Timeout
	// is that. 0 is 50 s.
	PullWait time.Duration
	// RetryAfter is how long a failed search stands, so that the layers of one normal pull do not ask again. One that took long stands for
	// longer. 0 is 10 s.
	RetryAfter time.Duration
	// StartQuiet is how long nothing new of an image is used once its container's start is over. 0 is 30 s.
	StartQuiet time.Duration
	// Background is how much of what no container has asked for is fetched when its start is over, bytes per second. 0 is nothing.
	Background int64
	// NoReadAhead: the kernel reads nothing before a container does, so that a record of what was read has nothing else.
	NoReadAhead bool
	// Trust is what is proven of the images.
	Trust Trust
	// Elsewhere lists repositories that hold an image with one of these chains of layers, when none that is known gives a blob. Nil knows none.
	Elsewhere func(ctx context.Context, chainIDs []digest.Digest) ([]registryclient.Repository, error)
	// OnForget is called after an image was forgotten. Nil is nobody.
	OnForget func()
	Log      *slog.Logger // nil is slog.Default()
}

// Store is the set of images. It is safe for concurrent use.
type Store struct {
	OnStart func(Start) // see there; it must not block. Nil is nobody. Set before the first mount
	o       Options
	log     *slog.Logger
	closing chan struct{} // closed by EndSearches

	started    chan struct{} // gets a value when an image's first start is over, or one is mounted: complete looks what there is to do
	completing atomic.Pointer[image]
	quit       context.CancelFunc // of complete, prove and vetAgain
	proofs     *proofs

	// LOCK ORDER: vouching before mu.
	vouching sync.Mutex // held while verdicts are written

	mu       sync.Mutex
	closed   bool
	searches map[searchKey]*search
	images   map[string]*image // by ID
	targets  map[string]*image // mounted, by target
	pins     map[string]int    // indexes that a search is about to need, by file name
	hots     map[*hotFetch]bool

	running sync.WaitGroup      // searches, fetches of hot blobs, records of first starts, the completion of images
	merges  *semaphore.Weighted // bytes of headers of the images whose trees are being made
}

// New creates the directories and returns the Store.
func New(o Options) (*Store, error) {
	if o.Timeout == 0 {
		o.Timeout = 15 * time.Second
	}
	if o.PullWait == 0 {
		o.PullWait = 50 * time.Second
	}
	if o.RetryAfter == 0 {
		o.RetryAfter = 10 * time.Second
	}
	if o.StartQuiet == 0 {
		o.StartQuiet = firstUseQuiet
	}
	for _, d := range []string{"images", "indexes"} {
		if err := os.MkdirAll(filepath.Join(o.Root, d), 0o700); err != nil {
			return nil, err
		}
	}
	s := &Store{
		o: o, log: cmp.Or(o.Log, slog.Default()), closing: make(chan struct{}), started: make(chan struct{}, 1),
		searches: map[searchKey]*search{}, images: map[string]*image{}, targets: map[string]*image{}, pins: map[string]int{}, hots: map[*hotFetch]bool{},
		merges: semaphore.NewWeighted(mergeHeaders),
		proofs: newProofs(),
	}
	if err := s.sweep(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.quit = cancel
	if o.Background > 0 {
		s.running.Go(func() { s.complete(ctx) })
	}
	if s.proves() {
		s.running.Go(func() { s.prove(ctx) })
	}
	if o.Policy != nil && o.Mounter != nil {
		s.running.Go(func() { s.vetAgain(ctx) })
	}
	return s, nil
}

// EndSearches fails all calls of Find, those to come too, and ends what goes on after them.
func (s *Store) EndSearches() {
	s.mu.Lock()
	if !s.closed {
		close(s.closing)
		s.quit()
	}
	s.closed = true
	for _, q := range s.searches {
		q.cancel()
	}
	for h := range s.hots {
		h.cancel()
	}
	s.mu.Unlock()
	s.running.Wait()
}

// Mounted reports whether an image is mounted at target and served, be it mounted in an earlier life of the daemon.
func (s *Store) Mounted(target string) bool { return s.o.Mounter.Mounted(target) }

// Close ends all searches and unmounts everything that was mounted in this life. That is done at once, because what is in use takes its time, see Unmount, and a node
// may have a hundred images in use.
func (s *Store) Close() error {
	s.EndSearches()
	s.mu.Lock()
	targets := slices.Collect(maps.Keys(s.targets))
	s.mu.Unlock()
	errs := make([]error, len(targets))
	var all sync.WaitGroup
	for i, target := range targets {
		all.Go(func() { errs[i] = s.Unmount(target) })
	}
	all.Wait()
	return errors.Join(errs...)
}

// Find looks for the artifact of the image that ref names and whose platform manifest is manifest. The error is a
// *reason.Error unless ctx ended: a normal pull is the answer. A success stands as long as the image is in use, a failure for seconds.
//
// The id names the artifact on this node; chainIDs are those of the image's own config, bottom first. An id beside an error is of an artifact that was kept to be proven, and is not: it may be forgotten.
func (s *Store) Find(ctx context.Context, ref string, manifest digest.Digest) (id string, chainIDs []digest.Digest, err error) {
	img, err := s.find(ctx, ref, manifest)
	switch {
	case img == nil:
		return "", nil, err
	case err != nil:
		return img.id, nil, err
	}
	return img.id, img.rec.ChainIDs, nil
}

func (s *Store) find(ctx context.Context, ref string, manifest digest.Digest) (*image, error) {
	repo, _, _, err := registryclient.ParseReference(ref)
	if err != nil {
		return nil, reason.New(reason.NoLabels, err)
	}
	if s.o.Allow != nil {
		if err := s.o.Allow(repo); err != nil {
			return nil, reason.New(reason.NotListed, err)
		}
	}
	for {
		key := searchKey{repo, manifest}
		q, mine, err := s.join(ctx, key)
		if err != nil {
			return nil, err
		}
		select {
		case <-q.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		stands := mine || q.err != nil || s.standing(repo, q.image)
		s.mu.Lock()
		if !stands && s.searches[key] == q {
			delete(s.searches, key)
		}
		stale := !stands || s.stale(q) // its image was forgotten just now
		s.mu.Unlock()
		if q.err != nil || !stale {
			return q.image, q.err
		}
	}
}

// add puts a record on disk and in the set. An image that is there already, maybe from a former life, stays as it is: its ID names its bytes.
func (s *Store) add(rec *record) (img *image, isNew bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := rec.Artifact.Encoded()
	if img := s.images[id]; img != nil {
		return img, false, nil
	}
	if old, err := loadRecord(s.imageDir(id)); err == nil {
		rec = old
	} else if err := rec.save(s.imageDir(id)); err != nil {
		return nil, false, errors.Join(err, os.RemoveAll(s.imageDir(id)))
	} else {
		isNew = true
	}
	return s.newImage(id, rec), isNew, nil
}

// drop undoes add for an image that turned out not to be mountable.
func (s *Store) drop(img *image) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endHots(img)
	delete(s.images, img.id)
	return os.RemoveAll(s.imageDir(img.id))
}

// Mount mounts the chain of the first n layers of image id read-only at target, a directory. It works for images found in an
// earlier life of the daemon as well, and asks the registry for nothing, unless a layer maps file data in a way that extents
// cannot express, or an index on disk is damaged.
func (s *Store) Mount(ctx context.Context, id string, n int, target string) error {
	img, err := s.load(id)
	if err != nil {
		return err
	}
	if err := s.lacks(ctx, img); err != nil { // what Vet has proven, or the files of the policy have changed since
		return fmt.Errorf("streamed image %s of %s is not trusted (any more): %w", img.id, img.rec.Repository, err)
	}
	return img.mount(ctx, n, target)
}

func (s *Store) load(id string) (*image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if img := s.images[id]; img != nil {
		return img, nil
	}
	rec, err := loadRecord(s.imageDir(id))
	if err != nil {
		return nil, fmt.Errorf("load streamed image %s, which must be pulled again if that stays: %w", id, err)
	}
	return s.newImage(id, rec), nil
}

// Forget drops an image that nothing uses any more, and the indexes and cached chunks of layers that only it used.
func (s *Store) Forget(id string) error {
	if s.o.OnForget != nil {
		defer s.o.OnForget()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endHots(s.images[id])
	delete(s.images, id)
	if err := os.RemoveAll(s.imageDir(id)); err != nil {
		return err
	}
	return s.sweepIndexes()
}

// Retain forgets all images on disk but those that are used, and old proofs of what none of these names.
func (s *Store) Retain(used func(id string) bool) error {
	dirs, err := os.ReadDir(filepath.Join(s.o.Root, "images"))
	if err != nil {
		return err
	}
	for _, d := range dirs {
		if !used(d.Name()) {
			err = errors.Join(err, s.Forget(d.Name()))
		}
	}
	return errors.Join(err, s.retainProofs())
}

func (s *Store) imageDir(id string) string { return filepath.Join(s.o.Root, "images", id) }

func (s *Store) indexPath(index digest.Digest) string { return indexPath(s.o.Root, index) }

// sweep removes what a killed daemon left half made. A record that cannot be read stays, as long as snapshots need it: it may be
// that of a newer release, which comes back.
func (s *Store) sweep() error {
	dirs, err := os.ReadDir(filepath.Join(s.o.Root, "images"))
	if err != nil {
		return err
	}
	for _, d := range dirs {
		dir := s.imageDir(d.Name())
		if _, err := loadRecord(dir); errors.Is(err, os.ErrNotExist) {
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
			continue
		}
		os.Rename(filepath.Join(dir, firstUsePart), filepath.Join(dir, firstUseName)) // if it is there
		tmp, _ := filepath.Glob(filepath.Join(dir, "*"+tmpSuffix))
		for _, t := range tmp {
			os.Remove(t)
		}
	}
	return s.sweepIndexes()
}

package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
)

// What an image's container has not read at its start is fetched afterwards, so that the node needs the registry no more for it: image by image, layer by layer,
// with a bandwidth of its own, and only while no container waits for the registry. An image is done once; what the cache gives back later is not fetched again.
// What is here is then proven, see direct.go.
const (
	completedName = "completed" // in the image's directory: it is done

	// quietShare is the part of Options.StartQuiet, about 2 s, in which no read may have waited.
	quietShare = 16
	// completeRetry is the pause after an image could not be completed: the registry is away, or the cache full.
	completeRetry = 10 * time.Minute
	// completeWait is how long one request may wait for its answer: while one image's registry is away, the next image is completed.
	completeWait = 5 * time.Second
	// paceBurst is how much comes at once before the bandwidth is kept, bytes.
	paceBurst = 64 << 10
)

// errBusy ends a request for what nobody needs yet: somebody waits for what is needed.
var errBusy = errors.New("containers read from the registry")

// Background is how far the fetching of what no container has asked for is.
type Background struct {
	Image string `json:"image"` // repository and manifest digest
	Done  int64  `json:"done"`  // bytes of the tars of all its layers that are here
	Total int64  `json:"total"`
}

// Background returns the image that is being completed, or nil.
func (s *Store) Background() *Background {
	img := s.completing.Load()
	if img == nil {
		return nil
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	if img.dev == nil {
		return nil
	}
	b := &Background{Image: string(img.rec.Repository) + "@" + img.rec.Manifest.String()}
	for i, l := range img.dev.layers {
		b.Done += l.Present()
		b.Total += img.dev.indexes[i].TarSize
	}
	return b
}

// complete completes the images whose first start is over, until ctx ends.
func (s *Store) complete(ctx context.Context) {
	for {
		var again <-chan time.Time
		for _, id := range s.incomplete() {
			err := s.completeImage(ctx, id)
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				s.log.Info("the rest of an image is not fetched for now", "image", id, "error", err)
				again = time.After(completeRetry)
			}
		}
		select {
		case <-s.started:
		case <-again:
		case <-ctx.Done():
			return
		}
	}
}

// wake has the background look what there is to do.
func (s *Store) wake() {
	select {
	case s.started <- struct{}{}:
	default: // it is told already
	}
	s.wakeProver()
}

// incomplete lists the images that were started and are not completed, or are mounted through the daemon, which may not be needed, or from files that are not proven.
// A daemon that was killed early in a first start has left no record of it.
func (s *Store) incomplete() (ids []string) {
	dirs, _ := os.ReadDir(filepath.Join(s.o.Root, "images"))
	for _, d := range dirs {
		if img, err := s.load(d.Name()); err != nil || !s.proven(img.rec) || img.refused() != nil {
			continue // its proof comes first, and leaves here what it has read
		}
		has := func(name string) bool {
			_, err := os.Stat(filepath.Join(s.imageDir(d.Name()), name))
			return err == nil
		}
		recorded, through := has(firstUseName), len(s.through(d.Name())) > 0
		if recorded && (through || s.unproven(d.Name())) || !has(completedName) && (recorded || through && !s.recordsFirstUses(d.Name())) {
			ids = append(ids, d.Name())
		}
	}
	return ids
}

// use returns image id, and holds its device for as long as the caller needs it.
func (s *Store) use(ctx context.Context, id string) (*image, *deviceUse, error) {
	img, err := s.load(id)
	if err != nil {
		return nil, nil, err
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	use, err := img.use(ctx)
	return img, use, err
}

func (s *Store) completeImage(ctx context.Context, id string) error {
	img, use, err := s.use(ctx, id)
	if err != nil {
		return err
	}
	defer use.Close()
	if _, err := os.Stat(filepath.Join(s.imageDir(id), completedName)); err != nil {
		if err := s.fetchRest(ctx, img, use); err != nil {
			return err
		}
	}
	return s.makeDirect(ctx, img, use)
}

// fetchRest fetches what is missing of img.
func (s *Store) fetchRest(ctx context.Context, img *image, use *deviceUse) (err error) {
	s.completing.Store(img)
	defer s.completing.Store(nil)
	for i, l := range use.layers {
		if slices.Contains(use.digests[:i], use.digests[i]) {
			continue
		}
		for {
			if err := s.waitQuiet(ctx); err != nil {
				return err
			}
			if s.forgotten(img) {
				return nil
			}
			src := pacedBlob{img.blob(i), s, img}
			if err = l.Complete(ctx, src); err == nil {
				break
			}
			if !errors.Is(err, errBusy) && !errors.Is(err, cache.ErrLeft) {
				return err
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.images[img.id] != img {
		return nil
	}
	// A crash that loses it costs a look.
	return os.WriteFile(filepath.Join(s.imageDir(img.id), completedName), nil, 0o600)
}

func (s *Store) forgotten(img *image) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.images[img.id] != img
}

// waitQuiet waits until no read has waited for a while.
func (s *Store) waitQuiet(ctx context.Context) error {
	quiet := s.o.StartQuiet / quietShare
	for wait := quiet; wait > 0; wait = quiet - time.Since(s.o.Cache.Waited()) {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// pacedBlob reads a layer blob with the bandwidth that there is for what nobody waits for, as long as nobody waits for something else.
type pacedBlob struct {
	cache.Blob
	store *Store
	image *image
}

func (b pacedBlob) ReadRange(ctx context.Context, off, n int64, try int) (io.ReadCloser, error) {
	asked := time.Now()
	ctx, cancel := context.WithCancel(ctx)
	late := time.AfterFunc(completeWait, cancel)
	body, err := b.Blob.ReadRange(ctx, off, n, try)
	if !late.Stop() && err != nil {
		err = fmt.Errorf("no answer from the registry in %v: %w", completeWait, err)
	}
	if err != nil {
		cancel()
		return nil, err
	}
	return &pacedBody{ReadCloser: body, ctx: ctx, cancel: cancel, pacer: pacer{store: b.store, image: b.image, asked: asked, begun: time.Now()}}, nil
}

type pacedBody struct {
	io.ReadCloser
	ctx    context.Context // of the request: io.Reader has no place for it
	cancel context.CancelFunc
	pacer  pacer
}

func (r *pacedBody) Read(p []byte) (int, error) {
	if err := r.pacer.wait(r.ctx); err != nil {
		return 0, err
	}
	n, err := r.ReadCloser.Read(p[:min(len(p), paceBurst)])
	r.pacer.read += int64(n)
	return n, err
}

// Wrong passes on what fs/cache.Blob's readers are told.
func (r *pacedBody) Wrong(off, n int64) { tellWrong(r.ReadCloser, off, n) }

// Close ends the request.
func (r *pacedBody) Close() error {
	defer r.cancel()
	return r.ReadCloser.Close()
}

// pacer keeps to the bandwidth of what nobody waits for.
type pacer struct {
	store *Store
	image *image
	asked time.Time
	begun time.Time // to come
	read  int64
}

// wait waits until more may be read. It returns errBusy once a read has waited since it was asked for, or the image was forgotten.
func (p *pacer) wait(ctx context.Context) error {
	s := p.store
	due := time.Duration(float64(max(p.read-paceBurst, 0)) / float64(s.o.Background) * float64(time.Second))
	if wait := due - time.Since(p.begun); wait > 0 {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if s.o.Cache.Waited().After(p.asked) || s.forgotten(p.image) {
		return errBusy
	}
	return nil
}

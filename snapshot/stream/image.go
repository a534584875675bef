package stream

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/tree"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/span"
)

// blockSize is that of metadata images, bytes: tar aligns file bodies to 512.
const blockSize = 512

// Mounter mounts metadata images. *fs.Server is one.
type Mounter interface {
	Mount(ctx context.Context, img fs.Image, target string) error
	Unmount(target string) error
	Mounted(target string) bool
	// Started says that a first container of the image with this metadata image, by its path, has started.
	Started(metadata string)
	// At lists where a metadata image, by its path, is mounted; Replace puts a direct mount in the place of such a one.
	At(metadata string) []string
	Replace(img fs.Image, target string) (gone <-chan struct{}, err error)
	// ReadAhead has the kernel read what is mounted at target.
	ReadAhead(target string, ranges []fs.Range) error
	// Targets lists where image id is mounted, in whatever way; Invalidate has the kernel forget what it has read of its files there.
	Targets(id string) []string
	Invalidate(id string) error
}

// image is an image that can be streamed.
type image struct {
	store *Store
	id    string
	rec   *record
	size  atomic.Int64 // of its tars, for the status; 0 if nobody has asked
	bad   atomic.Pointer[refusal]
	waits atomic.Pointer[waits] // for registries, that end when the image is put into quarantine

	places *places // where it is read

	profile atomic.Pointer[ocispec.Descriptor] // whose hot blob came, or comes
	vetted  atomic.Pointer[[]*vetted]          // nil: not read yet
	doubt   atomic.Pointer[doubt]              // the last one

	// Guarded by store.proofs.mu:
	mounted time.Time // first, as far as is known; zero is never
	written bool      // that is on disk
	writeAt time.Time // when to write it, once more

	// mu is held while the image is opened and closed and its metadata images are made. LOCK ORDER: mu before store.mu.
	mu     sync.Mutex
	mounts int         // targets mounted, and other uses
	dev    *device     // open while mounts > 0
	made   os.FileInfo // of the metadata image of the whole chain, from prepare to its first mount
	proven bool        // all that is on disk was verified, in this life
	hot    *ahead      // what the next container's start will read, see warm; nil is nothing
}

func (img *image) mount(ctx context.Context, n int, target string) (err error) {
	ctx, end := span.Start(ctx, "mount")
	defer func() { end(err) }()
	began := time.Now()
	if n < 1 || n > len(img.rec.Layers) {
		return fmt.Errorf("mount %s: no chain of %d layers in an image of %d", target, n, len(img.rec.Layers))
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	if err := img.refused(); err != nil {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	meta, err := img.metadata(ctx, n)
	if refused := img.refused(); refused != nil { // again, under mu: see detach
		err = refused
	}
	if err == nil {
		i := fs.Image{ID: img.id, Metadata: meta, Device: img.dev, Started: img.started()}
		if n == len(img.rec.Layers) {
			i.Direct = img.direct()
		}
		err = img.store.o.Mounter.Mount(ctx, i, target)
		if i.Direct == nil {
			img.store.wake() // in the background it may become one that could be
		}
	}
	if err != nil {
		img.release()
		return fmt.Errorf("mount %s: %w", target, err)
	}
	img.mounts++
	img.store.noteMounted(img)
	img.store.mu.Lock()
	img.store.targets[target] = img
	img.store.mu.Unlock()
	if n == len(img.rec.Layers) { // a container's, and not a build's
		if a := img.hot; a != nil {
			img.hot = nil
			img.readAhead(target, a)
		}
		img.store.recordFirstUses(img, began)
	}
	return nil
}

// prepare makes the metadata image of the whole chain, the one that containers of the image mount, and returns a use of the image.
func (img *image) prepare(ctx context.Context) (use *deviceUse, err error) {
	ctx, end := span.Start(ctx, "tree")
	defer func() { end(err) }()
	img.mu.Lock()
	defer img.mu.Unlock()
	img.made = nil
	path, err := img.metadata(ctx, len(img.rec.Layers))
	if err != nil {
		img.release()
		return nil, err
	}
	if img.made, err = os.Stat(path); err != nil {
		img.made = nil // it will be looked at
	}
	return img.use(ctx)
}

// Unmount undoes Mount. A target that is not mounted is no error. EBUSY says that nothing is mounted at target any more, but somebody
// still uses what was.
func (s *Store) Unmount(target string) error {
	err := s.o.Mounter.Unmount(target)
	busy := errors.Is(err, unix.EBUSY)
	s.mu.Lock()
	img := s.targets[target]
	s.mu.Unlock()
	if err != nil && !busy || img == nil {
		return err
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	s.mu.Lock()
	mine := s.targets[target] == img
	if mine {
		delete(s.targets, target)
	}
	s.mu.Unlock()
	// In use, the device is read on, by later mounts of this image too: it stays open as long as the process lives.
	if mine && !busy {
		img.mounts--
		img.release()
	}
	return err
}

// Device opens the data device of image id for mounts of a former life of the daemon. It is an io.Closer, and open until closed. It asks the
// registry for nothing, unless an index on disk is damaged.
func (s *Store) Device(ctx context.Context, id string) (fs.Device, error) {
	img, err := s.load(id)
	if err != nil {
		return nil, err
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	use, err := img.use(ctx)
	if err != nil {
		return nil, err
	}
	return use, nil
}

// ensureOpen opens the data device if it is not open. The caller holds mu, and calls release in the end.
func (img *image) ensureOpen(ctx context.Context) (err error) {
	if img.dev == nil {
		if img.dev, err = img.open(ctx); err != nil {
			return fmt.Errorf("open streamed image %s: %w", img.id, err)
		}
	}
	return nil
}

// use opens the data device until the use is closed. The caller holds mu.
func (img *image) use(ctx context.Context) (*deviceUse, error) {
	if err := img.ensureOpen(ctx); err != nil {
		return nil, err
	}
	img.mounts++
	return &deviceUse{img.dev, img}, nil
}

// deviceUse is a use of an image's data device other than by a mount of this life.
type deviceUse struct {
	*device
	image *image
}

func (u *deviceUse) Close() error {
	u.image.mu.Lock()
	defer u.image.mu.Unlock()
	u.image.mounts--
	u.image.release()
	return nil
}

// release closes the data device if nothing is mounted. The caller holds mu.
func (img *image) release() {
	if img.mounts == 0 && img.dev != nil {
		img.dev.close()
		img.dev = nil
	}
}

func (img *image) open(ctx context.Context) (_ *device, err error) {
	ctx, done := img.until(ctx)
	defer done()
	d := &device{image: img}
	defer func() {
		if err != nil {
			d.close()
		}
	}()
	headers := int64(0)
	for i, l := range img.rec.Layers {
		x, err := img.store.openIndex(ctx, img.blob(i))
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
		if headers += x.HeadersSize; headers > artifact.MaxImageHeaders {
			return nil, fmt.Errorf("layer %d: %w: the headers up to here have more than %d MiB", i, artifact.ErrUnsupported, artifact.MaxImageHeaders>>20)
		}
		d.indexes, d.digests = append(d.indexes, x), append(d.digests, l.IndexDigest)
		cl, err := img.store.o.Cache.Layer(l.IndexDigest, x, img.blob(i))
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
		d.layers = append(d.layers, cl)
		d.bases = append(d.bases, d.size)
		d.size += (x.TarSize + blockSize - 1) / blockSize * blockSize
	}
	return d, nil
}

// metadata opens the data device and returns the path of the metadata image of the first n layers, which it makes if it is not
// there or damaged. The caller holds mu, and calls release in the end.
func (img *image) metadata(ctx context.Context, n int) (string, error) {
	if err := img.ensureOpen(ctx); err != nil {
		return "", err
	}
	path := img.metadataPath(n)
	if n == len(img.rec.Layers) && img.justMade(path) {
		return path, nil
	}
	return path, img.makeMetadata(ctx, img.dev, path, n, nil)
}

// justMade reports, once, whether the metadata image at path is the one that this process has made or verified at the pull: to read it again for the mount that follows takes that 20 ms for
// 27,000 files. The caller holds mu.
func (img *image) justMade(path string) bool {
	made := img.made
	img.made = nil
	now, err := os.Stat(path)
	return err == nil && made != nil && os.SameFile(made, now) && made.Size() == now.Size() && made.ModTime().Equal(now.ModTime())
}

func (img *image) metadataPath(n int) string {
	return filepath.Join(img.store.imageDir(img.id), fmt.Sprintf("%d.erofs", n))
}

// makeMetadata makes the metadata image of the first n layers of dev at path, unless a good one is there. Parts are those of erofs.Options.
func (img *image) makeMetadata(ctx context.Context, dev *device, path string, n int, parts []int64) error {
	if verifyMetadata(path) == nil {
		return nil
	}
	ctx, done := img.until(ctx)
	defer done()
	weight := int64(0)
	for _, x := range dev.indexes[:n] {
		weight += x.HeadersSize
	}
	if err := img.store.merges.Acquire(ctx, weight); err != nil {
		return err
	}
	defer img.store.merges.Release(weight)
	layers := make([]tree.Layer, n)
	for i := range layers {
		layers[i] = tree.Layer{Index: dev.indexes[i], Base: dev.bases[i], ReadAt: dev.layers[i].ReadAt}
	}
	var root *erofs.Inode
	var err error
	if fault := mapped.Guard(func() { root, err = tree.Merge(ctx, layers, blockSize) }); fault != nil { // of an index
		err = fault
	}
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+tmpSuffix)
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<20)
	if err := erofs.Write(w, root, erofs.Options{BlockSize: blockSize, DeviceSize: dev.size, Parts: parts}); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	// Not synced: what a power loss leaves is verified before it is mounted, and made again.
	return os.Rename(f.Name(), path)
}

// device is an image's data device over the cache: the layers' tars end to end, each at a 512-aligned base, zeros between.
type device struct {
	image   *image
	indexes []*artifact.Index
	digests []digest.Digest // of indexes
	layers  []*cache.Layer
	bases   []int64
	size    int64

	uses atomic.Pointer[firstUses] // nil but while they are recorded
}

func (d *device) Size() int64 { return d.size }

// ReadAt has no bytes of an image in quarantine, be it put there meanwhile: then it waits no longer.
func (d *device) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	ctx, done := d.image.until(ctx)
	defer done()
	n, err := 0, d.image.refused()
	if err == nil {
		n, err = d.read(ctx, p, off)
	}
	if refused := d.image.refused(); refused != nil {
		return 0, refused
	}
	return n, err
}

func (d *device) read(ctx context.Context, p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) && off < d.size {
		i := sort.Search(len(d.bases), func(i int) bool { return d.bases[i] > off }) - 1
		// Empty tars share their base with the next layer: the search finds the last of them, which is not empty.
		end := d.size
		if i+1 < len(d.bases) {
			end = d.bases[i+1]
		}
		want := p[n:min(int64(len(p)), int64(n)+end-off)]
		got, err := d.readLayer(ctx, i, want, off-d.bases[i])
		n += got
		off += int64(got)
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// readLayer fills p from tar offset off of layer i, with zeros beyond the tar's end.
func (d *device) readLayer(ctx context.Context, i int, p []byte, off int64) (int, error) {
	n := 0
	if size := d.indexes[i].TarSize; off < size {
		in := p[:min(int64(len(p)), size-off)]
		if u := d.uses.Load(); u != nil && len(in) > 0 {
			u.note(i, d.indexes[i].Find(off), d.indexes[i].Find(off+int64(len(in))-1)+1)
		}
		var err error
		if n, err = d.layers[i].ReadAt(ctx, in, off); n < len(in) {
			if err == nil {
				err = io.ErrUnexpectedEOF
			} else if errors.Is(err, io.EOF) { // a connection's: not to be taken for the end of the device
				err = fmt.Errorf("%w: %v", io.ErrUnexpectedEOF, err)
			}
			return n, err
		}
	}
	clear(p[n:])
	return len(p), nil
}

func (d *device) close() {
	for _, l := range d.layers {
		l.Close()
	}
}

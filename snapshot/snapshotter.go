// Package snapshot is the containerd snapshotter: upstream's overlay snapshotter, decorated so that the layers of an image
// that has a streaming artifact become streamed snapshots, which are committed without being downloaded.
//
// The principle: whatever is not a streamed snapshot is plain overlay, in upstream's own code and in its layout on disk. A
// streamed snapshot stands alone: its directory is where the merged tree of its whole chain is mounted, so an overlay needs nothing below
// it, and it does not matter how its parents came about. It is mounted when something is first prepared on top of it. Every failure
// on the way to a streamed snapshot ends in a plain one, with one log line that says why.
//
// What this package does not do: it knows no registries and no artifacts (package stream does), and mounts nothing itself.
//
// On disk, below the root:
//
//	metadata.db            upstream's, shared with the inner snapshotter; the name of a streamed snapshot says which image it is of
//	snapshots/<id>/fs      upstream's; of a streamed snapshot, the mount point of its chain
//	snapshots/<id>/on      of a layer that was unpacked on a streamed snapshot, the id of that, see stale
//	snapshots/<id>/unpacked
//	                       the layer in the place of one that must not be used, see unpack.go
//	snapshots/removed-*    being removed
package snapshot

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Images are the images that this node can stream. *stream.Store is one.
type Images interface {
	// Find says whether the image that ref names, with this platform manifest, can be streamed: under which id, and its
	// chain IDs, bottom first. An error is the reason why not, as a rule a *reason.Error; an id beside it is of an image that is here in vain.
	Find(ctx context.Context, ref string, manifest digest.Digest) (id string, chainIDs []digest.Digest, err error)
	// Mount mounts the chain of the first n layers of image id at target, on which something new may begin. It needs no network for an image that was found
	// before, in this life of the daemon or an earlier one.
	Mount(ctx context.Context, id string, n int, target string) error
	// Usable says why image id must not serve another pull, or nil. It waits for nothing. What it refuses is unpacked where it cannot be mounted.
	Usable(id string) error
	// Pulled says that image id serves a pull of ref, which may be of another repository, or what that unpacks.
	Pulled(id, ref string) error
	// Vet says why nothing new may begin on image id, be it mounted or not, or nil. Of an image that is Usable it waits for nothing; of others as long as ctx lasts, and what it has got until then is there the next time.
	Vet(ctx context.Context, id string) error
	// Source says where a layer of the image that id is of can be had, as the image itself has it: repository@digest, the layer's type, digest and size, and the digest of its tar.
	Source(ctx context.Context, id string, layer int) (ref string, d ocispec.Descriptor, diffID digest.Digest, err error)
	// Unmount undoes Mount; a target that is not mounted is no error.
	Unmount(target string) error
	// Mounted reports whether what is mounted at target is served, be it mounted in an earlier life of the daemon.
	Mounted(target string) bool
	// Blobs names what is kept of the first n layers of image id, the same for layers that have it in common; none if the image cannot be loaded. Usage returns the bytes on disk of some of them,
	// and of what else is kept for the chain of the first n layers, nothing for n = 0.
	Blobs(id string, n int) []digest.Digest
	Usage(id string, n int, blobs []digest.Digest) (int64, error)
	// Forget drops an image that no snapshot uses. Retain drops all of a former life but those in use.
	Forget(id string) error
	Retain(used func(id string) bool) error
}

// Snapshotter implements snapshots.Snapshotter.
//
// LOCK ORDER: mountMu, vetting or making, a transaction of ms, mu. No network or mount call is made under any but mountMu and vetting.
type Snapshotter struct {
	snapshots.Snapshotter // upstream's overlay, sharing ms

	// MapsBelow is an error if the containerd that calls maps the IDs of a directory, for a user namespace, and not of what is mounted below it. Nil is taken for one that maps both.
	// It is set before the first call.
	MapsBelow func(ctx context.Context) error
	// Unpack unpacks a layer as a pull does. into calls do with the mounts of an empty one, and is called again for each try; what takes its time and no disk comes before. Nil: what must not be used fails whatever
	// is prepared on it. It is set before the first call.
	Unpack func(ctx context.Context, l Layer, into func(do func([]mount.Mount) error) error) error
	// Wait is how long a call waits at most for what it stands on to be mounted, proven, or unpacked: see Wait. It is set before the first call.
	Wait time.Duration

	root   string
	ms     *storage.MetaStore
	images Images
	log    *slog.Logger
	onPull func(Pull)

	mountMu keyedMutex    // by snapshot id: held while its chain is mounted or unmounted
	vetting keyedMutex    // by image: held while it is asked whether something new may begin on it, which may take its proof. Nothing else waits for it
	making  sync.Mutex    // held while streamed snapshots are made
	slots   chan struct{} // of unpacks

	mu       sync.Mutex
	streamed map[string]*streamedSnapshot // by snapshot id
	unpacked map[string]snapshots.Usage   // by snapshot id: the layers in the place of what must not be used
	told     map[string]time.Time         // normal pulls told of lately, by reference, manifest digest and reason
	finds    int                          // searches whose snapshots are not made yet
	unused   map[string]bool              // images of which the last snapshot may be gone
	unpacks  map[string]*unpacking        // by snapshot id
	closed   bool

	ctx     context.Context // of what goes on when its caller waits no more; ends with Close
	quit    context.CancelFunc
	running sync.WaitGroup
}

var _ snapshots.Snapshotter = (*Snapshotter)(nil)
var _ snapshots.Cleaner = (*Snapshotter)(nil)

// New opens or creates the snapshotter's state in root. It detaches what a former life left mounted there and nobody
// serves, and needs no network. onPull is told of each pull, in the call that decides it; it must not block. Nil is nobody.
func New(root string, images Images, log *slog.Logger, onPull func(Pull)) (*Snapshotter, error) {
	if onPull == nil {
		onPull = func(Pull) {}
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	root, err := filepath.EvalSymlinks(root) // as the kernel names mount points
	if err != nil {
		return nil, err
	}
	if err := detachBelow(filepath.Join(root, "snapshots"), images.Mounted); err != nil {
		return nil, err
	}
	ms, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
	if err != nil {
		return nil, err
	}
	// Removal is ours: upstream would delete the directory of a streamed snapshot through its mount.
	// remap-ids is announced in containerd's configuration, which cannot ask: a kernel that cannot do it fails the mount.
	inner, err := overlay.NewSnapshotter(root, overlay.WithMetaStore(ms), overlay.AsynchronousRemove, overlay.WithRemapIDs)
	if err != nil {
		return nil, errors.Join(err, ms.Close())
	}
	s := &Snapshotter{
		Snapshotter: inner, root: root, ms: ms, images: images, log: log, onPull: onPull,
		streamed: map[string]*streamedSnapshot{}, unpacked: map[string]snapshots.Usage{}, told: map[string]time.Time{}, unused: map[string]bool{}, unpacks: map[string]*unpacking{},
		slots: make(chan struct{}, unpacksAtOnce), Wait: Wait,
	}
	s.ctx, s.quit = context.WithCancel(context.Background())
	if err := errors.Join(s.loadStreamed(s.ctx), s.Cleanup(s.ctx)); err != nil {
		return nil, errors.Join(err, ms.Close())
	}
	return s, nil
}

// Close ends what goes on, and closes the metadata store. It unmounts nothing.
func (s *Snapshotter) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.quit()
	s.running.Wait()
	return s.Snapshotter.Close()
}

// Prepare returns ErrAlreadyExists for a layer that is streamed: containerd then finds the snapshot by its chain ID, and skips the download.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	l, err := parseLabels(opts)
	if err != nil {
		return nil, err
	}
	if l.target != "" && s.stream(ctx, key, parent, l) {
		return nil, fmt.Errorf("snapshot %s is streamed: %w", l.target, errdefs.ErrAlreadyExists)
	}
	if err := ctx.Err(); err != nil {
		return nil, err // it went away during the search: nobody would remove what is made now
	}
	if l.target != "" {
		opts = append(opts, dropIDMaps)
		if base, err := s.streamedBase(ctx, parent); err == nil && base != nil {
			s.pulled(base, l)
		}
	}
	l.mapped = l.mapped && l.target == ""
	return s.create(ctx, key, parent, l, func() ([]mount.Mount, error) { return s.Snapshotter.Prepare(ctx, key, parent, opts...) })
}

// View is upstream's, over mounted parents.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	l, err := parseLabels(opts)
	if err != nil {
		return nil, err
	}
	return s.create(ctx, key, parent, l, func() ([]mount.Mount, error) { return s.Snapshotter.View(ctx, key, parent, opts...) })
}

// Mounts is upstream's, over mounted parents: containers of a former life are mounted again here.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	info, err := s.Stat(ctx, key)
	if err != nil {
		return nil, err
	}
	return s.create(ctx, key, info.Parent, labels{mapped: mapped(info.Labels)}, func() ([]mount.Mount, error) { return s.Snapshotter.Mounts(ctx, key) })
}

// create runs f, which asks upstream for mounts of key over parent, once the streamed snapshot that parent stands on is mounted. l are the labels of what is made.
func (s *Snapshotter) create(ctx context.Context, key, parent string, l labels, f func() ([]mount.Mount, error)) ([]mount.Mount, error) {
	waiting, cancel := context.WithTimeout(ctx, s.Wait)
	base, err := s.ready(waiting, key, parent, l, "")
	late := waiting.Err() != nil && ctx.Err() == nil
	cancel()
	if err != nil && late {
		return nil, fmt.Errorf("%w: what %s stands on is not there within %v, and is worked on: try again: %w", errdefs.ErrUnavailable, key, s.Wait, err)
	}
	if err != nil {
		return nil, err
	}
	if base != nil && l.mapped && base.name != parent && s.MapsBelow != nil {
		if err := s.MapsBelow(ctx); err != nil {
			return nil, fmt.Errorf("a user namespace over an image of which only the lower %d layers are streamed: %w: %w", base.layers, err, errdefs.ErrFailedPrecondition)
		}
	}
	mounts, err := f()
	if err != nil {
		return nil, err
	}
	s.atUnpacked(mounts)
	if base != nil {
		mounts = cutBelow(mounts, s.fsPath(base.id))
	}
	if base != nil && unpacks(key) {
		return mounts, s.noteBase(ctx, key, base)
	}
	return mounts, nil
}

// streamedBase returns the topmost streamed snapshot among name and its ancestors that is not unpacked, nil if there is none.
func (s *Snapshotter) streamedBase(ctx context.Context, name string) (base *streamedSnapshot, err error) {
	if name == "" {
		return nil, nil
	}
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		for name != "" && base == nil {
			id, info, _, err := storage.GetInfo(ctx, name)
			if errdefs.IsNotFound(err) {
				return nil // upstream says it in its own words
			}
			if err != nil {
				return err
			}
			if base, err = parseStreamed(id, info); err != nil {
				return err
			}
			if base != nil && s.unpackedAt(id) != "" {
				base = nil
			}
			name = info.Parent
		}
		return nil
	})
	return base, err
}

// unpacks reports whether key is that of a snapshot into which containerd unpacks a layer. Labels do not say so: those of a sandbox may be annotations of its pod.
func unpacks(key string) bool {
	return strings.HasPrefix(key[strings.LastIndex(key, "/")+1:], snapshots.UnpackKeyPrefix+"-")
}

// Remove removes a snapshot. Unlike upstream it unmounts first, and keeps the directory of what cannot be unmounted.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	var id string
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		id, _, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return err
	}
	if err := s.Snapshotter.Remove(ctx, key); err != nil {
		return err
	}
	if err := s.removed(id); err != nil {
		s.log.Warn("files of a removed snapshot stay until the next cleanup", "key", key, "error", err)
	}
	return nil
}

// removed removes the directory of a snapshot whose row is gone, and, with the last snapshot of an image, what was kept for that.
func (s *Snapshotter) removed(id string) error {
	unlock, err := s.mountMu.lock(context.Background(), id)
	if err != nil {
		return err
	}
	defer unlock()
	streamed := s.dropStreamed(id) // whatever fails below: it must not be promised to another pull
	if streamed {
		// EBUSY: it is not mounted there any more, but a mount namespace that nobody told still has it.
		if err := s.images.Unmount(s.fsPath(id)); err != nil && !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	err = os.RemoveAll(filepath.Join(s.root, "snapshots", id))
	if streamed {
		err = errors.Join(err, s.forgetUnused())
	}
	return err
}

// Cleanup removes directories that belong to no snapshot.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	var aside []string
	// Directories are made inside write transactions: within one, there are none in the making. After it, the id of an orphan
	// may be in use again, so it is given another name here.
	err := s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		ids, err := storage.IDMap(ctx)
		if err != nil && !errdefs.IsNotFound(err) { // which says that nothing was ever created
			return err
		}
		dirs, err := os.ReadDir(filepath.Join(s.root, "snapshots"))
		if err != nil {
			return err
		}
		for _, d := range dirs {
			if _, ok := ids[d.Name()]; ok {
				continue
			}
			path := filepath.Join(s.root, "snapshots", d.Name())
			if !strings.HasPrefix(d.Name(), "removed-") {
				from := path
				path = filepath.Join(s.root, "snapshots", "removed-"+d.Name())
				if err := os.Rename(from, path); err != nil {
					s.log.Warn("orphan snapshot directory", "dir", from, "error", err)
					continue
				}
			}
			aside = append(aside, path)
		}
		return nil
	})
	for _, path := range aside {
		err := detachBelow(path, func(string) bool { return false })
		if err == nil {
			err = os.RemoveAll(path)
		}
		if err != nil {
			s.log.Warn("files of a removed snapshot stay until the next cleanup", "dir", path, "error", err)
		}
	}
	return err
}

func (s *Snapshotter) fsPath(id string) string { return filepath.Join(s.root, "snapshots", id, "fs") }

// cutBelow removes what lies below base, a mounted chain, from the lower directories of an overlay.
func cutBelow(mounts []mount.Mount, base string) []mount.Mount {
	for i, m := range mounts {
		if m.Type != "overlay" {
			continue
		}
		writable := false
		lower := -1
		for j, o := range m.Options {
			writable = writable || strings.HasPrefix(o, "upperdir=")
			if strings.HasPrefix(o, "lowerdir=") {
				lower = j
			}
		}
		if lower < 0 {
			continue
		}
		dirs := strings.Split(strings.TrimPrefix(m.Options[lower], "lowerdir="), ":")
		for j, d := range dirs {
			if d == base {
				dirs = dirs[:j+1]
				break
			}
		}
		if len(dirs) == 1 && !writable {
			// overlayfs refuses a single lower directory without an upper one.
			mounts[i] = mount.Mount{Type: "bind", Source: dirs[0], Options: append(idMaps(m.Options), "ro", "rbind")}
			continue
		}
		if len(dirs) == 1 && dirs[0] == base && len(idMaps(m.Options)) > 0 {
			// containerd 2.2 maps the directory that the lower ones have in common, without what is mounted below it: that has to be the mount itself.
			dirs = []string{base + "/."}
		}
		m.Options[lower] = "lowerdir=" + strings.Join(dirs, ":")
	}
	return mounts
}

func idMaps(options []string) (maps []string) {
	for _, o := range options {
		if strings.HasPrefix(o, "uidmap=") || strings.HasPrefix(o, "gidmap=") {
			maps = append(maps, o)
		}
	}
	return maps
}

// detachBelow detaches what is mounted at the fs directories of snapshots and not served: a dead daemon's mounts, which answer only errors.
func detachBelow(dir string, served func(target string) bool) error {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return err
	}
	for i := len(infos) - 1; i >= 0; i-- {
		if p := infos[i].Mountpoint; filepath.Base(p) == "fs" && !served(p) {
			if err := unix.Unmount(p, unix.MNT_DETACH); err != nil {
				return fmt.Errorf("detach %s: %w", p, err)
			}
		}
	}
	return nil
}

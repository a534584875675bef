package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
)

// labels are what Prepare needs of a snapshot's labels. Every other key may come from an image's author and is not looked at.
type labels struct {
	target   string        // chain ID of the layer that is prepared
	ref      string        // the image's reference
	manifest digest.Digest // of the image's platform manifest
	mapped   bool          // see mapped
}

// check makes an error of labels that name no image.
func (l labels) check() error {
	if l.ref == "" || l.manifest == "" {
		return reason.New(reason.NoLabels, errors.New("containerd passes no image labels: set enable_remote_snapshot_annotations in the proxy plugin's exports, or disable_snapshot_annotations = false"))
	}
	if err := l.manifest.Validate(); err != nil {
		return reason.New(reason.NoLabels, fmt.Errorf("manifest digest %q: %w", l.manifest, err))
	}
	return nil
}

func parseLabels(opts []snapshots.Opt) (labels, error) {
	var info snapshots.Info
	for _, o := range opts {
		if err := o(&info); err != nil {
			return labels{}, err
		}
	}
	return labels{
		target:   info.Labels[snapshots.LabelSnapshotRef],
		ref:      info.Labels[snapshotters.TargetRefLabel],
		manifest: digest.Digest(info.Labels[snapshotters.TargetManifestDigestLabel]),
		mapped:   mapped(info.Labels),
	}, nil
}

// mapped reports whether a container's labels map IDs, for a user namespace.
func mapped(labels map[string]string) bool {
	return labels[snapshots.LabelSnapshotUIDMapping] != "" || labels[snapshots.LabelSnapshotGIDMapping] != ""
}

// dropIDMaps removes the labels that map IDs, which are a container's: on a layer that is unpacked they are an image author's.
func dropIDMaps(info *snapshots.Info) error {
	delete(info.Labels, snapshots.LabelSnapshotUIDMapping)
	delete(info.Labels, snapshots.LabelSnapshotGIDMapping)
	return nil
}

// streamedSnapshot is a committed snapshot whose content is mounted, not unpacked.
type streamedSnapshot struct {
	id     string // upstream's snapshot id: its directory
	name   string // in the metadata store
	parent string // likewise
	ref    string // chain ID
	image  string // as Images names it; "" for a layer that is not streamed, see stale
	layers int    // length of the chain
}

// The name of a streamed snapshot is the record of what it is: it comes and goes with the snapshot, and unlike labels nobody can
// change it. It ends in the key that was prepared, because the same chain may be streamed on two parents.
// containerd's names cannot be taken for one: a number follows their first slash.
// What begins like ours and has another form is of a newer release: its directory, on which this one could mount nothing, must not
// pass for an unpacked layer.
var (
	streamedName = regexp.MustCompile(`^streamed/([0-9a-f]{64,})/([1-9][0-9]{0,5})/`)
	newerName    = regexp.MustCompile(`^streamed/([0-9]*[^0-9/]|/|$)`)
)

func (sn *streamedSnapshot) setName(key string) {
	sn.name = fmt.Sprintf("streamed/%s/%d/%s", sn.image, sn.layers, key)
}

// parseStreamed returns what the name of snapshot id says, nil if it is not streamed.
func parseStreamed(id string, info snapshots.Info) (*streamedSnapshot, error) {
	m := streamedName.FindStringSubmatch(info.Name)
	switch {
	case m == nil && newerName.MatchString(info.Name):
		return nil, fmt.Errorf("streamed snapshot %s was made by a newer release: %w", info.Name, errdefs.ErrFailedPrecondition)
	case m == nil:
		return nil, nil
	}
	layers, _ := strconv.Atoi(m[2]) // at most six digits
	return &streamedSnapshot{
		id: id, name: info.Name, parent: info.Parent, ref: info.Labels[snapshots.LabelSnapshotRef], image: m[1], layers: layers,
	}, nil
}

// stream reports whether the layer that l.target names is streamed, and makes its snapshot if there is none yet. All failures
// are logged here and mean no.
func (s *Snapshotter) stream(ctx context.Context, key, parent string, l labels) bool {
	if sn := s.serving(l.target, parent); sn != nil {
		s.pulled(sn, l)
		return true
	}
	if err := l.check(); err != nil {
		s.fallback(l, err)
		return false
	}
	s.beginFind()
	began := time.Now()
	id, chainIDs, err := s.images.Find(ctx, l.ref, l.manifest)
	defer func() { s.endFind(id) }()
	if ctx.Err() != nil {
		return false // nobody pulls any more
	}
	if err != nil {
		s.fallback(l, err)
		return false
	}
	first := slices.Index(chainIDs, digest.Digest(l.target))
	if first < 0 {
		s.fallback(l, reason.New(reason.NoLabels, fmt.Errorf("chain %s is not one of the image's", l.target)))
		return false
	}
	made, err := s.commitStreamed(ctx, key, parent, id, chainIDs, first)
	if err != nil {
		s.fallback(l, err)
		return false
	}
	if sn := s.serving(l.target, parent); !made && sn != nil {
		s.pulled(sn, l)
	}
	if made {
		s.onPull(Pull{Image: l.ref, Manifest: l.manifest, Artifact: id, At: time.Now(), Took: time.Since(began)})
	}
	return true
}

func (s *Snapshotter) lookup(ref, parent string) bool { return s.serving(ref, parent) != nil }

// serving returns the snapshot of a chain on parent that may serve a pull, or nil.
func (s *Snapshotter) serving(ref, parent string) *streamedSnapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sn := range s.streamed {
		if sn.ref == ref && sn.parent == parent && s.mayServe(sn) {
			return sn
		}
	}
	return nil
}

// pulled tells that sn, of an image that may be of another repository, serves the pull of l, or what that unpacks.
func (s *Snapshotter) pulled(sn *streamedSnapshot, l labels) {
	if l.ref == "" {
		return
	}
	if err := s.images.Pulled(sn.image, l.ref); err != nil {
		s.log.Warn("where a streamed image is read, too, is not noted", "image", l.ref, "snapshot", sn.ref, "error", err)
	}
}

// mayServe reports whether sn may serve another pull. The caller holds mu.
func (s *Snapshotter) mayServe(sn *streamedSnapshot) bool {
	_, unpacked := s.unpacked[sn.id]
	return unpacked || s.images.Usable(sn.image) == nil
}

// commitStreamed commits snapshots for chains first.. of the image, on top of parent, in one transaction: containerd asks for them one
// after the other, and finds them made. Names are unique to the key; the chain ID as a name may belong to another namespace. It reports false if another
// Prepare was quicker.
func (s *Snapshotter) commitStreamed(ctx context.Context, key, parent, image string, chainIDs []digest.Digest, first int) (bool, error) {
	s.making.Lock()
	defer s.making.Unlock()
	// It is the same image then, or one with the same chain.
	if s.lookup(chainIDs[first].String(), parent) {
		return false, nil
	}
	var made []*streamedSnapshot
	err := s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		for i := first; i < len(chainIDs); i++ {
			sn := &streamedSnapshot{parent: parent, ref: chainIDs[i].String(), image: image, layers: i + 1}
			sn.setName(key)
			if err := s.commitOne(ctx, sn); err != nil {
				return err
			}
			made = append(made, sn)
			parent = sn.name
		}
		return nil
	})
	if err != nil {
		// An id is used again after a transaction that was rolled back: nothing may lie in its directory.
		return false, errors.Join(err, s.Cleanup(context.WithoutCancel(ctx)))
	}
	s.mu.Lock()
	for _, sn := range made {
		s.streamed[sn.id] = sn
	}
	s.mu.Unlock()
	return true, s.dropGone(ctx, made)
}

// dropGone drops those of made that were removed between their transaction and their being noted, when Remove did not find them: a
// containerd that gave up its Prepare may collect at once what that goes on to make.
func (s *Snapshotter) dropGone(ctx context.Context, made []*streamedSnapshot) error {
	return s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		for _, sn := range made {
			_, _, _, err := storage.GetInfo(ctx, sn.name)
			if errdefs.IsNotFound(err) {
				s.dropStreamed(sn.id)
			} else if err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *Snapshotter) commitOne(ctx context.Context, sn *streamedSnapshot) error {
	l := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: sn.ref})
	active := sn.name + " active"
	created, err := storage.CreateSnapshot(ctx, snapshots.KindActive, active, sn.parent, l)
	if err != nil {
		return err
	}
	if _, err := storage.CommitActive(ctx, active, sn.name, snapshots.Usage{}, l); err != nil {
		return err
	}
	sn.id = created.ID
	dir := filepath.Dir(s.fsPath(sn.id))
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.MkdirAll(filepath.Join(dir, "fs"), 0o755)
}

// loadStreamed finds the streamed snapshots of former lives, and makes directories that a power loss took.
func (s *Snapshotter) loadStreamed(ctx context.Context) error {
	newer := false
	plain := map[string]string{} // names by id
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		names, err := storage.IDMap(ctx)
		if err != nil {
			return err
		}
		for id, name := range names {
			_, info, _, err := storage.GetInfo(ctx, name)
			if err != nil {
				return err
			}
			if sn, err := parseStreamed(id, info); err != nil {
				newer = true
				s.log.Warn("kept for the release that made it", "error", err)
			} else if sn != nil {
				s.streamed[id] = sn
			} else {
				plain[id] = name
			}
		}
		return nil
	})
	if err != nil && !errdefs.IsNotFound(err) { // which says that nothing was ever created
		return err
	}
	for id, name := range plain {
		if err := s.loadUnpacked(id, name); err != nil {
			return err
		}
	}
	used := map[string]bool{}
	for id, sn := range s.streamed {
		if err := errors.Join(os.MkdirAll(s.fsPath(id), 0o755), s.loadUnpacked(id, sn.name)); err != nil {
			return err
		}
		used[sn.image] = true
	}
	// What snapshots of a newer release use is not known here.
	return s.images.Retain(func(id string) bool { return used[id] || newer })
}

// dropStreamed forgets a removed snapshot, and marks its image, if it is streamed, as one that may be unused.
func (s *Snapshotter) dropStreamed(id string) (was bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.unpacked, id)
	sn := s.streamed[id]
	if sn == nil {
		return false
	}
	delete(s.streamed, id)
	s.unused[sn.image] = true
	return true
}

// beginFind and endFind bracket the time from a search for an image until its snapshots are made: no image is forgotten in it.
func (s *Snapshotter) beginFind() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.finds++
}

func (s *Snapshotter) endFind(id string) {
	s.mu.Lock()
	s.finds--
	if id != "" {
		s.unused[id] = true // unless its snapshots were made
	}
	s.mu.Unlock()
	if err := s.forgetUnused(); err != nil {
		s.log.Warn("files of removed images stay until the next start", "error", err)
	}
}

// forgetUnused forgets the images of which no snapshot is left.
func (s *Snapshotter) forgetUnused() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.finds > 0 {
		return nil // the last search to end comes here again
	}
	for _, sn := range s.streamed {
		delete(s.unused, sn.image)
	}
	var errs []error
	for id := range s.unused {
		errs = append(errs, s.images.Forget(id))
	}
	clear(s.unused)
	return errors.Join(errs...)
}

// keyedMutex is a mutex for each key.
type keyedMutex struct {
	mu    sync.Mutex
	locks map[string]*countedMutex
}

type countedMutex struct {
	held  chan struct{} // has a value while it is locked
	users int
}

// lock locks key and returns its unlock, unless ctx ends first.
func (k *keyedMutex) lock(ctx context.Context, key string) (unlock func(), err error) {
	k.mu.Lock()
	if k.locks == nil {
		k.locks = map[string]*countedMutex{}
	}
	m := k.locks[key]
	if m == nil {
		m = &countedMutex{held: make(chan struct{}, 1)}
		k.locks[key] = m
	}
	m.users++
	k.mu.Unlock()
	leave := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if m.users--; m.users == 0 {
			delete(k.locks, key)
		}
	}
	select {
	case m.held <- struct{}{}:
		return func() {
			<-m.held
			leave()
		}, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}

package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// labels are what Prepare needs of a snapshot's labels. Every other key may come from an image's author and is not looked at.
type labels struct {
	target   string        // chain ID of the layer that is prepared
	ref      string        // the image's reference
	manifest digest.Digest // of the image's platform manifest
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
	}, nil
}

// streamedSnapshot is a committed snapshot whose content is mounted, not unpacked.
type streamedSnapshot struct {
	ID     string `json:"id"`     // upstream's snapshot id: its directory
	Name   string `json:"name"`   // in the metadata store
	Parent string `json:"parent"` // likewise
	Ref    string `json:"ref"`    // chain ID
	Image  string `json:"image"`  // as Images names it
	Layers int    `json:"layers"` // length of the chain

	file    string // record it stands in
	mounted bool   // guarded by mountMu of ID
}

// stream reports whether the layer that l.target names is streamed, and makes its snapshot if there is none yet. All failures
// are logged here and mean no.
func (s *Snapshotter) stream(ctx context.Context, key, parent string, l labels) bool {
	if s.lookup(l.target, parent) {
		return true
	}
	if l.ref == "" || l.manifest == "" {
		s.fallback(l, errors.New("containerd passes no image labels: set enable_remote_snapshot_annotations in the proxy plugin's exports, or disable_snapshot_annotations = false"))
		return false
	}
	if err := l.manifest.Validate(); err != nil {
		s.fallback(l, fmt.Errorf("manifest digest %q: %w", l.manifest, err))
		return false
	}
	s.beginFind()
	id, chainIDs, err := s.images.Find(ctx, l.ref, l.manifest)
	defer func() { s.endFind(id) }()
	if err != nil {
		s.fallback(l, err)
		return false
	}
	first := slices.Index(chainIDs, digest.Digest(l.target))
	if first < 0 {
		s.fallback(l, fmt.Errorf("chain %s is not one of the image's", l.target))
		return false
	}
	if err := s.commitStreamed(ctx, key, parent, id, chainIDs, first); err != nil {
		s.fallback(l, err)
		return false
	}
	return true
}

// fallback logs why an image is pulled in the normal way, once for each pull: its other layers are told at debug level.
func (s *Snapshotter) fallback(l labels, why error) {
	const quiet = time.Minute // about a pull
	now := time.Now()
	k := l.ref + " " + string(l.manifest)
	level := slog.LevelInfo
	s.mu.Lock()
	for old, t := range s.logged {
		if now.Sub(t) > quiet {
			delete(s.logged, old)
		}
	}
	if _, seen := s.logged[k]; seen {
		level = slog.LevelDebug
	} else {
		s.logged[k] = now
	}
	s.mu.Unlock()
	s.log.Log(context.Background(), level, "normal pull", "image", l.ref, "manifest", l.manifest, "reason", why)
}

func (s *Snapshotter) lookup(ref, parent string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sn := range s.streamed {
		if sn.Ref == ref && sn.Parent == parent {
			return true
		}
	}
	return false
}

// commitStreamed commits snapshots for chains first.. of the image, on top of parent, in one transaction: containerd asks for them one
// after the other, and finds them made. Names are unique to the key; the chain ID as a name may belong to another namespace.
func (s *Snapshotter) commitStreamed(ctx context.Context, key, parent, image string, chainIDs []digest.Digest, first int) (err error) {
	var made []*streamedSnapshot
	var file string
	defer func() {
		if err == nil {
			return
		}
		// An id is used again after a transaction that was rolled back: nothing may lie in its directory.
		for _, sn := range made {
			err = errors.Join(err, os.RemoveAll(filepath.Dir(s.fsPath(sn.ID))))
		}
		if file != "" {
			os.Remove(file)
		}
	}()
	err = s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		// Another Prepare may have been quicker: it is the same image then, or one with the same chain.
		if s.lookup(chainIDs[first].String(), parent) {
			return nil
		}
		for i := first; i < len(chainIDs); i++ {
			name := fmt.Sprintf("%s streamed-%d", key, i)
			sn := &streamedSnapshot{Name: name, Parent: parent, Ref: chainIDs[i].String(), Image: image, Layers: i + 1}
			if err := s.commitOne(ctx, sn); err != nil {
				return err
			}
			made = append(made, sn)
			parent = name
		}
		file = filepath.Join(s.root, "streamed", made[0].ID+".json")
		if err := saveStreamed(file, made); err != nil {
			return err
		}
		// Visible before the transaction ends, so that the next writer finds them; containerd asks only after it.
		s.mu.Lock()
		for _, sn := range made {
			sn.file = file
			s.streamed[sn.ID] = sn
		}
		s.mu.Unlock()
		return nil
	})
	if err != nil {
		s.mu.Lock()
		for _, sn := range made {
			delete(s.streamed, sn.ID)
		}
		s.mu.Unlock()
	}
	return err
}

func (s *Snapshotter) commitOne(ctx context.Context, sn *streamedSnapshot) error {
	l := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: sn.Ref})
	active := sn.Name + " active"
	created, err := storage.CreateSnapshot(ctx, snapshots.KindActive, active, sn.Parent, l)
	if err != nil {
		return err
	}
	if _, err := storage.CommitActive(ctx, active, sn.Name, snapshots.Usage{}, l); err != nil {
		return err
	}
	sn.ID = created.ID
	dir := filepath.Dir(s.fsPath(sn.ID))
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.MkdirAll(filepath.Join(dir, "fs"), 0o755)
}

// saveStreamed makes the record of one pull's snapshots durable, before the transaction that makes them is.
func saveStreamed(path string, made []*streamedSnapshot) error {
	b, err := json.Marshal(made)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// loadStreamed reads the records of former lives, drops what the metadata store does not know, and makes directories that a
// power loss took.
func (s *Snapshotter) loadStreamed() error {
	var ids map[string]string
	err := s.ms.WithTransaction(context.Background(), false, func(ctx context.Context) (err error) {
		ids, err = storage.IDMap(ctx)
		return err
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	files, err := filepath.Glob(filepath.Join(s.root, "streamed", "*.json"))
	if err != nil {
		return err
	}
	for _, file := range files {
		var sns []*streamedSnapshot
		b, err := os.ReadFile(file)
		if err == nil {
			err = json.Unmarshal(b, &sns)
		}
		if err != nil {
			s.log.Error("record of streamed snapshots is unreadable: their images must be removed and pulled again", "file", file, "error", err)
			continue
		}
		alive := 0
		for _, sn := range sns {
			if ids[sn.ID] != sn.Name {
				continue
			}
			if err := os.MkdirAll(s.fsPath(sn.ID), 0o755); err != nil {
				return err
			}
			sn.file = file
			s.streamed[sn.ID] = sn
			alive++
		}
		if alive == 0 {
			if err := os.Remove(file); err != nil {
				return err
			}
		}
	}
	used := map[string]bool{}
	for _, sn := range s.streamed {
		used[sn.Image] = true
	}
	return s.images.Retain(func(id string) bool { return used[id] })
}

// dropStreamed forgets a removed snapshot, and its image with the last one.
func (s *Snapshotter) dropStreamed(id string) error {
	s.mu.Lock()
	sn := s.streamed[id]
	if sn == nil {
		s.mu.Unlock()
		return nil
	}
	delete(s.streamed, id)
	lastOfFile := true
	for _, other := range s.streamed {
		lastOfFile = lastOfFile && other.file != sn.file
	}
	s.unused[sn.Image] = true
	s.mu.Unlock()
	var err error
	if lastOfFile {
		err = os.Remove(sn.file)
	}
	return errors.Join(err, s.forgetUnused())
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
		delete(s.unused, sn.Image)
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
	sync.Mutex
	users int
}

// lock locks key and returns its unlock.
func (k *keyedMutex) lock(key string) func() {
	k.mu.Lock()
	if k.locks == nil {
		k.locks = map[string]*countedMutex{}
	}
	m := k.locks[key]
	if m == nil {
		m = &countedMutex{}
		k.locks[key] = m
	}
	m.users++
	k.mu.Unlock()
	m.Lock()
	return func() {
		m.Unlock()
		k.mu.Lock()
		defer k.mu.Unlock()
		if m.users--; m.users == 0 {
			delete(k.locks, key)
		}
	}
}

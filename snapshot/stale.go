package snapshot

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// For the directories above a layer's files that its tar has not, containerd takes modes, owners and attributes from what is below. So what is noted beside the files of a layer that was unpacked on a streamed snapshot is which
// that is, and when something was unpacked in the place of that, the layer is unpacked once more itself, in the same way, before anything new begins on it.

// onName is a symbolic link to the id of that streamed snapshot: made at once, and in the order of the file system's journal before the files.
const onName = "on"

var errStale = errors.New("a layer was unpacked on a streamed image that must not be used any more, and may have its modes and owners of directories")

// stale returns the topmost of name and its ancestors whose files were unpacked on a streamed snapshot in whose place others were unpacked since, or nil. A snapshot that no chain ID names is none of an image's
// layers, which could be had again.
func (s *Snapshotter) stale(ctx context.Context, name string) (sn *streamedSnapshot, err error) {
	s.mu.Lock()
	none := len(s.unpacked) == 0
	s.mu.Unlock()
	if none || name == "" {
		return nil, nil
	}
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		layers := 0
		for name != "" {
			id, info, _, err := storage.GetInfo(ctx, name)
			if errdefs.IsNotFound(err) {
				return nil // upstream says it in its own words
			}
			if err != nil {
				return err
			}
			is := false
			if sn == nil {
				is, err = s.isStale(id)
			}
			if err == nil && is {
				sn, err = parseStreamed(id, info)
			}
			if err != nil {
				return err
			}
			if chain := digest.Digest(name[strings.LastIndex(name, "/")+1:]); is && sn == nil && chain.Validate() == nil {
				sn = &streamedSnapshot{id: id, name: name, parent: info.Parent, ref: chain.String()}
			}
			if sn != nil {
				layers++
			}
			name = info.Parent
		}
		if sn != nil {
			sn.layers = layers
		}
		return nil
	})
	return sn, err
}

// isStale reports whether the files of snapshot id are stale.
func (s *Snapshotter) isStale(id string) (bool, error) {
	dir := s.unpackedAt(id)
	if dir == "" {
		dir = s.fsPath(id)
	}
	on, err := os.Readlink(filepath.Join(filepath.Dir(dir), onName))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil && s.unpackedAt(on) != "", err
}

// noteBase notes that containerd unpacks into key, on base.
func (s *Snapshotter) noteBase(ctx context.Context, key string, base *streamedSnapshot) error {
	return s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		id, _, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		return noteOn(filepath.Dir(s.fsPath(id)), base.id)
	})
}

// noteOn notes in dir that its files are unpacked on the streamed snapshot on, if that is not "". The first stays: it is another's turn only when something was unpacked in its place.
func noteOn(dir, on string) error {
	if on == "" {
		return nil
	}
	if err := os.Symlink(on, filepath.Join(dir, onName)); !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil
}

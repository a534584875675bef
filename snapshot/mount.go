package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// mount mounts sn unless it is mounted. Whether something new may begin on the image is asked in either case, but for a layer of a pull that goes onto what is mounted.
func (s *Snapshotter) mount(ctx context.Context, sn *streamedSnapshot, unpack bool) error {
	mounted, err := mountinfo.Mounted(s.fsPath(sn.id))
	if err == nil && !(mounted && unpack) {
		err = s.vet(ctx, sn.image)
	}
	if err == nil {
		err = s.mountVetted(ctx, sn)
	}
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("streamed snapshot %s was removed: %w", sn.ref, errdefs.ErrNotFound)
	case err != nil:
		return fmt.Errorf("streamed snapshot %s: %w", sn.ref, err)
	}
	return nil
}

// vet is Images.Vet, once at a time for an image, and leaves half of the wait to the layers that are unpacked where it says no.
func (s *Snapshotter) vet(ctx context.Context, image string) error {
	if s.Unpack != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.Wait/2)
		defer cancel()
	}
	unlock, err := s.vetting.lock(ctx, image)
	if err != nil {
		return err
	}
	defer unlock()
	return s.images.Vet(ctx, image)
}

// mountVetted mounts sn unless it is mounted. The kernel is asked: somebody else may have unmounted it, and a container on the bare directory would miss the image.
func (s *Snapshotter) mountVetted(ctx context.Context, sn *streamedSnapshot) error {
	ctx, cancel := context.WithTimeout(ctx, s.Wait) // of an unpack's, too: a removal waits for it
	defer cancel()
	unlock, err := s.mountMu.lock(ctx, sn.id)
	if err != nil {
		return err
	}
	defer unlock()
	path := s.fsPath(sn.id)
	mounted, err := mountinfo.Mounted(path)
	if err != nil || mounted {
		return err
	}
	if err := s.images.Unmount(path); err != nil && !errors.Is(err, unix.EBUSY) { // Images may know of the mount that is gone
		return err
	}
	return s.images.Mount(ctx, sn.image, sn.layers, path)
}

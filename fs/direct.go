package fs

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Direct is what a mount needs that needs no process: EROFS reads local files. Only a Server in mode file or loop makes such mounts.
type Direct struct {
	Metadata string // path of the metadata image, whose data device has Files as its parts
	// Files are the paths of the parts. Their bytes must stay as they are for as long as anybody has them open, as the kernel has while the image is mounted or a user
	// of the mount is left. Each is a multiple of the block size long.
	Files []string
}

// maxLoops bounds the loop devices of one mount: each costs the kernel a block device.
const maxLoops = 32

// mountDirect mounts img from its Direct, beneath what is at target if beneath is set.
func (s *Server) mountDirect(m *mount, img Image, target string, beneath bool) error {
	c, err := s.create(Image{Metadata: img.Direct.Metadata}, img.Direct.Files, true)
	if err != nil {
		return err
	}
	defer c.close()
	if err := c.attach(target, s.options.flags, beneath, s.recorder(m, img, img.Direct.Metadata, target, true)); err != nil {
		m.drop()
		return err
	}
	m.devices = s.devices
	return nil
}

// recorder records the mount m, before it can be seen, with the device number that it is told.
func (s *Server) recorder(m *mount, img Image, metadata, target string, direct bool) func(dev uint64) error {
	m.metadata = metadata
	return func(dev uint64) (err error) {
		if s.keep == nil || img.ID == probeID {
			return nil
		}
		// Of a direct mount an older release takes it that the Device is in use.
		r := mountRecord{ID: img.ID, Size: img.Device.Size(), Target: target, Dev: dev, Metadata: metadata, Direct: direct}
		m.devices = s.devices
		m.record, err = s.devices.state.addRecord(r)
		return err
	}
}

// drop drops the record of m.
func (m *mount) drop() {
	if m.record != noRecord {
		m.devices.state.dropRecord(m.record)
		m.record = noRecord
	}
}

// At lists the targets where the metadata image of this path is mounted, by this Server or a predecessor of it; none in mode tree.
func (s *Server) At(metadata string) (targets []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for target, m := range s.mounts {
		if m.ready && m.tree == nil && m.metadata == metadata {
			targets = append(targets, target)
		}
	}
	return targets
}

// Replace mounts img, by its Direct, in the place of its mount at target; at no time is nothing there. Who uses the old mount goes on with it: gone is closed when that
// needs the Device no more, or others use the same one. It needs Linux 6.5.
func (s *Server) Replace(img Image, target string) (gone <-chan struct{}, err error) {
	s.replacing.Lock()
	defer s.replacing.Unlock()
	s.mu.Lock()
	old := s.mounts[target]
	if s.closed || old == nil || !old.ready || old.tree != nil {
		s.mu.Unlock()
		return nil, fmt.Errorf("replace the mount at %s: it is not one that could be: %w", target, unix.EBUSY)
	}
	s.busy.Add(1)
	s.mu.Unlock()
	defer s.busy.Done()

	m := &mount{id: img.ID, record: noRecord, ready: true}
	if err := s.mountDirect(m, img, target, true); err != nil {
		return nil, fmt.Errorf("replace the mount at %s: %w", target, err)
	}
	if err := unmountInUse(target); err != nil && !errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("replace the mount at %s: %w", target, err)
	}
	s.mu.Lock()
	s.mounts[target] = m
	s.mu.Unlock()
	if old.device == nil {
		old.drop()
	} else if old.devices.release(old.device, old.record) {
		return old.device.idle, nil
	}
	none := make(chan struct{})
	close(none)
	return none, nil
}

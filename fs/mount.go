package fs

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

func (s *Server) mount(img Image, target string) (err error) {
	m := &mount{id: img.ID, record: noRecord}
	resumed, err := s.reserve(target, m)
	if err != nil || resumed {
		return err
	}
	defer s.busy.Done()
	if s.mode == ModeTree {
		err = s.mountTree(m, img, target)
	} else {
		err = s.mountErofs(m, img, target)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		delete(s.mounts, target)
		return fmt.Errorf("mount image %s: %w", img.ID, err)
	}
	m.ready = true
	return nil
}

// reserve enters m as the mount of target, or reports that a predecessor has mounted the image there.
func (s *Server) reserve(target string, m *mount) (resumed bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false, errors.New("mount: server is closed")
	}
	if old := s.mounts[target]; old != nil {
		if old.ready && old.resumed && old.id == m.id {
			old.resumed = false
			return true, nil
		}
		return false, fmt.Errorf("mount: %s: %w", target, unix.EBUSY)
	}
	s.mounts[target] = m
	s.busy.Add(1)
	return false, nil
}

func (s *Server) mountErofs(m *mount, img Image, target string) error {
	if img.Direct != nil {
		err := s.mountDirect(m, img, target, false)
		if err == nil {
			return nil
		}
		s.log.Debug("a mount cannot be of local files, and needs the daemon", "mount", target, "error", err)
	}
	dev, err := s.devices.acquire(img.ID, img.Device)
	if err != nil {
		return err
	}
	c, err := s.create(img, []string{filepath.Join(s.dir, img.ID)}, false)
	if err == nil {
		err = c.attach(target, s.options.flags, false, s.recorder(m, img, img.Metadata, target, false))
		c.close()
	}
	if err != nil {
		s.devices.release(dev, m.record)
		return err
	}
	m.devices, m.device, m.bdi = s.devices, dev, c.bdi
	return nil
}

// releaseTimeout bounds the wait for the kernel to let go of an unmounted image. It takes a moment, loop devices a few milliseconds,
// unless somebody still uses it, be it another mount namespace that is just being made.
const releaseTimeout = 5 * time.Second

// Unmount undoes Mount. Unmounting what is not mounted is no error. After Unmount has returned nil, the image's Device is not used any
// more, unless by another mount. A mount that is in use is detached from the directory tree and served until its last user is gone;
// the error is then EBUSY, and calling Unmount again returns nil.
func (s *Server) Unmount(target string) error {
	target, err := filepath.Abs(target)
	if err != nil {
		return err
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.busy.Add(1)
	s.mu.Unlock()
	defer s.busy.Done()
	return s.unmount(target)
}

func (s *Server) unmount(target string) error {
	s.replacing.Lock()
	s.mu.Lock()
	s.replacing.Unlock()
	m := s.mounts[target]
	if m != nil && !m.ready {
		s.mu.Unlock()
		return fmt.Errorf("unmount %s: is being mounted or unmounted: %w", target, unix.EBUSY)
	}
	if m != nil {
		m.ready = false
		if m.ahead != nil {
			m.ahead.Kill() // or it has ended
		}
	}
	s.mu.Unlock()

	err := unmount(target, 0)
	if errors.Is(err, unix.EBUSY) {
		err = unmount(target, unix.MNT_DETACH)
	}
	s.mu.Lock()
	if err == nil {
		delete(s.mounts, target)
	} else if m != nil {
		m.ready = true
	}
	s.mu.Unlock()
	if err != nil || m == nil {
		return err
	}
	return s.released(m, target)
}

// released waits until the kernel has let go of m, which is unmounted.
func (s *Server) released(m *mount, target string) error {
	var gone <-chan struct{}
	if m.tree != nil {
		gone = m.tree.session.done
	} else if m.device == nil {
		m.drop()
		return nil
	} else if m.devices.release(m.device, m.record) {
		gone = m.device.idle
	} else {
		return nil
	}
	timeout := time.NewTimer(s.patience)
	defer timeout.Stop()
	select {
	case <-gone:
		return nil
	case <-timeout.C:
		return fmt.Errorf("unmount %s: detached, but still in use: %w", target, unix.EBUSY)
	}
}

package fs

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// loopAttempts is how often a free loop device is asked for, of which others may be quicker to take possession.
const loopAttempts = 64

// createLoop creates the file system of img over loop devices. Aligned says that devices can be read by direct I/O.
func (s *Server) createLoop(img Image, devices []string, local, aligned bool) (*fsContext, error) {
	if len(devices) > maxLoops {
		return nil, fmt.Errorf("%d loop devices for one mount, more than %d", len(devices), maxLoops)
	}
	meta, err := attachLoop(img.Metadata, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer meta.Close()
	flags := unix.O_RDONLY
	if aligned {
		flags |= unix.O_DIRECT
	}
	names := make([]string, len(devices))
	for i, d := range devices {
		data, err := attachLoop(d, flags)
		if err != nil {
			return nil, err
		}
		defer data.Close()
		names[i] = data.Name()
	}
	c, err := newErofs(meta.Name(), names)
	if err != nil {
		return nil, err
	}
	if err := c.created(unix.FsconfigCreate(c.fd)); err != nil { // which has only loop devices to open
		c.close()
		return nil, err
	}
	// EROFS has the read-ahead of its primary block device.
	var st unix.Stat_t
	if err := unix.Fstat(int(meta.Fd()), &st); err != nil {
		c.close()
		return nil, fmt.Errorf("stat %s: %w", meta.Name(), err)
	}
	c.bdi = deviceBDI(st.Rdev)
	s.setReadAhead(c.bdi, local, img.Started)
	return c, nil
}

// attachLoop attaches the file path, opened with flags, to a free loop device, which the kernel frees after its last use: when the
// returned file is closed and nothing on it is mounted.
func attachLoop(path string, flags int) (*os.File, error) {
	open, err := callOpen(path, flags)
	if err != nil {
		return nil, err
	}
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	config := unix.LoopConfig{Fd: 1, Size: 512} // what aside opens after the loop device
	config.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR
	if flags&unix.O_DIRECT != 0 {
		config.Info.Flags |= unix.LO_FLAGS_DIRECT_IO
	}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], path)
	for range loopAttempts {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		loop, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDONLY, 0)
		if err != nil {
			return nil, err
		}
		err = aside(int(loop.Fd()), open, callLoop(0, &config))
		if err == nil {
			return loop, nil
		}
		loop.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("attach %s to %s: %w", path, loop.Name(), err)
		}
	}
	return nil, fmt.Errorf("attach %s: no loop device stayed free", path)
}

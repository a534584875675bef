package fs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

// choose sets the Server's mode to the wanted one, or for ModeAuto to the first that works. A mode works if a file of a small image can be
// read by it. What a predecessor chose, for mounts that are still served, is not tried again.
func (s *Server) choose() error {
	for _, p := range s.resumed {
		if p.Want == s.want {
			s.mode, s.reason = p.Mode, p.Reason
			return nil
		}
	}
	modes := []Mode{s.want}
	switch s.want {
	case ModeAuto:
		modes = []Mode{ModeFile, ModeLoop, ModeTree}
	case ModeFile, ModeLoop, ModeTree:
	default:
		return fmt.Errorf("unknown mount mode %q", s.want)
	}
	var reasons []string
	for _, mode := range modes {
		s.mode = mode
		err := s.probe()
		if err == nil {
			s.reason = strings.Join(reasons, "; ")
			return s.keepDevices()
		}
		reasons = append(reasons, fmt.Sprintf("%s: %v", mode, err))
	}
	return fmt.Errorf("no way to mount: %s", strings.Join(reasons, "; "))
}

// probeDevice is a Device in memory.
type probeDevice []byte

func (d probeDevice) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	return copy(p, d[min(off, int64(len(d))):]), nil
}

func (d probeDevice) Size() int64 { return int64(len(d)) }

// probeID is the ID of the image that a mode is tried with. No image has it.
const probeID = ".probe"

// probe mounts a small image in the Server's mode and reads a file of it.
func (s *Server) probe() (err error) {
	if s.mode == ModeTree {
		err = s.stopDevices()
	} else {
		err = s.startDevices()
	}
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(s.dir), 0o700); err != nil {
		return err
	}
	// Beside the Server's directory, because it matters what file system the metadata image is on.
	dir := s.dir + ".probe"
	target := filepath.Join(dir, "mount")
	unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) // a process that was killed while it probed left it
	if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	data := probeDevice(bytes.Repeat([]byte("streaming-snapshotter\n"), 1000))
	img := Image{ID: probeID, Metadata: filepath.Join(dir, "metadata"), Device: data}
	if err := writeProbe(img.Metadata, data.Size()); err != nil {
		return err
	}
	if err := os.Mkdir(target, 0o700); err != nil {
		return err
	}
	if err := s.mount(img, target); err != nil {
		return err
	}
	return errors.Join(readBack(filepath.Join(target, "file"), data), s.Unmount(target))
}

// readBack reads want from the file path.
func readBack(path string, want []byte) error {
	got, err := unix.Mmap(-1, 0, len(want), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(got)
	open, err := callOpen(path, unix.O_RDONLY)
	if err != nil {
		return err
	}
	if err := aside(-1, open, callRead(0, got)); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	if !bytes.Equal(got, want) {
		return errors.New("a file read back differs")
	}
	return nil
}

// writeProbe writes a metadata image of one file, of size bytes, that is the whole data device.
func writeProbe(path string, size int64) error {
	file := &erofs.Inode{Mode: unix.S_IFREG | 0o644, Size: size, Extents: []erofs.Extent{{Size: size}}}
	root := &erofs.Inode{Mode: unix.S_IFDIR | 0o755, Entries: []erofs.Dirent{{Name: "file", Inode: file}}}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := erofs.Write(f, root, erofs.Options{BlockSize: 512, DeviceSize: size}); err != nil {
		return err
	}
	return f.Close()
}

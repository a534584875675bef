package fs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// create creates the file system of img with the files devices as its data device. They are local, or of a FUSE mount of this process.
func (s *Server) create(img Image, devices []string, local bool) (*fsContext, error) {
	aligned := true
	for i := 0; i < len(devices) && local; i++ {
		aligned = aligned && directAligned(devices[i])
	}
	if s.mode == ModeLoop {
		return s.createLoop(img, devices, local, aligned)
	}
	return s.createFile(img, devices, local, aligned)
}

// createFile creates the file system of img, file-backed. Aligned says that devices can be read by direct I/O.
func (s *Server) createFile(img Image, devices []string, local, aligned bool) (*fsContext, error) {
	c, err := newErofs(img.Metadata, devices)
	if err != nil {
		return nil, err
	}
	// Without it EROFS reads synchronously, 16 pages at a time. Linux 6.12.0 has no such option, and reads slowly.
	if aligned && directAligned(img.Metadata) {
		if err := unix.FsconfigSetFlag(c.fd, "directio"); err != nil {
			s.log.Debug("EROFS without direct I/O", "error", err)
		}
	}
	bdi, err := s.createErofs(c)
	if err != nil {
		c.close()
	}
	if errors.Is(err, unix.ENOTBLK) {
		return nil, fmt.Errorf("%w (file-backed EROFS needs Linux 6.12, and a metadata image on a disk's file system, not on overlayfs)", err)
	}
	if err != nil {
		return nil, err
	}
	c.bdi = bdi
	s.setReadAhead(bdi, local, img.Started)
	return c, nil
}

// directAligned reports whether path can be read by direct I/O in units of 512 bytes, which EROFS does not ask before it does so. If
// direct I/O is impossible altogether (tmpfs), EROFS sees that.
func directAligned(path string) bool {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_DIOALIGN, &st); err != nil {
		return false
	}
	return st.Mask&unix.STATX_DIOALIGN != 0 && max(st.Dio_offset_align, st.Dio_mem_align) <= 512
}

// createErofs creates the file-backed EROFS superblock c and returns its bdi, an entry of /sys/class/bdi that has the read-ahead.
// The kernel names it by a counter (erofs-N) and does not tell which is whose, so it is the one that appears; if another process
// mounts at the same moment there may be more.
func (s *Server) createErofs(c *fsContext) ([]string, error) {
	s.creating.Lock()
	defer s.creating.Unlock()
	before := bdis()
	if err := c.created(aside(c.fd, callCreate(0))); err != nil { // opens the file of the data device
		return nil, err
	}
	return slices.DeleteFunc(bdis(), func(name string) bool { return slices.Contains(before, name) }), nil
}

func bdis() []string {
	all, _ := filepath.Glob("/sys/class/bdi/erofs-*")
	return all
}

// setReadAhead sets the read-ahead of bdis: far if what the kernel reads in vain costs little, because it is local, or because starts are over and nobody has asked for another. It decides
// the throughput, not the result, so it is no error if it fails.
func (s *Server) setReadAhead(bdis []string, local, started bool) {
	bytes := s.readAhead
	if local || started && bytes == DefaultReadAhead {
		bytes = farReadAhead
	}
	if len(bdis) == 0 {
		s.log.Warn("no bdi found to set the read-ahead of a mount; cold reads of large files will be slow")
	}
	for _, dir := range bdis {
		kib := strconv.FormatInt(bytes>>10, 10)
		if err := os.WriteFile(filepath.Join(dir, "read_ahead_kb"), []byte(kib), 0); err != nil {
			s.log.Warn("set read-ahead; cold reads of large files will be slow", "error", err)
		}
	}
}

// deviceBDI is the bdi of the device number dev.
func deviceBDI(dev uint64) []string {
	return []string{fmt.Sprintf("/sys/class/bdi/%d:%d", unix.Major(dev), unix.Minor(dev))}
}

// fsContext is a file system being mounted, see fsopen(2). Unlike mount(2) it takes paths with commas and says what is wrong.
type fsContext struct {
	fd  int
	bdi []string // of the file system, once it was created
}

func newErofs(source string, devices []string) (*fsContext, error) {
	fd, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open EROFS: %w", err)
	}
	c := &fsContext{fd: fd}
	options := [][2]string{{"source", source}}
	for _, d := range devices {
		options = append(options, [2]string{"device", d})
	}
	for _, kv := range options {
		if err := unix.FsconfigSetString(fd, kv[0], kv[1]); err != nil {
			err = c.explain(fmt.Errorf("configure EROFS with %s=%s: %w", kv[0], kv[1], err))
			c.close()
			return nil, err
		}
	}
	if err := unix.FsconfigSetFlag(fd, "ro"); err != nil {
		c.close()
		return nil, fmt.Errorf("configure EROFS read-only: %w", err)
	}
	return c, nil
}

// created explains err, of the creation of c's file system.
func (c *fsContext) created(err error) error {
	if err != nil {
		return c.explain(fmt.Errorf("mount EROFS: %w", err))
	}
	return nil
}

// moveBeneath is MOVE_MOUNT_BENEATH of move_mount(2).
const moveBeneath = 0x200

// attach mounts what was created at target with flags of mount(2), or beneath what is mounted there, after record was called with its device number.
func (c *fsContext) attach(target string, flags uintptr, beneath bool, record func(dev uint64) error) error {
	attr := unix.MOUNT_ATTR_RDONLY
	if flags&unix.MS_NOSUID != 0 {
		attr |= unix.MOUNT_ATTR_NOSUID
	}
	if flags&unix.MS_NODEV != 0 {
		attr |= unix.MOUNT_ATTR_NODEV
	}
	m, err := unix.Fsmount(c.fd, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		return fmt.Errorf("mount EROFS: %w", err)
	}
	defer unix.Close(m)
	st, err := statMount(m, "")
	if err != nil {
		return fmt.Errorf("mount EROFS: %w", err)
	}
	if err := record(unix.Mkdev(st.Dev_major, st.Dev_minor)); err != nil {
		return err
	}
	how := unix.MOVE_MOUNT_F_EMPTY_PATH
	if beneath {
		how |= moveBeneath
	}
	if err := unix.MoveMount(m, "", unix.AT_FDCWD, target, how); err != nil {
		return fmt.Errorf("mount EROFS at %s: %w", target, err)
	}
	return nil
}

func (c *fsContext) close() { unix.Close(c.fd) }

// explain adds what the kernel says about an error.
func (c *fsContext) explain(err error) error {
	for {
		p := make([]byte, 1024)
		n, rerr := unix.Read(c.fd, p)
		if rerr != nil {
			return err
		}
		err = errors.Join(err, errors.New(strings.TrimSpace(string(p[:n]))))
	}
}

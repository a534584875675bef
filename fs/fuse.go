package fs

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// mountFUSE mounts a new FUSE connection at target and returns its descriptor.
func mountFUSE(target string, flags uintptr) (*os.File, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/fuse: %w", err)
	}
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read=%d", fd, maxRead)
	err = unix.Mount("streaming-snapshotter", target, "fuse.streaming-snapshotter", flags|unix.MS_RDONLY, data)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("mount FUSE at %s: %w", target, err)
	}
	return os.NewFile(uintptr(fd), "/dev/fuse"), nil
}

// deviceNumber returns the device number of the file system mounted at target.
func deviceNumber(target string) (uint64, error) {
	st, err := statMount(unix.AT_FDCWD, target)
	return unix.Mkdev(st.Dev_major, st.Dev_minor), err
}

// statMount looks at a mount, asking for only what the kernel knows already: nobody may serve it.
func statMount(fd int, path string) (st unix.Statx_t, err error) {
	err = unix.Statx(fd, path, unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT|unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH, 0, &st)
	return st, err
}

// mountedAs reports whether the file system with the device number dev is what is mounted at target.
func mountedAs(target string, dev uint64) bool {
	st, err := statMount(unix.AT_FDCWD, target)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 && unix.Mkdev(st.Dev_major, st.Dev_minor) == dev
}

// settleName is the name of a file for settle.
const settleName = ".settle"

// settle opens, polls and closes a file of a session, to which the session answers ENOSYS where it keeps no state, and which the kernel
// then never asks again. Otherwise a process that closes a file while no daemon serves it would hang in FLUSH; and one of the Go runtime's
// when os.Open adds the file to its poller: that blocks in POLL without giving the processor to others.
func settle(path string) error {
	open, err := callOpen(path, unix.O_RDONLY)
	if err == nil {
		err = aside(-1, open, callPoll(0), callClose(0))
	}
	if err != nil {
		return &os.PathError{Op: "settle", Path: path, Err: err}
	}
	return nil
}

// close ends the session, whoever still uses it, and waits for its goroutines.
func (s *session) close() error {
	return errors.Join(unmount(s.target, unix.MNT_DETACH), s.abort())
}

// abort ends the connection, also of a mount that is detached but in use, and waits for the session's goroutines. Users get ENOTCONN.
func (s *session) abort() error {
	select {
	case <-s.done:
		return nil
	default:
	}
	if err := abortFUSE(unix.Minor(s.dev)); err != nil {
		return fmt.Errorf("abort FUSE connection of %s: %w", s.target, err)
	}
	<-s.done
	return nil
}

// abortFUSE aborts FUSE connection number conn by the FUSE control file system, which it does not need to be mounted anywhere.
func abortFUSE(conn uint32) error {
	fd, err := unix.Fsopen("fusectl", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.FsconfigCreate(fd); err != nil {
		return err
	}
	dir, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	abort, err := unix.Openat(dir, fmt.Sprintf("%d/abort", conn), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT {
		return nil // it has ended by itself
	}
	if err != nil {
		return err
	}
	defer unix.Close(abort)
	_, err = unix.Write(abort, []byte("1"))
	return err
}

// unmount is umount2(2) for a path that may not be a mount point any more.
func unmount(target string, flags int) error {
	err := unix.Unmount(target, flags|unix.UMOUNT_NOFOLLOW)
	if err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return &os.PathError{Op: "unmount", Path: target, Err: err}
	}
	return nil
}

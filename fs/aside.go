package fs

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// call is a system call of aside. Memory that args point to belongs to keep, so that it is there.
type call struct {
	trap uintptr
	args [5]uintptr
	keep unsafe.Pointer
	may  unix.Errno // an error that does not end the child
}

// aside makes system calls that may wait for this process to answer a FUSE request, in a child of its own, up to the first that fails.
//
// Made by a thread of this process, such a call would keep it from dying: the kernel waits for the answer to a request that was read, even
// if the one who waits has SIGKILL, and the process that ends is the one that would answer. So it would keep its descriptors and its locks
// for ever, and no successor would come. The child has none: of all descriptors it only has fd, as number 0, or nothing, if fd is negative;
// what it opens is the next number. It waits for the successor, and ends.
//
// The child is a fork that runs nothing but these calls, because it has only one of the Go runtime's threads. What it writes is seen by
// nobody, but in memory that is shared.
func aside(fd int, calls ...call) error {
	c, err := startAside(fd, calls)
	if err != nil {
		return err
	}
	return c.wait()
}

// child makes the calls of an aside.
type child struct{ pid int }

// startAside is the begin of aside. Its child must be waited for.
func startAside(fd int, calls []call) (child, error) {
	pid, err := fork(fd, calls)
	runtime.KeepAlive(calls) // the child has its own copy of them
	if err != 0 {
		return child{}, fmt.Errorf("fork: %w", err)
	}
	return child{int(pid)}, nil
}

// wait waits for the end of c.
func (c child) wait() error {
	var status unix.WaitStatus
	for {
		if _, err := unix.Wait4(c.pid, &status, unix.WALL, nil); err == nil {
			break
		} else if err != unix.EINTR {
			return os.NewSyscallError("wait4", err)
		}
	}
	switch {
	case !status.Exited():
		return fmt.Errorf("a child was killed: %v", status.Signal())
	case status.ExitStatus() != 0:
		return unix.Errno(status.ExitStatus())
	}
	return nil
}

// fork returns in the parent only. Without signals, as those are the Go runtime's; no exit signal, so that nobody else waits for the child.
//
//go:norace
func fork(fd int, calls []call) (pid uintptr, err unix.Errno) {
	all, before := ^uint64(0), uint64(0)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&before)), 8, 0, 0)
	pid, _, err = unix.RawSyscall6(unix.SYS_CLONE, 0, 0, 0, 0, 0, 0)
	if pid == 0 && err == 0 {
		run(fd, calls)
	}
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&before)), 0, 8, 0, 0)
	return pid, err
}

// run is the child. It must not grow its stack, allocate memory or be scheduled.
//
//go:norace
//go:nosplit
func run(fd int, calls []call) {
	first := uintptr(0)
	if fd >= 0 {
		first = 1
	}
	if fd > 0 {
		if _, _, err := unix.RawSyscall(unix.SYS_DUP3, uintptr(fd), 0, 0); err != 0 {
			unix.RawSyscall(unix.SYS_EXIT_GROUP, uintptr(err), 0, 0)
		}
	}
	_, _, err := unix.RawSyscall(unix.SYS_CLOSE_RANGE, first, uintptr(^uint32(0)), 0)
	for i := 0; err == 0 && i < len(calls); i++ {
		c := &calls[i]
		_, _, err = unix.RawSyscall6(c.trap, c.args[0], c.args[1], c.args[2], c.args[3], c.args[4], 0)
		if err == c.may {
			err = 0
		}
	}
	unix.RawSyscall(unix.SYS_EXIT_GROUP, uintptr(err), 0, 0)
}

// callOpen opens path.
func callOpen(path string, flags int) (call, error) {
	p, err := unix.BytePtrFromString(path)
	at := unix.AT_FDCWD
	return call{trap: unix.SYS_OPENAT, args: [5]uintptr{uintptr(at), uintptr(unsafe.Pointer(p)), uintptr(flags)}, keep: unsafe.Pointer(p)}, err
}

// callDieWithParent has the kernel kill the child when the thread that has forked it ends: with this process, as the Go runtime keeps its threads.
func callDieWithParent() call {
	return call{trap: unix.SYS_PRCTL, args: [5]uintptr{unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL)}}
}

// callPoll looks whether fd can be read.
func callPoll(fd int32) call {
	p := &struct {
		wait unix.Timespec
		fd   unix.PollFd
	}{fd: unix.PollFd{Fd: fd, Events: unix.POLLIN}}
	return call{trap: unix.SYS_PPOLL, args: [5]uintptr{uintptr(unsafe.Pointer(&p.fd)), 1, uintptr(unsafe.Pointer(&p.wait))}, keep: unsafe.Pointer(p)}
}

// callRead reads from fd into p, which is shared memory.
func callRead(fd uintptr, p []byte) call {
	at := unsafe.Pointer(unsafe.SliceData(p))
	return call{trap: unix.SYS_READ, args: [5]uintptr{fd, uintptr(at), uintptr(len(p))}, keep: at}
}

// callClose closes fd, unlike the end of the child with an error that counts.
func callClose(fd uintptr) call { return call{trap: unix.SYS_CLOSE, args: [5]uintptr{fd}} }

// callCreate creates the file system of the context fd.
func callCreate(fd uintptr) call {
	return call{trap: unix.SYS_FSCONFIG, args: [5]uintptr{fd, unix.FSCONFIG_CMD_CREATE}}
}

// callLoop attaches to the loop device fd what config says.
func callLoop(fd uintptr, config *unix.LoopConfig) call {
	at := unsafe.Pointer(config)
	return call{trap: unix.SYS_IOCTL, args: [5]uintptr{fd, unix.LOOP_CONFIGURE, uintptr(at)}, keep: at}
}

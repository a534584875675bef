package install

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// On runs this program with args on the host whose root directory is at root, as a process that the host itself has started: paths, sockets and systemd are the host's. It takes the
// host's process IDs (hostPID in a pod) and the right to enter its mount namespace (privileged). The program has files as its descriptors from 3 on.
func On(ctx context.Context, root string, args []string, files ...*os.File) error {
	at, err := os.Stat(root)
	if err != nil {
		return err
	}
	host, err := os.Stat("/proc/1/root/.")
	if err != nil {
		return fmt.Errorf("the root directory of process 1 (a pod has to be privileged): %w", err)
	}
	if !os.SameFile(at, host) {
		return fmt.Errorf("%s is not the root directory of process 1: a pod needs hostPID: true, and the host's / at %s", root, root)
	}
	ns, err := os.Open("/proc/1/ns/mnt")
	if err != nil {
		return err
	}
	defer ns.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends in the host's namespace
		done <- onHost(ctx, ns, args, files)
	}()
	return <-done
}

// hostPath is of the environment of what runs on the host.
const hostPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

func onHost(ctx context.Context, ns *os.File, args []string, files []*os.File) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("enter the mount namespace of process 1: %w", err)
	}
	c := exec.CommandContext(ctx, "/proc/self/exe", args...) // the child's, which is still this program
	c.Stdin, c.Stdout, c.Stderr, c.Dir = os.Stdin, os.Stdout, os.Stderr, "/"
	c.ExtraFiles = files
	c.Env = slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "HOME=") }) // the pod's
	c.Env = append(c.Env, hostPath)
	c.Cancel = func() error { return c.Process.Signal(unix.SIGTERM) }
	return c.Run()
}

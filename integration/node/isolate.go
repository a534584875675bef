package node

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stageVariable tells the copies of a program that Isolate has started what they are: "init" or "run".
const stageVariable = "INTEGRATION_STAGE"

// grace is how long a program may take to end after a signal before its namespaces are ended under it.
const grace = 30 * time.Second

// Isolate moves the calling program, with all that it will start, into a PID and a mount namespace of its own. When the
// program ends, in whatever way, the kernel ends every process it has left (daemons, shims, containers) and drops every mount, and with these the loop devices
// and FUSE connections. $TMPDIR is a directory that is removed afterwards, from outside, where no mount can be in the way. The only thing that can stay behind is
// that directory, if the outermost process itself is killed by SIGKILL.
//
// It is called first in main or TestMain, as root. In the process that the user has started it does not return; the program goes on in a copy of it.
func Isolate() {
	var code int
	var err error
	switch os.Getenv(stageVariable) {
	case "run":
		os.Unsetenv(stageVariable)
		return
	case "init":
		code, err = runInit()
	default:
		code, err = runOutside()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "isolate:", err)
		code = 1
	}
	os.Exit(code)
}

// runOutside starts the namespaces' init, passes signals to it and clears up after it.
func runOutside() (int, error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("containers, FUSE and mounts need root")
	}
	dir, err := os.MkdirTemp("", "streaming-snapshotter-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o711); err != nil { // root of a user namespace goes through it
		return 0, err
	}

	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	runtime.LockOSThread() // Pdeathsig is about the thread
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Args[0] = os.Args[0]
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.Env = append(os.Environ(), stageVariable+"=init", "TMPDIR="+dir)
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := c.Start(); err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	var late <-chan time.Time
	for {
		select {
		case s := <-signals:
			if late == nil {
				c.Process.Signal(s)
				late = time.After(grace)
			}
		case <-late:
			c.Process.Kill()
		case <-ended:
			return c.ProcessState.ExitCode(), nil
		}
	}
}

// runInit is process 1 of the namespaces: it prepares the mounts, runs the program, passes signals on and reaps.
func runInit() (int, error) {
	if err := prepareMounts(); err != nil {
		return 0, err
	}
	// Notify and not Ignore: what is ignored stays ignored in the program.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	os.Setenv(stageVariable, "run")
	pid, err := syscall.ForkExec("/proc/self/exe", os.Args, &syscall.ProcAttr{
		Env:   os.Environ(),
		Files: []uintptr{0, 1, 2},
		Sys:   &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		return 0, err
	}
	go func() {
		for s := range signals {
			syscall.Kill(pid, s.(syscall.Signal))
		}
	}()
	for {
		var status syscall.WaitStatus
		p, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return 0, err
		case p == pid && status.Signaled():
			return 128 + int(status.Signal()), nil
		case p == pid && status.Exited():
			return status.ExitStatus(), nil
		}
	}
}

// prepareMounts keeps the mounts of this namespace out of the others, gives it a /proc of its own processes, and hides the host's
// containerd: shims keep their sockets under /run/containerd whatever containerd's state directory is.
func prepareMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount proc: %w", err)
	}
	const run = "/run/containerd"
	if err := os.MkdirAll(run, 0o711); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", run, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0711"); err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", run, err)
	}
	return nil
}

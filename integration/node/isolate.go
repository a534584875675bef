package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// stageVariable tells the copies of a program that Isolate has started what they are: "init" or "run".
const stageVariable = "INTEGRATION_STAGE"

// fuseConnections is where each FUSE connection has a directory with a file abort.
const fuseConnections = "/sys/fs/fuse/connections"

// grace is how long a program may take to end after a signal before its namespaces are ended under it.
const grace = 30 * time.Second

// Isolate moves the calling program, with all that it will start, into a PID and a mount namespace of its own. When the
// program ends, in whatever way, the kernel ends every process it has left (daemons, shims, containers) and drops every mount, and with these the loop devices
// and FUSE connections. $TMPDIR is a directory that is removed afterwards, from outside, where no mount can be in the way. If the outermost process itself is
// killed by SIGKILL that directory stays behind, until the next program that calls Isolate with the same $TMPDIR removes it.
//
// With MachineVariable there is more to it. It is called first in main or TestMain, as root. In the process that the user has started it does not return; the program goes on in a copy of it.
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

// IsolateWithParent is Isolate for a program that is to end, as after SIGTERM, when the one that has started it dies.
func IsolateWithParent() {
	if os.Getenv(stageVariable) == "" {
		parent := os.Getppid()
		runtime.LockOSThread() // the setting is the thread's
		err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGTERM), 0, 0, 0)
		if err == nil && os.Getppid() != parent { // it died before
			err = errors.New("who has started this has ended")
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "isolate:", err)
			os.Exit(1)
		}
	}
	Isolate()
}

// runOutside starts the namespaces' init, passes signals to it and clears up after it.
func runOutside() (int, error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("containers, FUSE and mounts need root")
	}
	removeLeft()
	dir, lock, err := makeDir()
	if err != nil {
		return 0, err
	}
	defer lock.Close()
	defer os.RemoveAll(dir)

	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	inside, alive, err := os.Pipe() // init ends everything when it is closed
	if err != nil {
		return 0, err
	}
	defer alive.Close()
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Args[0] = os.Args[0]
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.Env = append(os.Environ(), stageVariable+"=init", "TMPDIR="+dir)
	c.ExtraFiles = []*os.File{inside}
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	if os.Getenv(MachineVariable) != "" {
		c.SysProcAttr.Cloneflags |= syscall.CLONE_NEWNET
	}
	err = c.Start()
	inside.Close()
	if err != nil {
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
			alive.Close()
		case <-ended:
			return c.ProcessState.ExitCode(), nil
		}
	}
}

// lockName is a file in a directory that Isolate has made. The outermost process holds a lock on it, which ends with that process.
const lockName = ".streaming-snapshotter"

// makeDir makes the directory and locks it. Its name is short, for the sockets below it.
func makeDir() (dir string, lock *os.File, err error) {
	for {
		if dir, err = os.MkdirTemp("", "stream-"); err != nil {
			return "", nil, err
		}
		if err := os.Chmod(dir, 0o711); err != nil { // root of a user namespace goes through it
			return "", nil, err
		}
		if lock, err = os.Create(filepath.Join(dir, lockName)); err != nil {
			return "", nil, err
		}
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if _, statErr := os.Stat(lock.Name()); err == nil && statErr == nil {
			return dir, lock, nil
		}
		lock.Close() // another's removeLeft was quicker
	}
}

// removeLeft removes the directories that nobody has locked. What it cannot remove stays.
func removeLeft() {
	names, _ := filepath.Glob(filepath.Join(os.TempDir(), "stream-*", lockName))
	for _, name := range names {
		lock, err := os.Open(name)
		if err != nil {
			continue
		}
		if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			os.RemoveAll(filepath.Dir(name))
		}
		lock.Close()
	}
}

// runInit is process 1 of the namespaces: it prepares the mounts, runs the program, passes signals on, reaps, and ends what is left.
func runInit() (int, error) {
	syscall.CloseOnExec(3)
	if err := prepareMounts(); err != nil {
		return 0, err
	}
	if err := mountTemp(); err != nil {
		return 0, err
	}
	others := connections("self") // of the machine's FUSE mounts
	go func() {
		os.NewFile(3, "alive").Read(make([]byte, 1)) // nobody writes
		endAll(others)
	}()
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
	code := -1
	for {
		var status syscall.WaitStatus
		p, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case err == syscall.ECHILD && code >= 0:
			return code, nil
		case err == syscall.EINTR:
		case err != nil:
			return 0, err
		case p == pid && status.Signaled():
			code = 128 + int(status.Signal())
		case p == pid && status.Exited():
			code = status.ExitStatus()
		}
		if p == pid && code >= 0 {
			endAll(others)
		}
	}
}

// diskVariable is set where $TMPDIR is on a disk of mountTemp.
const diskVariable = "INTEGRATION_DISK"

// mountTemp gives $TMPDIR a new file system on a file, which is as large as what is free there: one that loses many files all the time is slow at new ones (Options.Disk).
// Without mkfs.ext4 it stays a directory.
func mountTemp() error {
	dir := os.TempDir()
	if _, err := exec.LookPath("mkfs.ext4"); err != nil || os.Getenv(diskVariable) != "" {
		return nil
	}
	var free unix.Statfs_t
	if err := unix.Statfs(dir, &free); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	file := filepath.Join(dir, "disk")
	if err := makeDisk(context.Background(), file, int64(free.Bavail)*free.Bsize); err != nil {
		return err
	}
	if err := mountDisk(context.Background(), file, dir); err != nil {
		return err
	}
	os.Setenv(diskVariable, "1")
	return os.Chmod(dir, 0o711) // as makeDir
}

// endAll kills every process of the namespace but its init, and aborts the FUSE connections that are not others: a process that waits for an answer of its own
// would never end. It keeps the mount namespaces until init exits: the last process in one would wait in its exit for reads, before it closes the connection.
func endAll(others map[int]bool) {
	ours := map[int]bool{}
	names, _ := filepath.Glob("/proc/[0-9]*/ns/mnt")
	for _, name := range names {
		maps.Copy(ours, connections(strings.Split(name, "/")[2]))
		syscall.Open(name, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	}
	syscall.Kill(-1, syscall.SIGKILL)
	for c := range ours {
		if !others[c] {
			os.WriteFile(fmt.Sprintf("%s/%d/abort", fuseConnections, c), []byte("1"), 0)
		}
	}
}

// connections are the numbers of the FUSE connections in the mount namespace of a process.
func connections(process string) map[int]bool {
	numbers := map[int]bool{}
	f, err := os.Open("/proc/" + process + "/mountinfo")
	if err != nil {
		return nil // it has ended
	}
	defer f.Close()
	mounts, _ := mountinfo.GetMountsFromReader(f, nil)
	for _, m := range mounts {
		if m.FSType == "fuse" || strings.HasPrefix(m.FSType, "fuse.") {
			numbers[m.Minor] = true
		}
	}
	return numbers
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
	if err := unix.Mount("fusectl", fuseConnections, "fusectl", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil && err != unix.EBUSY { // it is there
		return fmt.Errorf("mount fusectl: %w", err)
	}
	const run = "/run/containerd"
	if err := os.MkdirAll(run, 0o711); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", run, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0711"); err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", run, err)
	}
	if os.Getenv(MachineVariable) != "" {
		return prepareMachine()
	}
	return nil
}

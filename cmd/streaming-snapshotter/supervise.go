package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/fdstore"
	nodefs "github.com/streaming-snapshotter/streaming-snapshotter/fs"
)

// The wait before a command that has ended is run again: the first, and the longest, after a row of starts that came to nothing.
const (
	firstBackOff = 100 * time.Millisecond
	maxBackOff   = 10 * time.Second
)

// supervisor keeps the descriptors of a command that it runs again and again. It opens no file of a mount and stats none: while the command
// is away, that would block it for ever. When it ends, and nobody keeps anything for it, it ends what the command has left.
type supervisor struct {
	program string // path
	args    []string
	socket  string
	logTo   string // "" for the terminal
	own     *fdstore.Store
	ready   atomic.Bool // the command that runs now has said so
	again   atomic.Bool // it is not the first
	log     *slog.Logger
}

// supervise keeps descriptors for whoever comes to socket, and runs this program with args, if there are any, until ctx ends. What both say goes to the file logTo, if that is not "".
func supervise(ctx context.Context, socket, logTo string, args []string) (err error) {
	if logTo != "" {
		stop, err := keepLog(logTo, true)
		if err != nil {
			return err
		}
		defer stop()
	}
	s := &supervisor{args: args, logTo: logTo, log: slog.Default()}
	if s.own, err = fdstore.Open(); err != nil {
		return err
	}
	// Now: once another one has been put in its place, it would be that of a deleted file.
	if s.program, err = os.Executable(); err != nil {
		return err
	}
	if socket == "" {
		dir, err := os.MkdirTemp("", "ss-keeper-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		socket = filepath.Join(dir, "s.sock")
	}
	if s.socket, err = filepath.Abs(socket); err != nil {
		return err
	}
	k, err := fdstore.NewKeeper(s.socket, s.own, s.said)
	if err != nil {
		return err
	}
	keeping, stop := context.WithCancel(context.WithoutCancel(ctx)) // longer than the command lives
	served := make(chan error, 1)
	go func() { served <- k.Serve(keeping) }()
	defer func() {
		stop()
		err = errors.Join(err, <-served)
	}()
	if len(args) > 0 {
		err := s.run(ctx)
		if !s.own.Keeps() {
			err = errors.Join(err, s.release())
		}
		return err
	}
	if err := s.own.Notify("READY=1"); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-served:
		served <- nil
		return err
	}
}

// said passes on what the command says of itself. That it stops is not said: another one follows.
func (s *supervisor) said(state string) {
	for line := range strings.SplitSeq(state, "\n") {
		if line == "READY=1" {
			s.ready.Store(true)
			if s.again.Load() {
				s.log.Info("the command is ready again", "command", s.args)
			}
		}
		if line == "READY=1" || strings.HasPrefix(line, "STATUS=") {
			if err := s.own.Notify(line); err != nil {
				s.log.Warn("systemd could not be told the state of the command", "command", s.args, "error", err)
			}
		}
	}
}

// run runs the command until ctx ends. A command that was never ready is not run again, but for serve, which has other ways to start.
func (s *supervisor) run(ctx context.Context) error {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, unix.SIGHUP)
	defer signal.Stop(hangup)
	backOff, everReady := firstBackOff, false
	for {
		s.ready.Store(false)
		asked, err := s.runOnce(ctx, hangup)
		if exit := (*exec.ExitError)(nil); ctx.Err() != nil && errors.As(err, &exit) && !exit.Exited() {
			return nil // killed, by somebody else, a moment before
		}
		if ctx.Err() != nil {
			return err
		}
		if s.ready.Load() || asked {
			backOff, everReady = firstBackOff, everReady || s.ready.Load()
		} else if s.args[0] != "serve" && !everReady {
			return err
		}
		wait := backOff
		if asked {
			wait = 0
		}
		s.again.Store(true)
		s.log.Warn("the command has ended and is run again", "command", s.args, "error", err, "wait", wait)
		select {
		case <-ctx.Done():
			return nil
		case <-hangup:
		case <-time.After(wait):
		}
		backOff = min(2*backOff, maxBackOff)
	}
}

// release ends what the command, which has ended, has left to a successor: there is none.
func (s *supervisor) release() error {
	st, err := fdstore.OpenKeeper(s.socket)
	if err != nil {
		return err
	}
	err = nodefs.Release(st)
	if errors.Is(err, unix.EBUSY) {
		s.log.Warn("a mount is in use: who uses it gets errors from now on", "error", err)
		err = nil
	}
	return errors.Join(err, removeRoot(st), removeSocket(snapshotsSocket, st), removeSocket(criSocket, st))
}

// runOnce runs the command to its end, which it asks for when ctx ends, or at a signal from hangup: asked.
func (s *supervisor) runOnce(ctx context.Context, hangup <-chan os.Signal) (asked bool, err error) {
	c := exec.Command(s.program, s.args...)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.Env = append(os.Environ(), "NOTIFY_SOCKET="+s.socket, fdstore.KeeperEnv+"="+s.socket, logEnv+"="+s.logTo)
	// A group of its own: what the terminal sends comes once, from here. And when the supervisor dies, its successor must find no other.
	c.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGTERM}
	runtime.LockOSThread() // Pdeathsig is about the thread
	defer runtime.UnlockOSThread()
	if err := c.Start(); err != nil {
		return false, err
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	select {
	case err = <-ended:
	case <-hangup:
		asked = true
	case <-ctx.Done():
		asked = true
	}
	if asked {
		c.Process.Signal(unix.SIGTERM) // fails if it has just ended
		err = <-ended
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", s.args[0], err)
	}
	return asked, err
}

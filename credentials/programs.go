package credentials

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/plain"
)

const (
	maxOutput = 1 << 20 // bytes of a program's answer
	maxSaid   = 200     // bytes of what it says of its failure
)

// program is a command that is not trusted to end, nor to be brief.
type program struct {
	path    string
	args    []string
	env     []string // beside ours
	timeout time.Duration
}

// run gives the program stdin and returns what it writes. It is killed with its children when its time is up, and itself when this process ends in whatever way.
func (p program) run(ctx context.Context, stdin []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	out, said := &limited{max: maxOutput, strict: true}, &limited{max: maxSaid}
	cmd := exec.CommandContext(ctx, p.path, p.args...)
	cmd.Env = append(os.Environ(), p.env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), out, said
	// The kernel sends that signal when the thread that has started the program ends: it is kept for so long.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // children may hold its pipes
	err := cmd.Run()
	if err != nil && cmd.Process != nil {
		_ = cmd.Cancel() // children that are left
	}
	switch {
	case out.over:
		return nil, fmt.Errorf("answer of more than %d bytes", maxOutput)
	case context.Cause(ctx) == context.DeadlineExceeded:
		return nil, fmt.Errorf("no answer within %v: killed", p.timeout)
	case err != nil && len(said.b) > 0:
		return out.b, fmt.Errorf("%w: %s", err, said.quoted())
	}
	return out.b, err
}

// limited keeps the beginning of what is written.
type limited struct {
	b      []byte // no bytes.Buffer: its ReadFrom would take all
	max    int
	strict bool // more is an error
	over   bool
}

func (l *limited) Write(b []byte) (int, error) {
	room := l.max - len(l.b)
	l.b = append(l.b, b[:min(len(b), room)]...)
	if len(b) > room && l.strict {
		l.over = true
		return 0, errors.New("too much")
	}
	return len(b), nil
}

// quoted returns what was kept for a log line.
func (l *limited) quoted() string {
	return plain.Cut(string(l.b), maxSaid)
}

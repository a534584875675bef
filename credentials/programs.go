package credentials

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/singleflight"
)

const (
	maxOutput = 1 << 20 // bytes of a program's answer
	maxSaid   = 200     // bytes of what it says of its failure
)

// programs runs helpers and plugins. One program with the same question runs once at a time, for all who ask, and goes on when they have left:
// its answer may be what the next ones find.
type programs struct {
	group  singleflight.Group
	ctx    context.Context // of all that run
	cancel context.CancelFunc

	mu      sync.Mutex
	running sync.WaitGroup // grows under mu, as long as ctx lives
}

func newPrograms() *programs {
	p := &programs{}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p
}

// close kills what runs.
func (p *programs) close() {
	p.mu.Lock()
	p.cancel()
	p.mu.Unlock()
	p.running.Wait()
}

// once calls f once for all who ask with the same key while it runs.
func (p *programs) once(ctx context.Context, key string, f func(context.Context) (any, error)) (any, error) {
	answer := p.group.DoChan(key, func() (any, error) {
		p.mu.Lock()
		if err := p.ctx.Err(); err != nil {
			p.mu.Unlock()
			return nil, err
		}
		p.running.Add(1)
		p.mu.Unlock()
		defer p.running.Done()
		return f(p.ctx)
	})
	select {
	case r := <-answer:
		return r.Val, r.Err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// program is a command that is not trusted to end, nor to be brief.
type program struct {
	path    string
	args    []string
	env     []string // beside ours
	timeout time.Duration
}

// run gives the program stdin and returns what it writes. It is killed with its children when its time is up.
func (p program) run(ctx context.Context, stdin []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	out, said := &limited{max: maxOutput, strict: true}, &limited{max: maxSaid}
	cmd := exec.CommandContext(ctx, p.path, p.args...)
	cmd.Env = append(os.Environ(), p.env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), out, said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
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
	return strings.Trim(strconv.Quote(strings.TrimSpace(string(l.b))), `"`)
}

package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// FreeAddress returns a loopback address that nobody listens on, and that no connection gets by chance before somebody does: ports of that are others.
func FreeAddress() (string, error) {
	for {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 20000+rand.IntN(10000)))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			return "", err
		}
		return l.Addr().String(), l.Close()
	}
}

// process is a daemon with its output in a file.
type process struct {
	name string
	log  string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

// start runs a daemon until stop; its output is appended to dir/name.log.
func start(dir, name string, args ...string) (*process, error) {
	p := &process{name: name, log: filepath.Join(dir, name+".log"), done: make(chan struct{})}
	f, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p.cmd = exec.Command(args[0], args[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = f, f
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		defer close(p.done)
		p.cmd.Wait()
	}()
	return p, nil
}

// ready polls until check succeeds, for at most a minute.
func (p *process) ready(ctx context.Context, check func(context.Context) error) error {
	return p.readyIn(ctx, time.Minute, check)
}

func (p *process) readyIn(ctx context.Context, most time.Duration, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s does not get ready: %w\n%s", p.name, err, tail(p.log))
		case <-p.done:
			return fmt.Errorf("%s ended: %v\n%s", p.name, p.cmd.ProcessState, tail(p.log))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// stop asks the daemon to end, and ends it if it does not within ten seconds, which is an error.
func (p *process) stop() error {
	if p == nil {
		return nil
	}
	select {
	case <-p.done:
		return fmt.Errorf("%s ended by itself: %v\n%s", p.name, p.cmd.ProcessState, tail(p.log))
	default:
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(10 * time.Second):
		p.kill()
		return fmt.Errorf("%s did not end when asked to\n%s", p.name, tail(p.log))
	}
}

// kill ends the daemon as a crash would.
func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.done
}

// stopped is nil if a process is stopped by a signal; proc(5) has the states.
func stopped(pid int) error {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return err
	}
	if !bytes.Contains(b, []byte(") T ")) {
		return fmt.Errorf("process %d is not stopped", pid)
	}
	return nil
}

// command runs a program to its end and returns what it printed on standard output; the error has what it printed on standard error.
func command(ctx context.Context, args ...string) (string, error) {
	var out, errs bytes.Buffer
	c := exec.CommandContext(ctx, args[0], args[1:]...)
	c.Stdout, c.Stderr = &out, &errs
	c.WaitDelay = 5 * time.Second
	if err := c.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), errors.Join(err, ctx.Err()), bytes.TrimSpace(append(errs.Bytes(), out.Bytes()...)))
	}
	return out.String(), nil
}

// tail returns the end of a log.
func tail(name string) string {
	const most = 8 << 10
	f, err := os.Open(name)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.Size() > most {
		f.Seek(-most, io.SeekEnd)
	}
	b, _ := io.ReadAll(f)
	return fmt.Sprintf("--- %s\n%s", name, b)
}

// Usage is what a process has used so far.
type Usage struct {
	CPU             time.Duration // of all its threads, in user and kernel mode; in steps of 10 ms
	Anonymous, Peak int64         // memory, bytes: its own now, and at most with the pages of mapped files, which are the page cache's
	Shared          int64         // in memory files, which may outlive it
	Resident        int64         // all of these now
	Switches        int64         // how often its threads, those that live, have gone to sleep
}

// ReadUsage reads the usage of a process.
func ReadUsage(pid int) (u Usage, err error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return u, err
	}
	var user, system int64
	_, rest, _ := strings.Cut(string(stat), ") ")
	if f := strings.Fields(rest); len(f) > 12 { // proc(5) counts from 1, and two fields are before
		user, _ = strconv.ParseInt(f[11], 10, 64)
		system, _ = strconv.ParseInt(f[12], 10, 64)
	}
	const tick = 10 * time.Millisecond // USER_HZ is 100 wherever Go runs
	u.CPU = time.Duration(user+system) * tick
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return u, err
	}
	for key, n := range map[string]*int64{"RssAnon": &u.Anonymous, "RssShmem": &u.Shared, "VmRSS": &u.Resident, "VmHWM": &u.Peak} {
		_, after, ok := strings.Cut(string(status), "\n"+key+":")
		if !ok {
			return u, fmt.Errorf("process %d has no %s", pid, key)
		}
		kib, err := strconv.ParseInt(strings.Fields(after)[0], 10, 64)
		if err != nil {
			return u, err
		}
		*n = kib << 10
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	for _, task := range tasks {
		b, _ := os.ReadFile(task) // or the thread has ended
		if _, after, ok := strings.Cut(string(b), "\nvoluntary_ctxt_switches:"); ok {
			n, _ := strconv.ParseInt(strings.Fields(after)[0], 10, 64)
			u.Switches += n
		}
	}
	return u, err
}

package fs

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stalledReader is a process whose read waits for a registry that does not answer.
type stalledReader struct {
	what  string
	cmd   *exec.Cmd
	tid   int
	got   bytes.Buffer
	ended chan error
}

func startStalled(t *testing.T, what, path string) *stalledReader {
	t.Helper()
	r := &stalledReader{what: what, ended: make(chan error, 1)}
	r.cmd, r.tid = startReader(t, path, &r.got)
	go func() { r.ended <- r.cmd.Wait() }()
	t.Cleanup(func() { r.cmd.Process.Kill() })
	return r
}

func (r *stalledReader) signal(t *testing.T, s unix.Signal) {
	t.Helper()
	if err := unix.Tgkill(r.cmd.Process.Pid, r.tid, s); err != nil {
		t.Fatal(err)
	}
}

func (r *stalledReader) wantDead(t *testing.T) {
	t.Helper()
	begin := time.Now()
	select {
	case <-r.ended:
		t.Logf("%s: dead after %v", r.what, time.Since(begin).Round(time.Millisecond))
	case <-time.After(10 * time.Second):
		t.Errorf("%s: lives on", r.what)
	}
}

// told waits until the daemon has told of n reads.
func (k *keeper) told(n int) {
	k.t.Helper()
	k.pipe.SetReadDeadline(time.Now().Add(30 * time.Second))
	for range n {
		if line, err := k.out.ReadString('\n'); line != "read\n" {
			k.t.Fatalf("daemon: %q, %v", line, err)
		}
	}
}

// interrupts counts the requests in flight that are marked as interrupted.
func (k *keeper) interrupts() (n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for name, f := range k.kept {
		if !strings.HasSuffix(name, stateSuffix) {
			continue
		}
		fd, err := unix.Dup(int(f.Fd()))
		if err != nil {
			k.t.Fatal(err)
		}
		st, _, used, err := openState(os.NewFile(uintptr(fd), name))
		if err != nil {
			k.t.Fatal(err)
		}
		for _, sl := range used {
			if isRead(sl.req) && sl.readIn().Padding == interrupted {
				n++
			}
		}
		st.close()
	}
	return n
}

// TestKilledReaderWhileStalled: the registry does not answer. Processes whose reads a daemon has taken, which then died, are killed before and
// after its successor comes, some after another signal: they die. One that is not killed reads the right bytes in the end.
func TestKilledReaderWhileStalled(t *testing.T) {
	eachResume(t, func(t *testing.T, a daemonArgs) {
		a.Stall = true
		k := newKeeper(t, a, 1)
		k.start()
		k.ready()
		const kinds = 5
		paths := map[string]func(i int) string{
			"read":  func(i int) string { return fmt.Sprintf("%s/dir0/file%d", k.args.Targets[0], 10+i) },
			"fault": func(i int) string { return fmt.Sprintf("%s%s/dir1/file%d", byFault, k.args.Targets[0], 10+i) },
		}
		if a.Mode != ModeTree {
			paths["data device"] = func(int) string { return filepath.Join(k.args.Dir, "image") }
		}
		var early, signalled, late, signalledLate, alive []*stalledReader
		for what, path := range paths {
			early = append(early, startStalled(t, what+", killed without a daemon", path(0)))
			signalled = append(signalled, startStalled(t, what+", interrupted, and killed without a daemon", path(1)))
			late = append(late, startStalled(t, what+", killed with the next daemon", path(2)))
			signalledLate = append(signalledLate, startStalled(t, what+", interrupted without a daemon, and killed with the next", path(3)))
			alive = append(alive, startStalled(t, what, path(4)))
		}
		k.told(kinds * len(paths))
		for _, r := range signalled {
			r.signal(t, unix.SIGUSR1)
		}
		// Of one the kernel tells: the page fault in mode tree, the data device in the others. Who else waits does so for a page.
		eventually(t, "an interrupt", func() bool { return k.interrupts() == 1 })
		k.kill()
		for _, r := range append(early, signalled...) {
			r.cmd.Process.Kill()
		}
		for _, r := range signalledLate {
			r.signal(t, unix.SIGUSR1)
		}
		k.start()
		for _, r := range append(early, signalled...) {
			r.wantDead(t)
		}
		k.ready()
		for _, r := range append(late, signalledLate...) {
			r.cmd.Process.Kill()
			r.wantDead(t)
		}
		k.kill()
		k.args.Stall = false
		k.start()
		k.ready()
		for _, r := range alive {
			select {
			case err := <-r.ended:
				if err != nil || r.got.Len() != 4096 {
					t.Errorf("%s: %d bytes, %v", r.what, r.got.Len(), err)
				}
			case <-time.After(20 * time.Second):
				t.Errorf("%s: hangs", r.what)
			}
		}
		startComparing(t, k.args.Targets[0]).finish(t)
	})
}

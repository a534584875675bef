package fs

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// keeper is the parent of daemons: it starts one after the other, and keeps their descriptors.
type keeper struct {
	t    *testing.T
	args daemonArgs
	env  []string
	m    *image

	mu   sync.Mutex
	kept map[string]*os.File

	cmd   *exec.Cmd
	stdin io.Closer
	out   *bufio.Reader
	pipe  *os.File   // that out reads
	done  chan error // gives the end of the daemon
	log   *strings.Builder
}

// newKeeper prepares mounts of resumeImage, which leave nothing behind when the test ends.
func newKeeper(t *testing.T, args daemonArgs, mounts int) *keeper {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	before := leftovers(t, dir)
	k := &keeper{t: t, m: resumeImage(), args: args, kept: map[string]*os.File{}, log: &strings.Builder{}}
	k.args.Dir = filepath.Join(dir, "devices")
	k.args.Metadata = k.m.write(t, "image").Metadata
	for i := range mounts {
		target := filepath.Join(dir, fmt.Sprintf("mount%d", i))
		if err := os.Mkdir(target, 0o755); err != nil {
			t.Fatal(err)
		}
		k.args.Targets = append(k.args.Targets, target)
	}
	t.Cleanup(func() {
		if k.cmd != nil {
			k.kill()
		}
		for _, f := range k.kept {
			f.Close()
		}
		for _, target := range append(k.args.Targets, k.args.Dir) {
			for unix.Unmount(target, unix.MNT_DETACH) == nil {
			}
		}
		eventually(t, "nothing left behind", func() bool { return !leftovers(t, dir).exceed(before) })
		if t.Failed() {
			t.Logf("daemons: %s", k.log)
		}
	})
	return k
}

// start starts a daemon, which has what was kept.
func (k *keeper) start() {
	k.t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		k.t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "socket")
	defer theirs.Close()
	k.cmd = exec.Command("/proc/self/exe")
	k.cmd.ExtraFiles = []*os.File{theirs}
	k.args.Kept = nil
	for name, f := range k.kept {
		k.args.Kept = append(k.args.Kept, name)
		k.cmd.ExtraFiles = append(k.cmd.ExtraFiles, f)
	}
	arg, err := json.Marshal(k.args)
	if err != nil {
		k.t.Fatal(err)
	}
	k.cmd.Env = append(append(os.Environ(), "FS_TEST_DAEMON="+string(arg)), k.env...)
	k.cmd.Stderr = k.log
	k.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if k.stdin, err = k.cmd.StdinPipe(); err != nil {
		k.t.Fatal(err)
	}
	out, err := k.cmd.StdoutPipe()
	if err != nil {
		k.t.Fatal(err)
	}
	k.pipe = out.(*os.File)
	k.out = bufio.NewReader(out)
	if err := k.cmd.Start(); err != nil {
		k.t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		defer unix.Close(pair[0])
		for k.serve(pair[0]) {
		}
	}()
	cmd, done := k.cmd, make(chan error, 1)
	k.done = done
	go func() {
		err := cmd.Wait()
		<-served
		done <- err
	}()
}

// serve handles a message of the daemon's, and reports whether there may be more.
func (k *keeper) serve(fd int) bool {
	b, oob := make([]byte, 1024), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(fd, b, oob, unix.MSG_CMSG_CLOEXEC)
	if err == unix.EINTR {
		return true
	}
	if err != nil || n == 0 {
		return false
	}
	var m keepMessage
	if err := json.Unmarshal(b[:n], &m); err != nil {
		k.t.Error(err)
		return false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if old := k.kept[m.Name]; old != nil {
		old.Close()
		delete(k.kept, m.Name)
	}
	if !m.Drop {
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(messages) != 1 {
			k.t.Errorf("%d control messages, %v", len(messages), err)
			return false
		}
		fds, err := unix.ParseUnixRights(&messages[0])
		if err != nil {
			k.t.Error(err)
			return false
		}
		k.kept[m.Name] = os.NewFile(uintptr(fds[0]), m.Name)
	}
	_, err = unix.Write(fd, []byte{0})
	return err == nil
}

// ready waits until the daemon serves.
func (k *keeper) ready() {
	k.t.Helper()
	if line, err := k.out.ReadString('\n'); line != "serving\n" {
		k.t.Fatalf("daemon: %q, %v", line, err)
	}
}

// ended waits for the daemon's end.
func (k *keeper) ended() error {
	k.t.Helper()
	select {
	case err := <-k.done:
		k.cmd = nil
		return err
	case <-time.After(20 * time.Second):
		k.t.Fatal("the daemon does not end")
		return nil
	}
}

func (k *keeper) kill() {
	k.t.Helper()
	k.cmd.Process.Kill()
	k.ended()
}

// reader is a process that compares a tree.
type reader struct {
	cmd   *exec.Cmd
	stdin io.Closer
	out   *os.File
}

func startComparing(t *testing.T, root string) *reader {
	t.Helper()
	r := &reader{cmd: exec.Command("/proc/self/exe")}
	r.cmd.Env = append(os.Environ(), "FS_TEST_COMPARE="+root)
	r.cmd.Stderr = os.Stderr
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var err error
	if r.stdin, err = r.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.out = out.(*os.File)
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.cmd.Process.Kill()
		r.cmd.Wait()
	})
	return r
}

// finish has the reader end after its pass, and checks what it has seen.
func (r *reader) finish(t *testing.T) (report readerReport) {
	t.Helper()
	r.stdin.Close()
	r.out.SetReadDeadline(time.Now().Add(60 * time.Second))
	if err := json.NewDecoder(r.out).Decode(&report); err != nil {
		t.Fatalf("report of a reader: %v", err)
	}
	for _, err := range report.Errors {
		t.Error(err)
	}
	return report
}

// eachResume runs f for each mode, with FUSE_NOTIFY_RESEND and without.
func eachResume(t *testing.T, f func(t *testing.T, a daemonArgs)) {
	for _, mode := range modes {
		for _, noResend := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/%s", mode, map[bool]string{false: "resend", true: "record"}[noResend]), func(t *testing.T) {
				f(t, daemonArgs{Mode: mode, NoResend: noResend})
			})
		}
	}
}

// kills is how often each test here kills the daemon, and after what time.
func kills() (n int, least, most time.Duration) {
	if os.Getenv("FULL") != "" {
		return 100, 200 * time.Millisecond, 2 * time.Second
	}
	return 5, 20 * time.Millisecond, 300 * time.Millisecond
}

func TestResume(t *testing.T) {
	eachResume(t, func(t *testing.T, a daemonArgs) { killAndCompare(t, a, nil) })
	t.Run("one processor", func(t *testing.T) {
		eachResume(t, func(t *testing.T, a daemonArgs) {
			if a.NoResend || os.Getenv("FULL") != "" {
				killAndCompare(t, a, []string{"GOMAXPROCS=1"})
			}
		})
	})
}

// killAndCompare kills the daemon again and again while two trees are compared.
func killAndCompare(t *testing.T, a daemonArgs, env []string) {
	k := newKeeper(t, a, 2)
	k.env = env
	k.start()
	k.ready()
	readers := []*reader{startComparing(t, k.args.Targets[0]), startComparing(t, k.args.Targets[1])}
	n, least, most := kills()
	for range n {
		timer := time.NewTimer(least + rand.N(most-least))
		select {
		case err := <-k.done:
			timer.Stop()
			k.cmd = nil
			t.Fatalf("the daemon ended by itself: %v", err)
		case <-timer.C:
		}
		k.kill()
		k.start()
	}
	k.ready()
	for _, r := range readers {
		report := r.finish(t)
		t.Logf("%d kills, %d passes, longest pause %v", n, report.Passes, report.Longest.Round(time.Millisecond))
	}
	k.stdin.Close()
	if err := k.ended(); err != nil {
		t.Errorf("the last daemon: %v", err)
	}
	if len(k.kept) > 0 {
		t.Errorf("still kept: %v", k.kept)
	}
	for _, target := range k.args.Targets {
		if entries, err := os.ReadDir(target); err != nil || len(entries) > 0 {
			t.Errorf("still mounted: %v, %v", entries, err)
		}
	}
}

// TestFailpoints kills the daemon at each step of a request, and at each of a resumption.
func TestFailpoints(t *testing.T) {
	n := 1
	if os.Getenv("FULL") != "" {
		n = 20
	}
	eachResume(t, func(t *testing.T, a daemonArgs) {
		for _, step := range []string{"read", "registered", "answer", "replied", "cleared", "replayed", "resent"} {
			if step == "resent" && a.NoResend {
				continue
			}
			t.Run(step, func(t *testing.T) {
				k := newKeeper(t, a, 1)
				k.start()
				k.ready()
				r := startComparing(t, k.args.Targets[0])
				for range n { // the later ones with work left by more than one
					k.kill()
					k.args.Step, k.args.Nth = step, 1+rand.Int64N(20)
					if step == "replayed" || step == "resent" {
						k.args.Nth = 1
					}
					k.start()
					if err := k.ended(); err == nil || !strings.Contains(err.Error(), "killed") {
						t.Fatalf("the daemon did not reach %q: %v", step, err)
					}
					k.args.Step = ""
					k.start()
				}
				k.ready()
				r.finish(t)
			})
		}
	})
}

// TestKilledWhileMounting kills a new daemon at each request that its own start and mount lead to, once it has read it: it dies, though it
// waits for the answer, and the next one mounts and serves.
func TestKilledWhileMounting(t *testing.T) {
	step := int64(6)
	if os.Getenv("FULL") != "" {
		step = 1
	}
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			k := newKeeper(t, daemonArgs{Mode: mode, Step: "read"}, 1)
			for n := int64(1); ; n += step {
				k.args.Step, k.args.Nth = "read", n
				k.start()
				line, _ := k.out.ReadString('\n')
				if line != "" {
					if n < 10 {
						t.Errorf("%q before request %d", line, n)
					}
					return
				}
				if err := k.ended(); err == nil || !strings.Contains(err.Error(), "killed") {
					t.Fatalf("request %d: %v", n, err)
				}
				k.args.Step = ""
				k.start()
				k.ready()
				startComparing(t, k.args.Targets[0]).finish(t)
				k.stdin.Close()
				if err := k.ended(); err != nil || len(k.kept) > 0 {
					t.Fatalf("request %d: the next daemon: %v, still kept: %v", n, err, k.kept)
				}
			}
		})
	}
}

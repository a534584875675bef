package fs

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// byFault before the path of FS_TEST_READ has it read by a page fault, without read-ahead.
const byFault = "fault:"

// readInChild is the process that the tests here send signals to: it prints its thread, reads the first page of path, once, with
// no regard for EINTR, and prints what it got.
func readInChild(path string) int {
	runtime.LockOSThread()
	signal.Notify(make(chan os.Signal, 1), unix.SIGUSR1)
	path, fault := strings.CutPrefix(path, byFault)
	fd, err := unix.Open(path, unix.O_RDONLY, 0)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println(unix.Gettid())
	p := make([]byte, 4096)
	if fault {
		mem, err := unix.Mmap(fd, 0, len(p), unix.PROT_READ, unix.MAP_SHARED)
		if err == nil {
			err = unix.Madvise(mem, unix.MADV_RANDOM)
		}
		if err != nil {
			fmt.Fprint(os.Stderr, err)
			return 1
		}
		os.Stderr.Write(mem) // write(2) reads them
		return 0
	}
	n, err := unix.Pread(fd, p, 0)
	if err != nil {
		fmt.Fprint(os.Stderr, err)
		return 1
	}
	os.Stderr.Write(p[:n])
	return 0
}

// startReader starts a child that reads path, and returns it with the thread that reads. What it reads comes on its standard error.
func startReader(t *testing.T, path string, got *bytes.Buffer) (*exec.Cmd, int) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "FS_TEST_READ="+path)
	cmd.Stderr = got
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var tid int
	if _, err := fmt.Fscan(out, &tid); err != nil {
		t.Fatal(err)
	}
	return cmd, tid
}

// readers are the ways a process can wait for a Device: in the three modes, and in the data device's own file.
func waitingReads(t *testing.T, f func(t *testing.T, s *Server, m *image, path string)) {
	m := newImage()
	m.file("file", noise(1, 4096))
	inModes(t, func(t *testing.T, s *Server) {
		img := m.write(t, "image")
		target := mountImage(t, s, img)
		t.Run("file", func(t *testing.T) { f(t, s, m, filepath.Join(target, "file")) })
		if s.mode == ModeFile {
			t.Run("data device", func(t *testing.T) { f(t, s, m, filepath.Join(s.dir, img.ID)) })
		}
	})
}

func TestKilledRead(t *testing.T) {
	waitingReads(t, func(t *testing.T, s *Server, m *image, path string) {
		defer m.dev.block(t)()
		before, _, _ := m.dev.counts()
		cmd, _ := startReader(t, path, &bytes.Buffer{})
		eventually(t, "a read of the device", func() bool { reads, _, _ := m.dev.counts(); return reads > before })
		start := time.Now()
		cmd.Process.Kill()
		cmd.Wait()
		if d := time.Since(start); d > 5*time.Second {
			t.Errorf("the process died after %v", d)
		}
	})
}

func TestSignalledRead(t *testing.T) {
	waitingReads(t, func(t *testing.T, s *Server, m *image, path string) {
		release := m.dev.block(t)
		before, _, _ := m.dev.counts()
		var got bytes.Buffer
		cmd, tid := startReader(t, path, &got)
		eventually(t, "a read of the device", func() bool { reads, _, _ := m.dev.counts(); return reads > before })
		if err := unix.Tgkill(cmd.Process.Pid, tid, unix.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(path, "/image") { // a read that the kernel tells us about
			eventually(t, "an interrupt", s.devices.session.interrupted)
		}
		release()
		err := cmd.Wait()
		want := m.dev.data[512 : 512+4096]
		if strings.HasSuffix(path, "/image") {
			want = m.dev.data[:4096]
		}
		if err != nil || !bytes.Equal(got.Bytes(), want) {
			t.Errorf("a read disturbed by a signal gave %d bytes, %v", got.Len(), err)
		}
	})
}

// interrupted reports whether a READ in flight has been interrupted.
func (s *session) interrupted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.reads {
		if r.watched {
			return true
		}
	}
	return false
}

// TestKilledAfterSignal kills a process whose READ has been interrupted by another signal before: the kernel does not tell again.
func TestKilledAfterSignal(t *testing.T) {
	s := newServer(t, Options{Mode: ModeFile})
	m := newImage()
	m.file("file", noise(1, 4096))
	img := m.write(t, "image")
	mountImage(t, s, img)
	defer m.dev.block(t)()
	cmd, tid := startReader(t, filepath.Join(s.dir, img.ID), &bytes.Buffer{})
	eventually(t, "a read of the device", func() bool { _, running, _ := m.dev.counts(); return running > 0 })
	if err := unix.Tgkill(cmd.Process.Pid, tid, unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	eventually(t, "an interrupt", s.devices.session.interrupted)
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil { // fatal, by default
		t.Fatal(err)
	}
	start := time.Now()
	cmd.Wait()
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("the process died after %v", d)
	}
}

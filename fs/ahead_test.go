package fs

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestReadAhead: what was read ahead, in large pieces, costs the device nothing any more, and nothing else was read.
func TestReadAhead(t *testing.T) {
	m := newImage()
	content := map[string][]byte{"a": noise(1, 300_000), "dir/b": noise(2, 1<<20), "c": noise(3, 5000)}
	m.add("dir", dir())
	for name, b := range content {
		m.file(name, b)
	}
	inModes(t, func(t *testing.T, s *Server) {
		target := mountImage(t, s, m.write(t, "image"))
		reads := func() int {
			reads, running, _ := m.dev.counts()
			if running > 0 {
				return -1
			}
			return reads
		}
		asked := func() (bytes int64, running int) {
			m.dev.mu.Lock()
			defer m.dev.mu.Unlock()
			return m.dev.bytes, m.dev.running
		}
		before, _ := asked()
		begun := reads()
		ranges := []Range{{"dir/b", 0, 256 << 10}, {"a", 0, 300_000}, {"dir/b", 256 << 10, 768 << 10}}
		if err := s.ReadAhead(target, ranges); err != nil {
			t.Fatal(err)
		}
		const want = 1<<20 + 300_000
		eventually(t, "all is read", func() bool { bytes, running := asked(); return bytes-before >= want && running == 0 })
		if bytes, _ := asked(); bytes-before > want+2*4096 {
			t.Errorf("%d bytes were read ahead, want %d", bytes-before, want)
		}
		begin := reads()
		if n := begin - begun; n > want/(32<<10) { // the kernel makes 64 KiB of one of ours in mode file
			t.Errorf("%d reads for %d bytes", n, want)
		}
		for _, name := range []string{"a", "dir/b"} {
			if got, err := os.ReadFile(filepath.Join(target, name)); err != nil || !bytes.Equal(got, content[name]) {
				t.Errorf("%s: %d bytes, %v", name, len(got), err)
			}
		}
		if got := reads(); got != begin {
			t.Errorf("%d reads of what was read ahead", got-begin)
		}
		if _, err := os.ReadFile(filepath.Join(target, "c")); err != nil || reads() == begin {
			t.Errorf("what was not read ahead costs no read (%v)", err)
		}
		if err := s.ReadAhead(target, []Range{{"none", 0, 1}}); err == nil {
			t.Error("no error for a file that is not there")
		}
		if err := s.ReadAhead(t.TempDir(), ranges); err != nil {
			t.Errorf("where nothing is mounted: %v", err)
		}
	})
}

// TestUnmountEndsReadAhead: a process that reads ahead keeps no mount, even if it waits for the device.
func TestUnmountEndsReadAhead(t *testing.T) {
	m := newImage()
	m.file("file", noise(1, 1<<20))
	inModes(t, func(t *testing.T, s *Server) {
		target := mountImage(t, s, m.write(t, "image"))
		var ranges []Range
		for range 1000 {
			ranges = append(ranges, Range{"file", 0, 1 << 20})
		}
		release := m.dev.block(t)
		done := make(chan error)
		go func() { done <- s.ReadAhead(target, ranges) }()
		eventually(t, "it waits", func() bool { _, running, _ := m.dev.counts(); return running > 0 })
		unmounted := make(chan error)
		go func() { unmounted <- s.Unmount(target) }()
		eventually(t, "the unmount has begun", func() bool { return !s.Mounted(target) })
		release()
		if err := <-unmounted; err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// forked lists the processes that pid has forked and that have not ended.
func forked(pid int) (children []int) {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, list := range lists {
		b, _ := os.ReadFile(list) // of a thread that has ended: nothing
		for _, field := range strings.Fields(string(b)) {
			if child, err := strconv.Atoi(field); err == nil {
				children = append(children, child)
			}
		}
	}
	return children
}

// TestReadAheadEndsWithDaemon: the child of a daemon that was killed does not keep the successor from unmounting.
func TestReadAheadEndsWithDaemon(t *testing.T) {
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			k := newKeeper(t, daemonArgs{Mode: mode, Ahead: true}, 1)
			k.start()
			k.ready()
			child, stat := 0, func(pid int) string {
				b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
				return string(b)
			}
			eventually(t, "it reads ahead", func() bool {
				for _, child = range forked(k.cmd.Process.Pid) {
					if root, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/0", child)); root != k.args.Targets[0] {
						continue // it has not begun
					}
					unix.Kill(child, unix.SIGSTOP) // or it would end by itself
					if strings.Contains(stat(child), ") T ") {
						return true
					}
				}
				return false
			})
			t.Cleanup(func() { unix.Kill(child, unix.SIGKILL) })
			k.kill()
			k.args.Ahead = false
			k.start()
			k.ready()
			eventually(t, "the child has ended", func() bool { return stat(child) == "" || strings.Contains(stat(child), ") Z ") })
			k.stdin.Close()
			if err := k.ended(); err != nil || len(k.kept) > 0 {
				t.Errorf("the next daemon: %v, still kept: %v", err, k.kept)
			}
		})
	}
}

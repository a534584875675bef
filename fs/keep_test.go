package fs

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestLeave ends daemons orderly while a tree is compared: what is in flight then is the next one's.
func TestLeave(t *testing.T) {
	eachResume(t, func(t *testing.T, a daemonArgs) {
		k := newKeeper(t, a, 1)
		k.start()
		k.ready()
		r := startComparing(t, k.args.Targets[0])
		for range 3 {
			k.stdin.(*os.File).WriteString("leave")
			k.stdin.Close()
			if err := k.ended(); err != nil {
				t.Errorf("a daemon that leaves its mounts: %v", err)
			}
			k.start()
			k.ready()
		}
		r.finish(t)
	})
}

// TestRelease releases what a killed daemon has kept, with a reader inside, whose read ends.
func TestRelease(t *testing.T) {
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			k := newKeeper(t, daemonArgs{Mode: mode}, 2)
			before := leftovers(t, filepath.Dir(k.args.Dir))
			k.start()
			k.ready()
			r := startComparing(t, k.args.Targets[0])
			k.kill()
			eventually(t, "a read that waits", func() bool { return waitsInRead(r.cmd.Process.Pid) })
			own := &socketKeeper{kept: k.kept}
			if err := Release(dropping{own}); err != nil && !errors.Is(err, unix.EBUSY) {
				t.Error(err)
			}
			var report readerReport
			if err := json.NewDecoder(r.out).Decode(&report); err != nil || len(report.Errors) == 0 {
				t.Errorf("the reader saw %v, %v, want an error", report.Errors, err)
			}
			r.cmd.Wait()
			if len(own.kept) > 0 {
				t.Errorf("still kept: %v", own.kept)
			}
			eventually(t, "nothing left behind", func() bool { return !leftovers(t, filepath.Dir(k.args.Dir)).exceed(before) })
		})
	}
}

// dropping is the Keeper of whoever keeps: what is dropped is gone.
type dropping struct{ *socketKeeper }

func (k dropping) Drop(name string) error {
	if f := k.Kept(name); f != nil {
		return f.Close()
	}
	return nil
}

// TestOtherMode: mounts are served on in their mode when another is configured.
func TestOtherMode(t *testing.T) {
	for _, change := range [][2]Mode{{ModeFile, ModeTree}, {ModeLoop, ModeFile}, {ModeTree, ModeLoop}} {
		t.Run(string(change[0])+" to "+string(change[1]), func(t *testing.T) {
			k := newKeeper(t, daemonArgs{Mode: change[0]}, 2)
			second := k.args.Targets[1]
			k.args.Targets = k.args.Targets[:1]
			k.start()
			k.ready()
			k.kill()
			k.args.Mode, k.args.Targets = change[1], append(k.args.Targets, second)
			k.start()
			k.ready()
			for _, target := range k.args.Targets {
				startComparing(t, target).finish(t)
			}
			k.stdin.Close()
			if err := k.ended(); err != nil || len(k.kept) > 0 {
				t.Errorf("the last daemon: %v; still kept: %v", err, k.kept)
			}
		})
	}
}

// TestKilledReaderWithoutDaemon: a process that waits for a daemon that is away can be killed, and the next daemon serves on.
func TestKilledReaderWithoutDaemon(t *testing.T) {
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			k := newKeeper(t, daemonArgs{Mode: mode}, 1)
			k.start()
			k.ready()
			r := startComparing(t, k.args.Targets[0])
			k.kill()
			eventually(t, "a read that waits", func() bool { return waitsInRead(r.cmd.Process.Pid) })
			start := time.Now()
			r.cmd.Process.Kill()
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				r.cmd.Wait()
			}()
			select {
			case <-ended:
			case <-time.After(5 * time.Second):
				// It waits for a request that the killed daemon has read, which the kernel does not give up.
			}
			t.Logf("without a daemon: dead after %v", time.Since(start).Round(time.Millisecond))
			k.start()
			k.ready()
			select {
			case <-ended:
			case <-time.After(20 * time.Second):
				t.Error("not dead with a daemon")
			}
			startComparing(t, k.args.Targets[0]).finish(t)
		})
	}
}

// waitsInRead reports whether a thread of a process is blocked in a system call that reads a file.
func waitsInRead(pid int) bool {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", pid))
	for _, task := range tasks {
		b, _ := os.ReadFile(task)
		number, _, _ := strings.Cut(string(b), " ")
		switch n, err := strconv.Atoi(number); {
		case err == nil && (n == unix.SYS_PREAD64 || n == unix.SYS_OPENAT || n == unix.SYS_NEWFSTATAT || n == unix.SYS_GETDENTS64):
			return true
		}
	}
	return false
}

func TestStateOfAnotherRelease(t *testing.T) {
	st, err := newState()
	if err != nil {
		t.Fatal(err)
	}
	defer st.close()
	reopen := func() error {
		fd, err := unix.Dup(int(st.file.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		again, a, _, err := openState(os.NewFile(uintptr(fd), "state"))
		if err == nil {
			if a != nil && a.Target != "/mount" {
				t.Errorf("about: %+v", a)
			}
			again.close()
		}
		return err
	}
	if err := reopen(); err != nil {
		t.Errorf("an incomplete state: %v", err)
	}
	if err := st.setAbout(about{Kind: kindTree, Target: "/mount"}); err != nil {
		t.Fatal(err)
	}
	if err := reopen(); err != nil {
		t.Errorf("a complete state: %v", err)
	}
	st.mem[len(stateMagic)-1]++
	if err := reopen(); !errors.Is(err, errState) {
		t.Errorf("a state of another version: %v", err)
	}
	st.mem[len(stateMagic)-1]--
	*st.word(8) = aboutSize + 1
	if err := reopen(); !errors.Is(err, errState) {
		t.Errorf("a damaged state: %v", err)
	}
	other, err := os.Create(filepath.Join(t.TempDir(), "other"))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := openState(other); !errors.Is(err, errState) {
		t.Errorf("an empty file: %v", err)
	}
}

// TestSlots: slots that are used up are waited for, and a successor finds those in use.
func TestSlots(t *testing.T) {
	st, err := newState()
	if err != nil {
		t.Fatal(err)
	}
	defer st.close()
	if err := st.setAbout(about{}); err != nil {
		t.Fatal(err)
	}
	held := make([]slot, maxSlots)
	for i := range held {
		held[i] = st.get()
		header(held[i].req).Length = 40
	}
	got := make(chan slot)
	go func() { got <- st.get() }()
	select {
	case sl := <-got:
		t.Fatalf("slot %d is given out twice", sl.i)
	case <-time.After(10 * time.Millisecond):
	}
	st.put(held[300])
	if sl := <-got; sl.i != held[300].i || header(sl.req).Length != 0 {
		t.Errorf("slot %d with a request of %d bytes", sl.i, header(sl.req).Length)
	}
	for _, sl := range held[10:] {
		st.put(sl)
	}
	fd, err := unix.Dup(int(st.file.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	again, _, used, err := openState(os.NewFile(uintptr(fd), "state"))
	if err != nil {
		t.Fatal(err)
	}
	defer again.close()
	if len(used) != 10 {
		t.Errorf("a successor finds %d requests, want 10", len(used))
	}
	for _, sl := range used {
		if len(sl.req) != 40 {
			t.Errorf("request of %d bytes", len(sl.req))
		}
	}
	var st2 unix.Stat_t
	if err := unix.Fstat(int(st.file.Fd()), &st2); err != nil || st2.Blocks*512 > 4<<20 {
		t.Errorf("%d bytes stay in use, %v", st2.Blocks*512, err)
	}
	if sl := again.get(); header(sl.req).Length != 0 {
		t.Errorf("slot %d is given out in use", sl.i)
	}
}

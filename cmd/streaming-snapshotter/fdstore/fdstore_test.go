package fdstore

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// reportKept makes the test's executable print what it was given.
const reportKept = "FDSTORE_TEST_REPORT"

func TestMain(m *testing.M) {
	if os.Getenv(reportKept) != "" {
		os.Exit(report())
	}
	os.Exit(m.Run())
}

func report() int {
	s, err := Open()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	for _, name := range s.KeptNames() {
		f := s.Kept(name)
		flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
		b, readErr := io.ReadAll(io.NewSectionReader(f, 0, 100))
		fmt.Printf("%s=%s cloexec=%t env=%q %v %v\n", name, b, flags&unix.FD_CLOEXEC != 0, os.Getenv("LISTEN_FDS"), err, readErr)
	}
	return 0
}

func file(t *testing.T, text string) *os.File {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// keeping runs a Keeper until stop.
func keeping(t *testing.T, path string, own *Store, states func(string)) (stop func()) {
	t.Helper()
	k, err := NewKeeper(path, own, states)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- k.Serve(ctx) }()
	ended := false
	stop = func() {
		if cancel(); !ended {
			if err := <-served; err != nil {
				t.Error(err)
			}
		}
		ended = true
	}
	t.Cleanup(stop)
	return stop
}

func open(t *testing.T, env map[string]string) *Store {
	t.Helper()
	for k, v := range env {
		t.Setenv(k, v)
	}
	s, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// text returns what the kept file says, or "" if there is none.
func text(s *Store, name string) string {
	f := s.Kept(name)
	if f == nil {
		return ""
	}
	defer f.Close()
	b, _ := io.ReadAll(io.NewSectionReader(f, 0, 100))
	return string(b)
}

func TestKeeper(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sub", "s.sock")
	states := make(chan string, 1)
	keeping(t, path, open(t, nil), func(s string) { states <- s })
	if _, err := NewKeeper(path, open(t, nil), nil); err == nil {
		t.Error("two keepers at one socket")
	}
	env := map[string]string{KeeperEnv: path, "NOTIFY_SOCKET": path}
	first := open(t, env)
	if !first.Keeps() || len(first.KeptNames()) != 0 {
		t.Errorf("keeps %t, kept %v", first.Keeps(), first.KeptNames())
	}
	one, two := file(t, "one"), file(t, "two")
	for name, f := range map[string]*os.File{"a": one, "b": one, "c": two} {
		if err := first.Keep(name, f); err != nil {
			t.Fatal(err)
		}
	}
	if err := first.Keep("b", two); err != nil {
		t.Fatal(err)
	}
	if err := first.Drop("c"); err != nil {
		t.Fatal(err)
	}
	if err := first.Drop("never"); err != nil {
		t.Error(err)
	}
	if err := first.Keep("A=B", one); err == nil {
		t.Error("a name that is none was kept")
	}
	if err := first.Notify("READY=1"); err != nil {
		t.Error(err)
	}
	if got := <-states; got != "READY=1" {
		t.Errorf("got %q", got)
	}
	one.Close()
	two.Close()
	for range 2 { // what is taken stays kept
		s := open(t, env)
		if got := s.KeptNames(); !slices.Equal(got, []string{"a", "b"}) {
			t.Errorf("kept %v", got)
		}
		if a, b, again := text(s, "a"), text(s, "b"), text(s, "a"); a != "one" || b != "two" || again != "" {
			t.Errorf("got %q, %q, %q", a, b, again)
		}
	}
}

// Many descriptors, more than a socket's queue holds and than one message can carry.
func TestKeeperMany(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	keeping(t, path, open(t, nil), nil)
	env := map[string]string{KeeperEnv: path}
	s := open(t, env)
	f := file(t, "text")
	for i := range 500 {
		if err := s.Keep(fmt.Sprintf("fuse-%d", i), f); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(open(t, env).KeptNames()); n != 500 {
		t.Errorf("got %d", n)
	}
}

// A keeper that is restarted has its descriptors from its own keeper, and its clients wait for it.
func TestKeeperRestarted(t *testing.T) {
	dir := t.TempDir()
	upper, lower := filepath.Join(dir, "upper.sock"), filepath.Join(dir, "lower.sock")
	keeping(t, upper, open(t, nil), nil)
	own := func() *Store { return open(t, map[string]string{KeeperEnv: upper}) }
	stop := keeping(t, lower, own(), nil)
	client := open(t, map[string]string{KeeperEnv: lower})
	if err := client.Keep("a", file(t, "before")); err != nil {
		t.Fatal(err)
	}
	stop()
	kept := make(chan error, 1)
	f := file(t, "while it is away")
	go func() { kept <- client.Keep("b", f) }()
	keeping(t, lower, own(), nil)
	if err := <-kept; err != nil {
		t.Fatal(err)
	}
	s := open(t, map[string]string{KeeperEnv: lower})
	if a, b := text(s, "a"), text(s, "b"); a != "before" || b != "while it is away" {
		t.Errorf("got %q, %q", a, b)
	}
}

// The protocol of systemd: what is sent, and what is handed over.
func TestSystemd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	got := make(chan string, 100)
	go func() {
		for {
			text, files, err := receive(conn)
			if err != nil {
				close(got)
				return
			}
			got <- fmt.Sprintf("%s %d", strings.ReplaceAll(text, "\n", " "), len(files))
			for _, f := range files {
				f.Close()
			}
		}
	}()
	if s := open(t, map[string]string{"NOTIFY_SOCKET": path}); s.Keeps() {
		t.Error("FDSTORE is not set, but it keeps")
	}
	s := open(t, map[string]string{"NOTIFY_SOCKET": path, "FDSTORE": "2"})
	f := file(t, "text")
	for _, name := range []string{"a", "b", "a"} {
		if err := s.Keep(name, f); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Keep("c", f); err == nil || !strings.Contains(err.Error(), "FileDescriptorStoreMax") {
		t.Errorf("more than the store holds: %v", err)
	}
	if err := s.Drop("b"); err != nil {
		t.Fatal(err)
	}
	if err := s.Keep("c", f); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"FDSTORE=1 FDPOLL=0 FDNAME=a 1", "BARRIER=1 1", "FDSTORE=1 FDPOLL=0 FDNAME=b 1", "BARRIER=1 1",
		"FDSTOREREMOVE=1 FDNAME=a 0", "BARRIER=1 1", "FDSTORE=1 FDPOLL=0 FDNAME=a 1", "BARRIER=1 1",
		"FDSTOREREMOVE=1 FDNAME=b 0", "BARRIER=1 1", "FDSTORE=1 FDPOLL=0 FDNAME=c 1", "BARRIER=1 1",
	} {
		select {
		case g := <-got:
			if g != want {
				t.Errorf("got %q, want %q", g, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("no %q", want)
		}
	}
}

func TestListenFDs(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	run := func(pid string) string {
		// A shell, because the process ID must be known.
		c := exec.Command("/bin/sh", "-c", fmt.Sprintf(`export LISTEN_PID=%s; exec "$0"`, pid), self)
		c.Env = append(os.Environ(), reportKept+"=1", "LISTEN_FDS=3", "LISTEN_FDNAMES=a:b:a")
		c.ExtraFiles = []*os.File{file(t, "older"), file(t, "two"), file(t, "newer")}
		out, err := c.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	want := "a=newer cloexec=true env=\"\" <nil> <nil>\nb=two cloexec=true env=\"\" <nil> <nil>\n"
	if got := run("$$"); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	if got := run("1"); got != "" {
		t.Errorf("meant for another process, and taken: %s", got)
	}
}

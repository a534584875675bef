package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// child returns the process ID of the supervisor's command, when it is another than not.
func (p *process) child(not int) int {
	p.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.Process.Pid))
		for _, task := range tasks {
			b, _ := os.ReadFile(task)
			if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && pid != not {
				return pid
			}
		}
	}
	p.t.Fatalf("no child of %d", p.Process.Pid)
	return 0
}

func waitForSocket(t *testing.T, address string) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		conn, err := net.Dial("unix", address)
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// call makes a call of the snapshots service over a connection of its own. An answer is an answer, "not found" as well.
func call(ctx context.Context, address string) error {
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "streaming").Stat(ctx, "nothing")
	if errdefs.IsNotFound(err) {
		err = nil
	}
	return err
}

// The daemon is killed, upgraded and started with a bad configuration: the socket stays, and who connects meanwhile is answered.
func TestSupervise(t *testing.T) {
	dir := t.TempDir()
	address := filepath.Join(dir, "run", "s.sock")
	config := writeConfig(t, filepath.Join(dir, "root"), address)
	t.Cleanup(func() { unix.Unmount(filepath.Join(dir, "root", "devices"), unix.MNT_DETACH) })
	program := filepath.Join(dir, "program")
	replaceProgram(t, program, "")
	p := startProgram(t, program, "supervise", "--", "serve", "--config", config)
	waitForSocket(t, address)
	if err := call(t.Context(), address); err != nil { // the socket is there a moment before it is kept, and answers only after that
		t.Fatal(err)
	}
	inode := func() uint64 {
		var st unix.Stat_t
		if err := unix.Stat(address, &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	socket, pid := inode(), p.child(0)

	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var calls sync.WaitGroup
	for range 4 {
		calls.Go(func() {
			for ctx.Err() == nil {
				one, cancel := context.WithTimeout(context.Background(), 30*time.Second)
				// Between processes a connection may break under a call: gRPC then says so, and containerd calls again.
				if err := call(one, address); err != nil && !errdefs.IsUnavailable(err) {
					t.Errorf("call: %v", err)
				}
				cancel()
			}
		})
	}
	for range 3 {
		unix.Kill(pid, unix.SIGKILL)
		conn, err := net.Dial("unix", address) // in the very moment
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		pid = p.child(pid)
		if err := call(context.Background(), address); err != nil {
			t.Error(err)
		}
	}
	replaceProgram(t, program, "a newer one") // the next start runs it
	p.signal(unix.SIGHUP)
	pid = p.child(pid)
	if err := call(context.Background(), address); err != nil {
		t.Error(err)
	}
	exe, err := os.ReadFile(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil || !bytes.HasSuffix(exe, []byte("a newer one")) {
		t.Errorf("not the new program: %v", err)
	}
	stop()
	calls.Wait()
	if inode() != socket {
		t.Error("the socket was replaced")
	}
	p.signal(unix.SIGTERM)
	if err := p.wait(); err != nil {
		t.Errorf("%v\n%s", err, &p.stderr)
	}
	if unix.Kill(pid, 0) == nil {
		t.Error("the daemon is still there")
	}
	p.wantUnmounted(filepath.Join(dir, "root"))
	if _, err := os.Lstat(address); !os.IsNotExist(err) {
		t.Errorf("the socket: %v, want it gone", err)
	}
}

// install puts a copy of this program at path, as a package manager does, with a mark at its end.
func replaceProgram(t *testing.T, path, mark string) {
	t.Helper()
	b, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+".new", append(b, mark...), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// A command that cannot start says so and is not tried again; serve is.
func TestSuperviseFailures(t *testing.T) {
	start(t, "supervise", "--", "mount", "::", t.TempDir()).wantFailure(`"::"`)
	start(t, "supervise", "--", "nothing").wantFailure("unknown command")
	start(t, "supervise", "--config", "node.toml", "--", "serve").wantFailure("supervise -- serve --config FILE")
	dir := t.TempDir()
	config := writeConfig(t, filepath.Join(dir, "root"), filepath.Join(dir, "s.sock"))
	if err := os.WriteFile(filepath.Join(dir, "root"), nil, 0o600); err != nil { // no start gets as far as to be counted
		t.Fatal(err)
	}
	p := start(t, "supervise", "--", "serve", "--config", config)
	first := p.child(0)
	p.child(first)
	p.signal(unix.SIGTERM)
	if err := p.wait(); err != nil {
		t.Log(err) // the daemon's, if it was running
	}
	p.wantNothingLeft()
}

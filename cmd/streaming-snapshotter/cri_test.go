package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// wantProxy waits for the proxy at address, to which containerd's absence can be told.
func wantProxy(t *testing.T, address string) {
	t.Helper()
	waitForSocket(t, address)
	if err := call(t.Context(), address); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "c.sock") {
		t.Errorf("got %v, want that containerd is away", err)
	}
}

// The proxy's socket is handed over like the other one, and goes when nobody is to serve it any more. That it cannot be served is no hindrance for the rest.
func TestCRISocket(t *testing.T) {
	dir := t.TempDir()
	address, proxy := filepath.Join(dir, "s.sock"), filepath.Join(dir, "p.sock")
	config := writeConfig(t, filepath.Join(dir, "root"), address)
	t.Cleanup(func() { unix.Unmount(filepath.Join(dir, "root", "devices"), unix.MNT_DETACH) })
	off, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	on := string(off) + "cri_proxy = '" + proxy + "'\ncri_containerd = '" + filepath.Join(dir, "c.sock") + "'\ncri_credentials_key = ''\n"
	rewrite := func(text string) {
		t.Helper()
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	inode := func() uint64 {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Stat(proxy, &st); err != nil || st.Mode&0o777 != 0o600 {
			t.Fatalf("mode %o, %v", st.Mode, err)
		}
		return st.Ino
	}
	rewrite(on)
	p := start(t, "supervise", "--", "serve", "--config", config)
	wantProxy(t, proxy)
	socket, pid := inode(), p.child(0)
	unix.Kill(pid, unix.SIGKILL)
	conn, err := net.Dial("unix", proxy) // in the very moment
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	pid = p.child(pid)
	wantProxy(t, proxy)
	if inode() != socket {
		t.Error("the socket was replaced")
	}

	rewrite(string(off))
	p.signal(unix.SIGHUP)
	pid = p.child(pid)
	if err := call(t.Context(), address); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(proxy); !os.IsNotExist(err) {
		t.Errorf("turned off: %v, want it gone", err)
	}

	rewrite(strings.ReplaceAll(on, proxy, dir)) // which is no socket
	p.signal(unix.SIGHUP)
	pid = p.child(pid)
	if err := call(t.Context(), address); err != nil {
		t.Errorf("a proxy that cannot be: %v", err)
	}

	rewrite(on)
	p.signal(unix.SIGHUP)
	p.child(pid)
	wantProxy(t, proxy)
	p.signal(unix.SIGTERM)
	if err := p.wait(); err != nil {
		t.Errorf("%v\n%s", err, &p.stderr)
	}
	if _, err := os.Lstat(proxy); !os.IsNotExist(err) {
		t.Errorf("after the end: %v, want it gone", err)
	}
}

package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/fdstore"
)

// The names under which sockets are kept.
const (
	snapshotsSocket = "listen-snapshots" // of the snapshots service
	criSocket       = "listen-cri"       // of the proxy of CRI
)

// listen returns the socket at address that st has under name from a predecessor, or, for the snapshots service, from a systemd socket unit; or a new one, which st is given to keep.
// A kept one stays at its address when the listener is closed, and clients that connect meanwhile wait.
func listen(name, address string, st *fdstore.Store) (net.Listener, error) {
	if l := inherited(name, address, st); l != nil {
		return l, nil
	}
	l, err := newSocket(address)
	if err != nil || !st.Keeps() {
		return l, err
	}
	f, err := l.File()
	if err == nil {
		err = st.Keep(name, f)
		f.Close()
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	l.SetUnlinkOnClose(false)
	return l, nil
}

// removeSocket removes the socket that listen has given to st to keep under name.
func removeSocket(name string, st *fdstore.Store) error {
	f := st.Kept(name)
	if f == nil {
		return nil
	}
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return err
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(true)
	}
	return l.Close()
}

// inherited returns the socket at address that st has, or nil. One that has lost its place in the file system is of no use.
func inherited(name, address string, st *fdstore.Store) (found net.Listener) {
	for _, kept := range st.KeptNames() {
		if kept != name && (name != snapshotsSocket || !strings.HasSuffix(kept, ".socket")) {
			continue
		}
		f := st.Kept(kept)
		l, err := net.FileListener(f)
		f.Close()
		if err != nil {
			continue
		}
		if found == nil && l.Addr().Network() == "unix" && l.Addr().String() == address && reaches(address) {
			found = l
			continue
		}
		l.Close()
	}
	return found
}

// reaches reports whether somebody listens at address.
func reaches(address string) bool {
	conn, err := net.Dial("unix", address)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// newSocket replaces a socket that a dead daemon left, and nothing else.
func newSocket(address string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(address), 0o700); err != nil {
		return nil, err
	}
	if st, err := os.Lstat(address); err == nil {
		if st.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("address %s exists and is no socket: remove it, or configure another address", address)
		}
		if reaches(address) {
			return nil, fmt.Errorf("address %s is served by another process: end that one, or configure another address", address)
		}
		if err := os.Remove(address); err != nil {
			return nil, err
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: address, Net: "unix"})
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(address, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// Package fdstore keeps descriptors beyond the life of a process, for its successor: in systemd's descriptor store, or with a Keeper, a
// small process of our own (`streaming-snapshotter supervise`).
//
// Both are spoken to as sd_notify(3) describes: datagrams of KEY=VALUE lines with descriptors attached. systemd hands descriptors back as
// sd_listen_fds(3) describes; a Keeper is asked for them, because it need not be the parent. BARRIER=1 says when something is kept.
//
// The environment says who keeps:
//
//	NOTIFY_SOCKET                  where to tell that we are ready
//	FDSTORE                        how many descriptors systemd keeps; set by systemd 254 and later, or in a unit file
//	STREAMING_SNAPSHOTTER_KEEPER   socket of a Keeper, which is preferred to systemd
//	LISTEN_PID, _FDS, _FDNAMES     what systemd hands over: descriptors kept, and sockets
//
// The package does not know what the descriptors are, and never reads, polls or stats them.
package fdstore

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// KeeperEnv names the environment variable with the path of a Keeper's socket.
const KeeperEnv = "STREAMING_SNAPSHOTTER_KEEPER"

// patience bounds the wait for systemd or a Keeper, which may be restarting.
const patience = 20 * time.Second

// firstFD is SD_LISTEN_FDS_START.
const firstFD = 3

// Store is this process's side. Its methods may be called from many goroutines.
type Store struct {
	notify string // NOTIFY_SOCKET, or ""
	keeper string // socket to keep with, or "": nothing is kept
	limit  int    // of the names kept; 0: the keeper says no
	own    bool   // keeper is a Keeper, not systemd

	mu    sync.Mutex // never held while waiting for the keeper
	names map[string]bool
	kept  map[string]*os.File // of predecessors, not yet taken
}

// Open takes what the environment of the process says, out of it, so that its children do not see it, and what predecessors have kept.
func Open() (*Store, error) {
	s := &Store{names: map[string]bool{}, kept: map[string]*os.File{}, notify: takeEnv("NOTIFY_SOCKET")}
	limit, _ := strconv.Atoi(takeEnv("FDSTORE"))
	if path := takeEnv(KeeperEnv); path != "" {
		s.keeper, s.own = path, true
	} else if limit > 0 && s.notify != "" {
		s.keeper, s.limit = s.notify, limit
	}
	pid, count, names := takeEnv("LISTEN_PID"), takeEnv("LISTEN_FDS"), strings.Split(takeEnv("LISTEN_FDNAMES"), ":")
	if pid == strconv.Itoa(os.Getpid()) {
		n, err := strconv.Atoi(count)
		if err != nil || n < 0 {
			return nil, fmt.Errorf("LISTEN_FDS=%q", count)
		}
		for i := range n {
			unix.CloseOnExec(firstFD + i)
			name := "unknown"
			if i < len(names) && names[i] != "" {
				name = names[i]
			}
			s.receive(name, os.NewFile(uintptr(firstFD+i), name))
		}
	}
	if !s.own {
		return s, nil
	}
	return s, s.take()
}

// OpenKeeper takes what is kept by the Keeper at path.
func OpenKeeper(path string) (*Store, error) {
	s := &Store{names: map[string]bool{}, kept: map[string]*os.File{}, keeper: path, own: true}
	return s, s.take()
}

func takeEnv(key string) string {
	v := os.Getenv(key)
	os.Unsetenv(key)
	return v
}

func (s *Store) receive(name string, f *os.File) {
	if old := s.kept[name]; old != nil { // the last one stored counts
		old.Close()
	}
	s.kept[name], s.names[name] = f, true
}

// Keeps reports whether there is somebody who keeps descriptors.
func (s *Store) Keeps() bool { return s.keeper != "" }

// Keep keeps a copy of f under name ([a-z0-9-]+, at most 200 bytes), which replaces one kept under that name. f stays the caller's. When
// it has returned nil, the copy outlives this process, however it ends.
func (s *Store) Keep(name string, f *os.File) error {
	if !regexp.MustCompile(`^[a-z0-9-]{1,200}$`).MatchString(name) {
		return fmt.Errorf("keep descriptor %q: not a name", name)
	}
	if !s.Keeps() {
		return errors.New("keep descriptor: nobody keeps it")
	}
	s.mu.Lock()
	full, known := s.limit > 0 && len(s.names) >= s.limit, s.names[name]
	if !full {
		s.names[name] = true
	}
	s.mu.Unlock()
	if full && !known {
		return fmt.Errorf("keep descriptor %s: %d are kept, and no more can be (FileDescriptorStoreMax=)", name, s.limit)
	}
	if known && !s.own { // a Keeper replaces, systemd adds
		if err := s.tell("FDSTOREREMOVE=1\nFDNAME="+name, nil); err != nil {
			return fmt.Errorf("keep descriptor %s: %w", name, err)
		}
	}
	if err := s.tell("FDSTORE=1\nFDPOLL=0\nFDNAME="+name, f); err != nil {
		return fmt.Errorf("keep descriptor %s: %w", name, err)
	}
	return nil
}

// Drop forgets name. A name that is not kept is no error.
func (s *Store) Drop(name string) error {
	if !s.Keeps() {
		return nil
	}
	if err := s.tell("FDSTOREREMOVE=1\nFDNAME="+name, nil); err != nil {
		return fmt.Errorf("drop descriptor %s: %w", name, err)
	}
	s.mu.Lock()
	delete(s.names, name)
	s.mu.Unlock()
	return nil
}

// Kept returns what a predecessor kept under name, the first time it is called for it; nil if there is nothing. The caller closes it,
// and the copy that is kept stays until Drop.
func (s *Store) Kept(name string) *os.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.kept[name]
	delete(s.kept, name)
	return f
}

// KeptNames lists the names for which Kept has something, sorted.
func (s *Store) KeptNames() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := make([]string, 0, len(s.kept))
	for name := range s.kept {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Notify tells who started the process its state, as in "READY=1\nSTATUS=serving". Without somebody to tell it does nothing. It waits for one
// that is restarting, but not with STOPPING=1: who has gone for good is a reason to stop.
func (s *Store) Notify(state string) error {
	if s.notify == "" {
		return nil
	}
	if state == "STOPPING=1" {
		return sendOnce(s.notify, state, nil)
	}
	return send(s.notify, state, nil)
}

// tell sends a command with f, and waits until it is done: systemd and Keepers do one after the other.
func (s *Store) tell(command string, f *os.File) error {
	if err := send(s.keeper, command, f); err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	err = send(s.keeper, "BARRIER=1", w)
	w.Close()
	if err != nil {
		return err
	}
	r.SetReadDeadline(time.Now().Add(patience))
	if n, err := r.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		return fmt.Errorf("wait for %s: %w", s.keeper, err)
	}
	return nil
}

// take receives copies of all that the Keeper keeps: a message for each, its name with the descriptor, and takenAll at the end.
func (s *Store) take() (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("take descriptors from %s: %w", s.keeper, err)
		}
	}()
	ours, theirs, err := socketpair()
	if err != nil {
		return err
	}
	defer ours.Close()
	err = send(s.keeper, "TAKE=1", theirs)
	theirs.Close()
	if err != nil {
		return err
	}
	ours.SetReadDeadline(time.Now().Add(patience))
	for {
		name, files, err := receive(ours)
		if err != nil {
			return err
		}
		if name == takenAll {
			return nil
		}
		if name == "" {
			return io.ErrUnexpectedEOF
		}
		if len(files) != 1 {
			return fmt.Errorf("%d descriptors for %q", len(files), name)
		}
		s.receive(name, files[0])
	}
}

// send sends a datagram, and waits for a receiver that is restarting.
func send(address, text string, f *os.File) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := sendOnce(address, text, f)
		if !(errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT)) || time.Now().After(deadline) {
			return err
		}
	}
}

func sendOnce(address, text string, f *os.File) error {
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: address, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetWriteDeadline(time.Now().Add(patience))
	return write(c, text, f)
}

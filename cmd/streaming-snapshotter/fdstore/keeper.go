package fdstore

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Keeper keeps descriptors for other processes, one generation after the other, which reach it at its socket. It keeps copies with its own
// keeper, if it has one, so that it may end and come back as well.
type Keeper struct {
	conn   *net.UnixConn
	path   string
	own    *Store // its own keeper
	kept   map[string]*os.File
	states func(state string)
}

// NewKeeper listens at path, and takes what its predecessor kept with own. states is told what processes say of themselves, as READY=1; it
// is called by Serve.
func NewKeeper(path string, own *Store, states func(state string)) (*Keeper, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	addr := &net.UnixAddr{Name: path, Net: "unixgram"}
	if c, err := net.DialUnix("unixgram", nil, addr); err == nil {
		c.Close()
		return nil, fmt.Errorf("%s is served by another process", path)
	} else if errors.Is(err, unix.ECONNREFUSED) {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	conn, err := net.ListenUnixgram("unixgram", addr)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	k := &Keeper{conn: conn, path: path, own: own, kept: map[string]*os.File{}, states: states}
	for _, name := range own.KeptNames() {
		k.kept[name] = own.Kept(name)
	}
	return k, nil
}

// Serve answers until ctx ends, then closes everything.
func (k *Keeper) Serve(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { k.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	defer func() {
		k.conn.Close()
		os.Remove(k.path)
		for _, f := range k.kept {
			f.Close()
		}
	}()
	for {
		text, files, err := receive(k.conn)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("receive at %s: %w", k.path, err)
		}
		k.handle(text, files)
		for _, f := range files {
			if f != nil {
				f.Close()
			}
		}
	}
}

// handle sets those of files to nil that it keeps.
func (k *Keeper) handle(text string, files []*os.File) {
	lines := strings.Split(text, "\n")
	name := ""
	for _, l := range lines {
		if v, ok := strings.CutPrefix(l, "FDNAME="); ok {
			name = v
		}
	}
	switch {
	case slices.Contains(lines, "FDSTORE=1") && name != "" && len(files) == 1:
		if k.own.Keeps() {
			k.own.Keep(name, files[0]) // this process has it in any case
		}
		k.forget(name)
		k.kept[name], files[0] = files[0], nil
	case slices.Contains(lines, "FDSTOREREMOVE=1"):
		k.own.Drop(name)
		k.forget(name)
	case slices.Contains(lines, "TAKE=1") && len(files) == 1:
		k.give(files[0])
	case slices.Contains(lines, "BARRIER=1"):
		// That files are closed is the answer.
	default:
		k.states(text)
	}
}

func (k *Keeper) forget(name string) {
	if f := k.kept[name]; f != nil {
		f.Close()
		delete(k.kept, name)
	}
}

// give sends copies of all that is kept to a process, which sees an early end if this fails.
func (k *Keeper) give(to *os.File) {
	conn, err := net.FileConn(to)
	if err != nil {
		return
	}
	defer conn.Close()
	c, ok := conn.(*net.UnixConn)
	if !ok {
		return
	}
	c.SetWriteDeadline(time.Now().Add(patience))
	for name, f := range k.kept {
		if write(c, name, f) != nil {
			return
		}
	}
	write(c, takenAll, nil)
}

// takenAll ends what TAKE=1 is answered with. No name has an equals sign.
const takenAll = "TAKEN=1"

const maxMessage = 4096

func socketpair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	defer ours.Close()
	c, err := net.FileConn(ours)
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return c.(*net.UnixConn), theirs, nil
}

// write sends a datagram with f, if it is not nil. It does not change f's flags, as f.Fd does.
func write(c *net.UnixConn, text string, f *os.File) error {
	if f == nil {
		_, err := c.Write([]byte(text))
		return err
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	socket, err := c.SyscallConn() // c.WriteMsgUnix refuses connected datagram sockets
	if err != nil {
		return err
	}
	var sendErr, writeErr error
	err = raw.Control(func(fd uintptr) {
		writeErr = socket.Write(func(to uintptr) bool {
			sendErr = unix.Sendmsg(int(to), []byte(text), unix.UnixRights(int(fd)), nil, unix.MSG_NOSIGNAL)
			return sendErr != unix.EAGAIN
		})
	})
	return errors.Join(err, writeErr, sendErr)
}

// receive receives a datagram and what descriptors come with it.
func receive(c *net.UnixConn) (string, []*os.File, error) {
	b, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*253))
	n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		return "", nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return "", nil, err
	}
	var files []*os.File
	for _, m := range messages {
		if fds, err := unix.ParseUnixRights(&m); err == nil {
			for _, fd := range fds {
				unix.CloseOnExec(fd) // ReadMsgUnix asks for it, where it can
				files = append(files, os.NewFile(uintptr(fd), "kept"))
			}
		}
	}
	return string(b[:n]), files, nil
}

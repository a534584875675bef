// Package embedded is a NATS server in the process: what the conversion service keeps its state in where there is no other one.
//
// The principle: it is a whole server, with JetStream and a file store, that listens nowhere: the process itself is connected to it
// through a pipe, and nobody else can be. Each write is on the disk before it is answered. A directory is one process's at a time.
//
// What it does not do: it joins no cluster. Several processes share the work through a NATS server of their own.
package embedded

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"golang.org/x/sys/unix"
)

// Server is a running NATS server.
type Server struct {
	Conn   *nats.Conn    // to it
	Failed chan struct{} // closed when it could not write to its store, which it does not try again: it is to be started anew

	server *server.Server
	lock   *os.File
	once   sync.Once
	err    error
}

// Err is why it has failed.
func (s *Server) Err() error {
	select {
	case <-s.Failed:
		return s.err
	default:
		return nil
	}
}

// startTime is how long a server may take to read its store.
const startTime = time.Minute

// Start runs a server whose store is in dir until Close. What it has to complain of goes to log.
func Start(ctx context.Context, dir string, log *slog.Logger) (_ *Server, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	s := &Server{Failed: make(chan struct{})}
	if s.lock, err = lock(filepath.Join(dir, "lock")); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	s.server, err = server.NewServer(&server.Options{
		ServerName: "embedded", DontListen: true, NoSigs: true,
		JetStream: true, StoreDir: dir, SyncAlways: true, DisableJetStreamBanner: true,
	})
	if err != nil {
		return nil, fmt.Errorf("NATS server in %s: %w", dir, err)
	}
	s.server.SetLogger(logger{log, func(message string) {
		s.once.Do(func() {
			s.err = fmt.Errorf("NATS server in %s cannot write (make room on the disk): %s", dir, message)
			close(s.Failed)
		})
	}}, false, false)
	s.server.Start() // returns when it has: it accepts nobody
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(startTime)
	}
	if !s.server.JetStreamEnabled() || !s.server.ReadyForConnections(time.Until(deadline)) {
		return nil, fmt.Errorf("NATS server in %s does not start: the log says why", dir)
	}
	s.Conn, err = nats.Connect("", nats.InProcessServer(s.server), nats.MaxReconnects(-1), nats.Name("embedded"))
	return s, err
}

// lock takes the lock of a directory.
func lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another process uses %s (to share the work between several, run a NATS server for all)", filepath.Dir(path))
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

// Close ends the server; what it has answered is kept.
func (s *Server) Close() error {
	if s.Conn != nil {
		s.Conn.Close()
	}
	if s.server != nil {
		s.server.Shutdown()
		s.server.WaitForShutdown()
	}
	return s.lock.Close()
}

// logger passes the server's messages on: what it merely notices is for who debugs.
type logger struct {
	log    *slog.Logger
	failed func(message string)
}

func (l logger) Noticef(format string, args ...any) { l.say(slog.LevelDebug, format, args) }
func (l logger) Warnf(format string, args ...any)   { l.say(slog.LevelWarn, format, args) }
func (l logger) Errorf(format string, args ...any) {
	l.say(slog.LevelError, format, args)
	if message := fmt.Sprintf(format, args...); strings.Contains(message, "JetStream failed to store") { // it stays so, whatever the disk has later: TestDiskFull
		l.failed(message)
	}
}
func (l logger) Fatalf(format string, args ...any) { l.say(slog.LevelError, format, args) }
func (l logger) Debugf(format string, args ...any) { l.say(slog.LevelDebug, format, args) }
func (l logger) Tracef(format string, args ...any) { l.say(slog.LevelDebug, format, args) }

func (l logger) say(level slog.Level, format string, args []any) {
	l.log.Log(context.Background(), level, "NATS: "+fmt.Sprintf(format, args...))
}

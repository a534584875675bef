package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	nodefs "github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// node is everything below the snapshotter, plugged together.
type node struct {
	mounts *nodefs.Server
	cache  *cache.Cache
	images *stream.Store
}

// newNode opens the node's parts with their files in root and state. allow is nil to stream from everywhere.
func newNode(c config, allow func(registryclient.Repository) bool) (n *node, err error) {
	n = &node{}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.close())
		}
	}()
	o := nodefs.Options{Dir: filepath.Join(c.State, "devices"), Mode: c.MountMode}
	if !c.ReadAhead {
		o.ReadAhead = 4096 // a page, the kernel's least
	}
	if n.mounts, err = nodefs.New(o); err != nil {
		return n, err
	}
	if n.cache, err = cache.Open(filepath.Join(c.Root, "cache"), cache.Options{NoReadAhead: !c.ReadAhead}); err != nil {
		return n, err
	}
	reg, err := registryclient.New(registryclient.Options{
		HostsDir:    c.HostsDir,
		Credentials: registryclient.DockerCredentials(),
		UserAgent:   "streaming-snapshotter/" + version(),
	})
	if err != nil {
		return n, err
	}
	n.images, err = stream.New(stream.Options{
		Root: c.Root, Registry: reg, Cache: n.cache, Mounter: n.mounts, Allow: allow, Timeout: c.ResolveTimeout.std(),
	})
	return n, err
}

// close unmounts everything, then lets go of the cache.
func (n *node) close() error {
	var errs []error
	if n.mounts != nil {
		errs = append(errs, n.mounts.Close())
	}
	if n.cache != nil {
		errs = append(errs, n.cache.Close())
	}
	return errors.Join(errs...)
}

func serve(ctx context.Context, c config) (err error) {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: c.LogLevel}))
	slog.SetDefault(log)
	unlock, err := lockRoot(c.Root)
	if err != nil {
		return err
	}
	defer unlock()
	n, err := newNode(c, c.Stream.allow)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.close()) }()
	sn, err := snapshot.New(c.Root, n.images, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sn.Close()) }()
	l, err := listen(c.Address)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sn))
	mode, why := n.mounts.Mode()
	log.Info("serving", "address", c.Address, "mount_mode", mode, "others", why, "stream", c.Stream)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		server.GracefulStop()
	}()
	if err := server.Serve(l); err != nil {
		return fmt.Errorf("serve %s: %w", c.Address, err)
	}
	<-stopped
	return nil
}

// lockRoot keeps a second daemon off the same root. The lock ends with the process.
func lockRoot(root string) (unlock func(), err error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(root, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("root %s is used by another streaming-snapshotter: %w", root, err)
	}
	return func() { f.Close() }, nil
}

// listen replaces a socket that a dead daemon left: the lock on the root says that none is alive.
func listen(address string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(address), 0o700); err != nil {
		return nil, err
	}
	if err := os.Remove(address); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", address)
	if err != nil {
		return nil, err
	}
	return l, os.Chmod(address, 0o600)
}

func check(c config, w io.Writer) error {
	dir, err := os.MkdirTemp("", "streaming-snapshotter-check-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	s, err := nodefs.New(nodefs.Options{Dir: filepath.Join(dir, "devices"), Mode: c.MountMode})
	if err != nil {
		return err
	}
	mode, why := s.Mode()
	fmt.Fprintf(w, "mount mode: %s\n", mode)
	if why != "" {
		fmt.Fprintf(w, "not taken: %s\n", why)
	}
	if len(c.Stream) == 0 {
		fmt.Fprintln(w, "stream: nothing is listed in the configuration: every image is pulled in the normal way")
	}
	for _, p := range c.Stream {
		fmt.Fprintf(w, "stream: %s\n", p)
	}
	return s.Close()
}

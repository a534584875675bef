package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/fdstore"
	nodefs "github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// node is everything below the snapshotter, plugged together.
type node struct {
	lock   *os.File // of root
	keeps  bool     // mounts outlive the process
	mounts *nodefs.Server
	cache  *cache.Cache
	reg    *registryclient.Client
	images *stream.Store
}

// newNode opens the node's parts with their files in root. allow is nil to stream from everywhere. keep is nil if mounts end with the process.
// foreign is nodefs.Options.Foreign.
func newNode(c config, allow func(registryclient.Repository) bool, keep nodefs.Keeper, foreign bool) (n *node, err error) {
	n = &node{keeps: keep != nil}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.close())
		}
	}()
	if n.lock, err = lockDir(c.Root); err != nil {
		return n, err
	}
	// In root, so that the way to mount is tried on the file system where the metadata images are.
	o := nodefs.Options{Dir: filepath.Join(c.Root, "devices"), Mode: c.MountMode, Foreign: foreign}
	o.Keep = keep
	opened := make(chan struct{}) // when n.images is: reads from mounts of a predecessor wait for it
	o.Resolve = func(ctx context.Context, id string) (nodefs.Device, error) {
		select {
		case <-opened:
			return n.images.Device(ctx, id)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if !c.ReadAhead {
		o.ReadAhead = 4096 // a page, the kernel's least
	}
	if n.mounts, err = nodefs.New(o); err != nil {
		return n, err
	}
	if n.cache, err = cache.Open(filepath.Join(c.Root, "cache"), cache.Options{NoReadAhead: !c.ReadAhead}); err != nil {
		return n, err
	}
	n.reg, err = registryclient.New(registryclient.Options{
		HostsDir:    c.HostsDir,
		Credentials: registryclient.DockerCredentials(),
		UserAgent:   "streaming-snapshotter/" + version(),
		Wait:        c.RegistryWait.std(),
	})
	if err != nil {
		return n, err
	}
	n.images, err = stream.New(stream.Options{
		Root: c.Root, Registry: n.reg, Cache: n.cache, Mounter: n.mounts, Allow: allow, Timeout: c.ResolveTimeout.std(),
	})
	if err == nil {
		close(opened)
	}
	return n, err
}

// close unmounts everything, or leaves it to a successor, then lets go of the files.
func (n *node) close() error {
	var errs []error
	if n.images != nil && n.keeps {
		n.images.EndSearches()
	} else if n.images != nil {
		errs = append(errs, n.images.Close())
	}
	if n.mounts != nil {
		errs = append(errs, n.mounts.Close())
	}
	if n.cache != nil {
		errs = append(errs, n.cache.Close())
	}
	if n.reg != nil {
		errs = append(errs, n.reg.Close())
	}
	if n.lock != nil {
		errs = append(errs, n.lock.Close())
	}
	return errors.Join(errs...)
}

// stopTimeout bounds the wait for calls in progress when the daemon stops: below the 10 s that a container gets to stop.
const stopTimeout = 5 * time.Second

// serve serves until ctx ends. st keeps the socket and the mounts for the successor, if it keeps anything: clients and readers wait for it
// then.
func serve(ctx context.Context, c config, st *fdstore.Store) (err error) {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.Level(c.LogLevel)}))
	slog.SetDefault(log)
	var keep nodefs.Keeper
	if st.Keeps() {
		keep = st
	}
	n, err := newNode(c, c.Stream.allow, keep, false)
	if err != nil {
		return err
	}
	defer func() {
		closeErr := n.close()
		if errors.Is(closeErr, unix.EBUSY) {
			log.Warn("containers use streamed images: until they are started again, they read no file that they have not read yet", "error", closeErr)
			closeErr = nil
		}
		err = errors.Join(err, closeErr)
	}()
	sn, err := snapshot.New(c.Root, n.images, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sn.Close()) }()
	l, err := listen(c.Address, st)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sn))
	mode, why := n.mounts.Mode()
	log.Info("serving", "address", c.Address, "mount_mode", mode, "others", why, "stream", c.Stream)
	if err := st.Notify("READY=1"); err != nil {
		log.Warn("tell that we are ready", "error", err)
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		if err := st.Notify("STOPPING=1"); err != nil {
			log.Warn("tell that we stop", "error", err)
		}
		n.images.EndSearches() // pulls that wait for a search go on as normal ones
		hurry := time.AfterFunc(stopTimeout, server.Stop)
		defer hurry.Stop()
		server.GracefulStop()
	}()
	if err := server.Serve(l); err != nil {
		return fmt.Errorf("serve %s: %w", c.Address, err)
	}
	<-stopped
	return nil
}

// lockDir creates dir and keeps a second process off it. The lock ends with the process.
func lockDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s is in use by another streaming-snapshotter", dir)
		}
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return f, nil
}

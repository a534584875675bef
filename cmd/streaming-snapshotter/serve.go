package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync/atomic"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/fdstore"
	"github.com/streaming-snapshotter/streaming-snapshotter/credentials"
	"github.com/streaming-snapshotter/streaming-snapshotter/criproxy"
	nodefs "github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// node is everything below the snapshotter, plugged together.
type node struct {
	keeps  bool // mounts outlive the process
	mounts *nodefs.Server
	cache  *cache.Cache
	reg    *registryclient.Client
	logins sources
	cri    *criproxy.Store // nil without the proxy of CRI
	images *stream.Store
	ledger *ledger.Ledger // nil: nothing is proven
}

// newNode opens the node's parts with their files in root, which the caller has locked. keep is nil
// if mounts end with the process. foreign is nodefs.Options.Foreign. cri is nil without the proxy of CRI, onProof if nobody is told of proofs.
func newNode(c config, g gate, keep nodefs.Keeper, foreign bool, cri *criproxy.Store, onProof func(stream.Proof)) (n *node, err error) {
	n = &node{keeps: keep != nil, cri: cri}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.close())
		}
	}()
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
	limit, err := c.CacheSize.in(c.Root)
	if err != nil {
		return n, err
	}
	var lied atomic.Pointer[stream.Store]
	if n.cache, err = cache.Open(filepath.Join(c.Root, "cache"), cache.Options{
		NoReadAhead: !c.ReadAhead, Limit: limit, Index: stream.Indexes(c.Root), OnDisk: logDisk, OnDamage: logDamage(), OnRest: n.rest,
		OnLie: func(index digest.Digest, chunk int, err error) {
			if s := lied.Load(); s != nil {
				s.Lied(index, chunk, err)
			}
		},
	}); err != nil {
		return n, err
	}
	if err := n.openRegistry(c); err != nil {
		return n, err
	}
	background, err := c.Background.of(0)
	if err != nil {
		return n, err
	}
	images := stream.Options{
		Root: c.Root, Registry: n.reg, Cache: n.cache, Mounter: n.mounts, Allow: g.allow, Policy: g.policy, Timeout: c.ResolveTimeout.D, PullWait: c.PullWait.D, Background: background,
		NoReadAhead: !c.ReadAhead || foreign, // whoever looks at a mount starts nothing; and "profile record" is to see what is read
	}
	if cri != nil {
		images.OnForget = cri.Sweep
	}
	if !foreign { // whoever looks at a mount does not want all of it
		if n.ledger, err = ledger.Open(filepath.Join(c.Root, "trust"), nil); err != nil {
			return n, err
		}
		images.Trust = stream.Trust{Ledger: n.ledger, Deadline: c.ProofDeadline.D, OnProof: onProof}
		images.Elsewhere = elsewhere(c.Containerd)
	}
	if n.images, err = stream.New(images); err != nil {
		return n, err
	}
	lied.Store(n.images)
	close(opened)
	if cri != nil {
		cri.Follow(n.pulled, n.reg.Forget)
	}
	return n, nil
}

// openRegistry opens the client of registries.
func (n *node) openRegistry(c config) (err error) {
	n.logins = newSources(c, n.cri)
	n.reg, err = registryclient.New(registryclient.Options{
		HostsDir:    c.HostsDir,
		Credentials: credentials.Chain(n.logins...),
		UserAgent:   "streaming-snapshotter/" + version(),
		Wait:        c.RegistryWait.D,
		OnHost:      logHost,
	})
	return err
}

// rest gives back the memory that reads have taken: the daemon is idle most of its life.
func (n *node) rest() {
	n.mounts.Rest()
	debug.FreeOSMemory() // what pools have, they let go of at the second time
	debug.FreeOSMemory()
}

// logHost logs what happens to a registry's host.
func logHost(h registryclient.HostStatus) {
	ctx := about(h.Registry + " " + h.Host)
	switch {
	case h.Away:
		slog.WarnContext(ctx, "registry host is away: reads of what is not on the node wait", "registry", h.Registry, "host", h.Host, "error", h.Error)
	case h.Error != "":
		slog.Warn("registry host is asked after the others", "registry", h.Registry, "host", h.Host, "error", h.Error, "until", h.Wrong.Format(time.RFC3339))
	default:
		slog.InfoContext(ctx, "registry host is back", "registry", h.Registry, "host", h.Host)
	}
}

// logDisk logs what happens to the cache's disk.
func logDisk(failing bool, err error) {
	ctx := about("the cache's disk")
	if failing {
		slog.WarnContext(ctx, "the cache's disk fails: reads go on without caching", "error", err)
	} else {
		slog.InfoContext(ctx, "the cache's disk works again")
	}
}

// logDamage returns what logs damage of the chunk cache.
func logDamage() func(cache.Damage) {
	var lines nodefs.LogLimit
	return func(d cache.Damage) {
		lines.Log(slog.Default(), time.Now(), slog.LevelWarn, "damaged on this node's disk, and fetched again", "layer", d.Layer, "file", d.File, "offset", d.Offset, "bytes", d.Size)
	}
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
	errs = append(errs, n.logins.close())
	return errors.Join(errs...)
}

// stats are the cache's counts; none without a cache.
func (n *node) stats() cache.Stats {
	if n.cache == nil {
		return cache.Stats{}
	}
	return n.cache.Stats()
}

// background is the image that is being completed, nil if there is none.
func (n *node) background() *stream.Background {
	if n.images == nil {
		return nil
	}
	return n.images.Background()
}

// stopTimeout bounds the wait for calls in progress when the daemon stops: below the 10 s that a container gets to stop.
const stopTimeout = 5 * time.Second

// serve serves with the configuration of file until ctx ends, or for safeFor in safe mode if st keeps something. st keeps the socket and the mounts for the successor, if it keeps anything:
// clients and readers wait for it then.
func serve(ctx context.Context, file string, st *fdstore.Store, safeFor time.Duration) (err error) {
	c, configErr := loadConfig(file)
	if configErr != nil {
		c = salvage(cmp.Or(file, defaultConfig))
	}
	seen := newSeen(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.Level(c.LogLevel)}))
	log := slog.New(seen.problems)
	slog.SetDefault(log)
	lock, err := lockDir(c.Root)
	if err != nil {
		return errors.Join(configErr, err)
	}
	defer lock.Close()
	count := readStarts(c.Root)
	safe, err := count.begin()
	if err != nil {
		log.Warn("failed starts are not counted: after three there will be no safe mode", "error", err)
	}
	if safe != "" {
		log.Error("safe mode: nothing new is streamed, images are pulled in the normal way", "failed_starts", count.Failed, "reason", safe)
		if configErr != nil {
			if err := c.recallTrust(); err != nil {
				log.Error("the trust policy of the last good start cannot be read: what is streamed already is held against what can be read of the configuration", "error", err)
			}
		}
		configErr = nil
		if st.Keeps() {
			var stop context.CancelFunc
			ctx, stop = context.WithTimeout(ctx, safeFor)
			defer stop()
		}
	}
	pods, stopEvents := serveEvents(c)
	defer stopEvents()
	var stopReports func()
	seen.starts, stopReports = followStarts(c, seen.pulls, pods)
	defer stopReports()
	cri := openCRI(c)
	stopCRI, err := serveCRI(ctx, c, allPulls{cri, pods}, st)
	if err != nil {
		log.Error("CRI proxy: nobody answers there, and a kubelet that pulls through it pulls nothing", "address", c.CRIProxy, "error", err)
	} else {
		defer stopCRI()
	}
	var keep nodefs.Keeper
	if st.Keeps() {
		keep = st
	}
	var n *node
	var sn *snapshot.Snapshotter
	onPull := func(p snapshot.Pull) {
		seen.pulls.note(p)
		seen.starts.note(p)
		pods.tell(p, n)
	}
	ready := false
	if err = configErr; err == nil {
		if safe != "" {
			n, sn, err = startSafe(c, safe, keep, cri, log, onPull, pods.tellProof)
		} else {
			n, sn, err = startNormal(c, keep, cri, log, onPull, pods.tellProof, seen.starts.started)
		}
	}
	if err == nil {
		err = serveNode(ctx, c, n, sn, st, func() error {
			ready = true
			return count.succeeded(safe != "")
		}, status{SafeMode: safe}, seen)
	}
	if sn != nil {
		err = errors.Join(err, sn.Close())
	}
	if n != nil {
		closeErr := n.close()
		if errors.Is(closeErr, unix.EBUSY) {
			log.Warn("containers use streamed images: until they are started again, they read no file that they have not read yet", "error", closeErr)
			closeErr = nil
		}
		err = errors.Join(err, closeErr)
	}
	if err != nil && !ready && safe == "" {
		err = errors.Join(err, count.failed(err))
	}
	return err
}

// startNormal opens everything.
func startNormal(c config, keep nodefs.Keeper, cri *criproxy.Store, log *slog.Logger, onPull func(snapshot.Pull), onProof func(stream.Proof), onStart func(stream.Start)) (*node, *snapshot.Snapshotter, error) {
	g, err := c.gate(revocations(c.Root))
	if err != nil {
		return nil, nil, err
	}
	n, err := attempt(func() (*node, error) { return newNode(c, g, keep, false, cri, onProof) })
	if err != nil {
		return nil, nil, err
	}
	n.images.OnStart = onStart
	sn, err := attempt(func() (*snapshot.Snapshotter, error) { return n.snapshotter(c, n.images, log, onPull) })
	if err == nil {
		if err := c.keepTrust(); err != nil {
			log.Warn("the trust policy is not written down: safe mode has that of an earlier start", "error", err)
		}
	}
	return n, sn, err
}

// snapshotter opens the snapshotter of c over images.
func (n *node) snapshotter(c config, images snapshot.Images, log *slog.Logger, onPull func(snapshot.Pull)) (*snapshot.Snapshotter, error) {
	sn, err := snapshot.New(c.Root, images, log, onPull)
	if err == nil {
		sn.MapsBelow = func(ctx context.Context) error { return mapsBelow(ctx, c.Containerd) }
		sn.Wait = c.PullWait.D
		sn.Unpack = (&unpacker{socket: c.Containerd, from: n.readBlob}).unpack
	}
	return sn, err
}

// serveNode serves until ctx ends. It calls started once clients are answered.
func serveNode(ctx context.Context, c config, n *node, sn *snapshot.Snapshotter, st *fdstore.Store, started func() error, s status, seen *seen) error {
	log := slog.Default()
	s.Version, s.Since, s.Stream, s.Kept = version(), time.Now().UTC().Format(time.RFC3339), c.Stream, st.Keeps()
	if n.mounts != nil {
		mode, why := n.mounts.Mode()
		s.MountMode, s.NotTaken = string(mode), why
	}
	l, err := listen(snapshotsSocket, c.Address, st)
	if err != nil {
		return err
	}
	var w walks
	a := &admin{n: n, safe: s.SafeMode, check: n.check(c), blob: n.serveBlob(c.ResolveTimeout.D)}
	a.ask = func(age time.Duration) status { return s.measure(c.Root, n, seen, w.get(c.Root, n, seen.pulls, age)) }
	stopAdmin, err := a.serve(c.Root, c.Metrics)
	if err != nil {
		log.Warn("nobody can ask for the status or the metrics", "error", err)
	}
	defer stopAdmin()
	options, stopTraces := startTraces(ctx, c)
	defer stopTraces()
	server := grpc.NewServer(options...)
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sn))
	log.Info("serving", "address", c.Address, "mount_mode", s.MountMode, "others", s.NotTaken, "stream", c.Stream)
	if err := errors.Join(started(), st.Notify("READY=1")); err != nil {
		log.Warn("the start succeeded, and neither a file nor systemd could be told", "error", err)
	}
	a.ready.Store(true)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		a.ready.Store(false)
		if err := st.Notify("STOPPING=1"); err != nil {
			log.Warn("systemd could not be told of the stop", "error", err)
		}
		if n.images != nil {
			n.images.EndSearches() // pulls that wait for a search go on as normal ones
		}
		hurry := time.AfterFunc(stopTimeout, server.Stop)
		defer hurry.Stop()
		server.GracefulStop()
	}()
	if err := server.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) { // a stop that came before it is no failure
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
			return nil, fmt.Errorf("%s is in use by another streaming-snapshotter: stop that one, or give this one another `root`", dir)
		}
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return f, nil
}

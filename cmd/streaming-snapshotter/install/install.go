// Package install puts the snapshotter on a host and takes it away again.
//
// The principle: nothing is changed before containerd's own program has said what the new configuration comes to, and that has no trap; what is changed is noted
// first, with the originals, so that any failure, an interrupt and a kill included, ends with every file as it was: the next command that finds a change under way undoes
// it before all else. An upgrade is an install over an install.
package install

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/blobs"
)

// Path is where the program is installed: deploy/systemd's units run it.
const Path = "/usr/local/bin/streaming-snapshotter"

// Dir is where is kept what install has replaced.
const Dir = "/var/lib/streaming-snapshotter-install"

const lockFile = "/run/streaming-snapshotter-install.lock"

// Options say what to install and what the host has.
type Options struct {
	Program       string   // path of the program to install
	ConfigFile    string   // the snapshotter's configuration
	Config        []byte   // its content, if the host has none, or Replace
	Replace       bool     // the host's configuration by Config
	Runtime       string   // a runtime handler, made for pods that ask for it: CRI uses the snapshotter for these alone
	Address, Root string   // as it says
	CRIProxy      string   // and the socket of its proxy of CRI; "" is none
	Socket        string   // containerd's
	Asks          string   // the one that the daemon knows
	Restart       []string // the command that restarts containerd; nil is systemd's
	// Containerd says which containerd runs.
	Containerd func() (Containerd, error)
	// Loaded lists the snapshotters that the running containerd has.
	Loaded func(ctx context.Context) ([]string, error)
	// Ready asks the daemon whether it serves, and not in safe mode.
	Ready  func(ctx context.Context) error
	Fetch  blobs.Source // of layers that are not on the node
	DryRun bool
	Out    io.Writer // what is done, or would be

	// For Uninstall alone.
	Retire         bool // while there are containers of the snapshotter, have nothing new use it, instead of changing nothing
	DropImages     bool // images that cannot be fetched have to be pulled again
	DiscardChanges bool // that others have made to the files since
}

// Containerd is one that runs.
type Containerd struct {
	Program string // path
	Config  string // its configuration file, which need not exist
	Unit    string // of systemd
}

type installer struct {
	o   Options
	svc services
	s   *store
	c   Containerd
	use use

	cleaned bool // what an uninstall that was cut short has left
}

// plan is what there is to do.
type plan struct {
	files   []file
	theirs  int        // so many of files, the last ones, are containerd's
	daemon  bool       // is started, in the place of one that runs
	name    string     // of the snapshotter in containerd's configuration
	restart []string   // the command that restarts containerd; nil if that is not needed
	images  []unpacked // whose layers are fetched before, for their next containers
	store   string     // containerd's directory, into which
}

// Install installs, or upgrades. On an error the host is as it was before. options may be asked twice, as what a change that was cut short has left is no ground for them.
func Install(ctx context.Context, options func() (Options, error)) error {
	in, unlock, err := begin(ctx, options)
	if err != nil {
		return err
	}
	defer unlock()
	o := in.o
	p, err := in.plan(ctx)
	if err != nil {
		return err
	}
	if len(p.files) == 0 && !p.daemon && p.restart == nil {
		fmt.Fprintln(o.Out, "nothing to do: all is installed, and runs")
		return nil
	}
	if err := in.announce(p); err != nil || o.DryRun {
		return err
	}
	if err := in.fetchLayers(ctx, p.images); err != nil {
		return err
	}
	if err := in.carryOut(ctx, p); err != nil {
		return err
	}
	fmt.Fprintln(o.Out, "installed")
	return nil
}

// begin keeps others off, and undoes what was cut short.
func begin(ctx context.Context, options func() (Options, error)) (in *installer, unlock func(), err error) {
	lock, err := os.OpenFile(lockFile, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, nil, err
	}
	unlock = func() { lock.Close() }
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, nil, fmt.Errorf("another install or uninstall is under way: %w", err)
	}
	o, err := options()
	if err != nil {
		return nil, nil, err
	}
	in = &installer{o: o, use: use{runtime: o.Runtime}}
	if in.svc, err = findServices(ctx, o); err != nil {
		return nil, nil, err
	}
	if in.s, err = openStore(Dir); err != nil {
		return nil, nil, err
	}
	removeScratch()
	if in.s.Change == nil && !in.s.Ended {
		return in, unlock, nil
	}
	if in.s.Ended {
		fmt.Fprintln(o.Out, "an uninstall that was cut short is ended first")
	} else {
		fmt.Fprintln(o.Out, "a change that was cut short is undone first")
	}
	if o.DryRun {
		return nil, nil, errors.New("what comes then depends on it: run it without --dry-run")
	}
	if in.cleaned = in.s.Ended; in.cleaned {
		err = in.cleanUp()
	} else {
		_, err = in.rollBack(ctx, true)
	}
	if err == nil {
		in.o, err = options()
	}
	return in, unlock, err
}

// unmoved refuses another directory or socket than those that are in use: containerd has its images and containers there.
func (in *installer) unmoved() error {
	for _, k := range []struct{ key, was, is string }{{"root", in.s.Root, in.o.Root}, {"address", in.s.Address, in.o.Address}} {
		if in.s.installed() && resolved(k.was) != resolved(k.is) {
			return fmt.Errorf("nothing was changed: the configuration says %s = %q, and what is installed has %q, where containerd has its images and containers: take the change back, or uninstall first", k.key, k.is, k.was)
		}
	}
	return nil
}

// ours reports whether a socket is, or was, one of the daemon's for the kubelet.
func (in *installer) ours(socket string) bool {
	return socket == filepath.Clean(in.s.CRIProxy) || socket == filepath.Clean(in.o.CRIProxy) || strings.HasPrefix(socket, runDir+"/")
}

// proxied refuses to leave a kubelet without its image service.
func (in *installer) proxied() error {
	by := kubeletsAt(func(socket string) bool { return in.ours(socket) && socket != filepath.Clean(in.o.CRIProxy) })
	if len(by) > 0 {
		return fmt.Errorf("nothing was changed: the configuration has cri_proxy = %q: have it as it was, or take this out and restart it first, because it pulls nothing then, and does not start any more:\n  %s", in.o.CRIProxy, strings.Join(by, "\n  "))
	}
	return nil
}

// sameSocket refuses a daemon that would ask another containerd, or none.
func (in *installer) sameSocket() error {
	a, err := os.Stat(in.o.Asks)
	b, err2 := os.Stat(in.o.Socket)
	if in.o.Asks != in.o.Socket && (err != nil || err2 != nil || !os.SameFile(a, b)) {
		return fmt.Errorf("nothing was changed: containerd is at %s, and the configuration says cri_containerd = %q: say the former there, too", in.o.Socket, in.o.Asks)
	}
	return nil
}

func (in *installer) plan(ctx context.Context) (p plan, err error) {
	if err := errors.Join(in.unmoved(), in.sameSocket(), in.proxied()); err != nil {
		return p, err
	}
	if in.c, err = in.o.Containerd(); err != nil {
		return p, err
	}
	program, err := os.ReadFile(in.o.Program)
	if err != nil {
		return p, err
	}
	files := append([]file{regular(Path, 0o755, program)}, in.svc.files()...)
	if was, err := readFile(in.o.ConfigFile); err != nil {
		return p, err
	} else if was.Absent || in.o.Replace {
		files = append(files, regular(in.o.ConfigFile, 0o644, in.o.Config))
	}
	if files, err = changed(files); err != nil {
		return p, err
	}
	p.daemon = len(files) > 0 || !in.svc.running(ctx)
	containerd, found, err := in.containerdFiles(ctx)
	if err != nil {
		return p, err
	}
	if in.o.Runtime == "" && len(containerd) == 0 && !slices.Contains(found.Uses, "cri") {
		fmt.Fprintf(in.o.Out, "%s alone pulls with the snapshotter, and stays so: uninstall first for all of CRI\n", strings.Join(found.Uses, ", "))
	}
	loaded, err := in.o.Loaded(ctx)
	if err != nil {
		return p, fmt.Errorf("containerd has to run and answer before: %w", err)
	}
	p.name = found.Snapshotter
	if len(containerd) > 0 || !slices.Contains(loaded, p.name) {
		p.restart = in.svc.restartContainerd(in.c.Unit)
	}
	p.files, p.theirs, p.store = append(files, containerd...), len(containerd), found.Root
	if len(containerd) > 0 {
		p.images, err = in.withoutLayers(ctx, p.name)
	}
	return p, err
}

// changed leaves out what is there already.
func changed(files []file) (list []file, err error) {
	for _, f := range files {
		was, err := readFile(f.Path)
		if err != nil {
			return nil, err
		}
		if !was.same(f) {
			list = append(list, f)
		}
	}
	return list, nil
}

// announce prints what is done.
func (in *installer) announce(p plan) error {
	for _, f := range p.files {
		was, err := readFile(f.Path)
		if err != nil {
			return err
		}
		printChange(in.o.Out, was, f)
	}
	if err := in.announceLayers(p); err != nil {
		return err
	}
	if p.daemon {
		if _, bare := in.svc.(*supervised); bare {
			fmt.Fprintf(in.o.Out, "run %s (PID in %s); it does not start by itself at boot: have it started before containerd\n", Supervise, pidFile)
		} else {
			fmt.Fprintf(in.o.Out, "run systemctl restart %s\n", unit)
		}
	}
	if p.restart != nil {
		fmt.Fprintf(in.o.Out, "run %s\n", strings.Join(p.restart, " "))
	}
	return nil
}

// carryOut does what p says, or nothing.
func (in *installer) carryOut(ctx context.Context, p plan) (err error) {
	if err := in.s.begin(p.files, change{
		Theirs: p.theirs, Fresh: !in.s.installed() && !in.svc.there(ctx), Running: in.svc.running(ctx), Restart: p.restart, Name: p.name, Root: in.o.Root, Address: in.o.Address, CRI: in.o.CRIProxy,
	}); err != nil {
		return err
	}
	restarted := false
	defer func() {
		if err != nil {
			err = in.failed(ctx, err, restarted)
		}
	}()
	own, theirs := p.files[:len(p.files)-p.theirs], p.files[len(p.files)-p.theirs:]
	if err := apply(ctx, own); err != nil {
		return err
	}
	if p.daemon {
		if err := in.svc.start(ctx); err != nil {
			return err
		}
		if err := until(ctx, "the daemon", in.o.Ready); err != nil {
			return err
		}
	}
	if err := apply(ctx, theirs); err != nil { // containerd may be started by anybody, and finds the daemon then
		return err
	}
	if p.restart != nil {
		restarted = true
		if err := in.restartContainerd(ctx, p.restart, p.name); err != nil {
			return err
		}
	}
	return in.s.commit()
}

// restartContainerd does, and waits until it answers and has the snapshotter of this name, if that is not "".
func (in *installer) restartContainerd(ctx context.Context, command []string, name string) error {
	in.svc.allowRestart(ctx, command)
	if err := run(ctx, command...); err != nil {
		return err
	}
	return until(ctx, "containerd", func(ctx context.Context) error {
		loaded, err := in.o.Loaded(ctx)
		if err == nil && name != "" && !slices.Contains(loaded, name) {
			err = fmt.Errorf("it has the snapshotters %s, and not %s: was it started anew by %q?", strings.Join(loaded, ", "), name, strings.Join(command, " "))
		}
		return err
	})
}

// Package node runs a whole node in a directory: a real containerd with its CRI plugin, runc, crictl and ctr, and the streaming snapshotter in
// either of the configurations that deploy/containerd ships. What it runs is found in $PATH.
//
// Nothing is shared with a containerd that the machine runs anyway, and nothing stays behind: the program calls Isolate first. Pods use the host's network, so that no
// CNI plugin is needed. With Options.Kubelet it is a node of a real Kubernetes, whose pods may have networks of their own.
//
//	DIR/containerd.toml      containerd's own part of the configuration
//	DIR/conf.d/              the drop-in of deploy/containerd, with this node's paths
//	DIR/snapshotter.toml     the snapshotter's configuration
//	DIR/certs.d/             registry hosts, empty at first
//	DIR/c/, DIR/s/           containerd's root and the snapshotter's
//	DIR/run/                 sockets and state
//	DIR/logs/                of the daemons and of the pods
package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Snapshotter is the name that deploy/containerd gives to the proxy snapshotter.
const Snapshotter = "streaming"

// Namespace is the containerd namespace of all that a node pulls and runs, CRI's own.
const Namespace = "k8s.io"

// Pull is the way in which containerd's CRI plugin pulls.
type Pull string

const (
	Transfer Pull = "transfer" // through the transfer service: deploy/containerd/transfer.toml
	Local    Pull = "local"    // CRI's own: deploy/containerd/local.toml
	Old      Pull = "1.7"      // containerd 1.7's, with Options.Programs: deploy/containerd/1.7.toml
	Plain    Pull = "plain"    // no streaming snapshotter on this node: containerd's overlayfs
)

// Options of a Node.
type Options struct {
	Pull   Pull     // "" is Transfer
	Mode   string   // mount_mode of the snapshotter; "" is auto
	Stream []string // repositories to stream from
	Pause  string   // reference of the pods' pause image; "" for nodes without pods
	Config string   // more of the snapshotter's configuration, TOML
	// Programs is the directory of a containerd of another version, with its shim and ctr; "" for those in $PATH.
	Programs string
	// Peer is run in the snapshotter's place; Pull is Transfer then.
	Peer *Peer
	// Supervise runs the snapshotter below `supervise`, which keeps its mounts when it ends, and starts it again. Start-, Stop- and
	// KillSnapshotter are then about the supervisor.
	Supervise bool
	// Units leaves the snapshotter to this machine's systemd, as deploy/systemd's streaming-snapshotter.service, which gets this node's configuration. It must not run yet.
	Units bool
	// Kubelet makes it a node of Kubernetes, whose only one it is: Node.Kubernetes. The process has a machine of its own (MachineVariable), and Pause is needed. nil for none.
	Kubelet *Kubelet
	// CacheDisk gives the snapshotter's chunk cache a disk of its own, of so many bytes: CacheDir is an ext4 file system. 0 for none.
	CacheDisk int64
	// Disk gives the node a new disk of its own, of so many bytes: Dir is an empty ext4 file system, for measurements. On one that has just lost many files ext4 looks long for free inodes, and
	// an unpack can take ten times as long (recently_deleted in fs/ext4/ialloc.c). 0 for none. Not with PowerLoss.
	Disk int64
}

// Peer is somebody else's proxy snapshotter, to be measured against ours.
type Peer struct {
	Name    string   // in containerd's configuration
	Command []string // DIR in it is the node's directory; it serves on DIR/run/s.sock
}

// Of an installation with deploy/systemd.
const (
	Unit          = "streaming-snapshotter"
	InstalledPath = "/usr/local/bin/streaming-snapshotter"
	configPath    = "/etc/streaming-snapshotter/config.toml"
)

// Node is a running node. It is for one goroutine.
type Node struct {
	Dir        string
	Kubernetes *Kubernetes // nil without Options.Kubelet
	o          Options

	snapshotter *process
	containerd  *process
	pods        int
	containers  atomic.Int64 // of Run
}

// Start runs a node. Close ends it.
func Start(ctx context.Context, o Options) (n *Node, err error) {
	if o.Pull == "" {
		o.Pull = Transfer
	}
	if o.Mode == "" {
		o.Mode = "auto"
	}
	dir, err := os.MkdirTemp("", "n") // short: it is part of overlay's mount options and of socket paths
	if err != nil {
		return nil, err
	}
	n = &Node{Dir: dir, o: o}
	defer func(started *Node) {
		if err != nil {
			err = errors.Join(err, started.Close())
		}
	}(n)
	if o.Disk > 0 {
		if err := errors.Join(makeDisk(ctx, n.disk(), o.Disk), mountDisk(ctx, n.disk(), n.Dir)); err != nil {
			return nil, err
		}
	}
	if err := os.Chmod(n.Dir, 0o711); err != nil {
		return nil, err
	}
	for _, d := range []string{"conf.d", "certs.d", "cni", "run", "logs"} {
		if err := os.Mkdir(n.path(d), 0o755); err != nil {
			return nil, err
		}
	}
	if err := n.writeConfigs(); err != nil {
		return nil, err
	}
	if o.CacheDisk > 0 {
		if err := makeDisk(ctx, n.path("cache.ext4"), o.CacheDisk); err != nil {
			return nil, err
		}
	}
	return n, n.Boot(ctx)
}

func (n *Node) path(elem ...string) string { return filepath.Join(append([]string{n.Dir}, elem...)...) }

// disk is the file of Options.Disk.
func (n *Node) disk() string { return n.Dir + ".ext4" }

// CacheDir is where the snapshotter's chunk cache is.
func (n *Node) CacheDir() string { return n.path("s/cache") }

// HostsDir is the node's certs.d, for tests that configure registry hosts.
func (n *Node) HostsDir() string { return n.path("certs.d") }

// Snapshotter is the name of the snapshotter that CRI pulls with on this node.
func (n *Node) Snapshotter() string {
	switch {
	case n.o.Pull == Plain:
		return "overlayfs"
	case n.o.Peer != nil:
		return n.o.Peer.Name
	}
	return Snapshotter
}

// StartSnapshotter runs the streaming snapshotter; after StopSnapshotter or KillSnapshotter, again.
func (n *Node) StartSnapshotter(ctx context.Context) error {
	args := []string{"streaming-snapshotter", "serve", "--config", n.path("snapshotter.toml")}
	if n.o.Supervise {
		args = slices.Insert(args, 1, "supervise", "--")
	}
	if n.o.Peer != nil {
		args = nil
		for _, a := range n.o.Peer.Command {
			args = append(args, strings.ReplaceAll(a, "DIR", n.Dir))
		}
	}
	p, err := start(n.path("logs"), "streaming-snapshotter", args...)
	if err != nil {
		return err
	}
	n.snapshotter = p
	return p.ready(ctx, func(ctx context.Context) error {
		if err := dial(n.path("run/s.sock")); err != nil || n.containerd == nil {
			return err
		}
		// containerd does not see at once that its snapshotter is there again: gRPC waits a second and more between two attempts.
		_, err := n.Ctr(ctx, "snapshots", "--snapshotter", n.Snapshotter(), "list")
		return err
	})
}

// startUnit installs the configuration and has systemd run the streaming snapshotter, as docs/operations.md says.
func (n *Node) startUnit(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Dir(configPath), 0o755); err != nil {
		return err
	}
	if err := os.Symlink(n.ConfigFile(), configPath); err != nil {
		return err
	}
	_, err := command(ctx, "systemctl", "enable", "--now", Unit)
	return err
}

// ConfigFile is the path of the streaming snapshotter's configuration.
func (n *Node) ConfigFile() string { return n.path("snapshotter.toml") }

// StopSnapshotter ends the streaming snapshotter as `systemctl stop` does.
func (n *Node) StopSnapshotter() error {
	p := n.snapshotter
	n.snapshotter = nil
	if n.o.Peer != nil { // how a peer ends is not what it is measured for: stargz-snapshotter does not while it fetches over a slow link
		p.kill()
		return nil
	}
	return p.stop()
}

// KillSnapshotter ends the streaming snapshotter by SIGKILL.
func (n *Node) KillSnapshotter() {
	n.snapshotter.kill()
	n.snapshotter = nil
}

// KillSupervised ends the streaming snapshotter below `supervise` by SIGKILL, and reports whether there was one.
func (n *Node) KillSupervised() bool {
	pid, err := n.supervised()
	return err == nil && unix.Kill(pid, unix.SIGKILL) == nil
}

// supervised returns the process ID of the streaming snapshotter below `supervise`.
func (n *Node) supervised() (int, error) {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", n.snapshotter.cmd.Process.Pid))
	for _, task := range tasks {
		b, _ := os.ReadFile(task)
		if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
			return pid, nil
		}
	}
	return 0, errors.New("the supervisor has no child")
}

// RestartSupervised has the supervisor restart its child, as after an upgrade, and does not wait for it.
func (n *Node) RestartSupervised() error { return n.snapshotter.cmd.Process.Signal(syscall.SIGHUP) }

// KillSupervisedAnd is KillSupervised once there is one. What meanwhile does is done after the snapshotter has served its last, and before its
// successor starts.
func (n *Node) KillSupervisedAnd(ctx context.Context, meanwhile func()) error {
	pid := 0 // asked for again and again: that of one killed before may not be dead yet
	if err := n.snapshotter.ready(ctx, func(context.Context) (err error) {
		if pid, err = n.supervised(); err != nil {
			return err
		}
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			return err
		}
		return stopped(pid)
	}); err != nil {
		return err
	}
	meanwhile()
	return syscall.Kill(pid, syscall.SIGKILL)
}

// Processes returns the process IDs of the streaming snapshotter: the supervisor's, if there is one, and the daemon's.
func (n *Node) Processes() ([]int, error) {
	pids := []int{n.snapshotter.cmd.Process.Pid}
	if !n.o.Supervise {
		return pids, nil
	}
	pid, err := n.supervised()
	return append(pids, pid), err
}

// ContainerdPID is the process ID of containerd.
func (n *Node) ContainerdPID() int { return n.containerd.cmd.Process.Pid }

// StopContainerd ends containerd as `systemctl stop` does. Containers go on.
func (n *Node) StopContainerd() error {
	p := n.containerd
	n.containerd = nil
	return p.stop()
}

// RestartContainerd ends containerd, as a crash would if kill is true, and runs it again. Containers go on.
func (n *Node) RestartContainerd(ctx context.Context, kill bool) error {
	if kill {
		n.containerd.kill()
		n.containerd = nil
	} else if err := n.StopContainerd(); err != nil {
		return err
	}
	return n.StartContainerd(ctx)
}

// StartContainerd runs containerd; after StopContainerd, again.
func (n *Node) StartContainerd(ctx context.Context) error {
	p, err := start(n.path("logs"), "containerd", n.versioned("containerd", "--config", n.path("containerd.toml"))...)
	if err != nil {
		return err
	}
	n.containerd = p
	return p.ready(ctx, func(ctx context.Context) error {
		if err := dial(n.Socket()); err != nil {
			return err
		}
		_, err := n.Crictl(ctx, "version")
		return err
	})
}

// Socket is containerd's.
func (n *Node) Socket() string { return n.path("run/c.sock") }

// Ctr runs ctr in the node's namespace and returns its output.
func (n *Node) Ctr(ctx context.Context, args ...string) (string, error) {
	return command(ctx, n.versioned(append([]string{"ctr", "--address", n.Socket(), "--namespace", Namespace}, args...)...)...)
}

// versioned runs a program of this node's containerd: where Programs come first in $PATH, for containerd finds its shim there.
func (n *Node) versioned(args ...string) []string {
	if n.o.Programs == "" {
		return args
	}
	return append([]string{"env", "PATH=" + n.o.Programs + ":" + os.Getenv("PATH")}, args...)
}

// Crictl runs crictl and returns its output.
func (n *Node) Crictl(ctx context.Context, args ...string) (string, error) {
	return command(ctx, append([]string{"crictl", "--config", n.path("crictl.yaml")}, args...)...)
}

// Logs returns the ends of the daemons' logs, for a failure's report.
func (n *Node) Logs() string {
	names, _ := filepath.Glob(n.path("logs", "*.log"))
	var b strings.Builder
	for _, name := range names {
		b.WriteString(tail(name))
		b.WriteByte('\n')
	}
	return b.String()
}

// Close ends all containers and daemons and removes the directory. Its error names a daemon that did not end as it should.
func (n *Node) Close() error {
	var errs []error
	if n.Kubernetes != nil {
		errs = append(errs, n.Kubernetes.Close())
	}
	if n.containerd != nil {
		errs = append(errs, n.removeContainers(), n.containerd.stop())
		n.containerd = nil
	}
	if n.snapshotter != nil {
		errs = append(errs, n.StopSnapshotter())
	}
	errs = append(errs, n.killRest(), n.unmountRest())
	return errors.Join(append(errs, os.RemoveAll(n.Dir), os.RemoveAll(n.disk()))...)
}

func (n *Node) removeContainers() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // a cancelled test has to clear up too
	defer cancel()
	var errs []error
	if n.pods > 0 || n.Kubernetes != nil {
		_, err := n.Crictl(ctx, "rmp", "--all", "--force")
		errs = append(errs, err)
	}
	tasks, err := n.Ctr(ctx, "tasks", "list", "--quiet")
	errs = append(errs, err)
	for _, id := range strings.Fields(tasks) {
		_, err := n.Ctr(ctx, "tasks", "delete", "--force", id)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// killRest ends processes that name this node's directory in their arguments: shims of a containerd that was cut short.
func (n *Node) killRest() error {
	names, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil || !strings.Contains(string(b), n.Dir+"/") {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name))); err == nil && pid != os.Getpid() {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return nil
}

// unmountRest unmounts what is still mounted in the directory, the deepest first, so that removing it removes nothing else.
func (n *Node) unmountRest() error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(n.Dir))
	if err != nil {
		return err
	}
	sort.Slice(mounts, func(i, j int) bool { return len(mounts[i].Mountpoint) > len(mounts[j].Mountpoint) })
	var errs []error
	for _, m := range mounts {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil && err != unix.EINVAL {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m.Mountpoint, err))
		}
	}
	return errors.Join(errs...)
}

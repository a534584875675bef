package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
)

// PowerLoss leaves the node as a power loss and a boot do: the same disk, but no process of it, no mount, no loop device, and an empty /run. What the
// disk had not written yet is not lost.
func (n *Node) PowerLoss() error {
	n.containerd.kill()
	n.containerd = nil
	if n.snapshotter != nil {
		n.KillSnapshotter()
	}
	if err := errors.Join(n.killRest(), n.killContainers(), n.unmountRest()); err != nil {
		return err
	}
	for end := time.Now().Add(grace); ; {
		left, err := n.traces()
		if err != nil || len(left) == 0 {
			return errors.Join(err, emptyDir(n.path("run")), emptyDir("/run/containerd"))
		}
		if time.Now().After(end) {
			return fmt.Errorf("still there after the power loss: %q", left)
		}
		time.Sleep(time.Millisecond)
	}
}

// Boot mounts the cache's disk, if it has one, and starts the daemons, as after a boot.
func (n *Node) Boot(ctx context.Context) error {
	if n.o.CacheDisk > 0 {
		if err := mountDisk(ctx, n.path("cache.ext4"), n.CacheDir()); err != nil {
			return err
		}
	}
	if n.o.Units {
		if err := n.startUnit(ctx); err != nil {
			return err
		}
	} else if n.o.Pull != Plain {
		if err := n.StartSnapshotter(ctx); err != nil {
			return err
		}
	}
	if err := n.StartContainerd(ctx); err != nil || n.o.Kubelet == nil {
		return err
	}
	k, err := StartKubernetes(ctx, n.Dir, n.Socket(), *n.o.Kubelet)
	n.Kubernetes = k
	return err
}

// containerProcesses lists the processes in containers of this node: they have mount namespaces of their own, and their roots are overlays
// in its directory.
func (n *Node) containerProcesses() (pids []int) {
	names, _ := filepath.Glob("/proc/[0-9]*/mountinfo")
	own, _ := os.Readlink("/proc/self/ns/mnt")
	for _, name := range names {
		if ns, err := os.Readlink(filepath.Join(filepath.Dir(name), "ns/mnt")); err != nil || ns == own {
			continue
		}
		b, err := os.ReadFile(name)
		if err != nil || !strings.Contains(string(b), n.Dir+"/") {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (n *Node) killContainers() error {
	var errs []error
	for _, pid := range n.containerProcesses() {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// traces lists what of the node the kernel still has: processes in containers, mounts, loop devices.
func (n *Node) traces() (left []string, err error) {
	for _, pid := range n.containerProcesses() {
		left = append(left, fmt.Sprintf("process %d", pid))
	}
	mounts, err := n.Mounts("")
	return append(append(left, mounts...), n.Loops()...), err
}

// Mounts lists the mounts below dir in the node's directory.
func (n *Node) Mounts(dir string) (targets []string, err error) {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(n.path(dir)))
	for _, m := range infos {
		targets = append(targets, m.Mountpoint)
	}
	return targets, err
}

// Loops lists the loop devices whose files are in the node's directory.
func (n *Node) Loops() (files []string) {
	names, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, name := range names {
		if b, err := os.ReadFile(name); err == nil && strings.HasPrefix(string(b), n.Dir+"/") {
			files = append(files, strings.TrimSpace(string(b)))
		}
	}
	return files
}

// makeDisk makes a file an empty disk of so many bytes.
func makeDisk(ctx context.Context, name string, size int64) error {
	f, err := os.Create(name)
	if err == nil {
		err = errors.Join(f.Truncate(size), f.Close())
	}
	if err != nil {
		return err
	}
	_, err = command(ctx, "mkfs.ext4", "-q", "-m", "0", name)
	return err
}

func mountDisk(ctx context.Context, name, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	_, err := command(ctx, "mount", "-o", "loop,noinit_itable", name, dir)
	return err
}

func emptyDir(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}

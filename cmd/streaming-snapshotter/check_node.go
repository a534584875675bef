package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/install"
	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/traps"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
)

// diskReport is how the file system of root is.
type diskReport struct {
	Path       string `json:"path"` // root, or what is there of it
	Free       int64  `json:"free"` // bytes
	CacheBytes int64  `json:"cache_bytes"`
	CacheLimit int64  `json:"cache_limit"` // 0 is none
}

func (d diskReport) String() string {
	s := fmt.Sprintf("%s: %s free, cache %s", d.Path, bytesText(d.Free), bytesText(d.CacheBytes))
	if d.CacheLimit > 0 {
		s += " of at most " + bytesText(d.CacheLimit)
	}
	return s
}

// checkDisk looks at the file system of root, on which dir is.
func (r *checkReport) checkDisk(c config, dir string) {
	r.Disk.Path = existing(c.Root)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		r.unknown("the file system of %s: %v", r.Disk.Path, err)
		return
	}
	r.Disk.Free, r.Disk.CacheBytes = int64(st.Bavail)*st.Bsize, diskUse(filepath.Join(c.Root, "cache"))
	limit, err := c.CacheSize.in(dir)
	if err != nil {
		r.unknown("cache_size: %v", err)
	}
	r.Disk.CacheLimit = limit
	if room := r.Disk.Free + r.Disk.CacheBytes; limit > room {
		r.trap(cacheTooLarge, "a smaller cache_size, or more room", "cache_size is %s, and there is room for %s: the disk is full before the cache gives anything back", bytesText(limit), bytesText(room))
	}
	f, err := os.CreateTemp(dir, "hole")
	if err == nil {
		defer f.Close()
		if _, err = f.Write(make([]byte, 8192)); err == nil {
			err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096)
		}
	}
	if err != nil {
		r.trap(noHoles, "another file system for `root`: ext4, xfs, btrfs, tmpfs", "holes cannot be punched in files of %s, so the cache cannot give back parts of layers: %v", r.Disk.Path, err)
	}
}

func (r *checkReport) checkDaemon(ctx context.Context, c config) {
	s, err := askStatusOf(ctx, c.Root)
	if err != nil {
		start := "systemctl start streaming-snapshotter"
		if !install.Systemd() {
			start = install.Start
		}
		remedy := "start it: `" + start + "`"
		if _, err := os.Stat(install.Path); errors.Is(err, os.ErrNotExist) {
			remedy = "run `streaming-snapshotter install`; or, where it is run by hand, " + remedy
		}
		r.trap(daemonDown, remedy, "%v: pulls and new containers of streamed images fail", err)
		return
	}
	r.Daemon = fmt.Sprintf("%s, since %s", s.Version, s.Since)
	if s.SafeMode != "" {
		r.trap(safeMode, "put right what it says, and restart the daemon", "the daemon is in safe mode, in which nothing new is streamed: %s", s.SafeMode)
	}
	if s.Paused != "" {
		r.trap(paused, reason.Paused.Remedy(), "streaming is paused since %s: every image is pulled in the normal way", s.Paused)
	}
	r.checkProofs(s, time.Now())
	for key, socket := range map[string]string{"address": c.Address, "cri_proxy": c.CRIProxy} {
		if socket != "" && !reaches(socket) {
			r.trap(daemonDown, "restart the daemon: it may have been started with another configuration", "the daemon runs, and nobody answers at %s (`%s`)", socket, key)
		}
	}
}

// checkProofs looks at what the daemon has proven of the images that are here.
func (r *checkReport) checkProofs(s status, now time.Time) {
	var late []string
	for _, i := range s.Images {
		switch {
		case i.Quarantine != "":
			r.trap(quarantined, reason.Tampered.Remedy(), "%s: %s", i.name(), i.Quarantine)
		case i.ProofDue != nil && i.ProofDue.Before(now):
			late = append(late, fmt.Sprintf("%s, %d of %d layers proven, due %s", i.name(), i.Proven, i.Layers, i.ProofDue.UTC().Format(time.RFC3339)))
		}
	}
	if len(late) > 0 {
		more := ""
		if n := len(late) - maxLate; n > 0 {
			late, more = late[:maxLate], fmt.Sprintf("; and %d more", n)
		}
		r.trap(unproven, "the log says what keeps a layer from being proven (`a layer is not proven for now`): a registry that gives nothing as a rule; without one, raise proof_deadline",
			"images run, and have not been proven within proof_deadline: %s%s", strings.Join(late, "; "), more)
	}
}

// maxLate is how many images that are not proven in time are named.
const maxLate = 10

// containerdReport is what was found of containerd.
type containerdReport struct {
	Address string `json:"address"`
	Version string `json:"version,omitempty"` // of the one that runs
	Config  string `json:"config"`            // the file
	traps.Found
}

func (c containerdReport) String() string {
	version := c.Version
	if version == "" {
		version = "does not answer"
	}
	s := fmt.Sprintf("%s at %s, configuration %s", version, c.Address, c.Config)
	if c.Root != "" {
		s += fmt.Sprintf(" (root %s, state %s)", c.Root, c.State)
	}
	if c.Snapshotter != "" {
		s += fmt.Sprintf("; snapshotter %s for %s", c.Snapshotter, strings.Join(c.Uses, ", "))
	}
	if c.Pull == "transfer" {
		s += "; pulls by the transfer service"
	} else if c.Pull != "" {
		s += "; local pulls, for " + c.Why
	}
	return s
}

// checkContainerd asks the containerd that runs, and reads the configuration that its program makes of its file.
func (r *checkReport) checkContainerd(ctx context.Context, c config, o checkOptions) {
	at := &r.Containerd
	at.Address = o.containerd
	program, config := "containerd", "/etc/containerd/config.toml"
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	loaded, err := at.ask(ctx)
	if err != nil {
		r.unknown("containerd does not answer at %s (`--containerd` takes another socket): %v", o.containerd, err)
	} else if pid := peerOf(o.containerd); pid > 0 {
		program = fmt.Sprintf("/proc/%d/exe", pid)
		config = startedWith(pid, config)
	}
	if err == nil && c.Containerd != o.containerd && !reaches(c.Containerd) {
		r.trap(otherContainerd, "set it to "+o.containerd+", and restart the daemon", "containerd is at %s, and nobody answers at cri_containerd = %q, where the daemon asks: containers in user namespaces may be refused, what stands on an artifact in quarantine does not start, and pulls through cri_proxy fail", o.containerd, c.Containerd)
	}
	if o.config != "" {
		config = o.config
	}
	at.Config = config
	dump, err := install.Dump(ctx, program, config)
	if err != nil && loaded == nil {
		r.unknown("containerd's configuration: %v", err)
		return
	}
	w := traps.Want{Address: c.Address, Root: c.Root, DropIns: dropIns(config, c.Address)}
	at.Found = traps.Find(dump, w)
	if err != nil {
		at.Found = traps.Found{Traps: []traps.Trap{{Code: traps.Unreadable, Text: fmt.Sprintf("%s: %v", config, err), Remedy: "mend the file: containerd does not start with it"}}}
	}
	r.Traps = append(r.Traps, at.Traps...)
	r.checkHosts(c, at.Found)
	if at.Snapshotter != "" && loaded != nil && !slices.Contains(loaded, at.Snapshotter) {
		r.trap(traps.NotLoaded, "restart containerd", "%s has the proxy plugin %s, and the containerd that runs has not: it was started before", config, at.Snapshotter)
	}
}

// checkHosts compares where containerd and the daemon look for mirrors, certificates and other ways to registries.
func (r *checkReport) checkHosts(c config, f traps.Found) {
	same := func(dir string) bool { return filepath.Clean(dir) == filepath.Clean(c.HostsDir) }
	switch {
	case len(f.HostsDirs) > 0 && !slices.ContainsFunc(f.HostsDirs, same):
		r.trap(otherHosts, fmt.Sprintf("set hosts_dir = %q, and restart the daemon", f.HostsDirs[0]),
			"containerd has its registry hosts in %s (`config_path`), and the daemon looks for them in %q (`hosts_dir`): it knows other mirrors and certificates", strings.Join(f.HostsDirs, ", "), c.HostsDir)
	case f.HostsHere && len(f.HostsDirs) == 0:
		r.trap(otherHosts, fmt.Sprintf("write them as hosts.toml below %s, to which containerd's `config_path` points then, and give the daemon credentials of its own", cmp.Or(c.HostsDir, defaults().HostsDir)),
			"containerd's configuration has mirrors or credentials of registries itself (`registry.mirrors`, `registry.configs`, `registry.auths`), which the daemon does not read: it asks these registries without them")
	case f.Version == 2 && len(f.HostsDirs) == 0: // from 2.2 on containerd looks there unless it is told otherwise
		if hosts, err := os.ReadDir(c.HostsDir); err == nil && len(hosts) > 0 {
			r.trap(otherHosts, fmt.Sprintf("set config_path = %q in [plugins.\"io.containerd.grpc.v1.cri\".registry] of containerd's configuration, and restart containerd", c.HostsDir),
				"the daemon has registry hosts in %s, and containerd looks for none: `config_path` is empty", c.HostsDir)
		}
	}
}

// ask returns the names of the snapshotters that the running containerd has.
func (c *containerdReport) ask(ctx context.Context) (loaded []string, err error) {
	if !reaches(c.Address) {
		return nil, os.ErrNotExist
	}
	client, err := containerd.New(c.Address, containerd.WithTimeout(5*time.Second))
	if err != nil {
		return nil, err
	}
	defer client.Close()
	v, err := client.Version(ctx)
	if err != nil {
		return nil, err
	}
	c.Version = strings.TrimPrefix(v.Version, "v")
	plugins, err := client.IntrospectionService().Plugins(ctx, "type==io.containerd.snapshotter.v1")
	if err != nil {
		return nil, err
	}
	loaded = []string{}
	for _, p := range plugins.Plugins {
		if p.InitErr == nil {
			loaded = append(loaded, p.ID)
		}
	}
	return loaded, nil
}

// peerOf returns the ID of the process that serves the socket at address, 0 if that cannot be known: it is of another PID namespace.
func peerOf(address string) int {
	conn, err := net.Dial("unix", address)
	if err != nil {
		return 0
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil || credErr != nil {
		return 0
	}
	return int(cred.Pid)
}

// startedWith returns the configuration file that the containerd with this process ID was started with.
func startedWith(pid int, fallback string) string {
	value := install.Argument(pid, "--config", "-config", "-c")
	if value == "" {
		return fallback
	}
	if !filepath.IsAbs(value) {
		if dir, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); err == nil {
			value = filepath.Join(dir, value)
		}
	}
	return value
}

// dropIns lists the files with the snapshotter's address in the directories that are imported as a rule.
func dropIns(config, address string) (files []string) {
	for _, dir := range []string{"/etc/containerd/conf.d", filepath.Join(filepath.Dir(config), "conf.d")} {
		names, _ := filepath.Glob(filepath.Join(dir, "*.toml"))
		for _, name := range names {
			if b, err := os.ReadFile(name); err == nil && strings.Contains(string(b), address) && !slices.Contains(files, name) {
				files = append(files, name)
			}
		}
	}
	return files
}

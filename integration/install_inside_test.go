package integration_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/traps"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

const newProgram = "/opt/" + thisRelease

// restartContainerd is a command for --restart-containerd, however often it was started of late.
const restartContainerd = "systemctl reset-failed containerd; systemctl restart containerd"

// installOnHost does on this host what an operator may do in the life of an installation. The first form of a Debian also goes through what may go wrong that has nothing to do
// with containerd's configuration, and the last one through a reboot, after which afterReboot goes on.
func installOnHost(t *testing.T, c installTest, form string, first, last bool) {
	h := newHost(t, c, form)
	host, _, _ := strings.Cut(c.App, "/")
	install := []string{"install", "--stream", host + "/*"}
	switch form {
	case bare:
		h.installBare(install)
		h.clear()
		return
	case documented:
		h.installDocumented(host)
		h.clear()
		return
	}
	out := h.must(append([]string{newProgram}, append(install, "--dry-run")...)...)
	for _, want := range []string{"write " + node.InstalledPath, "+++ /etc/containerd/", `+  address = "/run/streaming-snapshotter/snapshotter.sock"`, "+++ /etc/streaming-snapshotter/config.toml", "run systemctl restart containerd.service"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	h.unchanged("dry run")
	if form == discarding {
		h.layersGone(host)
	}
	h.failedInstall(install)
	if first {
		h.interruptedInstall(install)
		h.killedInstall(install)
		h.installUnderContainers(install)
		h.installWithoutContainerd(install)
	}
	// As a pod with hostPID does it.
	h.must("unshare", "-m", "sh", "-c", `mkdir -p /run/pod && mount -t tmpfs none /run/pod && mkdir /run/pod/host && mount --rbind / /run/pod/host && cp "$0" /run/pod/program && mount -t tmpfs none /etc && exec /run/pod/program "$@" --root /run/pod/host`,
		newProgram, install[0], install[1], install[2])
	if out := h.must(append([]string{newProgram}, install...)...); !strings.Contains(out, "nothing to do") {
		t.Errorf("a second install: %s", out)
	}
	check, _ := tryRun(t, node.InstalledPath, "check") // this machine's disk may be too small for it
	for _, code := range traps.All() {
		if strings.Contains(check, "TRAP "+string(code)) {
			t.Error(check)
		}
	}

	w := h.watch()
	if first {
		hardened(t)
		h.reads(c.App, systemdSeed, node.Snapshotter, idMaps(500_000)...)
	}
	if form == discarding {
		h.reads(c.Other, systemdSeed+1, node.Snapshotter) // unpacked again
	}
	h.upgrade(w, install, first)
	h.must("sh", "-c", restartContainerd)
	w.awaitPass(t)
	if last {
		h.reboot(form)
		return
	}
	h.inTheWay(w)
	h.remove(w)
	switch {
	case first && form == "list replaced":
		h.uninstallAtAnyPrice(host)
	case first:
		h.failedUninstall()
		h.killedUninstall(install)
		h.busyUninstall(c.App)
	default:
		h.refusedUninstall(host)
		h.putBack(form == discarding)
		h.uninstall(c.App)
	}
	h.clear()
}

// newHost makes this host one with containerd, in a form of its configuration.
func newHost(t *testing.T, c installTest, form string) *hosted {
	t.Helper()
	h := &hosted{T: t, c: c, old: form == "1.7"}
	h.makeLoops()
	if err := os.WriteFile("/etc/systemd/system/containerd.service", h.unit(), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, text := range forms[form] {
		path := filepath.Join("/etc/containerd", name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o640), os.Chown(path, 0, 4)); err != nil {
			t.Fatal(err)
		}
	}
	if form == "another file imported" { // and somebody has made the snapshotter's directory
		if err := errors.Join(os.Mkdir(ownRoot, 0o750), os.WriteFile(keptFile, []byte("kept"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if form == discarding { // what is fetched wants a disk that is not nearly full, which this machine's may be
		if err := errors.Join(os.MkdirAll(ownDisk, 0o711), unix.Mount("none", ownDisk, "tmpfs", 0, "size=2g")); err != nil {
			t.Fatal(err)
		}
	}
	h.must("systemctl", "daemon-reload")
	h.must("systemctl", "enable", "containerd")
	h.must("sh", "-c", restartContainerd)
	h.was = h.files()
	return h
}

// makeLoops makes loop devices' nodes: here is no udev.
func (h *hosted) makeLoops() {
	h.Helper()
	for i := range 64 {
		if err := unix.Mknod(fmt.Sprintf("/dev/loop%d", i), unix.S_IFBLK|0o600, int(unix.Mkdev(7, uint32(i)))); err != nil && err != unix.EEXIST {
			h.Fatal(err)
		}
	}
}

const ownDisk = "/var/lib/containerd"

// clear ends containerd, and removes what it has.
func (h *hosted) clear() {
	h.Helper()
	h.must("systemctl", "disable", "--now", "containerd")
	if err := unix.Unmount(ownDisk, unix.MNT_DETACH); err != nil && err != unix.EINVAL { // it is one in one form
		h.Error(err)
	}
	for _, dir := range []string{"/etc/containerd", ownDisk, "/run/containerd", ownRoot} {
		if err := os.RemoveAll(dir); err != nil {
			h.Error(err)
		}
	}
}

// watch pulls the image, which is streamed, and runs a container that reads it.
func (h *hosted) watch() *watcher {
	h.Helper()
	h.crictl("pull", h.c.App)
	if s := unitStatus(h.T); s.Streamed != 1 || !s.Kept {
		h.Fatalf("after the pull: %+v", s)
	}
	w := h.watcher()
	h.must("sh", "-c", h.runs(w))
	w.awaitPass(h.T)
	return w
}

// runs is a shell command that runs the container of a watcher.
func (h *hosted) runs(w *watcher) string {
	return strings.Join([]string{filepath.Join(filepath.Dir(h.containerd()), "ctr"), "--namespace", node.Namespace, "run", "--detach", node.NoShares, "--snapshotter", node.Snapshotter, "--log-uri", "file://" + w.log, h.c.App, w.id, "/guest", "watch", "/data"}, " ")
}

func (h *hosted) watcher() *watcher {
	h.Helper()
	return &watcher{id: "watch", want: smallSum(systemdSeed), log: filepath.Join(tempDir(h.T), "watch.out")}
}

func (h *hosted) remove(w *watcher) {
	h.Helper()
	h.ctr("tasks", "delete", "--force", w.id)
	h.ctr("containers", "delete", w.id)
}

// reads runs a container of an image that reads all of it.
func (h *hosted) reads(ref string, seed uint64, snapshotter string, flags ...string) {
	h.Helper()
	log := filepath.Join(tempDir(h.T), "run.out")
	h.ctr(slices.Concat([]string{"run", "--rm", node.NoShares, "--snapshotter", snapshotter, "--log-uri", "file://" + log}, flags, []string{ref, "run", "/guest", "sum", "/data"})...)
	b, err := os.ReadFile(log)
	if err != nil {
		h.Fatal(err)
	}
	checkSumsBelow(h.T, string(b), seed, "/data")
}

// newer is a program with another content.
func (h *hosted) newer() string {
	h.Helper()
	this, err := os.ReadFile(newProgram)
	if err != nil {
		h.Fatal(err)
	}
	path := filepath.Join(tempDir(h.T), "newer")
	if err := os.WriteFile(path, append(slices.Clip(this), "a newer one"...), 0o755); err != nil {
		h.Fatal(err)
	}
	return path
}

// once is a shell command that does something else the first time.
func (h *hosted) once(first, then string) string {
	h.Helper()
	mark := filepath.Join(tempDir(h.T), "once")
	return fmt.Sprintf("test -e %s || { touch %s; %s; }; %s", mark, mark, first, then)
}

// failsSecond is a shell command that restarts containerd, but not the second time.
func (h *hosted) failsSecond() string {
	h.Helper()
	mark := filepath.Join(tempDir(h.T), "first")
	return fmt.Sprintf("if test -e %s; then %s; fi; touch %s; %s", mark, h.once("exit 7", "true"), mark, restartContainerd)
}

// failedInstall: a daemon that does not start leaves containerd's files alone, and containerd that does not come back, once, puts everything back.
func (h *hosted) failedInstall(install []string) {
	h.Helper()
	untouched := h.ofContainerd()
	h.fails("systemctl restart "+node.Unit, append([]string{"/opt/" + brokenRelease}, install...)...)
	h.notInstalled("an install whose daemon does not start")
	if is := h.ofContainerd(); is != untouched {
		h.Errorf("an install whose daemon does not start has touched containerd's files:\n%sbecame\n%s", untouched, is)
	}
	h.fails("exit status 7", append([]string{newProgram}, append(install, "--restart-containerd", h.once("exit 7", restartContainerd))...)...)
	h.notInstalled("failed install")
}

// ofContainerd tells whether anybody has made, replaced or changed a file of containerd's configuration.
func (h *hosted) ofContainerd() (list string) {
	h.Helper()
	for path := range h.files() {
		var st unix.Stat_t
		if !strings.HasPrefix(path+"/", "/etc/containerd/") {
			continue
		}
		if err := unix.Lstat(path, &st); err != nil {
			h.Fatal(err)
		}
		list += fmt.Sprintf("%s: inode %d, changed %v\n", path, st.Ino, st.Ctim)
	}
	lines := strings.SplitAfter(list, "\n")
	slices.Sort(lines)
	return strings.Join(lines, "")
}

func (h *hosted) notInstalled(after string) {
	h.Helper()
	h.unchanged(after)
	h.ctr("plugins", "ls")
	if out, _ := tryRun(h.T, "systemctl", "is-active", node.Unit); !strings.HasPrefix(out, "inactive") {
		h.Errorf("%s: the daemon is %s", after, out)
	}
	h.noneFailed(after)
}

// noneFailed: an operator who asks systemd what has failed is not told of our units.
func (h *hosted) noneFailed(after string) {
	h.Helper()
	if out := h.must("systemctl", "list-units", "--failed", "--plain", "--no-legend", node.Unit+"*"); out != "" {
		h.Errorf("%s: failed is %s\n%s", after, out, h.journal())
	}
}

// interruptedInstall is interrupted while it restarts containerd, and puts everything back itself.
func (h *hosted) interruptedInstall(install []string) {
	h.Helper()
	h.fails("interrupted", append([]string{newProgram}, append(install, "--restart-containerd", h.once("kill -INT $PPID; exec sleep 600", restartContainerd))...)...)
	h.notInstalled("interrupted install")
}

// killedInstall: the next command puts everything back, and goes on. Here that is another install, which makes its own configuration, and fails.
func (h *hosted) killedInstall(install []string) {
	h.Helper()
	c := exec.Command(newProgram, append(install, "--restart-containerd", restartContainerd+"; kill -KILL $PPID")...)
	c.CombinedOutput()
	if st, ok := c.ProcessState.Sys().(syscall.WaitStatus); !ok || !st.Signaled() {
		h.Fatalf("install was not killed: %v", c.ProcessState)
	}
	if _, err := os.Stat(node.InstalledPath); err != nil {
		h.Fatal(err)
	}
	again := exec.Command(newProgram, append(install, "--restart-containerd", h.failsSecond())...)
	if out, err := again.CombinedOutput(); err == nil || !strings.Contains(string(out), "\n+stream = ") || !strings.Contains(string(out), "exit status 7") {
		h.Errorf("the install after one that was killed: %v\n%s", err, out)
	}
	h.notInstalled("killed install")
	h.fails("has put nothing on this host", newProgram, "uninstall")
}

// installUnderContainers: what an install that has failed, or was killed, would undo is the files of a container that has come once containerd was restarted. So it stands.
func (h *hosted) installUnderContainers(install []string) {
	h.Helper()
	for how, end := range map[string]string{"failed": "exit 7", "killed": "kill -KILL $PPID"} {
		w := h.watcher()
		out, err := tryRun(h.T, append([]string{newProgram}, append(install, "--restart-containerd", h.comes(w)+end)...)...)
		if err == nil || how == "failed" && (!strings.Contains(err.Error(), "exit status 7") || !strings.Contains(out, node.Namespace+"/"+w.id)) {
			h.Fatalf("an install that %s says %v\n%s", how, err, out)
		}
		w.awaitPass(h.T)
		if out, err := tryRun(h.T, newProgram, "uninstall"); err == nil || !strings.Contains(err.Error(), node.Namespace+"/"+w.id) || strings.Contains(out, "nothing is undone") != (how == "killed") {
			h.Errorf("an uninstall after an install that %s under a container: %v\n%s", how, err, out)
		}
		if out := h.must(append([]string{newProgram}, install...)...); !strings.Contains(out, "nothing to do") {
			h.Errorf("an install after one that %s under a container: %s", how, out)
		}
		w.awaitPass(h.T)
		h.remove(w)
		h.uninstall(h.c.App)
	}
}

// comes is a shell command that restarts containerd, and has the container of a watcher come then.
func (h *hosted) comes(w *watcher) string {
	return fmt.Sprintf("%s; crictl --runtime-endpoint unix:///run/containerd/containerd.sock pull %s && %s; ", restartContainerd, h.c.App, h.runs(w))
}

// installWithoutContainerd: containerd ends when a container has come, and does not start with what the install has written. So it has its own files again, and the container its daemon.
func (h *hosted) installWithoutContainerd(install []string) {
	h.Helper()
	w := h.watcher()
	restart := h.once(h.comes(w)+"systemctl stop containerd; exit 7", "if grep -rq snapshotter.sock /etc/containerd; then exit 8; fi; "+restartContainerd)
	h.fails("containerd's files are as they were before", append([]string{newProgram}, append(install, "--restart-containerd", restart)...)...)
	w.awaitPass(h.T)
	ofContainerd := func(tree map[string]hostFile) map[string]hostFile {
		tree = maps.Clone(tree)
		maps.DeleteFunc(tree, func(path string, _ hostFile) bool { return !strings.HasPrefix(path, "/etc/containerd") })
		return tree
	}
	h.compare(ofContainerd(h.was), ofContainerd(h.files()), "an install in which containerd has ended")
	if s := unitStatus(h.T); !s.Kept || s.SafeMode != "" {
		h.Errorf("after an install in which containerd has ended: %+v", s)
	}
	h.fails("install again", newProgram, "uninstall")
	h.must(append([]string{newProgram}, install...)...)
	w.awaitPass(h.T)
	h.remove(w)
	h.uninstall(h.c.App)
}

// upgrade puts a newer program in the place of the one that serves a container, and, if broken is true, tries one that does not start then.
func (h *hosted) upgrade(w *watcher, install []string, broken bool) {
	h.Helper()
	newer := h.newer()
	pid := h.must("systemctl", "show", "--property", "MainPID", "--value", "containerd")
	h.must(append([]string{newer}, install...)...)
	h.serves(newer)
	w.awaitPass(h.T)
	if broken {
		installed := h.files()
		h.fails("systemctl restart "+node.Unit, append([]string{"/opt/" + brokenRelease}, install...)...)
		h.asInstalled(installed, "an upgrade that does not start")
		h.serves(newer)
		w.awaitPass(h.T)
		if s := unitStatus(h.T); s.SafeMode != "" {
			h.Errorf("after an upgrade that does not start: %+v", s)
		}
		h.must("systemctl", "stop", node.Unit) // as where it is to be mended by this: the container waits
		h.fails("systemctl restart "+node.Unit, append([]string{"/opt/" + brokenRelease}, install...)...)
		if out, _ := tryRun(h.T, "systemctl", "is-active", node.Unit); !strings.HasPrefix(out, "inactive") {
			h.Errorf("after a failed upgrade of a daemon that was stopped it is %s", out)
		}
		h.must("systemctl", "start", node.Unit) // before a look at the files, some of which it serves
		h.asInstalled(installed, "an upgrade of a daemon that was stopped")
		w.awaitPass(h.T)
	}
	moved := filepath.Join(tempDir(h.T), "moved.toml")
	if err := os.WriteFile(moved, []byte("stream = []\nroot = '/var/lib/elsewhere'\n"), 0o600); err != nil {
		h.Fatal(err)
	}
	h.fails("uninstall first", newer, "install", "--config", moved)
	if broken {
		h.otherProxies(newer, moved)
	}
	if after := h.must("systemctl", "show", "--property", "MainPID", "--value", "containerd"); after != pid {
		h.Error("an upgrade has restarted containerd")
	}
}

// otherProxies: an upgrade whose proxy of CRI does not listen fails, and one without the proxy that a kubelet has its image service from is refused.
func (h *hosted) otherProxies(program, config string) {
	h.Helper()
	is, err := os.ReadFile(configOfInstall)
	if err != nil {
		h.Fatal(err)
	}
	installed := h.files()
	for _, c := range []struct{ proxy, kubelets, want string }{
		{"/etc/passwd", "", "(`cri_proxy`)"},
		{"", "/run/streaming-snapshotter/cri.sock", "has its image service at"},
	} {
		if c.kubelets == "" && h.c.Old == "" {
			continue // an upgrade waits for a minute: under FULL=1
		}
		if err := os.WriteFile(config, fmt.Appendf(slices.Clip(is), "cri_proxy = %q\n", c.proxy), 0o600); err != nil {
			h.Fatal(err)
		}
		end := func() {}
		if c.kubelets != "" {
			end = h.kubelet(c.kubelets)
		}
		h.fails(c.want, program, "install", "--config", config)
		end()
		h.asInstalled(maps.Clone(installed), "an upgrade with another proxy of CRI")
	}
}

// kubelet runs what is called so, with its image service at a socket.
func (h *hosted) kubelet(socket string) (end func()) {
	h.Helper()
	kubelet := &exec.Cmd{Path: "/bin/sh", Args: []string{"kubelet", "-c", "read line", "--image-service-endpoint=unix://" + socket}}
	in, err := kubelet.StdinPipe()
	if err == nil {
		err = kubelet.Start()
	}
	if err != nil {
		h.Fatal(err)
	}
	return func() {
		in.Close()
		kubelet.Wait() // its status is that of read
	}
}

// serves checks which program the daemon is.
func (h *hosted) serves(program string) {
	h.Helper()
	want, err := os.ReadFile(program)
	if err != nil {
		h.Fatal(err)
	}
	pid := strings.TrimSpace(h.must("systemctl", "show", "--property", "MainPID", "--value", node.Unit))
	if b, err := os.ReadFile("/proc/" + pid + "/exe"); err != nil || string(b) != string(want) {
		h.Errorf("the daemon is not %s: %v", program, err)
	}
}

const configOfInstall = "/etc/streaming-snapshotter/config.toml"

// awayFor has nobody answer for a registry, and commands give up soon.
func (h *hosted) awayFor(registry string) (back func()) {
	h.Helper()
	certs := filepath.Join("/etc/containerd/certs.d", registry)
	config, err := os.ReadFile(configOfInstall)
	if err := errors.Join(err, os.WriteFile(configOfInstall, append(slices.Clip(config), "resolve_timeout = '1s'\n"...), 0o644),
		os.MkdirAll(certs, 0o755), os.WriteFile(filepath.Join(certs, "hosts.toml"), []byte("server = 'http://127.0.0.1:1'\n"), 0o644)); err != nil {
		h.Fatal(err)
	}
	h.must("systemctl", "restart", node.Unit) // which looks at certs.d now and then only
	return func() {
		if err := errors.Join(os.WriteFile(configOfInstall, config, 0o644), os.RemoveAll("/etc/containerd/certs.d")); err != nil {
			h.Error(err)
		}
	}
}

// discarding is the form of a host where containerd keeps no layers of images that it has unpacked.
const discarding = "forced to local"

// layersGone: an image is there whose layers are not, as a pod's pause image may be. While these cannot be had, nothing is changed; later, an install gets them.
func (h *hosted) layersGone(registry string) {
	h.Helper()
	h.crictl("pull", h.c.Other)
	h.ctr("content", "prune", "references") // what else comes a while after the pull
	dir := tempDir(h.T)
	config, certs := filepath.Join(dir, "config.toml"), filepath.Join(dir, "certs.d", registry)
	if err := errors.Join(os.MkdirAll(certs, 0o755), os.WriteFile(filepath.Join(certs, "hosts.toml"), []byte("server = 'http://127.0.0.1:1'\n"), 0o644),
		os.WriteFile(config, fmt.Appendf(nil, "stream = []\nresolve_timeout = '1s'\nhosts_dir = %q\n", filepath.Dir(certs)), 0o644)); err != nil {
		h.Fatal(err)
	}
	h.fails(node.Namespace+"/"+h.c.Other, newProgram, "install", "--config", config)
	h.notInstalled("an install of an image without layers")
	if out := h.must(newProgram, "install", "--stream", registry+"/*", "--dry-run"); !strings.Contains(out, "fetch the layers of "+node.Namespace+"/"+h.c.Other) {
		h.Errorf("no layers are to be fetched:\n%s", out)
	}
}

// inTheWay: an uninstall names the container that runs, whatever the configuration says by now, and a kubelet that would be left without its image service.
func (h *hosted) inTheWay(w *watcher) {
	h.Helper()
	config, err := os.ReadFile(configOfInstall)
	if err == nil {
		err = os.WriteFile(configOfInstall, append(slices.Clip(config), "address = '/run/other.sock'\nroot = '/var/lib/elsewhere'\n"...), 0o644)
	}
	if err != nil {
		h.Fatal(err)
	}
	h.fails(node.Namespace+"/"+w.id, node.InstalledPath, "uninstall")
	if err := os.WriteFile(configOfInstall, config, 0o644); err != nil {
		h.Fatal(err)
	}
	end := h.kubelet("/run/streaming-snapshotter/cri.sock")
	h.fails("has its image service at unix:///run/streaming-snapshotter/cri.sock", node.InstalledPath, "uninstall")
	end()
}

// putBack: others have put back containerd's files as they were before the install. If it is restarted then, it has forgotten the snapshotter, and an uninstall keeps the image that was
// streamed; if not, an uninstall has it forget.
func (h *hosted) putBack(restarted bool) {
	h.Helper()
	for path, is := range h.files() {
		f, before := h.was[path]
		var err error
		switch {
		case !strings.HasPrefix(path, "/etc/containerd/"):
		case !before:
			err = os.RemoveAll(path)
		case !bytes.Equal(f.Content, is.Content):
			err = os.WriteFile(path, f.Content, 0)
		}
		if err != nil {
			h.Fatal(err)
		}
	}
	if restarted {
		h.must("sh", "-c", restartContainerd)
	}
	if out := h.must(node.InstalledPath, "uninstall", "--dry-run"); !strings.Contains(out, "unpack "+node.Namespace+"/"+h.c.App) {
		h.Errorf("an uninstall where containerd's files are as before:\n%s", out)
	}
}

// failedUninstall: a container comes in the middle of it; then, containerd does not come back, once, when the snapshots are gone already. All is as installed again, and the image runs.
func (h *hosted) failedUninstall() {
	h.Helper()
	installed := h.files()
	w := h.watcher()
	w.id = "late"
	h.fails(node.Namespace+"/"+w.id, node.InstalledPath, "uninstall", "--restart-containerd", restartContainerd+"; "+h.once(h.runs(w), "true"))
	h.asInstalled(installed, "an uninstall in the middle of which a container has come")
	w.awaitPass(h.T)
	h.remove(w)
	h.fails("exit status 7", node.InstalledPath, "uninstall", "--restart-containerd", h.failsSecond())
	h.asInstalled(installed, "failed uninstall")
	if s := unitStatus(h.T); !s.Kept || s.SafeMode != "" {
		h.Errorf("after a failed uninstall: %+v", s)
	}
	h.reads(h.c.App, systemdSeed, node.Snapshotter)
}

// killedUninstall: it is killed before containerd is restarted, the first time, when nothing new is to use the snapshotter, and the second, when the snapshots are gone and the files are
// as before the install. All is as installed again then.
func (h *hosted) killedUninstall(install []string) {
	h.Helper()
	installed := h.files()
	program := filepath.Join(tempDir(h.T), "streaming-snapshotter") // what is installed, which the second time is gone
	if b, err := os.ReadFile(node.InstalledPath); err != nil {
		h.Fatal(err)
	} else if err := os.WriteFile(program, b, 0o755); err != nil {
		h.Fatal(err)
	}
	for at := range 2 {
		count := filepath.Join(tempDir(h.T), "count")
		c := exec.Command(node.InstalledPath, "uninstall", "--restart-containerd", fmt.Sprintf("echo >>%s; test $(wc -l <%s) -ne %d || { kill -KILL $PPID; exit; }; %s", count, count, at+1, restartContainerd))
		out, _ := c.CombinedOutput()
		if st, ok := c.ProcessState.Sys().(syscall.WaitStatus); !ok || !st.Signaled() {
			h.Fatalf("uninstall was not killed: %v\n%s", c.ProcessState, out)
		}
		if out := h.must(append([]string{program}, install...)...); !strings.Contains(out, "cut short is undone first") || !strings.Contains(out, "nothing to do") {
			h.Errorf("an install after an uninstall that was killed: %s", out)
		}
		h.asInstalled(installed, "an uninstall that was killed")
		h.reads(h.c.App, systemdSeed, node.Snapshotter)
	}
}

// refusedUninstall: while the registry is away, what was never downloaded cannot be had, and nothing is changed.
func (h *hosted) refusedUninstall(registry string) {
	h.Helper()
	back := h.awayFor(registry)
	installed := h.files()
	h.fails("would not run any more", node.InstalledPath, "uninstall")
	h.asInstalled(installed, "refused uninstall")
	back()
}

// busyUninstall: a directory cannot be removed, as if it had been killed at its end. The next one removes it.
func (h *hosted) busyUninstall(images ...string) {
	h.Helper()
	const busy = "/run/streaming-snapshotter"
	h.must("mount", "--bind", busy, busy)
	h.fails("uninstalled, but for this", node.InstalledPath, "uninstall")
	h.must("umount", busy)
	h.must(newProgram, "uninstall")
	h.asBefore(images...)
}

// uninstall: everything is as before, and the images, with systemdSeed and those after it, run.
func (h *hosted) uninstall(images ...string) {
	h.Helper()
	h.must(node.InstalledPath, "uninstall", "--dry-run")
	h.must(node.InstalledPath, "uninstall", "--restart-containerd", "systemctl daemon-reload; "+restartContainerd)
	h.asBefore(images...)
}

func (h *hosted) asBefore(images ...string) {
	h.Helper()
	h.unchanged("uninstall")
	for i, ref := range images {
		h.reads(ref, systemdSeed+uint64(i), "overlayfs")
		h.crictl("rmi", ref)
	}
	h.uninstalled()
}

func (h *hosted) uninstalled() {
	h.Helper()
	if out, err := tryRun(h.T, "systemctl", "cat", node.Unit); err == nil {
		h.Errorf("the unit is still there:\n%s", out)
	}
	if out, _ := tryRun(h.T, "systemctl", "is-active", node.Unit, keeperUnit); strings.Contains("\n"+out, "\nactive") {
		h.Errorf("what was uninstalled runs:\n%s", out)
	}
	h.noneFailed("uninstall")
	if out := h.ctr("plugins", "ls"); regexp.MustCompile(`io\.containerd\.snapshotter\.v1\s+` + node.Snapshotter + `\s`).MatchString(out) {
		h.Errorf("containerd has the snapshotter:\n%s", out)
	}
}

// uninstallAtAnyPrice: the registry is away for good, somebody has changed what install has written, and the daemon ends as it should not when its unit's file is gone.
func (h *hosted) uninstallAtAnyPrice(registry string) {
	h.Helper()
	unit := filepath.Join("/etc/systemd/system", node.Unit+".service")
	for _, path := range []string{configOfInstall, unit} {
		b, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path, append(b, "# changed\n"...), 0o644)
		}
		if err != nil {
			h.Fatal(err)
		}
	}
	back := h.awayFor(registry)
	installed := h.files()
	h.fails(unit+": changed since the install", node.InstalledPath, "uninstall", "--drop-images")
	h.fails("would not run any more", node.InstalledPath, "uninstall", "--discard-changes")
	h.asInstalled(installed, "refused uninstall")
	crash := fmt.Sprintf("systemctl daemon-reload; systemctl cat %[1]s || systemctl kill -s ABRT %[1]s; %[2]s", node.Unit, restartContainerd)
	out := run(h.T, node.InstalledPath, "uninstall", "--drop-images", "--discard-changes", "--restart-containerd", crash)
	for _, want := range []string{"leave " + configOfInstall, "have to be pulled again", node.Unit + ".service " + badEnd + " (exit-code)"} {
		if !strings.Contains(out, want) {
			h.Errorf("uninstall at any price says nothing of %q:\n%s", want, out)
		}
	}
	back()
	if b, err := os.ReadFile(configOfInstall); err != nil || !strings.HasSuffix(string(b), "# changed\n") {
		h.Errorf("the configuration that was changed: %q, %v", b, err)
	}
	if err := os.RemoveAll(filepath.Dir(configOfInstall)); err != nil {
		h.Error(err)
	}
	h.unchanged("uninstall at any price")
	h.uninstalled()
	h.crictl("rmi", h.c.App)
	h.crictl("pull", h.c.App)
	h.reads(h.c.App, systemdSeed, "overlayfs")
	h.crictl("rmi", h.c.App)
}

// Of a reboot: what the test knows before it, and what tells the unit that runs it to reboot.
const (
	beforeReboot = "/opt/before.json"
	rebootMark   = "/reboot"
)

type rebootState struct {
	Form string
	Was  map[string]hostFile
}

// reboot has the host reboot when this test has ended.
func (h *hosted) reboot(form string) {
	h.Helper()
	b, err := json.Marshal(rebootState{form, h.was})
	if err := errors.Join(err, os.WriteFile(beforeReboot, b, 0o600), os.WriteFile(rebootMark, nil, 0o600)); err != nil {
		h.Fatal(err)
	}
}

// rebooted reports whether this is the life after a reboot.
func rebooted(t *testing.T) (s rebootState, ok bool) {
	t.Helper()
	b, err := os.ReadFile(beforeReboot)
	if errors.Is(err, os.ErrNotExist) {
		return s, false
	}
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s, true
}

// afterReboot: the daemon and containerd are up, the container of before the reboot starts again and reads, and what is pulled is streamed. Then it is uninstalled.
func afterReboot(t *testing.T, c installTest, before rebootState) {
	h := &hosted{T: t, c: c, old: before.Form == "1.7", was: before.Was}
	h.makeLoops()
	if s := unitStatus(t); s.Streamed != 1 || !s.Kept || s.SafeMode != "" {
		t.Errorf("after the reboot: %+v", s)
	}
	w := h.watcher()
	h.ctr("tasks", "start", "--detach", "--log-uri", "file://"+w.log, w.id)
	w.awaitPass(t)
	h.crictl("pull", c.Other)
	if s := unitStatus(t); s.Streamed != 2 {
		t.Errorf("a pull after the reboot: %+v", s)
	}
	h.reads(c.Other, systemdSeed+1, node.Snapshotter)
	h.reads(c.App, systemdSeed, node.Snapshotter)
	h.remove(w)
	host, _, _ := strings.Cut(c.App, "/")
	h.refusedUninstall(host)
	h.editedByHand()
	h.uninstall(c.App, c.Other)
}

// editedByHand: what others write into containerd's main file stays there, also where install has.
func (h *hosted) editedByHand() {
	h.Helper()
	const path, text = "/etc/containerd/config.toml", "# by hand\n[timeouts]\n  \"io.containerd.timeout.task.state\" = \"3s\"\n"
	w, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		h.Fatal(err)
	}
	_, err = w.WriteString(text)
	if err := errors.Join(err, w.Close()); err != nil {
		h.Fatal(err)
	}
	f := h.was[path]
	f.Content, f.Time = append(slices.Clip(f.Content), text...), h.files()[path].Time
	h.was[path] = f
}

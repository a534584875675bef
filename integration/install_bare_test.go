package integration_test

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

// installBare installs, upgrades and uninstalls where systemd is not seen: the daemon runs below `supervise`.
func (h *hosted) installBare(install []string) {
	h.Helper()
	bare := func(program string, args ...string) []string {
		return append(append([]string{"env", "OF_A_POD=yes", "unshare", "-m", "--propagation", "unchanged", "sh", "-c", `mount --make-private /run && mount -t tmpfs none /run/systemd && exec "$0" "$@"`, program}, args...),
			"--restart-containerd", "nsenter -t 1 -m sh -c '"+restartContainerd+"'")
	}
	h.must(bare(newProgram, install...)...)
	w := h.watch()
	before := h.bareState()
	if err := os.Remove("/run/streaming-snapshotter/supervise.pid"); err != nil { // as where who starts the host has started it
		h.Fatal(err)
	}
	newer := h.newer()
	h.must(bare(newer, install...)...)
	w.awaitPass(h.T)
	installed := h.files()
	h.fails("the daemon has ended before it was ready", bare("/opt/"+brokenRelease, install...)...)
	h.asInstalled(installed, "an upgrade that does not start")
	w.awaitPass(h.T)
	if s := unitStatus(h.T); s.SafeMode != "" || !s.Kept {
		h.Errorf("after an upgrade that does not start: %+v", s)
	}
	if after := h.bareState(); after != before {
		h.Errorf("an upgrade has replaced the supervisor %s by %s", before, after)
	}
	h.remove(w)
	h.must(bare(node.InstalledPath, "uninstall")...)
	h.unchanged("uninstall")
	if _, err := os.Stat("/proc/" + before); err == nil {
		h.Error("the supervisor still runs")
	}
	h.crictl("rmi", h.c.App)
}

// bareState checks what is root's alone, and what of a supervisor's environment and output is the host's; it returns the supervisor's process ID.
func (h *hosted) bareState() string {
	h.Helper()
	const run, log = "/run/streaming-snapshotter", "/var/log/streaming-snapshotter.log"
	b, err := os.ReadFile(run + "/supervise.pid")
	if err != nil {
		h.Fatal(err)
	}
	for path, want := range map[string]os.FileMode{run: os.ModeDir | 0o700, run + "/keeper.sock": os.ModeSocket | 0o600} {
		if fi, err := os.Stat(path); err != nil || fi.Mode() != want {
			h.Errorf("%s: %v, %v, want %v", path, fi, err, want)
		}
	}
	pid := strings.TrimSpace(string(b))
	processes := []string{pid}
	tasks, _ := filepath.Glob("/proc/" + pid + "/task/*/children")
	for _, task := range tasks {
		children, _ := os.ReadFile(task)
		processes = append(processes, strings.Fields(string(children))...)
	}
	if len(processes) < 2 {
		h.Fatal("the supervisor has no daemon")
	}
	for _, p := range processes {
		if env, err := os.ReadFile("/proc/" + p + "/environ"); err != nil || strings.Contains(string(env), "OF_A_POD") || !strings.Contains(string(env), "PATH=") {
			h.Errorf("process %s has the environment %q, %v", p, env, err)
		}
		if out, err := os.Readlink("/proc/" + p + "/fd/2"); err != nil || out != log {
			h.Errorf("process %s writes to %s, %v", p, out, err)
		}
	}
	return pid
}

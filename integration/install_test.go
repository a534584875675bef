package integration_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/traps"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// installTest is what TestInstall does in one of its Debians.
type installTest struct {
	Debian     string
	App        string   // reference of an image that streams, with systemdSeed
	Forms      []string // of containerd's configuration
	Containerd string   // the program
}

// TestInstall boots Debians with a real systemd and a containerd of their own, and installs there with the commands: systemd 252, with the keeper, and 257, without; with
// containerd's configuration in each of its forms.
func TestInstall(t *testing.T) {
	if text := os.Getenv(insideSystemd); text != "" {
		var c installTest
		if err := json.Unmarshal([]byte(text), &c); err != nil {
			t.Fatal(err)
		}
		for _, form := range c.Forms {
			t.Run(form, func(t *testing.T) { installOnHost(t, c, form) })
			if t.Failed() {
				return
			}
		}
		return
	}
	images := debians(t)
	registry := startRegistry(t, registrytest.Options{})
	app := registry.Host() + "/app:v1"
	pushSmall(t, app, systemdSeed)
	run(t, "streamctl", "create", "--record", "", app)
	programs := buildForDebian(t)
	for _, c := range []installTest{
		{Debian: "systemd", Forms: []string{"no file", "version 2"}},
		{Debian: "systemd-trixie", Forms: []string{"list replaced", "another file imported", "forced to local", bare}},
	} {
		t.Run(c.Debian, func(t *testing.T) {
			root, checkout := filepath.Join(tempDir(t), "root"), checkout(t)
			c.App, c.Containerd = app, filepath.Join(toolsDir(checkout), "containerd")
			runInside(t, root, filepath.Join(images, c.Debian), checkout, programs, "TestInstall", c)
			bootTest(t, root, checkout, "TestInstall")
		})
	}
}

// bare is the form of a host without systemd: install sees none, containerd is run by one.
const bare = "no systemd"

// forms are the files of containerd's configuration before an install, by their paths below /etc/containerd.
var forms = map[string]map[string]string{
	"no file":               {},
	"version 2":             {"config.toml": "# kept as it is\nversion = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  restrict_oom_score_adj = true\n"},
	"list replaced":         {"config.toml": "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n", "conf.d/z.toml": "version = 3\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = 'linux'\n  snapshotter = 'overlayfs'\n"},
	"another file imported": {"config.toml": "version = 3\nimports = ['/etc/containerd/other.toml']\n[plugins.'io.containerd.cri.v1.images'] # CRI\n  snapshotter = 'overlayfs'\n", "other.toml": "version = 3\n[plugins.'io.containerd.cri.v1.runtime']\n  restrict_oom_score_adj = true\n"},
	bare:                    {"config.toml": "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n"},
	"forced to local":       {"config.toml": "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  max_concurrent_downloads = 5\n"},
}

const containerdUnit = `[Service]
Type=notify
Environment=PATH=%s:/usr/bin:/usr/sbin
ExecStart=%s
KillMode=process
Delegate=yes
`

// hosted is a host with containerd's unit, and what install has found there.
type hosted struct {
	*testing.T
	c   installTest
	was map[string]hostFile
}

// hostFile is all that is compared of a file.
type hostFile struct {
	mode     uint32
	uid, gid uint32
	time     int64 // ns, of regular files
	content  string
}

// files are those of the host where an install has something to do.
func (h *hosted) files() map[string]hostFile {
	h.Helper()
	tree := map[string]hostFile{}
	for _, dir := range []string{"/etc", "/usr/local", "/var/lib/streaming-snapshotter", "/var/lib/streaming-snapshotter-install"} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); errors.Is(err, fs.ErrNotExist) {
				return nil // a daemon that runs has removed it meanwhile
			} else if err != nil {
				return &fs.PathError{Op: "lstat", Path: path, Err: err}
			}
			f := hostFile{mode: st.Mode, uid: st.Uid, gid: st.Gid}
			switch st.Mode & unix.S_IFMT {
			case unix.S_IFLNK:
				f.content, err = os.Readlink(path)
			case unix.S_IFREG:
				var b []byte
				b, err = os.ReadFile(path)
				f.content, f.time = string(b), st.Mtim.Nano()
			}
			tree[path] = f
			return err
		})
		if err != nil {
			h.Fatal(err)
		}
	}
	return tree
}

// unchanged wants the files to be as they were, byte for byte.
func (h *hosted) unchanged(after string) {
	h.Helper()
	is := h.files()
	for path, f := range is {
		if was, ok := h.was[path]; !ok {
			h.Errorf("%s: %s is left", after, path)
		} else if !reflect.DeepEqual(was, f) {
			h.Errorf("%s: %s was %+v and is %+v", after, path, was, f)
		}
	}
	for path := range h.was {
		if _, ok := is[path]; !ok {
			h.Errorf("%s: %s is gone", after, path)
		}
	}
}

func (h *hosted) must(args ...string) string {
	h.Helper()
	return run(h.T, args...)
}

func (h *hosted) ctr(args ...string) string {
	h.Helper()
	return h.must(append([]string{"ctr", "--namespace", node.Namespace}, args...)...)
}

// fails runs a command that must fail with a text.
func (h *hosted) fails(want string, args ...string) {
	h.Helper()
	if out, err := tryRun(h.T, args...); err == nil || !strings.Contains(err.Error(), want) {
		h.Errorf("%q: got %v, want %q\n%s", args, err, want, out)
	}
}

const newProgram = "/opt/" + thisRelease

func installOnHost(t *testing.T, c installTest, form string) {
	for i := range 64 { // here is no udev
		if err := unix.Mknod(fmt.Sprintf("/dev/loop%d", i), unix.S_IFBLK|0o600, int(unix.Mkdev(7, uint32(i)))); err != nil && err != unix.EEXIST {
			t.Fatal(err)
		}
	}
	h := &hosted{T: t, c: c}
	if err := os.WriteFile("/etc/systemd/system/containerd.service", fmt.Appendf(nil, containerdUnit, filepath.Dir(c.Containerd), c.Containerd), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, text := range forms[form] {
		path := filepath.Join("/etc/containerd", name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o640), os.Chown(path, 0, 4)); err != nil {
			t.Fatal(err)
		}
	}
	h.must("systemctl", "daemon-reload")
	h.must("systemctl", "restart", "containerd")
	defer func() {
		h.must("systemctl", "stop", "containerd")
		if err := os.RemoveAll("/etc/containerd"); err != nil {
			t.Error(err)
		}
	}()
	h.was = h.files()
	host, _, _ := strings.Cut(c.App, "/")
	install := []string{"install", "--stream", host + "/*"}

	if form == bare {
		h.installBare(install)
		return
	}
	out := h.must(append([]string{newProgram}, append(install, "--dry-run")...)...)
	for _, want := range []string{"write " + node.InstalledPath, "+++ /etc/containerd/", `+  address = "/run/streaming-snapshotter/snapshotter.sock"`, "+++ /etc/streaming-snapshotter/config.toml", "run systemctl restart containerd.service"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	h.unchanged("dry run")
	h.failedInstall(install)
	h.killedInstall(install)
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
	h.upgrade(w, install)
	h.fails(node.Namespace+"/"+w.id, node.InstalledPath, "uninstall")
	h.ctr("tasks", "delete", "--force", w.id)
	h.ctr("containers", "delete", w.id)
	h.uninstall(host)
}

// watch pulls the image, which is streamed, and runs a container that reads it.
func (h *hosted) watch() *watcher {
	h.Helper()
	h.must("crictl", "--runtime-endpoint", "unix:///run/containerd/containerd.sock", "--timeout", "60s", "pull", h.c.App)
	if s := unitStatus(h.T); s.Streamed != 1 || !s.Kept {
		h.Fatalf("after the pull: %+v", s)
	}
	w := &watcher{id: "watch", want: smallSum(systemdSeed), log: filepath.Join(tempDir(h.T), "watch.out")}
	h.ctr("run", "--detach", node.NoShares, "--snapshotter", node.Snapshotter, "--log-uri", "file://"+w.log, h.c.App, w.id, "/guest", "watch", "/data")
	w.awaitPass(h.T)
	return w
}

// installBare installs, upgrades and uninstalls where systemd is not seen: the daemon runs below `supervise`.
func (h *hosted) installBare(install []string) {
	h.Helper()
	run := func(program string, args ...string) string {
		h.Helper()
		return h.must(append(append([]string{"unshare", "-m", "--propagation", "unchanged", "sh", "-c", `mount --make-private /run && mount -t tmpfs none /run/systemd && exec "$0" "$@"`, program}, args...),
			"--restart-containerd", "nsenter -t 1 -m systemctl restart containerd")...)
	}
	run(newProgram, install...)
	w := h.watch()
	pid := func() string {
		b, err := os.ReadFile("/run/streaming-snapshotter/supervise.pid")
		if err != nil {
			h.Fatal(err)
		}
		return string(b)
	}
	before := pid()
	newer := filepath.Join(tempDir(h.T), "newer")
	h.must("sh", "-c", `cat "$0" >"$1"; echo a newer one >>"$1"; chmod 755 "$1"`, newProgram, newer)
	run(newer, install...)
	w.awaitPass(h.T)
	if pid() != before {
		h.Error("the upgrade has replaced the supervisor")
	}
	h.ctr("tasks", "delete", "--force", w.id)
	h.ctr("containers", "delete", w.id)
	run(node.InstalledPath, "uninstall")
	h.unchanged("uninstall")
	if _, err := os.Stat("/proc/" + strings.TrimSpace(before)); err == nil {
		h.Error("the supervisor still runs")
	}
	h.must("crictl", "--runtime-endpoint", "unix:///run/containerd/containerd.sock", "rmi", h.c.App)
}

// failedInstall: containerd that does not come back, once, puts everything back.
func (h *hosted) failedInstall(install []string) {
	h.Helper()
	once := filepath.Join(tempDir(h.T), "once")
	h.fails("exit status 7", append([]string{newProgram}, append(install, "--restart-containerd", "test -e "+once+" || { touch "+once+"; exit 7; }; systemctl restart containerd")...)...)
	h.unchanged("failed install")
	h.ctr("plugins", "ls")
	if out, _ := tryRun(h.T, "systemctl", "is-active", node.Unit); !strings.HasPrefix(out, "inactive") {
		h.Errorf("after a failed install the daemon is %s", out)
	}
}

// killedInstall: the next command puts everything back, and goes on. Here that is an uninstall, which finds nothing to do then.
func (h *hosted) killedInstall(install []string) {
	h.Helper()
	c := exec.Command(newProgram, append(install, "--restart-containerd", "systemctl restart containerd; kill -KILL $PPID")...)
	c.CombinedOutput()
	if st, ok := c.ProcessState.Sys().(syscall.WaitStatus); !ok || !st.Signaled() {
		h.Fatalf("install was not killed: %v", c.ProcessState)
	}
	if _, err := os.Stat(node.InstalledPath); err != nil {
		h.Fatal(err)
	}
	h.fails("has put nothing on this host", newProgram, "uninstall", "--restart-containerd", "systemctl restart containerd")
	h.unchanged("killed install")
}

// upgrade puts a newer program in the place of the one that serves a container, and then one that does not start.
func (h *hosted) upgrade(w *watcher, install []string) {
	h.Helper()
	this, err := os.ReadFile(newProgram)
	if err != nil {
		h.Fatal(err)
	}
	newer := filepath.Join(tempDir(h.T), "newer")
	if err := os.WriteFile(newer, append(slices.Clip(this), "a newer one"...), 0o755); err != nil {
		h.Fatal(err)
	}
	out := h.must(append([]string{newer}, install...)...)
	if strings.Contains(out, "containerd.service") {
		h.Errorf("the upgrade restarted containerd:\n%s", out)
	}
	pid := strings.TrimSpace(h.must("systemctl", "show", "--property", "MainPID", "--value", node.Unit))
	if b, err := os.ReadFile("/proc/" + pid + "/exe"); err != nil || len(b) != len(this)+len("a newer one") {
		h.Errorf("the daemon has %d bytes: %v", len(b), err)
	}
	w.awaitPass(h.T)
}

// uninstall: while the registry is away it changes nothing; then everything is as before, and the image runs.
func (h *hosted) uninstall(registry string) {
	h.Helper()
	installed := &hosted{T: h.T, c: h.c, was: h.files()}
	certs := filepath.Join("/etc/containerd/certs.d", registry)
	if err := errors.Join(os.MkdirAll(certs, 0o755), os.WriteFile(filepath.Join(certs, "hosts.toml"), []byte("server = 'http://127.0.0.1:1'\n"), 0o644)); err != nil {
		h.Fatal(err)
	}
	h.fails("would not run any more", node.InstalledPath, "uninstall")
	if err := os.RemoveAll("/etc/containerd/certs.d"); err != nil {
		h.Fatal(err)
	}
	for path := range installed.was {
		if strings.HasPrefix(path, "/var/lib/streaming-snapshotter/") { // the daemon's own
			delete(installed.was, path)
		}
	}
	for path, f := range installed.files() {
		if was, ok := installed.was[path]; ok && !reflect.DeepEqual(was, f) {
			h.Errorf("refused uninstall: %s was %+v and is %+v", path, was, f)
		}
	}
	h.must(node.InstalledPath, "uninstall", "--dry-run")
	h.must(node.InstalledPath, "uninstall")
	h.unchanged("uninstall")
	log := filepath.Join(tempDir(h.T), "run.out")
	h.ctr("run", "--rm", node.NoShares, "--snapshotter", "overlayfs", "--log-uri", "file://"+log, h.c.App, "run", "/guest", "sum", "/data")
	b, err := os.ReadFile(log)
	if err != nil {
		h.Fatal(err)
	}
	checkSumsBelow(h.T, string(b), systemdSeed, "/data")
	h.must("crictl", "--runtime-endpoint", "unix:///run/containerd/containerd.sock", "rmi", h.c.App)
	if out, err := tryRun(h.T, "systemctl", "cat", node.Unit); err == nil {
		h.Errorf("the unit is still there:\n%s", out)
	}
}

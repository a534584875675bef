package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// insideSystemd is set where systemd is process 1 and the units are installed: to a mount mode.
const insideSystemd = "STREAMING_SNAPSHOTTER_TEST_SYSTEMD"

// TestSystemd boots a Debian with a real systemd, installs the units of deploy/systemd there, and runs itself in it (underUnits); with FULL set in another mount mode too.
func TestSystemd(t *testing.T) {
	if mode := os.Getenv(insideSystemd); mode != "" {
		underUnits(t, mode)
		return
	}
	base := debian(t)
	program := filepath.Join(t.TempDir(), "streaming-snapshotter") // static: that Debian's libc may be older than ours
	build := exec.Command("go", "test", "-c", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	modes := []string{"file"}
	if os.Getenv("FULL") != "" {
		modes = append(modes, "tree")
	}
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "root")
			prepareRoot(t, root, base, program, mode)
			console, err := boot(t, root)
			b, _ := os.ReadFile(filepath.Join(root, "result"))
			if err != nil || !strings.Contains(string(b), "\nexit 0\n") || !strings.Contains(string(b), "--- PASS: TestSystemd ") {
				journal, _ := os.ReadFile(filepath.Join(root, "journal"))
				t.Errorf("%v\n%s\n%s\n%s", err, console[max(0, len(console)-2000):], b, journal)
			}
			t.Logf("%s", b)
		})
	}
}

// debian returns the directory of the Debian that `make images` has built.
func debian(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("systemd-nspawn needs root")
	}
	if _, err := exec.LookPath("systemd-nspawn"); err != nil {
		t.Skip(err)
	}
	images := os.Getenv("OUT")
	if images == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			t.Skip(err)
		}
		images = filepath.Join(cache, "test-images")
	}
	dir := filepath.Join(images, "systemd")
	if _, err := os.Stat(dir); err != nil {
		t.Skipf("%v: make images builds it", err)
	}
	return dir
}

// prepareRoot makes root a copy of base in which systemd runs program as this test, after the keeper's start.
func prepareRoot(t *testing.T, root, base, program, mode string) {
	t.Helper()
	command := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	command("cp", "-a", base, root)
	units := filepath.Join(root, "etc/systemd/system")
	write := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(units, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(units, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	command("cp", program, filepath.Join(root, "usr/local/bin/streaming-snapshotter"))
	for _, unit := range []string{"streaming-snapshotter.service", "streaming-snapshotter-keeper.service"} {
		command("cp", "../../deploy/systemd/"+unit, units)
		write(unit+".d/test.conf", "[Service]\nEnvironment="+asCommand+"=1\n") // the test program is the command when it is called so
	}
	write("inside.service", fmt.Sprintf(`[Unit]
After=multi-user.target
[Service]
Type=oneshot
Environment=%s=%s
ExecStart=/bin/sh -c '/usr/local/bin/streaming-snapshotter -test.v -test.run ^TestSystemd$ >/result 2>&1; echo exit $? >>/result; journalctl --no-pager -n 200 >/journal; systemctl poweroff --no-block'
[Install]
WantedBy=multi-user.target
`, insideSystemd, mode))
	command("systemctl", "--root="+root, "enable", "inside.service", "streaming-snapshotter-keeper.service")
}

// boot runs the Debian in root until it powers itself off, and returns its console. Nothing is left of it however that ends: its mounts, and nspawn's own in
// /run, are in a mount namespace, and its processes in a PID namespace, which ends with this process, and in a cgroup.
func boot(t *testing.T, root string) (console []byte, err error) {
	t.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
	if err != nil || len(mounts) == 0 {
		t.Skipf("no cgroup2 is mounted: %v", err)
	}
	group, err := os.MkdirTemp(mounts[0].Mountpoint, "streaming-snapshotter-")
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { removeGroup(t, group) })
	fd, err := os.Open(group)
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, "sh", "-c", `mount -t proc proc /proc && mount -t tmpfs tmpfs /run && exec systemd-nspawn --register=no --keep-unit --boot --bind=/dev/fuse --capability=all --console=pipe -D "$0"`, root)
	c.Env = append(os.Environ(), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1")
	c.WaitDelay = 10 * time.Second
	c.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Unshareflags: unix.CLONE_NEWNS, UseCgroupFD: true, CgroupFD: int(fd.Fd()), Pdeathsig: unix.SIGKILL}
	runtime.LockOSThread() // Pdeathsig is about the thread
	defer runtime.UnlockOSThread()
	return c.CombinedOutput()
}

// removeGroup kills what is in a cgroup and removes it with those below it.
func removeGroup(t *testing.T, group string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(group, "cgroup.kill"), []byte("1"), 0); err != nil {
		t.Error(err)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		var dirs []string
		filepath.WalkDir(group, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		slices.Reverse(dirs)
		var err error
		for _, dir := range dirs {
			err = unix.Rmdir(dir) // EBUSY until its processes are gone
		}
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("remove %s: %v", group, err)
			return
		}
	}
}

// underUnits does all that can be done to the units of deploy/systemd while a mounted image is read.
func underUnits(t *testing.T, mode string) {
	systemctl := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("systemctl", args...).CombinedOutput(); err != nil {
			t.Errorf("systemctl %v: %v\n%s", args, err, out)
		}
	}
	reg := registrytest.Start(t, registrytest.Options{})
	ref := reg.Host() + "/app"
	if err := os.MkdirAll(filepath.Dir(defaultConfig), 0o755); err != nil {
		t.Fatal(err)
	}
	configure := func(text string) {
		if err := os.WriteFile(defaultConfig, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	good := fmt.Sprintf("stream = ['%s/*']\nhosts_dir = ''\nmount_mode = %q\n", reg.Host(), mode)
	configure(good)
	systemctl("daemon-reload")
	systemctl("start", "streaming-snapshotter")

	manifest, diffIDs := push(t, ref)
	convert(t, ref)
	conn, err := grpc.NewClient("unix://"+defaults().Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	sn := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "streaming")
	ctx := context.Background()
	if _, err := sn.Prepare(ctx, "x", "", snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef: diffIDs[0], snapshotters.TargetRefLabel: ref, snapshotters.TargetManifestDigestLabel: manifest,
	})); !errdefs.IsAlreadyExists(err) {
		t.Fatalf("Prepare: %v", err)
	}
	top := ""
	if err := sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Parent != "" {
			top = info.Name
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	mounts, err := sn.Prepare(ctx, "container", top)
	if err != nil {
		t.Fatal(err)
	}
	container := t.TempDir()
	if err := mount.All(mounts, container); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(container, unix.MNT_DETACH)

	var passes atomic.Int64
	var longest time.Duration
	stop, failed := make(chan struct{}), make(chan error, 1)
	go func() {
		want := [32]byte{}
		for i := 0; ; i++ {
			began := time.Now()
			sum, err := sumTree(container)
			longest = max(longest, time.Since(began))
			if i == 0 {
				want = sum
			}
			if err == nil && sum != want {
				err = fmt.Errorf("pass %d differs", i)
			}
			select {
			case <-stop:
				failed <- err
				return
			default:
			}
			if err != nil {
				failed <- err
				return
			}
			passes.Add(1)
		}
	}()
	read := func(what string) { // twice through, after what
		t.Helper()
		from := passes.Load()
		for deadline := time.Now().Add(30 * time.Second); passes.Load() < from+2; time.Sleep(5 * time.Millisecond) {
			select {
			case err := <-failed:
				t.Fatalf("%s: %v", what, err)
			default:
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: reads do not go on", what)
			}
		}
		t.Logf("%s: %d passes", what, passes.Load())
	}
	read("start")
	for range 3 {
		systemctl("restart", "streaming-snapshotter")
	}
	read("restart")
	systemctl("kill", "-s", "KILL", "streaming-snapshotter")
	read("kill")
	systemctl("stop", "streaming-snapshotter")
	stopped := passes.Load()
	systemctl("daemon-reload") // takes its time
	if n := passes.Load(); n > stopped+1 {
		t.Errorf("%d passes without a daemon: the reads are none of its business", n-stopped)
	}
	systemctl("start", "streaming-snapshotter")
	read("stop and start")
	systemctl("daemon-reexec")
	systemctl("restart", "streaming-snapshotter")
	read("daemon-reexec")
	systemctl("restart", "streaming-snapshotter-keeper")
	systemctl("kill", "-s", "KILL", "streaming-snapshotter")
	read("keeper restarted")
	systemctl("kill", "-s", "KILL", "streaming-snapshotter-keeper", "streaming-snapshotter")
	read("keeper and daemon killed")
	install(t, "/usr/local/bin/streaming-snapshotter", "a newer one")
	systemctl("restart", "streaming-snapshotter")
	read("upgrade")
	configure("nonsense\n" + good)
	exec.Command("systemctl", "restart", "streaming-snapshotter").Run() // fails, as the first starts do
	askStatus(t, defaultConfig, func(s status) bool { return s.SafeMode != "" })
	read("safe mode")
	prepare(t, defaults().Address, "ordinary")
	configure(good)
	systemctl("restart", "streaming-snapshotter")
	askStatus(t, defaultConfig, func(s status) bool { return s.SafeMode == "" })
	read("mended")
	close(stop)
	if err := <-failed; err != nil {
		t.Error(err)
	}
	t.Logf("%d passes, the longest took %v", passes.Load(), longest)
}

// sumTree reads the files below dir, having had the kernel forget their pages, so that the daemon is asked for them.
func sumTree(dir string) (sum [32]byte, err error) {
	h := sha256.New()
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			return err
		}
		b, err := io.ReadAll(f)
		fmt.Fprintf(h, "%s %x\n", path, sha256.Sum256(b))
		return err
	})
	return [32]byte(h.Sum(nil)), err
}

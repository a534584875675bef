package integration_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// insideSystemd is set where systemd is process 1 and the units are installed: to a unitsTest.
const insideSystemd = "STREAMING_SNAPSHOTTER_TEST_SYSTEMD"

// unitsTest is what TestSystemd does in one of its Debians.
type unitsTest struct {
	Debian string // directory below that of the test images
	Keeper bool   // with the keeper's unit; else systemd keeps the descriptors, which it does over a stop since 254
	Mode   string
	App    string // reference of an image that streams, with systemdSeed
	Plain  string // and of one that does not
}

const systemdSeed = 93

// TestSystemd boots Debians with a real systemd, installs the units of deploy/systemd, and runs a node and itself there (underUnits): systemd 252
// with the keeper, and 257 without. With FULL set in each mount mode.
func TestSystemd(t *testing.T) {
	if text := os.Getenv(insideSystemd); text != "" {
		var c unitsTest
		if err := json.Unmarshal([]byte(text), &c); err != nil {
			t.Fatal(err)
		}
		underUnits(t, c)
		return
	}
	images := debians(t)
	registry := startRegistry(t, registrytest.Options{})
	app, plain := registry.Host()+"/app:v1", registry.Host()+"/plain:v1"
	pushSmall(t, app, systemdSeed)
	pushSmall(t, plain, systemdSeed+1)
	run(t, "streamctl", "create", "--record", "", app)
	programs := buildForDebian(t)
	chosen := modes[:1]
	if os.Getenv("FULL") != "" {
		chosen = modes[:]
	}
	for _, mode := range chosen {
		for _, c := range []unitsTest{
			{Debian: "systemd", Keeper: true, Mode: mode, App: app, Plain: plain},
			{Debian: "systemd-trixie", Mode: mode, App: app, Plain: plain},
		} {
			t.Run(c.Debian+"/"+mode, func(t *testing.T) {
				root, checkout := filepath.Join(tempDir(t), "root"), checkout(t)
				prepareRoot(t, c, root, filepath.Join(images, c.Debian), checkout, programs)
				bootTest(t, root, checkout, "TestSystemd", 1)
			})
		}
	}
}

// bootTest runs what runInside has prepared; the test asks for so many boots. More are directories beside the checkout and the tools that are to be seen there.
func bootTest(t *testing.T, root, checkout, test string, boots int, more ...string) {
	t.Helper()
	var console []byte
	var err error
	for n := 1; ; n++ {
		const reboot = 133 // systemd-nspawn's exit status
		var exit *exec.ExitError
		if console, err = boot(t, root, append([]string{checkout, toolsDir(checkout)}, more...)); n < boots && errors.As(err, &exit) && exit.ExitCode() == reboot {
			continue
		}
		break
	}
	b, _ := os.ReadFile(filepath.Join(root, "result"))
	text := string(b)
	if err != nil || !strings.HasSuffix(text, "end\n") || strings.Count(text, "\nexit 0\n") != boots || strings.Count(text, "--- PASS: "+test+" ") != boots {
		journal, _ := os.ReadFile(filepath.Join(root, "journal"))
		t.Errorf("%v\n%s\n%s\n%s", err, console[max(0, len(console)-2000):], b, journal)
	}
	t.Logf("%s", b)
}

// checkout is the directory of this module, without symbolic links.
func checkout(t *testing.T) string {
	t.Helper()
	dir, err := node.Root()
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// toolsDir is where make build has put containerd and the other tools.
func toolsDir(checkout string) string {
	dir, err := filepath.EvalSymlinks(filepath.Join(checkout, ".build/bin"))
	if err != nil {
		return filepath.Join(checkout, ".build/bin")
	}
	return dir
}

// debians returns the directory of the Debians that `make images` has built.
func debians(t *testing.T) string {
	t.Helper()
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
	for _, name := range []string{"systemd", "systemd-trixie"} {
		if _, err := os.Stat(filepath.Join(images, name)); err != nil {
			t.Skipf("%v: make images builds it", err)
		}
	}
	return images
}

// Programs that buildForDebian builds.
const (
	thisRelease   = "streaming-snapshotter"
	otherRelease  = "streaming-snapshotter-other"  // one that lays out the state of a session differently
	brokenRelease = "streaming-snapshotter-broken" // one that does not start
	testProgram   = "test"
)

// buildForDebian builds the programs that run in the Debians, static: their libc may be older than ours.
func buildForDebian(t *testing.T) (dir string) {
	t.Helper()
	dir = tempDir(t)
	top := checkout(t)
	for _, args := range [][]string{
		{"build", "-o", filepath.Join(dir, thisRelease), "./cmd/streaming-snapshotter"},
		{"build", "-overlay", overlay(t, dir, "fs/state.go", `"FUSE st\x01"`, `"FUSE st\xff"`), "-o", filepath.Join(dir, otherRelease), "./cmd/streaming-snapshotter"},
		{"build", "-overlay", overlay(t, dir, "cmd/streaming-snapshotter/serve.go", "\topened := make(", "\treturn nil, errors.New(\"this build does not start\")\n\topened := make("), "-o", filepath.Join(dir, brokenRelease), "./cmd/streaming-snapshotter"},
		{"test", "-c", "-o", filepath.Join(dir, testProgram), "./integration"},
	} {
		c := exec.CommandContext(t.Context(), "go", args...)
		c.Dir, c.Env = top, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("go %v: %v\n%s", args, err, out)
		}
	}
	return dir
}

// overlay returns the file that has the go command build with a source in which old, which is there once, is new.
func overlay(t *testing.T, dir, source, old, new string) string {
	t.Helper()
	path := filepath.Join(checkout(t), source)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Count(string(b), old) != 1 {
		t.Fatalf("%s does not say %s", source, old)
	}
	other := filepath.Join(dir, filepath.Base(source))
	text, err := json.Marshal(map[string]any{"Replace": map[string]string{path: other}})
	if err := errors.Join(err, os.WriteFile(other, []byte(strings.Replace(string(b), old, new, 1)), 0o644), os.WriteFile(other+".overlay", text, 0o644)); err != nil {
		t.Fatal(err)
	}
	return other + ".overlay"
}

// prepareRoot makes root a copy of base in which systemd runs this test, as c says.
func prepareRoot(t *testing.T, c unitsTest, root, base, checkout, programs string) {
	t.Helper()
	in := func(name string) string { return filepath.Join(root, name) }
	runInside(t, root, base, checkout, programs, "TestSystemd", c)
	run(t, "cp", in("opt/"+thisRelease), in(node.InstalledPath))
	units, deploy := in("etc/systemd/system"), filepath.Join(checkout, "deploy/systemd")
	run(t, "cp", filepath.Join(deploy, node.Unit+".service"), units)
	if c.Keeper {
		run(t, "cp", filepath.Join(deploy, node.Unit+"-keeper.service"), units)
		run(t, "systemctl", "--root="+root, "enable", node.Unit+"-keeper.service")
	} else {
		run(t, "mkdir", filepath.Join(units, node.Unit+".service.d"))
		run(t, "cp", filepath.Join(deploy, "systemd-254.conf"), filepath.Join(units, node.Unit+".service.d"))
	}
}

// runInside makes root a copy of base in which systemd runs a test of this program, as c says, and then ends; or, if the test has left a rebootMark, boots and runs it again.
func runInside(t *testing.T, root, base, checkout, programs, test string, c any) {
	t.Helper()
	run(t, "cp", "-a", base, root)
	run(t, "cp", filepath.Join(programs, thisRelease), filepath.Join(programs, otherRelease), filepath.Join(programs, brokenRelease), filepath.Join(programs, testProgram), filepath.Join(root, "opt"))
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	inside := fmt.Sprintf(`[Unit]
After=multi-user.target
[Service]
Type=oneshot
WorkingDirectory=%s/integration
Environment=TMPDIR=/var/lib PATH=%s:/usr/local/bin:/usr/bin:/usr/sbin '%s=%s'
ExecStart=/bin/sh -c '/opt/%s -test.v -test.run ^%s$ >>/result 2>&1; echo exit $? >>/result; journalctl --no-pager -n 200 >/journal; if rm %s; then systemctl reboot --no-block; else echo end >>/result; systemctl poweroff --no-block; fi'
[Install]
WantedBy=multi-user.target
`, checkout, toolsDir(checkout), insideSystemd, text, testProgram, test, rebootMark)
	if err := os.WriteFile(filepath.Join(root, "etc/systemd/system/inside.service"), []byte(inside), 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, "systemctl", "--root="+root, "enable", "inside.service")
}

// boot runs the Debian in root, which sees some of our directories, until it powers itself off, and returns its console. Nothing is left of it however that ends: its mounts, and nspawn's own in
// /run, are in a mount namespace, and its processes in a PID namespace, which ends with this process, and in a cgroup.
func boot(t *testing.T, root string, seen []string) (console []byte, err error) {
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
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	args := []string{"-c", `mount -t proc proc /proc && mount -t tmpfs tmpfs /run && exec systemd-nspawn --register=no --keep-unit --boot --bind=/dev/fuse --bind=/dev/loop-control --resolv-conf=off --timezone=off --system-call-filter="bpf @keyring" --capability=all --console=pipe -D "$0" "$@"`, root}
	for _, dir := range seen {
		args = append(args, "--bind-ro="+dir)
	}
	c := exec.CommandContext(ctx, "sh", args...)
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

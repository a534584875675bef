package integration_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

const keeperUnit = node.Unit + "-keeper"

// underUnits does all that can be done to the units of deploy/systemd while a container reads its streamed image, round after round.
func underUnits(t *testing.T, c unitsTest) {
	for i := range 64 { // here is no udev
		if err := unix.Mknod(fmt.Sprintf("/dev/loop%d", i), unix.S_IFBLK|0o600, int(unix.Mkdev(7, uint32(i)))); err != nil && err != unix.EEXIST {
			t.Fatal(err)
		}
	}
	host, _, _ := strings.Cut(c.App, "/")
	n := startNode(t, node.Options{Mode: c.Mode, Stream: []string{host + "/*"}, Units: true})
	if err := n.Pull(t.Context(), c.App); err != nil {
		t.Fatal(err)
	}
	if s := unitStatus(t); s.Streamed != 1 || !s.Kept || s.MountMode != c.Mode {
		t.Fatalf("after the pull: %+v", s)
	}
	hardened(t)
	u := &units{T: t, c: c, n: n, w: startWatcher(t, n, "watch", c.App, smallSum(systemdSeed), nil, "/guest", "watch", "/data")}
	keeper := []step{
		{"keeper restarted", func() {
			u.systemctl("restart", keeperUnit)
			u.systemctl("kill", "-s", "KILL", node.Unit)
		}},
		{"keeper and daemon killed", func() { u.systemctl("kill", "-s", "KILL", keeperUnit, node.Unit) }},
	}
	if !c.Keeper {
		keeper = nil
	}
	for _, s := range append([]step{
		{"start", func() {}},
		{"restart", func() {
			for range 3 {
				u.systemctl("restart", node.Unit)
			}
		}},
		{"kill", func() { u.systemctl("kill", "-s", "KILL", node.Unit) }},
		{"stop and start", u.stopAndStart},
		{"daemon-reexec", func() {
			u.systemctl("daemon-reexec")
			u.systemctl("restart", node.Unit)
		}},
		{"upgrade and back", u.upgradeAndBack},
		{"other release and back", u.otherRelease},
		{"crash loop past the start limit", u.crashLoop},
		{"safe mode and mended", u.safeMode},
		{"containerd killed", func() {
			if err := n.RestartContainerd(t.Context(), true); err != nil {
				t.Error(err)
			}
		}},
	}, keeper...) {
		s.do()
		if t.Failed() {
			t.Fatalf("%s failed", s.name)
		}
		t.Logf("%s: %d rounds", s.name, u.w.awaitPass(t))
	}
	u.answers()
	sumIn(t, n, c.App, systemdSeed, "/data")
	if _, err := n.Ctr(t.Context(), "tasks", "delete", "--force", u.w.id); err != nil {
		t.Error(err)
	}
	if !c.Keeper {
		u.uninstall()
	}
}

// step is something that is done to the units.
type step struct {
	name string
	do   func()
}

// uninstall: systemd keeps the descriptors while the unit is enabled, and no longer.
func (u *units) uninstall() {
	stored := func() string {
		return strings.TrimSpace(run(u.T, "systemctl", "show", "--property", "NFileDescriptorStore", "--value", node.Unit))
	}
	u.systemctl("stop", node.Unit)
	if stored() == "0" {
		u.Error("nothing is kept of a stopped daemon")
	}
	u.systemctl("disable", node.Unit)
	eventually(u.T, "a unit that keeps nothing", func() bool { return stored() == "0" })
}

// units is a host with the units, and a container that reads.
type units struct {
	*testing.T
	c unitsTest
	n *node.Node
	w *watcher
}

func (u *units) systemctl(args ...string) {
	u.Helper()
	if _, err := tryRun(u.T, append([]string{"systemctl"}, args...)...); err != nil {
		u.Error(err)
	}
}

// waits does what takes its time, in which the container gets no further than to the end of a round that had all it needed.
func (u *units) waits(do func()) {
	u.Helper()
	before, err := u.w.passes()
	do()
	after, err2 := u.w.passes()
	if err != nil || err2 != nil || after > before+1 {
		u.Errorf("%d rounds without a daemon that serves them: %v, %v", after-before, err, err2)
	}
}

// answers waits until containerd sees that its snapshotter is there again. Its gRPC gives up on a connection that nobody has answered for about a second, and
// then fails calls until it tries again.
func (u *units) answers() {
	u.Helper()
	eventually(u.T, "a daemon that answers", func() bool {
		_, err := u.n.Ctr(u.Context(), "snapshots", "--snapshotter", u.n.Snapshotter(), "list")
		return err == nil
	})
}

// stopAndStart also starts a container, for which containerd waits only so long.
func (u *units) stopAndStart() {
	u.systemctl("stop", node.Unit)
	u.waits(func() {
		if out, err := u.n.Run(u.Context(), u.c.App, nil); err == nil || !strings.Contains(err.Error(), "connection error") {
			u.Errorf("a container that started without a daemon: %v\n%s", err, out)
		}
	})
	u.systemctl("start", node.Unit)
	u.answers()
	sumIn(u.T, u.n, u.c.App, systemdSeed, "/data")
}

// install puts a program into the place of the installed one, as a package manager does.
func (u *units) install(program []byte) {
	u.Helper()
	if err := os.WriteFile(node.InstalledPath+".new", program, 0o755); err != nil {
		u.Fatal(err)
	}
	if err := os.Rename(node.InstalledPath+".new", node.InstalledPath); err != nil {
		u.Fatal(err)
	}
}

func (u *units) program(name string) []byte {
	u.Helper()
	b, err := os.ReadFile(filepath.Join("/opt", name))
	if err != nil {
		u.Fatal(err)
	}
	return b
}

// runs checks which program the daemon is.
func (u *units) runs(program []byte) {
	u.Helper()
	pid := strings.TrimSpace(run(u.T, "systemctl", "show", "--property", "MainPID", "--value", node.Unit))
	if b, err := os.ReadFile("/proc/" + pid + "/exe"); err != nil || string(b) != string(program) {
		u.Errorf("the daemon is not the installed program: %v", err)
	}
}

func (u *units) upgradeAndBack() {
	this := u.program(thisRelease)
	for _, program := range [][]byte{append(this[:len(this):len(this)], "a newer one"...), this} {
		u.install(program)
		if u.c.Keeper {
			u.systemctl("restart", keeperUnit)
		}
		u.systemctl("restart", node.Unit)
		u.runs(program)
		u.w.awaitPass(u.T)
	}
}

// otherRelease: one that does not understand what this one has kept lets its containers wait, for this one to come back.
func (u *units) otherRelease() {
	u.install(u.program(otherRelease))
	u.systemctl("restart", node.Unit)
	u.runs(u.program(otherRelease))
	u.waits(u.pullsOrdinary)
	u.install(u.program(thisRelease))
	u.systemctl("restart", node.Unit)
	u.runs(u.program(thisRelease))
}

// pullsOrdinary pulls and runs an image that does not stream.
func (u *units) pullsOrdinary() {
	u.Helper()
	u.answers()
	if err := u.n.Pull(u.Context(), u.c.Plain); err != nil {
		u.Error(err)
		return
	}
	sumIn(u.T, u.n, u.c.Plain, systemdSeed+1, "/data")
	if _, err := u.n.Crictl(u.Context(), "rmi", u.c.Plain); err != nil {
		u.Error(err)
	}
}

// crashLoop has systemd give up on the daemon, and then mends what was wrong.
func (u *units) crashLoop() {
	limit := filepath.Join("/etc/systemd/system", node.Unit+".service.d/limit.conf")
	if err := os.MkdirAll(filepath.Dir(limit), 0o755); err != nil {
		u.Fatal(err)
	}
	if err := os.WriteFile(limit, []byte("[Unit]\nStartLimitIntervalSec=1h\nStartLimitBurst=3\n"), 0o644); err != nil {
		u.Fatal(err)
	}
	u.systemctl("daemon-reload")
	u.install([]byte("#!/bin/sh\nexit 1\n"))
	u.systemctl("kill", "-s", "KILL", node.Unit)
	eventually(u.T, "systemd gives up", func() bool {
		return run(u.T, "systemctl", "show", "--property", "ActiveState,SubState", "--value", node.Unit) == "failed\nfailed\n"
	})
	u.waits(func() { u.systemctl("daemon-reload") })
	if err := os.Remove(limit); err != nil {
		u.Fatal(err)
	}
	u.install(u.program(thisRelease))
	u.systemctl("daemon-reload")
	u.systemctl("reset-failed", node.Unit)
	u.systemctl("start", node.Unit)
}

// safeMode gives the daemon a configuration that is wrong.
func (u *units) safeMode() {
	good, err := os.ReadFile(u.n.ConfigFile())
	if err != nil {
		u.Fatal(err)
	}
	configure := func(text string) {
		if err := os.WriteFile(u.n.ConfigFile(), []byte(text), 0o644); err != nil {
			u.Fatal(err)
		}
	}
	configure("nonsense\n" + string(good))
	tryRun(u.T, "systemctl", "restart", node.Unit) // fails, as the first starts do
	eventually(u.T, "safe mode", func() bool { return unitStatus(u.T).SafeMode != "" })
	u.w.awaitPass(u.T)
	u.pullsOrdinary()
	configure(string(good))
	u.systemctl("restart", node.Unit)
	if s := unitStatus(u.T); s.SafeMode != "" {
		u.Errorf("mended, it is in safe mode: %s", s.SafeMode)
	}
}

// daemonStatus is a part of what `streaming-snapshotter status` prints.
type daemonStatus struct {
	SafeMode  string `json:"safe_mode"`
	MountMode string `json:"mount_mode"`
	Kept      bool   `json:"kept"`
	Streamed  int    `json:"streamed_images"`
}

// unitStatus asks the daemon; it is empty while there is none.
func unitStatus(t *testing.T) (s daemonStatus) {
	t.Helper()
	if out, err := tryRun(t, node.InstalledPath, "status", "--output", "json"); err == nil {
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	return s
}

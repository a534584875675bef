package install

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/moby/sys/mountinfo"
)

// TestAmongHostsOwn: what is started from a pod's cgroup is where process 1 is, and who has started it is where it was.
func TestAmongHostsOwn(t *testing.T) {
	needRoot(t)
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
	if err != nil || len(mounts) == 0 {
		t.Skipf("no cgroup2 is mounted: %v", err)
	}
	group, err := os.MkdirTemp(mounts[0].Mountpoint, "streaming-snapshotter-")
	if err != nil {
		t.Skip(err)
	}
	of := func(pid string) string {
		t.Helper()
		groups, err := cgroupsOf(pid)
		if err != nil {
			t.Fatal(err)
		}
		return groups[""]
	}
	before := of("self")
	defer func() {
		if err := join("", before); err != nil {
			t.Error(err)
		}
		if err := os.Remove(group); err != nil {
			t.Error(err)
		}
	}()
	if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	pod := of("self")
	c := exec.Command("sleep", "600")
	if err := amongHostsOwn(c.Start); err != nil {
		t.Fatal(err)
	}
	started := of(strconv.Itoa(c.Process.Pid))
	if err := c.Process.Kill(); err != nil {
		t.Error(err)
	}
	c.Wait() // killed
	if host := of("1"); started != host || pod == host {
		t.Errorf("from %s it was started in %s, want %s", pod, started, host)
	}
	if is := of("self"); is != pod {
		t.Errorf("who has started it is in %s, and was in %s", is, pod)
	}
}

package install

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// amongHostsOwn calls start with this process in the cgroups of process 1, where what it starts stays: a pod's container ends with all that is in its own.
// Where that cannot be done, start is called all the same.
func amongHostsOwn(start func() error) error {
	own, err := cgroupsOf("self")
	host, hostErr := cgroupsOf("1")
	if err != nil || hostErr != nil {
		return start()
	}
	for hierarchy, path := range own {
		if to := host[hierarchy]; to != path && join(hierarchy, to) == nil {
			defer join(hierarchy, path) // if it fails, this process outlives its pod for some seconds
		}
	}
	return start()
}

// cgroupsOf returns a process's cgroups by hierarchy: the controllers, "" for cgroup v2.
func cgroupsOf(pid string) (map[string]string, error) {
	b, err := os.ReadFile("/proc/" + pid + "/cgroup")
	if err != nil {
		return nil, err
	}
	of := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 {
			of[f[1]] = f[2]
		}
	}
	return of, nil
}

// join moves this process into a cgroup.
func join(hierarchy, path string) error {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		if hierarchy == "" {
			return m.FSType != "cgroup2", false
		}
		return m.FSType != "cgroup" || !slices.Contains(strings.Split(m.VFSOptions, ","), strings.Split(hierarchy, ",")[0]), false
	})
	if err == nil && len(mounts) == 0 {
		err = errors.New("its hierarchy is not mounted")
	}
	if err != nil {
		return fmt.Errorf("cgroup %s: %w", path, err)
	}
	return os.WriteFile(filepath.Join(mounts[0].Mountpoint, path, "cgroup.procs"), []byte("0"), 0) // 0 is who writes
}

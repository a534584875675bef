package serve

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/tomlfile"
)

// BesideMemory is what the process may hold beside limits.memory, in bytes: the operations, NATS in the process, requests, indexes.
const BesideMemory = 512 << 20

// settle finds out the limits that the configuration leaves to us, and tells Go's garbage collector how much memory the process may have.
func (l *limits) settle(temp string) error {
	there, err := memoryThere("/proc/self/cgroup", "/sys/fs/cgroup")
	if err != nil {
		return fmt.Errorf("limits.memory: %w", err)
	}
	if l.Memory == 0 {
		l.Memory = tomlfile.Size(there / 2)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(min(int64(l.Memory)+BesideMemory, there/10*9))
	}
	if l.Disk != 0 {
		return nil
	}
	if temp == "" {
		temp = os.TempDir()
	}
	var st unix.Statfs_t
	if err := unix.Statfs(temp, &st); err != nil {
		return fmt.Errorf("limits.disk: %s: %w", temp, err)
	}
	l.Disk = tomlfile.Size(max(1, int64(st.Bavail)*st.Frsize/4*3)) // nothing of ours is there: files have no names
	return nil
}

// memoryThere is how many bytes of memory the machine has, or fewer if a cgroup of this process's may not have as many. list is
// /proc/self/cgroup, and root where cgroups are mounted, of version 2 or 1.
func memoryThere(list, root string) (int64, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, err
	}
	there := int64(info.Totalram) * int64(info.Unit)
	b, err := os.ReadFile(list)
	if err != nil {
		return there, nil // no cgroups, no limit
	}
	for line := range bytes.Lines(b) {
		// "0::/a/b", or of version 1 "4:memory:/a/b". In a container the path may be that of the host, and the limit at the root.
		_, rest, _ := strings.Cut(strings.TrimSpace(string(line)), ":")
		controllers, path, _ := strings.Cut(rest, ":")
		dir, file := root, "memory.max"
		switch controllers {
		case "":
		case "memory":
			dir, file = filepath.Join(root, "memory"), "memory.limit_in_bytes"
		default:
			continue
		}
		for path = filepath.Clean("/" + path); ; path = filepath.Dir(path) {
			if b, err := os.ReadFile(filepath.Join(dir, path, file)); err == nil {
				if n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil { // and not "max"
					there = min(there, n)
				}
			}
			if path == "/" {
				break
			}
		}
	}
	return there, nil
}

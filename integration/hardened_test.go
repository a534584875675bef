package integration_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

// rights are what a process of deploy/systemd's units has, as docs/security.md and docs/operations.md say it.
type rights struct {
	capabilities uint64  // what it has and may ever have
	exposure     float64 // at most, by `systemd-analyze security`; 10 is exposed
}

var rightsOf = map[string]rights{
	node.Unit:  {1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER, 4.3},
	keeperUnit: {0, 3.1},
}

// forbidden are systemd's groups of system calls, and some calls, of which the units let none pass.
var forbidden = []string{"@aio", "@clock", "@cpu-emulation", "@debug", "@keyring", "@module", "@obsolete", "@raw-io", "@reboot", "@swap", "bpf", "chroot", "open_by_handle_at", "pivot_root", "userfaultfd"}

// hardened: what the units say is in force in each thread, no port is open, and systemd finds the units no more exposed than the documentation says.
func hardened(t *testing.T) {
	t.Helper()
	docs, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	own, err := os.Readlink("/proc/1/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	for unit, r := range rightsOf {
		pid := strings.TrimSpace(run(t, "systemctl", "show", "--property", "MainPID", "--value", unit))
		if pid == "0" && unit == keeperUnit {
			continue // since systemd 254
		}
		checkThreads(t, unit, pid, r.capabilities)
		checkCalls(t, unit)
		if open := openPorts(t, pid); len(open) > 0 {
			t.Errorf("%s has open ports: %q", unit, open)
		}
		if ns, err := os.Readlink("/proc/" + pid + "/ns/mnt"); err != nil || ns != own {
			t.Errorf("%s is in the mount namespace %s, and systemd in %s: %v", unit, ns, own, err)
		}
		out := run(t, "systemd-analyze", "--no-pager", "security", unit+".service")
		m := regexp.MustCompile(`Overall exposure level for \S+: ([0-9.]+)`).FindStringSubmatch(out)
		if m == nil {
			t.Fatal(out)
		}
		if got, err := strconv.ParseFloat(m[1], 64); err != nil || got > r.exposure {
			t.Errorf("%s: exposure %s, want at most %v\n%s", unit, m[1], r.exposure, out)
		}
		if text := fmt.Sprintf("%.1f", r.exposure); !strings.Contains(string(docs), text) {
			t.Errorf("docs/operations.md does not say %s of %s", text, unit)
		}
		t.Logf("%s: exposure %s", unit, m[1])
	}
}

// checkThreads: every thread of a process has these capabilities and can have no others, gains none by what it starts, and has system calls filtered.
func checkThreads(t *testing.T, unit, pid string, capabilities uint64) {
	t.Helper()
	want := []string{"NoNewPrivs:\t1\n", "Seccomp:\t2\n", fmt.Sprintf("CapAmb:\t%016x\n", 0)}
	for _, set := range []string{"CapPrm", "CapEff", "CapBnd"} {
		want = append(want, fmt.Sprintf("%s:\t%016x\n", set, capabilities))
	}
	threads, err := filepath.Glob("/proc/" + pid + "/task/*/status")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, path := range threads {
		status, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		seen++
		for _, line := range want {
			if !strings.Contains(string(status), line) {
				t.Errorf("%s: %s has no %q in\n%s", unit, path, line, status)
			}
		}
	}
	if seen < 2 { // a program in Go has several
		t.Errorf("%s: %d threads of process %s", unit, seen, pid)
	}
}

// checkCalls: the unit says which system calls pass, and none that is forbidden is among them.
func checkCalls(t *testing.T, unit string) {
	t.Helper()
	allowed := strings.Fields(run(t, "systemctl", "show", "--property", "SystemCallFilter", "--value", unit))
	for _, call := range []string{"read", "openat", "epoll_pwait"} { // and it is that list
		if !slices.Contains(allowed, call) {
			t.Fatalf("%s: %s is not among %q", unit, call, allowed)
		}
	}
	for _, name := range forbidden {
		calls := []string{name}
		if strings.HasPrefix(name, "@") {
			calls = strings.Fields(regexp.MustCompile(`#.*`).ReplaceAllString(run(t, "systemd-analyze", "--no-pager", "syscall-filter", name), ""))[1:]
			if len(calls) == 0 {
				t.Errorf("%s is no group of system calls", name)
			}
		}
		for _, call := range calls {
			if slices.Contains(allowed, call) {
				t.Errorf("%s: %s of %s passes", unit, call, name)
			}
		}
	}
}

// openPorts returns the lines of /proc/net about sockets of a process at which others may knock.
func openPorts(t *testing.T, pid string) (open []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/" + pid + "/fd/*")
	if err != nil || len(files) == 0 {
		t.Fatalf("descriptors of process %s: %v", pid, err)
	}
	var sockets []string
	for _, f := range files {
		to, err := os.Readlink(f)
		if inode, ok := strings.CutPrefix(to, "socket:["); ok && err == nil {
			sockets = append(sockets, strings.TrimSuffix(inode, "]"))
		}
	}
	for table, state := range map[string]string{"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07"} { // TCP_LISTEN; of UDP one that is not connected
		b, err := os.ReadFile("/proc/" + pid + "/net/" + table)
		if err != nil {
			continue // a kernel without IPv6
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 9 && f[3] == state && slices.Contains(sockets, f[9]) {
				open = append(open, table+" "+line)
			}
		}
	}
	return open
}

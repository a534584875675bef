package node

import (
	"fmt"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// MachineVariable is set for a program that Isolate is to give more: a network namespace, and mounts, of a machine of its own. There a kubelet does as it likes, several do
// so at a time, and all is as before when the program ends.
//
// There is no network but loopback, which has the address of the node and that of the API server's service as well. /var/lib and /var/log are empty. Mounts are shared, as systemd has
// them.
const MachineVariable = "INTEGRATION_MACHINE"

const (
	nodeAddress    = "192.0.2.1"    // no loopback address: the API server connects to no kubelet there
	serviceRange   = "10.96.0.0/24" // of services
	serviceAddress = "10.96.0.1"    // of the first one, which is the API server's
	podRange       = "10.88.0.0/16"
)

func prepareMachine() error {
	ip := exec.Command("ip", "-batch", "-")
	ip.Stdin = strings.NewReader("link set lo up\naddress add " + nodeAddress + "/32 dev lo\naddress add " + serviceAddress + "/32 dev lo\n")
	if out, err := ip.CombinedOutput(); err != nil {
		return fmt.Errorf("ip: %w\n%s", err, out)
	}
	for _, dir := range []string{"/var/lib", "/var/log"} {
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
			return fmt.Errorf("mount tmpfs on %s: %w", dir, err)
		}
	}
	return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")
}

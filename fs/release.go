package fs

import (
	"errors"
	"fmt"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// Release unmounts, for good, what a process that has ended has kept with k, and drops it: for the end of whoever keeps, after which nobody
// could serve it. What still uses a mount gets errors from then on, and Release an EBUSY. It never waits for a FUSE connection.
func Release(k Keeper) error {
	var errs []error
	for _, n := range keptSessions(k) {
		name := keptName(n)
		p, err := takeKept(k, name)
		if p != nil {
			err = p.release()
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("release %s: %w", name, err))
		}
		errs = append(errs, dropSession(k, name))
	}
	return errors.Join(errs...)
}

// release aborts the connection before it unmounts, as an unmount waits for the reads that are in flight.
func (p *kept) release() error {
	var errs []error
	// Once the connection has ended, its number may be another's.
	poll := []unix.PollFd{{Fd: int32(p.device.Fd())}}
	if _, err := unix.Poll(poll, 0); err == nil && poll[0].Revents&unix.POLLERR == 0 {
		errs = append(errs, abortFUSE(unix.Minor(p.about.Dev)))
	}
	errs = append(errs, p.state.loadRecords(func(_ int, r mountRecord) {
		if r.Target != "" && mountedAs(r.Target, r.Dev) {
			if err := unmountInUse(r.Target); !r.Direct || !errors.Is(err, unix.EBUSY) { // whose users need nobody
				errs = append(errs, err)
			}
		}
	}))
	if mountedAs(p.about.Target, p.about.Dev) {
		if p.about.Kind == kindDevices { // in use by those, as long as their users live
			errs = append(errs, unmount(p.about.Target, unix.MNT_DETACH))
		} else {
			errs = append(errs, unmountInUse(p.about.Target))
		}
	}
	return errors.Join(append(errs, p.close())...)
}

// unmountInUse unmounts target, or detaches it if it is in use: EBUSY then.
func unmountInUse(target string) error {
	busy := unmount(target, 0)
	if !errors.Is(busy, unix.EBUSY) {
		return busy
	}
	return errors.Join(busy, unmount(target, unix.MNT_DETACH))
}

// keptSessions returns the numbers in the names of the sessions that are kept.
func keptSessions(k Keeper) (numbers []int) {
	for _, name := range k.KeptNames() {
		if m := sessionName.FindStringSubmatch(name); m != nil {
			n, _ := strconv.Atoi(m[1])
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return slices.Compact(numbers)
}

func keptName(n int) string { return fmt.Sprintf("fuse-%d", n) }

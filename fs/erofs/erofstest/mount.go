package erofstest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Mount mounts a metadata image with the kernel for the time of the test: from files, or from loop devices of them. The test must run as root.
func Mount(tb testing.TB, image []byte, loop bool, devices ...string) string {
	tb.Helper()
	dir := tb.TempDir()
	source, target := filepath.Join(dir, "image"), filepath.Join(dir, "mount")
	if err := errors.Join(os.WriteFile(source, image, 0o600), os.Mkdir(target, 0o700)); err != nil {
		tb.Fatal(err)
	}
	if loop {
		// A loop device is detached with its last user: these descriptors now, the mount later.
		devices = slices.Clone(devices)
		for _, p := range append(pointers(devices), &source) {
			f, err := attachLoop(*p)
			if err != nil {
				tb.Fatal(err)
			}
			defer f.Close()
			*p = f.Name()
		}
	}
	if err := unix.Mount(source, target, "erofs", unix.MS_RDONLY, "device="+strings.Join(devices, ",device=")); err != nil {
		tb.Fatalf("mount %s with devices %s: %v", source, devices, err)
	}
	tb.Cleanup(func() {
		if err := unix.Unmount(target, 0); err != nil {
			tb.Errorf("unmount %s: %v", target, err)
			unix.Unmount(target, unix.MNT_DETACH)
		}
	})
	return target
}

func pointers(names []string) (p []*string) {
	for i := range names {
		p = append(p, &names[i])
	}
	return p
}

// attachLoop returns an open loop device, read-only, that goes when its last user does.
func attachLoop(path string) (*os.File, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for deadline := time.Now().Add(10 * time.Second); ; {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("get a free loop device: %w", err)
		}
		loop, err := os.Open(fmt.Sprintf("/dev/loop%d", n))
		if err != nil {
			return nil, err
		}
		config := unix.LoopConfig{Fd: uint32(file.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR}}
		if err = unix.IoctlLoopConfigure(int(loop.Fd()), &config); err == nil {
			return loop, nil
		}
		loop.Close()
		// Another process may have taken the device since.
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return nil, fmt.Errorf("attach %s: %w", path, err)
		}
	}
}

package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// openPTY returns the two ends of a terminal.
func openPTY(t *testing.T) (master, slave *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx") // non-blocking, so that it has deadlines
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetUint32(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

// TestBars: on a terminal there is a bar while a layer is read, and one line when it is done.
func TestBars(t *testing.T) {
	master, slave := openPTY(t)
	if err := master.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	var screen []byte
	readUntil := func(s string) {
		t.Helper()
		buf := make([]byte, 4096)
		for !bytes.Contains(screen, []byte(s)) {
			n, err := master.Read(buf)
			if err != nil {
				t.Fatalf("waiting for %q: %v; read %q", s, err, screen)
			}
			screen = append(screen, buf[:n]...)
		}
	}
	p := newProgress(slave, "converted")
	e := converter.Event{Platform: "linux/amd64", Layer: 1, Layers: 3, Digest: digest.FromString("x"), Total: 2_000_000}
	e.Kind = converter.LayerStarted
	p.report(e)
	readUntil("[" + strings.Repeat(" ", 20) + "] 0 B of 2.0 MB")
	e.Kind, e.Read = converter.LayerRead, 1_000_000
	p.report(e)
	readUntil("\x1b[1A\x1b[J" + name(e) + " [==========          ] 1.0 MB of 2.0 MB")
	e.Kind, e.OutSize = converter.LayerPushing, 2_200_000
	p.report(e)
	readUntil("pushing 2.2 MB")
	screen = nil
	e.Kind, e.Elapsed = converter.LayerDone, 1500*time.Millisecond
	p.report(e)
	p.stop()
	readUntil("linux/amd64 2/3 " + short(e.Digest) + " converted, 2.0 MB -> 2.2 MB in 1.5 s\r\n")
	if len(p.active) != 0 || p.drawn != 0 {
		t.Errorf("after the end: %d bars, %d lines drawn", len(p.active), p.drawn)
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 999: "999 B", 1000: "1.0 kB", 999_499: "999.5 kB", 999_500: "1.0 MB", 48_508_632: "48.5 MB", 3 << 40: "3298.5 GB"} {
		if got := size(n); got != want {
			t.Errorf("size(%d) is %s, want %s", n, got, want)
		}
	}
	for s, want := range map[string]int{"512": 512, "64KiB": 64 << 10, "1MiB": 1 << 20, "4194304": 4 << 20} {
		var f sizeFlag
		if err := f.Set(s); err != nil || int(f) != want {
			t.Errorf("size %q is %d, %v; want %d", s, f, err, want)
		}
		var again sizeFlag
		if err := again.Set(f.String()); err != nil || again != f {
			t.Errorf("size %q prints as %s, which is %d, %v", s, f.String(), again, err)
		}
	}
}

package serve

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestDiskFull: a service whose own disk is full ends with an error that says what to do, and goes on when it is started with room.
func TestDiskFull(t *testing.T) {
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=16m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, 0); err != nil {
			t.Error(err)
		}
	})
	c, err := load(t, fmt.Sprintf("data_dir = %q\naudit_log = ''\nlisten = '127.0.0.1:0'\n[times]\nreconcile = '100ms'\n[[registry]]\nname = '127.0.0.1:1'\n", disk)) // which writes each pass
	if err != nil {
		t.Fatal(err)
	}
	p := begin(t, c)
	if err := p.await(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(disk, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 64 << 10; size > 0; size /= 2 { // to the last byte
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
	}
	err = <-p.ended
	p.ended <- err
	if err == nil || !strings.Contains(err.Error(), "make room on the disk") || !strings.Contains(err.Error(), disk) {
		t.Errorf("it ended with: %v", err)
	}
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	again := begin(t, c)
	if err := again.await(); err != nil {
		t.Error(err)
	}
	if err := again.stop(); err != nil {
		t.Error(err)
	}
}

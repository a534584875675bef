package snapshot

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// When an image's first start is over, the kernel may read further ahead, also in the mounts to come.
func TestReadAheadAfterTheStart(t *testing.T) {
	n := newTestNodeMode(t, "tree") // whose mounts' device number is the name of what has their read-ahead
	img, files := pushHot(n)
	n.prepareAll(img, 0, "")
	id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
	if err != nil {
		t.Fatal(err)
	}
	mount := func() (target string, readAhead func() string) {
		target = t.TempDir()
		if err := n.images.Mount(testContext(), id, 2, target); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(target, &st); err != nil {
			t.Fatal(err)
		}
		return target, func() string {
			b, err := os.ReadFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev)))
			if err != nil {
				t.Fatal(err)
			}
			return strings.TrimSpace(string(b))
		}
	}
	target, first := mount()
	if got := first(); got != "16" {
		t.Errorf("read-ahead of %s KiB in the first mount, want 16", got)
	}
	wantFiles(t, target, map[string]string{"hot1": files["hot1"]})
	n.poll("more read-ahead", func() bool { return first() == "512" })
	second, ahead := mount()
	if got := ahead(); got != "512" {
		t.Errorf("read-ahead of %s KiB in the second mount, want 512", got)
	}
	n.unmount(second)
	n.unmount(target)
}

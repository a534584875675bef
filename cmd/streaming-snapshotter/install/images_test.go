package install

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// TestAnnounceLayers: layers that images have in common are fetched once, and as long as the disk has room for them below the kubelet's limit.
func TestAnnounceLayers(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("test", dir, "tmpfs", 0, "size=100m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	for need, fits := range map[int64]bool{89 << 20: false, 84 << 20: true} {
		shared := ocispec.Descriptor{Digest: "sha256:1", Size: need - 1000}
		p := plan{store: dir, images: []unpacked{
			{namespace: "k8s.io", names: []string{"one:v1"}, missing: []ocispec.Descriptor{shared, {Digest: "sha256:2", Size: 1000}}},
			{namespace: "k8s.io", names: []string{"other:v1"}, missing: []ocispec.Descriptor{shared}},
		}}
		var out bytes.Buffer
		err := (&installer{o: Options{Out: &out}}).announceLayers(p)
		if (err == nil) != fits || err != nil && !strings.Contains(err.Error(), filepath.Base(dir)+" has room for 90 MB") {
			t.Errorf("%d bytes: %v", need, err)
		}
		if !strings.Contains(out.String(), "fetch 2 layers in all") {
			t.Errorf("%d bytes:\n%s", need, &out)
		}
	}
}

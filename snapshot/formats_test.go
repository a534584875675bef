package snapshot

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// only returns the one file below the root that matches.
func (n *testNode) only(elem ...string) string {
	n.t.Helper()
	files, err := filepath.Glob(filepath.Join(append([]string{n.root}, elem...)...))
	if err != nil || len(files) != 1 {
		n.t.Fatalf("files that match %s: %v, %v", filepath.Join(elem...), files, err)
	}
	return files[0]
}

// rewrite changes the bytes of the file at path, and returns what they were.
func (n *testNode) rewrite(path string, change func([]byte) []byte) []byte {
	n.t.Helper()
	old, err := os.ReadFile(path)
	if err != nil {
		n.t.Fatal(err)
	}
	changed := change(bytes.Clone(old))
	if bytes.Equal(old, changed) {
		n.t.Fatalf("nothing was changed in %s", path)
	}
	if err := os.WriteFile(path, changed, 0o600); err != nil {
		n.t.Fatal(err)
	}
	return old
}

// What a newer release has recorded of an image is not destroyed by an older one: with the newer, the image is back, without a registry.
func TestNewerRecord(t *testing.T) {
	n, _, top := pulled(t)
	n.wantContainer("first", top) // so that its chunks are here
	n.stop()
	record := n.only("images", "*", "image.json")
	var newer []byte
	ours := n.rewrite(record, func(b []byte) []byte {
		newer = bytes.Replace(b, []byte(`"version":1`), []byte(`"version":2`), 1)
		return newer
	})
	n.reg.Close()
	n.start()
	if _, err := n.sn.Prepare(testContext(), "container", top); err == nil || !strings.Contains(err.Error(), "version 2") {
		t.Errorf("got %v, want an error that names the version", err)
	}
	n.restart()
	n.stop()
	if b, err := os.ReadFile(record); err != nil || !bytes.Equal(b, newer) {
		t.Errorf("the record: got %q, %v", b, err)
	}
	if err := os.WriteFile(record, ours, 0o600); err != nil {
		t.Fatal(err)
	}
	n.start()
	n.wantContainer("container", top)
}

// A snapshot of a form that only a newer release knows is an error, never an empty directory; it stays, and so do the images that it may need.
func TestNewerSnapshot(t *testing.T) {
	n, _, top := pulled(t)
	ctx := testContext()
	const newer = "streamed/v2/something"
	if _, err := n.sn.Snapshotter.Prepare(ctx, "key", top); err != nil {
		t.Fatal(err)
	}
	if err := n.sn.Snapshotter.Commit(ctx, newer, "key"); err != nil {
		t.Fatal(err)
	}
	unused := filepath.Join(n.root, "images", strings.Repeat("0", 64))
	if err := os.CopyFS(unused, os.DirFS(filepath.Dir(n.only("images", "*", "image.json")))); err != nil {
		t.Fatal(err)
	}
	n.restart()
	if _, err := n.sn.Prepare(ctx, "container", newer); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("got %v, want ErrFailedPrecondition", err)
	}
	if _, err := n.sn.Stat(ctx, newer); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(unused); err != nil {
		t.Errorf("an image that it may need: %v", err)
	}
	if err := n.sn.Remove(ctx, newer); err != nil {
		t.Fatal(err)
	}
	n.restart()
	if _, err := os.Stat(unused); !os.IsNotExist(err) {
		t.Errorf("an image that nobody needs: %v", err)
	}
	n.wantContainer("container", top)
}

// A metadata image of another format is made anew, without a registry.
func TestOtherMetadataImage(t *testing.T) {
	for name, change := range map[string]func([]byte) []byte{
		"a feature that is not known": func(b []byte) []byte {
			binary.LittleEndian.PutUint32(b[1024+80:], 0xffff)
			return b
		},
		"another format": func([]byte) []byte { return bytes.Repeat([]byte("later"), 1000) },
		"nothing":        func([]byte) []byte { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			n, _, top := pulled(t)
			n.wantContainer("first", top)
			n.stop()
			metadata := n.only("images", "*", "*.erofs")
			old := n.rewrite(metadata, change)
			n.reg.Close()
			n.start()
			n.wantContainer("container", top)
			if b, err := os.ReadFile(metadata); err != nil || !bytes.Equal(b, old) {
				t.Errorf("the image was not made anew (%v)", err)
			}
		})
	}
}

// What a release cached that named layers otherwise (by their blobs) is removed at the start; what this one cached stays.
func TestOlderCache(t *testing.T) {
	n, img, top := pulled(t)
	n.wantContainer("first", top)
	n.stop()
	before := n.filesIn("cache")
	older := filepath.Join(n.root, "cache", "sha256-"+n.artifactOf(img).Layers[0].Digest.Encoded())
	if err := os.Mkdir(older, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"data", "map"} {
		if err := os.WriteFile(filepath.Join(older, name), make([]byte, 10_000), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n.start()
	if _, err := os.Stat(older); !os.IsNotExist(err) {
		t.Errorf("the older release's directory: %v", err)
	}
	if after := n.filesIn("cache"); len(before) == 0 || !slices.Equal(after, before) {
		t.Errorf("files %q before, %q after", before, after)
	}
}

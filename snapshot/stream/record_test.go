package stream

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
)

// The records that releases have written are read by all later ones. A change that breaks this test needs another version of the record,
// and code that reads both.
func TestRecordsOfOlderReleases(t *testing.T) {
	records, err := filepath.Glob("testdata/*/" + recordName)
	if err != nil || len(records) != recordVersion {
		t.Fatalf("records of %d versions, %v; want %d", len(records), err, recordVersion)
	}
	for _, path := range records {
		rec, err := loadRecord(filepath.Dir(path))
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		if rec.Version != recordVersion { // an older one need not be written as it was
			continue
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := json.Marshal(rec); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is written as\n%s, %v; want\n%s", path, got, err, want)
		}
	}
}

// A record that the disk has damaged costs its image, at most: a store starts, and sweeps, whichever bit it is.
func TestDamagedRecord(t *testing.T) {
	record, err := os.ReadFile(filepath.Join("testdata", "v1", recordName))
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	dir := filepath.Join(root, "images", "a")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	chunks, err := cache.Open(filepath.Join(root, "cache"), cache.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer chunks.Close()
	for i := range record {
		damaged := bytes.Clone(record)
		damaged[i] ^= 1 << (i % 8)
		if err := os.WriteFile(filepath.Join(dir, recordName), damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := New(Options{Root: root, Cache: chunks}); err != nil {
			t.Fatalf("byte %d: %v", i, err)
		}
	}
}

// What the disk cannot read any more is an error: the file is made anew. A daemon that died of it would die at each start.
func TestUnreadableFile(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	disk, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
	if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, 32<<20)); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range [][]string{{"mkfs.ext4", "-q", disk}, {"mount", "-o", "loop", disk, dir}} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", cmd, err, out)
		}
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	path := filepath.Join(dir, "index")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(make([]byte, 16<<20))
	if err = errors.Join(err, f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close(), os.Truncate(disk, 8<<20)); err != nil {
		t.Fatal(err)
	}
	if err := verifyMetadata(path); !errors.Is(err, unix.EIO) {
		t.Errorf("got %v, want %v", err, unix.EIO)
	}
}

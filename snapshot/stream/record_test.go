package stream

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
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
	for i := range record {
		damaged := bytes.Clone(record)
		damaged[i] ^= 1 << (i % 8)
		if err := os.WriteFile(filepath.Join(dir, recordName), damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := New(Options{Root: root}); err != nil {
			t.Fatalf("byte %d: %v", i, err)
		}
	}
}

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

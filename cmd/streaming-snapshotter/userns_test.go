package main

import (
	"path/filepath"
	"strings"
	"testing"
)

func TestMapsBelow(t *testing.T) {
	for version, want := range map[string]bool{"2.3.0": true, "2.3.7+unknown": true, "2.10.1": true, "3.0.0-rc.1": true, "2.2.9": false, "2.2.0~ds1": false, "2.0.14": false, "1.7.35": false, "unknown": false, "": false} {
		if got := mapsBelowSince(version); got != want {
			t.Errorf("%q: got %v", version, got)
		}
	}
	socket := filepath.Join(t.TempDir(), "nobody.sock")
	if err := mapsBelow(t.Context(), socket); err == nil || !strings.Contains(err.Error(), socket) || !strings.Contains(err.Error(), "cri_containerd") {
		t.Errorf("of a containerd that nobody can ask: %v", err)
	}
}

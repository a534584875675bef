package stream

import (
	"bytes"
	"runtime"
	"testing"
)

// A config takes memory for the layers that an image can have, not for how many empty diffIDs fit into it.
func TestConfigMemory(t *testing.T) {
	b := append([]byte(`{"rootfs":{"diff_ids":[`), bytes.Repeat([]byte(`"",`), maxConfigSize/3-20)...)
	b = append(b, `""]}}`...)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, _, err := decodeConfig(b); err == nil {
		t.Error("millions of diffIDs were taken")
	}
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > maxConfigSize {
		t.Errorf("%d bytes were allocated for a config of %d", got, len(b))
	}
	if got, p, err := decodeConfig([]byte(`{"architecture":"arm64","os":"linux","variant":"v8","history":[{}],"rootfs":{"type":"layers","diff_ids":["sha256:a","sha256:b"]}}`)); err != nil || len(got) != 2 || got[1] != "sha256:b" || p.OS != "linux" || p.Architecture != "arm64" || p.Variant != "v8" {
		t.Errorf("got %q, %+v, %v", got, p, err)
	}
}

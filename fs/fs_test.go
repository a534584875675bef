package fs

import (
	"testing"
)

func TestModes(t *testing.T) {
	for _, mode := range []Mode{ModeAuto, ModeFile, ModeLoop, ModeTree} {
		t.Run(string(mode), func(t *testing.T) {
			s, err := New(Options{Dir: t.TempDir() + "/devices", Mode: mode})
			if err != nil {
				t.Fatal(err)
			}
			t.Log(s.Mode())
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

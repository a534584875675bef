package mapped

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestGuard(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, make([]byte, 10_000), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mem, err := Open(f)
	if err != nil || len(mem) != 10_000 {
		t.Fatalf("mapped %d bytes, %v", len(mem), err)
	}
	defer unix.Munmap(mem)
	sum, deferred := 0, false
	touch := func() {
		defer func() { deferred = true }()
		for _, b := range mem {
			sum += int(b)
		}
	}
	if err := Guard(touch); err != nil {
		t.Error(err)
	}
	if err := os.Truncate(path, 1); err != nil {
		t.Fatal(err)
	}
	if deferred = false; Guard(touch) == nil || !deferred {
		t.Errorf("what is not there was read, or a deferred call was not made (%v)", deferred)
	}
	var none *[1]int
	for name, mistake := range map[string]func(){"nil": func() { none[0]++ }, "other": func() { panic("other") }} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: a mistake became an error", name)
				}
			}()
			Guard(mistake)
		}()
	}
}

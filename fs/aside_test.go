package fs

import (
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestAside makes calls aside while the Go runtime is as busy as it gets: they do what they should, and report what fails.
func TestAside(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, noise(1, 5000), 0o600); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var busy sync.WaitGroup
	for range 4 {
		busy.Go(func() {
			for keep := make([][]byte, 64); ; runtime.Gosched() {
				select {
				case <-stop:
					return
				default:
					for i := range keep {
						keep[i] = make([]byte, 10_000)
					}
				}
			}
		})
	}
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 25 {
				if err := readBack(path, noise(1, 5000)); err != nil {
					t.Error(err)
				}
				if err := settle(path + "gone"); !os.IsNotExist(err) {
					t.Errorf("a file that is not there: %v", err)
				}
			}
		})
	}
	all.Wait()
	close(stop)
	busy.Wait()
	if err := readBack(path, noise(2, 5000)); err == nil {
		t.Error("other bytes pass")
	}
	if err := aside(-1, callClose(3)); err != unix.EBADF { // of this process's descriptors it has none
		t.Errorf("a descriptor of the parent: %v", err)
	}
}

func BenchmarkAside(b *testing.B) {
	for b.Loop() {
		if err := aside(-1); err != nil {
			b.Fatal(err)
		}
	}
}

// Package mapped maps files into memory, and survives disks that cannot read them any more.
//
// A page that the disk cannot give, or that was cut off the file, is a SIGBUS to who touches it, and the end of a Go process. A daemon that
// ends so takes all containers with it, and does it again at its next start. So who reads a map does it in Guard.
package mapped

import (
	"fmt"
	"io"
	"os"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// Open maps the file f from its beginning to its end, read-only; unix.Munmap undoes it. The file is read first, so that what cannot be read now
// is an error now.
func Open(f *os.File) ([]byte, error) {
	size, err := io.Copy(io.Discard, io.NewSectionReader(f, 0, 1<<62))
	if err != nil {
		return nil, err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", f.Name(), err)
	}
	return mem, nil
}

// Guard calls f, and makes an error of it if f, in this goroutine, touches what cannot be read. Then f has not returned, but its deferred calls
// were made.
func Guard(f func()) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		switch r := recover().(type) {
		case nil:
		case interface {
			error
			Addr() uintptr
		}:
			if r.Addr() < 1<<16 { // a nil pointer is a mistake of ours
				panic(r)
			}
			err = fmt.Errorf("read memory map: %w", r)
		default:
			panic(r)
		}
	}()
	f()
	return nil
}

package fs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

// TestSyscalls has programs do unusual things in a container's root, and compares with an overlay of a plain directory.
func TestSyscalls(t *testing.T) {
	m := newImage()
	content := noise(1, 300_001)
	m.file("file", content).Mode |= 0o111
	holes := m.file("holes", noise(2, 8192))
	holes.Mode |= 0o111
	holes.Size, holes.Extents[0].FileOffset = 1<<20+5, 512<<10
	m.add("empty", &erofs.Inode{Mode: unix.S_IFREG | 0o755})
	m.add("link", &erofs.Inode{Mode: unix.S_IFLNK | 0o777, Data: []byte("file")})
	m.add("fifo", &erofs.Inode{Mode: unix.S_IFIFO | 0o644})

	plain := t.TempDir()
	sparse := make([]byte, holes.Size)
	copy(sparse[512<<10:], noise(2, 8192))
	for name, b := range map[string][]byte{"file": content, "holes": sparse, "empty": nil} {
		if err := os.WriteFile(filepath.Join(plain, name), b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("file", filepath.Join(plain, "link")), unix.Mkfifo(filepath.Join(plain, "fifo"), 0o644)); err != nil {
		t.Fatal(err)
	}
	overlay := mountOverlay(t, plain)
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			mounted := mountImage(t, newServer(t, Options{Mode: mode}), m.write(t, "image"))
			over := mountOverlay(t, mounted)
			for name, call := range calls {
				if got, want := call(over), call(overlay); got != want && !departs(name, mode) {
					t.Errorf("%s: got %s, a plain directory gives %s", name, got, want)
				}
				if got, want := call(mounted), call(plain); got != want && !departs(name, mode) && !departs(name, "") {
					t.Errorf("%s without an overlay: got %s, a plain directory gives %s", name, got, want)
				}
			}
		})
	}
}

// departs tells where the kernel behaves otherwise on a mount, and without an overlay if mode is "".
func departs(call string, mode Mode) bool {
	switch call {
	case "copy_file_range": // from another file system, like from a volume
		return true
	case "direct I/O": // file-backed EROFS knows none
		return mode == ModeFile
	case "attributes": // of an image that has none, the tree says that it knows none: overlayfs would ask at each lookup
		return mode == ModeTree || mode == ""
	case "ioctls", "directories":
		return mode == ""
	}
	return false
}

// calls are the unusual things. Each gets the root and tells what came of it, for comparison.
var calls = map[string]func(root string) string{
	"read beyond the end": onFile("file", os.O_RDONLY, func(fd int) string {
		var s string
		for _, off := range []int64{300_000, 300_001, 300_002, 1 << 40, 1<<63 - 1, -1} {
			n, err := unix.Pread(fd, make([]byte, 4096), off)
			s += fmt.Sprintln(off, n, err)
		}
		return s
	}),
	"map beyond the end": onFile("file", os.O_RDONLY, func(fd int) string {
		unix.Pread(fd, make([]byte, 4096), 299_008) // a page fault that waits for this process stops it
		mem, err := unix.Mmap(fd, 0, 1<<20, unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			return err.Error()
		}
		defer unix.Munmap(mem)
		return fmt.Sprintln(touch(mem, 300_000), touch(mem, 300_001), touch(mem, 303_103), touch(mem, 303_104), touch(mem, 1<<20-1))
	}),
	"map and write": onFile("file", os.O_RDONLY, func(fd int) string {
		unix.Pread(fd, make([]byte, 4096), 0)
		mem, err := unix.Mmap(fd, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
		if err != nil {
			return err.Error()
		}
		defer unix.Munmap(mem)
		mem[5]++
		p := make([]byte, 10)
		_, err = unix.Pread(fd, p, 0)
		_, shared := unix.Mmap(fd, 0, 8192, unix.PROT_WRITE, unix.MAP_SHARED)
		return fmt.Sprintln(p, err, shared)
	}),
	"direct I/O": onFile("file", os.O_RDONLY|unix.O_DIRECT, func(fd int) string {
		mem, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return err.Error()
		}
		defer unix.Munmap(mem)
		n, err := unix.Pread(fd, mem[:300<<10], 0)
		return fmt.Sprint(n, err, bytes.Equal(mem[:300_001], noise(1, 300_001)))
	}),
	"holes": onFile("holes", os.O_RDONLY, func(fd int) string {
		data, err1 := unix.Seek(fd, 600<<10, unix.SEEK_DATA) // where nothing is: either says so or takes it for data
		_, err2 := unix.Seek(fd, 1<<20+5, unix.SEEK_DATA)
		_, err3 := unix.Seek(fd, 1<<20+5, unix.SEEK_HOLE)
		end, err4 := unix.Seek(fd, 1<<20, unix.SEEK_HOLE)
		_, err5 := unix.Seek(fd, -1, unix.SEEK_DATA)
		return fmt.Sprintln(data >= 600<<10 || err1 == unix.ENXIO, err2, err3, end <= 1<<20+5, err4, err5)
	}),
	"copy": onFile("file", os.O_RDONLY, func(fd int) string {
		out, err := unix.MemfdCreate("copy", unix.MFD_CLOEXEC)
		if err != nil {
			return err.Error()
		}
		defer unix.Close(out)
		var pipe [2]int
		if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
			return err.Error()
		}
		defer unix.Close(pipe[0])
		defer unix.Close(pipe[1])
		off := int64(299_000)
		spliced, err1 := unix.Splice(fd, &off, pipe[1], nil, 60_000, 0)
		p := make([]byte, 2000)
		n, err2 := unix.Read(pipe[0], p)
		off = 100
		sent, err3 := unix.Sendfile(out, fd, &off, 1<<20)
		got := make([]byte, sent)
		_, err4 := unix.Pread(out, got, 0)
		return fmt.Sprintln(spliced, err1, n, err2, bytes.Equal(p[:n], noise(1, 300_001)[299_000:]), sent, err3, err4, bytes.Equal(got, noise(1, 300_001)[100:]))
	}),
	"copy_file_range": func(root string) string {
		return onFile("file", os.O_RDONLY, func(fd int) string {
			out, err := os.CreateTemp(root, "copy") // on the mount itself there is no place for it
			if err != nil {
				return err.Error()
			}
			defer os.Remove(out.Name())
			defer out.Close()
			off := int64(7)
			n, err := unix.CopyFileRange(fd, &off, int(out.Fd()), nil, 1<<20, 0)
			got, _ := os.ReadFile(out.Name())
			return fmt.Sprintln(n, err, bytes.Equal(got, noise(1, 300_001)[7:7+max(n, 0)]))
		})(root)
	},
	"locks and leases": onFile("file", os.O_RDONLY, func(fd int) string {
		lease, err1 := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_RDLCK)
		_, err2 := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK)
		err3 := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		err4 := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Len: 10})
		return fmt.Sprintln(lease, err1, err2, err3, err4)
	}),
	"hints": onFile("holes", os.O_RDONLY, func(fd int) string {
		var errs []error
		for _, advice := range []int{unix.FADV_SEQUENTIAL, unix.FADV_WILLNEED, unix.FADV_DONTNEED, unix.FADV_RANDOM} {
			errs = append(errs, unix.Fadvise(fd, 0, 0, advice))
		}
		_, _, errno := unix.Syscall(unix.SYS_READAHEAD, uintptr(fd), 0, 1<<30)
		n, err := unix.Preadv2(fd, [][]byte{make([]byte, 1<<20), nil, make([]byte, 100)}, 0, 0)
		return fmt.Sprintln(errs, errno, n, err)
	}),
	"ioctls": onFile("file", os.O_RDONLY, func(fd int) string {
		var s string
		for _, request := range []uint{0x1234, unix.TCGETS, 0x541b, unix.FS_IOC_ENABLE_VERITY} {
			_, err := unix.IoctlGetInt(fd, request)
			s += fmt.Sprintln(err)
		}
		return s
	}),
	"attributes": func(root string) string {
		var s string
		for _, name := range []string{"file", "holes", "empty", "link", "fifo"} {
			var st unix.Statx_t
			err := unix.Statx(unix.AT_FDCWD, filepath.Join(root, name), unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_FORCE_SYNC, 0x7fffffff, &st)
			s += fmt.Sprintln(name, err, st.Size, st.Nlink, st.Mode, st.Uid, st.Gid)
			for _, attr := range []string{"user.none", "trusted.overlay.opaque", "trusted.overlay.metacopy", "security.capability", "no", "user." + strings.Repeat("x", 300)} {
				_, err := unix.Lgetxattr(filepath.Join(root, name), attr, make([]byte, 10))
				s += fmt.Sprintln(attr, err)
			}
		}
		return s
	},
	"names": func(root string) string {
		var s string
		for _, name := range []string{"file/", "file/x", "link/", "no/../file", "...", strings.Repeat("x", 255), strings.Repeat("x", 256), "\xff\xfe", "file\n"} {
			_, err := os.Lstat(root + "/" + name)
			var pe *os.PathError
			errors.As(err, &pe)
			if pe != nil {
				err = pe.Err
			}
			s += fmt.Sprintln(err)
		}
		return s
	},
	"directories": onFile(".", os.O_RDONLY, func(fd int) string {
		_, err1 := unix.Getdents(fd, make([]byte, 8))
		_, err2 := unix.Seek(fd, -1, unix.SEEK_SET)
		var errs []error
		for _, off := range []int64{1, 7, 1 << 20, 1<<62 + 1} { // what comes is the file system's own business
			_, seek := unix.Seek(fd, off, unix.SEEK_SET)
			_, err := unix.Getdents(fd, make([]byte, 4096))
			if seek == nil {
				errs = append(errs, err)
			}
		}
		_, err3 := unix.Read(fd, make([]byte, 10))
		_, err4 := unix.Mmap(fd, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
		return fmt.Sprintln(err1, err2, errors.Join(errs...), err3, err4)
	}),
	"file handles": func(root string) string {
		h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, filepath.Join(root, "file"), 0)
		if err != nil {
			return "" // an overlay has none, or has: it depends on its layers
		}
		dir, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err.Error()
		}
		defer unix.Close(dir)
		// Any handle at all, as root may make them up.
		for i := range 200 {
			b := bytes.Clone(h.Bytes())
			if i > 0 {
				b[i%len(b)] ^= byte(i)
			}
			if fd, err := unix.OpenByHandleAt(dir, unix.NewFileHandle(h.Type(), b), unix.O_RDONLY|unix.O_NONBLOCK); err == nil {
				unix.Read(fd, make([]byte, 4096))
				unix.Close(fd)
			}
		}
		return ""
	},
	"extents": onFile("file", os.O_RDONLY, func(fd int) string {
		const fiemap = 0xc020660b
		var m [32 + 56*16]byte
		*(*uint64)(unsafe.Pointer(&m[8])), *(*uint32)(unsafe.Pointer(&m[24])) = 1<<63, 16 // length, extents
		unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fiemap, uintptr(unsafe.Pointer(&m)))
		return "" // file systems differ, also in whether they know it
	}),
	"execution": func(root string) string {
		// By another process: while Go starts one, this one cannot serve it.
		out, err := exec.Command("env", filepath.Join(root, "file")).CombinedOutput()
		return strings.ReplaceAll(string(out), root, "") + fmt.Sprint(err)
	},
}

// onFile makes a call of something done with an open file.
func onFile(name string, flags int, f func(fd int) string) func(root string) string {
	return func(root string) string {
		fd, err := unix.Open(filepath.Join(root, name), flags|unix.O_CLOEXEC, 0)
		if err != nil {
			return err.Error()
		}
		defer unix.Close(fd)
		return f(fd)
	}
}

// touch reads mem[i], where there may be nothing.
func touch(mem []byte, i int) (result string) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			result = "fault"
		}
	}()
	return fmt.Sprint(mem[i])
}

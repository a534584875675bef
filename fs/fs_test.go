package fs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs/erofstest"
)

// TestMain runs the tests in a mount namespace of their own, so that nobody else's copies of our mounts keep them in use. They run in a
// second process: if that dies with a read in flight, the kernel ends its FUSE connections before the namespace, whose unmounting would
// wait for the read. It also lets the test binary be the other process in tests that need one.
func TestMain(m *testing.M) {
	if path := os.Getenv("FS_TEST_READ"); path != "" {
		os.Exit(readInChild(path))
	}
	for name, f := range map[string]func(string) error{"FS_TEST_DAEMON": runDaemon, "FS_TEST_COMPARE": runReader} {
		if arg := os.Getenv(name); arg != "" {
			if err := f(arg); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			return
		}
	}
	if os.Getenv("FS_TEST_IN_NAMESPACE") != "" || os.Geteuid() != 0 {
		os.Exit(m.Run())
	}
	if err := runInNamespace(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func runInNamespace() error {
	runtime.LockOSThread() // a namespace is a thread's
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), "FS_TEST_IN_NAMESPACE=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}

func inModes(t *testing.T, f func(t *testing.T, s *Server)) {
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) { f(t, newServer(t, Options{Mode: mode})) })
	}
}

func TestTree(t *testing.T) {
	images := map[string]*image{
		"special": madeImage((*erofstest.Maker).Special),
		"random":  madeImage(func(m *erofstest.Maker) *erofs.Inode { return m.Tree(1000) }),
		"wide":    madeImage(func(m *erofstest.Maker) *erofs.Inode { return m.Wide(20_000, 60) }),
		"empty":   newImage(),
	}
	inModes(t, func(t *testing.T, s *Server) {
		for name, m := range images {
			t.Run(name, func(t *testing.T) { m.compare(t, mountImage(t, s, m.write(t, name))) })
		}
		t.Run("one processor", func(t *testing.T) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
			m := images["random"]
			m.compare(t, mountImage(t, s, m.write(t, "image")))
		})
	})
}

func TestHugeFile(t *testing.T) {
	m := newImage()
	content := noise(1, 1<<20)
	const size, at = 5<<30 + 17, 4<<30 - 512<<10 // a piece across 4 GiB, holes around it
	huge := m.file("huge", content)
	huge.Size, huge.Extents[0].FileOffset = size, at
	inModes(t, func(t *testing.T, s *Server) {
		f, err := os.Open(filepath.Join(mountImage(t, s, m.write(t, "image")), "huge"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		want := append(append(make([]byte, 4096), content...), make([]byte, 4096)...)
		got := make([]byte, len(want))
		if _, err := f.ReadAt(got, at-4096); err != nil || !bytes.Equal(got, want) {
			t.Errorf("read across 4 GiB differs, %v", err)
		}
		if n, err := f.ReadAt(got, size-100); n != 100 || err != io.EOF || !bytes.Equal(got[:n], make([]byte, n)) {
			t.Errorf("read at the end: %d bytes, %v", n, err)
		}
		fi, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		if st := fi.Sys().(*syscall.Stat_t); fi.Size() != size || st.Blocks != (size+511)/512 {
			t.Errorf("%d bytes in %d blocks", fi.Size(), st.Blocks)
		}
	})
}

func TestMountIsPlain(t *testing.T) {
	m := newImage()
	m.add("null", &erofs.Inode{Mode: unix.S_IFCHR | 0o666, Rdev: erofstest.EncodeDev(1, 3)})
	m.file("file", noise(1, 100_000))
	inModes(t, func(t *testing.T, s *Server) {
		target := mountImage(t, s, m.write(t, "image"))
		if err := os.WriteFile(filepath.Join(target, "null"), []byte("gone"), 0); err != nil {
			t.Errorf("write to a device: %v", err)
		}
		if err := os.Mkdir(filepath.Join(target, "new"), 0o755); !errors.Is(err, unix.EROFS) {
			t.Errorf("mkdir: %v", err)
		}
		if _, err := os.Stat(filepath.Join(target, ".go-fuse-epoll-hack")); !os.IsNotExist(err) {
			t.Errorf("go-fuse's own file: %v", err)
		}
		var st unix.Statfs_t
		if err := unix.Statfs(target, &st); err != nil {
			t.Fatal(err)
		}
		if int64(st.Blocks)*st.Bsize < m.dev.Size()&^4095 || st.Bavail != 0 || st.Namelen != 255 {
			t.Errorf("statfs: %+v", st)
		}
	})
}

// What users of the host look at gives them no privileges.
func TestForeign(t *testing.T) {
	m := newImage()
	m.add("null", &erofs.Inode{Mode: unix.S_IFCHR | 0o666, Rdev: erofstest.EncodeDev(1, 3)})
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			target := mountImage(t, newServer(t, Options{Mode: mode, Foreign: true}), m.write(t, "image"))
			if err := os.WriteFile(filepath.Join(target, "null"), nil, 0); !errors.Is(err, unix.EACCES) {
				t.Errorf("write to a device: %v", err)
			}
			var st unix.Statfs_t
			if err := unix.Statfs(target, &st); err != nil || st.Flags&unix.ST_NOSUID == 0 || st.Flags&unix.ST_NODEV == 0 {
				t.Errorf("mounted with flags %#x, %v", st.Flags, err)
			}
		})
	}
}

// A metadata image that the disk loses costs the mount, and not the process.
func TestMetadataLost(t *testing.T) {
	s := newServer(t, Options{Mode: ModeTree})
	m := madeImage(func(m *erofstest.Maker) *erofs.Inode { return m.Wide(2000, 60) })
	img := m.write(t, "image")
	target := mountImage(t, s, img)
	if err := os.Truncate(img.Metadata, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := os.ReadDir(target); !errors.Is(err, unix.EIO) {
		t.Errorf("list what is lost: %v", err)
	}
	if _, err := os.Stat(filepath.Join(target, "file")); !errors.Is(err, unix.EIO) {
		t.Errorf("look up in what is lost: %v", err)
	}
	other := newImage()
	other.file("file", noise(1, 100_000))
	other.compare(t, mountImage(t, s, other.write(t, "other")))
}

func TestFSTest(t *testing.T) {
	m := newImage()
	m.add("a", dir())
	m.add("a/b", dir())
	m.file("a/b/c", noise(1, 10_000))
	m.file("d", []byte("d"))
	inModes(t, func(t *testing.T, s *Server) {
		target := mountImage(t, s, m.write(t, "image"))
		if err := fstest.TestFS(os.DirFS(target), "a/b/c", "d"); err != nil {
			t.Error(err)
		}
	})
}

func TestReadInParallel(t *testing.T) {
	m := newImage()
	content := noise(1, 16<<20)
	m.file("file", content)
	inModes(t, func(t *testing.T, s *Server) {
		target := mountImage(t, s, m.write(t, "image"))
		var group sync.WaitGroup
		for i := range 16 {
			group.Go(func() {
				f, err := os.Open(filepath.Join(target, "file"))
				if err != nil {
					t.Error(err)
					return
				}
				defer f.Close()
				p := make([]byte, 50_000)
				for off := int64(i * 1000); off < int64(len(content)); off += 777_777 {
					n, err := f.ReadAt(p, off)
					if err != nil && err != io.EOF || !bytes.Equal(p[:n], content[off:off+int64(n)]) {
						t.Errorf("read at %d: %d bytes, %v", off, n, err)
					}
				}
			})
		}
		group.Wait()
	})
}

func TestConcurrency(t *testing.T) {
	m := newImage()
	m.file("file", noise(1, 32<<20))
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			s := newServer(t, Options{Mode: mode, ReadAhead: 4 << 20})
			target := mountImage(t, s, m.write(t, "image"))
			release := m.dev.block(t)
			done := make(chan error, 1)
			go func() {
				_, err := os.ReadFile(filepath.Join(target, "file"))
				done <- err
			}()
			eventually(t, "four reads of the device at one time", func() bool {
				_, running, _ := m.dev.counts()
				return running >= 4
			})
			release()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

func TestDeviceFails(t *testing.T) {
	m := newImage()
	content := noise(1, 1<<20)
	m.file("file", content)
	inModes(t, func(t *testing.T, s *Server) {
		path := filepath.Join(mountImage(t, s, m.write(t, "image")), "file")
		m.dev.fail(errors.New("the registry is gone"))
		t.Cleanup(func() { m.dev.fail(nil) })
		if _, err := os.ReadFile(path); !errors.Is(err, unix.EIO) {
			t.Errorf("read from a failing device: %v, want EIO", err)
		}
		m.dev.fail(nil)
		got, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("read from a device that works again: %d bytes, %v", len(got), err)
		}
	})
}

// shortDevice is a Device that breaks its promise.
type shortDevice struct{ *testDevice }

func (shortDevice) ReadAt(context.Context, []byte, int64) (int, error) { return 100, nil }

// Once its containers have started, the kernel reads further ahead, in mounts that are there and in new ones.
func TestStarted(t *testing.T) {
	m := newImage()
	for _, name := range []string{"before", "after", "new"} {
		m.file(name, noise(1, 1<<20))
	}
	inModes(t, func(t *testing.T, s *Server) {
		img := m.write(t, "image")
		target := mountImage(t, s, img)
		const wanted, most = 256 << 10, 256<<10 + 2*DefaultReadAhead
		bytes := func() int64 {
			m.dev.mu.Lock()
			defer m.dev.mu.Unlock()
			return m.dev.bytes
		}
		// read reads the first wanted bytes, page by page, and returns what had come in before.
		read := func(target, name string) (before int64) {
			before = bytes()
			f, err := os.Open(filepath.Join(target, name))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for range wanted / 4096 {
				if _, err := f.Read(make([]byte, 4096)); err != nil {
					t.Fatal(err)
				}
			}
			return before
		}
		before := read(target, "before")
		s.Started(img.Metadata)
		after := read(target, "after")
		if got := after - before; got > most {
			t.Errorf("before the start is over %d bytes are read for %d, want %d at most", got, wanted, most)
		}
		eventually(t, "more is read", func() bool { return bytes()-after > most })
		img = m.write(t, "image")
		img.Started = true
		target = mountImage(t, s, img)
		before = read(target, "new")
		eventually(t, "more is read in a new mount", func() bool { return bytes()-before > most })
	})
}

func TestDeviceReadsShort(t *testing.T) {
	m := newImage()
	m.file("file", noise(1, 1<<20))
	inModes(t, func(t *testing.T, s *Server) {
		img := m.write(t, "image")
		img.Device = shortDevice{m.dev}
		if got, err := os.ReadFile(filepath.Join(mountImage(t, s, img), "file")); !errors.Is(err, unix.EIO) {
			t.Errorf("read from a device that reads short: %d bytes, %v, want EIO", len(got), err)
		}
	})
}

func TestSharedDevice(t *testing.T) {
	m := newImage()
	m.file("lower", []byte("lower"))
	inModes(t, func(t *testing.T, s *Server) {
		lower := t.TempDir()
		if err := s.Mount(t.Context(), m.write(t, "shared"), lower); err != nil {
			t.Fatal(err)
		}
		upper := newImage()
		upper.dev = m.dev
		upper.file("upper", []byte("upper"))
		target := mountImage(t, s, upper.write(t, "shared"))
		if err := s.Unmount(lower); err != nil {
			t.Error(err)
		}
		got, err := os.ReadFile(filepath.Join(target, "upper"))
		if string(got) != "upper" {
			t.Errorf("read %q, %v", got, err)
		}
	})
}

func TestUnmount(t *testing.T) {
	m := newImage()
	content := noise(1, 1<<20)
	m.file("file", content)
	inModes(t, func(t *testing.T, s *Server) {
		s.patience = 100 * time.Millisecond
		img := m.write(t, "image")
		target := t.TempDir()
		if err := s.Unmount(target); err != nil {
			t.Errorf("unmount of what is not mounted: %v", err)
		}
		if err := s.Mount(t.Context(), img, target); err != nil {
			t.Fatal(err)
		}
		if err := s.Mount(t.Context(), img, target); !errors.Is(err, unix.EBUSY) {
			t.Errorf("mount over a mount: %v, want EBUSY", err)
		}
		f, err := os.Open(filepath.Join(target, "file"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := s.Unmount(target); !errors.Is(err, unix.EBUSY) {
			t.Errorf("unmount of what is in use: %v, want EBUSY", err)
		}
		if _, err := os.Stat(filepath.Join(target, "file")); !os.IsNotExist(err) {
			t.Errorf("still mounted: %v", err)
		}
		if err := s.Unmount(target); err != nil {
			t.Errorf("second unmount: %v", err)
		}
		got, err := io.ReadAll(f)
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("read after the mount was detached: %d bytes, %v", len(got), err)
		}
	})
}

func TestCloseInUse(t *testing.T) {
	m := newImage()
	m.file("file", noise(1, 8<<20))
	inModes(t, func(t *testing.T, s *Server) {
		s.patience = 100 * time.Millisecond
		target := t.TempDir()
		if err := s.Mount(t.Context(), m.write(t, "image"), target); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(filepath.Join(target, "file"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := s.Close(); !errors.Is(err, unix.EBUSY) {
			t.Errorf("close: %v, want EBUSY", err)
		}
		if _, err := f.ReadAt(make([]byte, 4096), 4<<20); err == nil {
			t.Error("read after close: no error")
		}
		if err := s.Mount(t.Context(), m.write(t, "image"), target); err == nil {
			t.Error("mount after close: no error")
		}
	})
}

func TestMountFails(t *testing.T) {
	m := newImage()
	m.file("file", []byte("content"))
	inModes(t, func(t *testing.T, s *Server) {
		img := m.write(t, "image")
		garbage := img
		garbage.Metadata = filepath.Join(t.TempDir(), "garbage")
		if err := os.WriteFile(garbage.Metadata, noise(1, 8192), 0o600); err != nil {
			t.Fatal(err)
		}
		absent, badID := img, img
		absent.Metadata += ".absent"
		badID.ID = "../image"
		for name, img := range map[string]Image{"garbage": garbage, "absent": absent, "bad ID": badID} {
			target := t.TempDir()
			if err := s.Mount(t.Context(), img, target); err == nil {
				t.Errorf("%s: mounted", name)
				s.Unmount(target)
			}
		}
		if err := s.Mount(t.Context(), img, filepath.Join(t.TempDir(), "absent")); !errors.Is(err, unix.ENOENT) {
			t.Errorf("mount at an absent directory: %v", err)
		}
	})
}

func TestModeFallsBack(t *testing.T) {
	// EROFS refuses metadata images on a stacked file system, but loop devices do not mind.
	merged := mountOverlay(t, t.TempDir())
	s := newServer(t, Options{Dir: filepath.Join(merged, "devices"), Mode: ModeAuto})
	mode, reason := s.Mode()
	if mode != ModeLoop || !strings.Contains(reason, "file: ") || !strings.Contains(reason, "overlayfs") {
		t.Errorf("mode %s, because %q; want loop, because file-backed mounts on overlayfs are refused", mode, reason)
	}
	if _, err := New(Options{Dir: filepath.Join(merged, "forced"), Mode: ModeFile}); err == nil {
		t.Error("forced mode file on overlayfs: no error")
	}
}

func TestModeAuto(t *testing.T) {
	mode, reason := newServer(t, Options{Mode: ModeAuto}).Mode()
	if mode != ModeFile || reason != "" {
		t.Errorf("mode %s, because %q", mode, reason)
	}
	if _, err := New(Options{Dir: t.TempDir(), Mode: "fast"}); err == nil {
		t.Error("unknown mode: no error")
	}
}

func TestStaleMount(t *testing.T) {
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "devices")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := mountFUSE(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.Close() // as when a daemon dies
	newServer(t, Options{Dir: dir, Mode: ModeFile})
}

func TestDevicesDirectory(t *testing.T) {
	s := newServer(t, Options{Mode: ModeFile})
	m := newImage()
	m.file("file", noise(1, 1000))
	for i := range 300 {
		mountImage(t, s, m.write(t, fmt.Sprintf("image%03d", i)))
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil || len(entries) != 300 || entries[0].Name() != "image000" {
		t.Errorf("directory of data devices: %d entries, %v", len(entries), err)
	}
	got, err := os.ReadFile(filepath.Join(s.dir, "image042"))
	want := append(bytes.Clone(m.dev.data), make([]byte, -len(m.dev.data)&4095)...)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("data device: %d bytes, %v; want %d", len(got), err, len(want))
	}
}

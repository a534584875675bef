package fs

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The benchmarks compare the modes with the file system of the temporary directory ("disk"), and show what the settings are chosen
// by: "make bench", or go test -run '^$' -bench . ./fs

const (
	benchDirs  = 200
	benchFiles = 50 // in each directory
	benchSmall = 6000
	benchLarge = 64 << 20
)

// benchImage is a tree of small files and a large one.
func benchImage() *image {
	m := newImage()
	for d := range benchDirs {
		m.add(fmt.Sprintf("dir%03d", d), dir())
		for f := range benchFiles {
			m.file(benchPath(d, f), noise(byte(f), benchSmall))
		}
	}
	m.file("large", noise(0, benchLarge))
	return m
}

func benchPath(d, f int) string { return fmt.Sprintf("dir%03d/file%02d", d, f) }

// eachMount runs f with a mount of benchImage in each mode, and with a copy of it on disk.
func eachMount(b *testing.B, f func(b *testing.B, root string)) {
	m := benchImage()
	b.Run("disk", func(b *testing.B) {
		root := b.TempDir()
		if err := os.CopyFS(root, os.DirFS(mountImage(b, newServer(b, Options{Mode: ModeFile}), m.write(b, "image")))); err != nil {
			b.Fatal(err)
		}
		syncTree(b, root) // dirty pages stay
		f(b, root)
	})
	for _, mode := range modes {
		b.Run(string(mode), func(b *testing.B) {
			f(b, mountImage(b, newServer(b, Options{Mode: mode}), m.write(b, "image")))
		})
	}
}

// chill empties the kernel's caches of the files under root, and of all inodes and names.
func chill(b *testing.B, root string) {
	b.Helper()
	b.StopTimer()
	defer b.StartTimer()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		fd, err := unix.Open(path, unix.O_RDONLY, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED) // the kernel drops no inode that has pages
	})
	if err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0); err != nil {
		b.Fatal(err)
	}
}

// syncTree writes the file system of root to disk.
func syncTree(b *testing.B, root string) {
	f, err := os.Open(root)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		b.Fatal(err)
	}
}

// walk lists the tree under root and stats each entry.
func walk(b *testing.B, root string) (n int) {
	err := filepath.WalkDir(root, func(_ string, d fs.DirEntry, err error) error {
		if err == nil {
			_, err = d.Info()
		}
		n++
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	return n
}

func BenchmarkWalk(b *testing.B) {
	eachMount(b, func(b *testing.B, root string) {
		for _, cold := range []bool{true, false} {
			b.Run(map[bool]string{true: "cold", false: "warm"}[cold], func(b *testing.B) {
				entries := walk(b, root)
				for b.Loop() {
					if cold {
						chill(b, root)
					}
					walk(b, root)
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*entries), "ns/entry")
			})
		}
	})
}

// eachFile runs f b.N times, with one small file after the other. Cold, no file has been looked up before.
func eachFile(b *testing.B, root string, cold bool, f func(path string) error) {
	const all = benchDirs * benchFiles
	i := 0
	for b.Loop() {
		if cold && i%all == 0 {
			chill(b, root)
		}
		if err := f(filepath.Join(root, benchPath(i/benchFiles%benchDirs, i%benchFiles))); err != nil {
			b.Fatal(err)
		}
		i++
	}
}

func benchFile(b *testing.B, f func(path string) error) {
	eachMount(b, func(b *testing.B, root string) {
		b.Run("cold", func(b *testing.B) { eachFile(b, root, true, f) })
		b.Run("warm", func(b *testing.B) {
			for d := range benchDirs {
				for i := range benchFiles {
					if err := f(filepath.Join(root, benchPath(d, i))); err != nil {
						b.Fatal(err)
					}
				}
			}
			eachFile(b, root, false, f)
		})
	})
}

func BenchmarkStat(b *testing.B) {
	benchFile(b, func(path string) error {
		var st unix.Stat_t
		return unix.Lstat(path, &st)
	})
}

func BenchmarkOpen(b *testing.B) {
	benchFile(b, func(path string) error {
		fd, err := unix.Open(path, unix.O_RDONLY, 0)
		if err != nil {
			return err
		}
		return unix.Close(fd)
	})
}

func BenchmarkReadSmall(b *testing.B) {
	buf := make([]byte, benchSmall)
	benchFile(b, func(path string) error {
		fd, err := unix.Open(path, unix.O_RDONLY, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		_, err = unix.Read(fd, buf)
		return err
	})
}

func BenchmarkReadLarge(b *testing.B) {
	eachMount(b, func(b *testing.B, root string) {
		for _, cold := range []bool{true, false} {
			b.Run(map[bool]string{true: "cold", false: "warm"}[cold], func(b *testing.B) {
				readThrough(b, filepath.Join(root, "large"))
				b.SetBytes(benchLarge)
				for b.Loop() {
					if cold {
						chill(b, root)
					}
					readThrough(b, filepath.Join(root, "large"))
				}
			})
		}
	})
}

func readThrough(b *testing.B, path string) {
	f, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, make([]byte, 128<<10)); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkReadAhead shows what the kernel's read-ahead does by itself, over a link of 5 ms for each read of the device: the speed of reading a
// large file, and the bytes fetched and the time taken to start a program of which a part is needed, this test itself.
func BenchmarkReadAhead(b *testing.B) {
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		b.Fatal(err)
	}
	m := newImage()
	m.file("large", noise(1, benchLarge))
	m.file("program", program).Mode |= 0o111
	m.dev.delay = 5 * time.Millisecond
	for _, mode := range modes {
		for _, readAhead := range []int64{4 << 10, 128 << 10, 512 << 10, 1 << 20, 4 << 20} {
			s := newServer(b, Options{Mode: mode, ReadAhead: readAhead})
			img := m.write(b, "image")
			// cold runs f with a new mount, b.N times, and reports the bytes that each fetches.
			cold := func(b *testing.B, f func(root string)) {
				fetched := int64(0)
				for b.Loop() {
					b.StopTimer()
					target := b.TempDir()
					if err := s.Mount(b.Context(), img, target); err != nil {
						b.Fatal(err)
					}
					m.dev.bytes = 0
					b.StartTimer()
					f(target)
					b.StopTimer()
					fetched += m.dev.bytes
					if err := s.Unmount(target); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
				b.ReportMetric(float64(fetched)/float64(b.N)/1e6, "fetched-MB")
			}
			b.Run(fmt.Sprintf("%s/%dKiB/large", mode, readAhead>>10), func(b *testing.B) {
				b.SetBytes(benchLarge)
				cold(b, func(root string) { readThrough(b, filepath.Join(root, "large")) })
			})
			b.Run(fmt.Sprintf("%s/%dKiB/program", mode, readAhead>>10), func(b *testing.B) {
				cold(b, func(root string) {
					if out, err := fromMount(filepath.Join(root, "program"), "-test.run=^$").CombinedOutput(); err != nil {
						b.Fatalf("%v: %s", err, out)
					}
				})
			})
		}
	}
}

// BenchmarkMount is the cost of a mount and its unmount.
func BenchmarkMount(b *testing.B) {
	m := benchImage()
	for _, mode := range modes {
		b.Run(string(mode), func(b *testing.B) {
			s, img, target := newServer(b, Options{Mode: mode}), m.write(b, "image"), b.TempDir()
			for b.Loop() {
				if err := s.Mount(b.Context(), img, target); err != nil {
					b.Fatal(err)
				}
				if err := s.Unmount(target); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

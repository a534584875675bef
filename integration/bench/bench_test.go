// Package bench holds benchmarks of the built commands, which `make bench` puts in PATH: a daemon's memory, a very large image. They print
// figures and assert only that what was read is right.
package bench

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/lagproxy"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// run runs a command to its end.
func run(b *testing.B, name string, args ...string) {
	b.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		b.Fatalf("%s %s: %v\n%s", name, args, err, out)
	}
}

// writeLayout makes an OCI layout of one image with one gzip layer in dir, tagged latest. write writes the layer's tar.
func writeLayout(tb testing.TB, dir string, write func(io.Writer) error) (tarSize int64) {
	tb.Helper()
	check := func(err error) {
		tb.Helper()
		if err != nil {
			tb.Fatal(err)
		}
	}
	blobs := filepath.Join(dir, "blobs", "sha256")
	check(os.MkdirAll(blobs, 0o755))
	f, err := os.CreateTemp(blobs, "layer")
	check(err)
	defer f.Close()
	blobHash, tarHash := sha256.New(), sha256.New()
	counted := &counter{}
	z, err := gzip.NewWriterLevel(io.MultiWriter(f, blobHash), gzip.BestSpeed)
	check(err)
	check(write(io.MultiWriter(z, tarHash, counted)))
	check(z.Close())
	size, err := f.Seek(0, io.SeekCurrent)
	check(err)
	dgst := digest.NewDigest(digest.SHA256, blobHash)
	check(os.Rename(f.Name(), filepath.Join(blobs, dgst.Encoded())))
	put := func(mediaType string, v any) ocispec.Descriptor {
		raw, err := json.Marshal(v)
		check(err)
		d := digest.FromBytes(raw)
		check(os.WriteFile(filepath.Join(blobs, d.Encoded()), raw, 0o644))
		return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(raw))}
	}
	layer := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: dgst, Size: size}
	config := put(ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.NewDigest(digest.SHA256, tarHash)}},
	})
	manifest := put(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{layer},
	})
	manifest.Annotations = map[string]string{ocispec.AnnotationRefName: "latest"}
	index, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{manifest}})
	check(err)
	check(os.WriteFile(filepath.Join(dir, "index.json"), index, 0o644))
	check(os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644))
	return counted.n
}

type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) { c.n += int64(len(p)); return len(p), nil }

// push copies the layout's image and its artifact into a registry that keeps blobs on disk, and returns its reference.
func push(b *testing.B, dir string) (reg *registrytest.Registry, ref string) {
	b.Helper()
	reg = registrytest.Start(b, registrytest.Options{Dir: b.TempDir()})
	ref = reg.Host() + "/bench:latest"
	src, tag, err := converter.Open("oci:"+dir+":latest", converter.OpenOptions{})
	if err != nil {
		b.Fatal(err)
	}
	dst, dstTag, err := converter.Open(ref, converter.OpenOptions{})
	if err != nil {
		b.Fatal(err)
	}
	if _, err := converter.Copy(context.Background(), src, tag, dst, dstTag, converter.CopyOptions{}); err != nil {
		b.Fatal(err)
	}
	return reg, ref
}

// mounted runs `streaming-snapshotter mount` of ref while f runs, which gets the mount and the daemon's process id.
func mounted(b *testing.B, ref, mode string, f func(dir string, pid int, mounting time.Duration)) {
	b.Helper()
	dir := b.TempDir()
	cmd := exec.Command("streaming-snapshotter", "mount", "--mount-mode", mode, ref, dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	runtime.LockOSThread() // Pdeathsig is the death of the thread
	defer runtime.UnlockOSThread()
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() {
		cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil {
			b.Errorf("mount: %v\n%s", err, errs.Bytes())
		}
	}()
	line := make([]byte, 4096)
	if n, err := out.Read(line); err != nil || !bytes.Contains(line[:n], []byte("is mounted")) {
		b.Errorf("mount said %q, %v: %s", line[:n], err, errs.Bytes())
		return
	}
	f(dir, cmd.Process.Pid, time.Since(begin))
}

// resident is the process's memory, bytes; without the pages of mapped files, which are the page cache's.
func resident(b *testing.B, pid int) (anonymous, all int64) {
	b.Helper()
	u, err := node.ReadUsage(pid)
	if err != nil {
		b.Fatal(err)
	}
	return u.Anonymous, u.Resident
}

// BenchmarkDaemonMemory is the memory of a daemon that has an image of 100,000 files mounted, after every one was looked at and read.
func BenchmarkDaemonMemory(b *testing.B) {
	dir := b.TempDir()
	writeLayout(b, dir, func(w io.Writer) error {
		t := tar.NewWriter(w)
		for i := range 100_000 {
			body := fmt.Sprintf("file %d", i)
			h := &tar.Header{Name: fmt.Sprintf("dir%d/sub%d/a-file-with-a-name-%d", i/3000, i/30, i), Mode: 0o644, Size: int64(len(body)), ModTime: time.Unix(1e9, 0)}
			if err := t.WriteHeader(h); err != nil {
				return err
			}
			if _, err := io.WriteString(t, body); err != nil {
				return err
			}
		}
		return t.Close()
	})
	run(b, "streamctl", "create", "oci:"+dir+":latest", "--record", b.TempDir())
	_, ref := push(b, dir)
	for _, mode := range []string{"file", "loop", "tree"} {
		b.Run(mode, func(b *testing.B) {
			var before, after, all int64
			var mounting time.Duration
			for b.Loop() {
				mounted(b, ref, mode, func(dir string, pid int, d time.Duration) {
					mounting += d
					before, _ = resident(b, pid)
					files := 0
					err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
						if err != nil || !d.Type().IsRegular() {
							return err
						}
						files++
						_, err = os.ReadFile(path)
						return err
					})
					if err != nil || files != 100_000 {
						b.Errorf("read %d files, %v", files, err)
					}
					after, all = resident(b, pid)
				})
			}
			b.ReportMetric(float64(before)/(1<<20), "mounted-MiB")
			b.ReportMetric(float64(after)/(1<<20), "read-MiB")
			b.ReportMetric(float64(all)/(1<<20), "read-with-maps-MiB")
			b.ReportMetric(float64(mounting.Milliseconds())/float64(b.N), "ms/mount")
		})
	}
}

const (
	hugeFiles = 10
	hugeStep  = 1 << 20 // each step of a file begins with a block that says which it is
)

func hugeBlock(file int, step int64) []byte {
	b := make([]byte, 16)
	binary.LittleEndian.PutUint64(b, uint64(file))
	binary.LittleEndian.PutUint64(b[8:], uint64(step)|1<<40)
	return b
}

// BenchmarkHugeImage converts an image of 400 MB and one of 40 GB, mounts both over a link, and reads the same of both; and then at random places of the whole.
func BenchmarkHugeImage(b *testing.B) {
	if os.Getenv("BENCH_HUGE") == "" {
		b.Skip("takes minutes: set BENCH_HUGE=1, as `make bench` does")
	}
	for _, c := range []struct {
		name  string
		steps int64 // of each file
	}{{"400MB", 40}, {"40GB", 4096}} {
		b.Run(c.name, func(b *testing.B) { hugeImage(b, c.steps) })
	}
}

func hugeImage(b *testing.B, steps int64) {
	dir := b.TempDir()
	step := make([]byte, hugeStep)
	size := writeLayout(b, dir, func(w io.Writer) error {
		t := tar.NewWriter(w)
		for f := range hugeFiles {
			if err := t.WriteHeader(&tar.Header{Name: fmt.Sprintf("part%d", f), Mode: 0o644, Size: steps * hugeStep}); err != nil {
				return err
			}
			for s := range steps {
				copy(step, hugeBlock(f, s))
				if _, err := t.Write(step); err != nil {
					return err
				}
			}
		}
		return t.Close()
	})
	for b.Loop() {
		begin := time.Now()
		run(b, "streamctl", "create", "oci:"+dir+":latest", "--force", "--record", b.TempDir())
		b.ReportMetric(float64(size)/1e6/time.Since(begin).Seconds(), "convert-MB/s")
		reg, ref := push(b, dir)
		link := lagproxy.Link{RTT: 5 * time.Millisecond, Bandwidth: 500e6 / 8, Connection: 60e6, SlowStart: true}
		far, err := lagproxy.Listen("tcp", reg.Host(), link)
		if err != nil {
			b.Fatal(err)
		}
		hugeReads(b, reg, far.Addr()+"/bench:latest", "same", 100, 40) // of what the image of 400 MB has, too
		far.Close()
		hugeReads(b, reg, ref, "random", 1000, steps)
	}
}

// hugeReads mounts ref, reads so many places among the first steps of the files, and reports what that takes, with name.
func hugeReads(b *testing.B, reg *registrytest.Registry, ref, name string, reads int, steps int64) {
	rnd := rand.New(rand.NewPCG(1, 2))
	reg.Reset()
	mounted(b, ref, "auto", func(dir string, pid int, mounting time.Duration) {
		report := func(took time.Duration, what string) {
			requests, fetched := reg.Count()
			b.ReportMetric(float64(took.Microseconds())/1000, "ms-"+what)
			b.ReportMetric(float64(requests), "requests-"+what)
			b.ReportMetric(float64(fetched)/1e6, "MB-"+what)
			reg.Reset()
		}
		report(mounting, name+"-mounted")
		begin := time.Now()
		for range reads {
			file, s := rnd.IntN(hugeFiles), rnd.Int64N(steps)
			readBlock(b, filepath.Join(dir, fmt.Sprintf("part%d", file)), s*hugeStep, hugeBlock(file, s))
		}
		report(time.Since(begin), name+"-reads")
		anon, _ := resident(b, pid)
		b.ReportMetric(float64(anon)/(1<<20), name+"-daemon-MiB")
	})
}

func readBlock(b *testing.B, path string, off int64, want []byte) {
	b.Helper()
	f, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
		b.Fatalf("%s at %d: got %x, %v, want %x", path, off, got, err, want)
	}
}

package snapshot

import (
	"archive/tar"
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// BenchmarkPrepare is one Prepare of a layer once the artifact is known: what containerd waits for at each layer of a pull.
func BenchmarkPrepare(b *testing.B) {
	n := newTestNode(b)
	var tars [][]byte
	for i := range 100 {
		tars = append(tars, tarOf(b, file{fmt.Sprint(i), "x"}))
	}
	img := n.push("app", tars...)
	n.convert(img)
	ctx := testContext()
	if _, _, err := n.images.Find(ctx, img.ref, img.manifest); err != nil {
		b.Fatal(err)
	}
	layers := 0
	var spent time.Duration
	for b.Loop() {
		parent := ""
		var names []string
		for i := range img.chainIDs {
			begin := time.Now()
			_, err := n.sn.Prepare(ctx, fmt.Sprint("extract ", layers), parent, img.labels(i))
			spent += time.Since(begin)
			if !isAlreadyExists(err) {
				b.Fatal(err)
			}
			layers++
			parent = n.prepareStreamed(img, i, parent)
			names = append(names, parent)
		}
		for i := len(names) - 1; i >= 0; i-- {
			if err := n.sn.Remove(ctx, names[i]); err != nil {
				b.Fatal(err)
			}
		}
		if _, _, err := n.images.Find(ctx, img.ref, img.manifest); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(spent.Microseconds())/float64(layers), "us/Prepare")
}

// BenchmarkFirstMount is the way from indexes on disk to a mounted chain of 100,000 entries, its metadata image not made yet.
func BenchmarkFirstMount(b *testing.B) {
	for _, mode := range []fs.Mode{fs.ModeFile, fs.ModeLoop, fs.ModeTree} {
		b.Run(string(mode), func(b *testing.B) {
			n := newTestNodeMode(b, mode)
			img := n.push("large", largeTar(b, 0, 60_000), largeTar(b, 50_000, 90_000), largeTar(b, 90_000, 100_000))
			n.convert(img)
			ctx := testContext()
			target := b.TempDir()
			var spent time.Duration
			rounds := 0
			for b.Loop() {
				id, chainIDs, err := n.images.Find(ctx, img.ref, img.manifest)
				if err != nil {
					b.Fatal(err)
				}
				begin := time.Now()
				if err := n.images.Mount(ctx, id, len(chainIDs), target); err != nil {
					b.Fatal(err)
				}
				spent += time.Since(begin)
				rounds++
				if err := n.images.Unmount(target); err != nil {
					b.Fatal(err)
				}
				if err := n.images.Forget(id); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(spent.Milliseconds())/float64(rounds), "ms/mount")
		})
	}
}

// largeTar is a layer of files from..to, thirty to a directory.
func largeTar(tb testing.TB, from, to int) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := from; i < to; i++ {
		if i%30 == 0 {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("dir%d/sub%d/", i/3000, i/30), Mode: 0o755, ModTime: time.Unix(1e9, 0)}); err != nil {
				tb.Fatal(err)
			}
		}
		body := fmt.Sprintf("file %d of many", i)
		if err := w.WriteHeader(&tar.Header{
			Typeflag: tar.TypeReg, Name: fmt.Sprintf("dir%d/sub%d/a-file-with-a-name-%d.py", i/3000, i/30, i), Mode: 0o644, Size: int64(len(body)),
			ModTime: time.Unix(1e9+int64(i), 0), Uid: i % 3,
		}); err != nil {
			tb.Fatal(err)
		}
		if _, err := w.Write([]byte(body)); err != nil {
			tb.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

// BenchmarkColdSequentialRead reads a file of 64 MiB from end to end over a link that takes 5 ms for each request, with nothing cached.
func BenchmarkColdSequentialRead(b *testing.B) {
	body := make([]byte, 64<<20)
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range body {
		body[i] = "0123456789abcdef"[rnd.IntN(16)]
	}
	layer := tarOf(b, file{"large", string(body)})
	for _, mode := range []fs.Mode{fs.ModeFile, fs.ModeLoop, fs.ModeTree} {
		b.Run(string(mode), func(b *testing.B) {
			var spent time.Duration
			requests := 0
			for b.Loop() {
				n := newTestNodeMode(b, mode)
				img := n.push("app", layer)
				n.convert(img)
				ctx := testContext()
				id, _, err := n.images.Find(ctx, img.ref, img.manifest)
				if err != nil {
					b.Fatal(err)
				}
				target := b.TempDir()
				if err := n.images.Mount(ctx, id, 1, target); err != nil {
					b.Fatal(err)
				}
				n.reg.Inject(registrytest.Blobs, -1, registrytest.Delay(5*time.Millisecond))
				n.reg.Reset()
				begin := time.Now()
				got, err := os.ReadFile(filepath.Join(target, "large"))
				spent += time.Since(begin)
				if err != nil || !bytes.Equal(got, body) {
					b.Fatalf("read %d bytes, %v", len(got), err)
				}
				r, _ := n.reg.Count()
				requests += r
				if err := n.images.Unmount(target); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N)*64*1.048576/spent.Seconds(), "MB/s")
			b.ReportMetric(float64(requests)/float64(b.N), "requests")
		})
	}
}

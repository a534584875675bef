package artifact

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"syscall"
	"testing"
	"time"
)

// benchTar returns a tar of the shape of a layer of programs and their files: most files are a few kilobytes, most bytes are in large ones.
func benchTar(b *testing.B) []byte {
	r := rand.New(rand.NewPCG(17, 18))
	var files []file
	for i := range 2000 {
		n := 200 + r.IntN(8000)
		if i%100 == 0 {
			n = 1<<20 + r.IntN(1<<20)
		}
		data := text(r, n)
		if i%200 == 0 {
			for j := range n / 4 { // machine code compresses worse than text
				data[r.IntN(n)] = byte(j)
			}
		}
		files = append(files, file{fmt.Sprintf("usr/lib/python3/dist-packages/package-%d/module_%d.py", i/20, i), data})
	}
	return tarOf(b, files)
}

func BenchmarkEncodeLayer(b *testing.B) {
	raw := benchTar(b)
	for _, workers := range []int{1, runtime.GOMAXPROCS(0)} {
		b.Run(fmt.Sprintf("workers=%d", workers), func(b *testing.B) {
			b.SetBytes(int64(len(raw)))
			var l EncodedLayer
			cpu := cpuTime(b)
			for b.Loop() {
				var err error
				if l, err = EncodeLayer(b.Context(), io.Discard, bytes.NewReader(raw), EncodeOptions{Workers: workers}); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(l.Size)/float64(l.TarSize), "blob/tar")
			b.ReportMetric(float64(l.IndexSize)/float64(l.TarSize), "index/tar")
			b.ReportMetric(float64(l.TarSize)/float64(l.Chunks), "B/chunk")
			b.ReportMetric(float64(len(raw))*float64(b.N)/1e6/(cpuTime(b)-cpu).Seconds(), "MB/cpu-s")
		})
	}
}

// cpuTime returns the processor time that the process has used: unlike the wall clock's, a throughput per core that other processes do not change.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func BenchmarkDecompress(b *testing.B) {
	e := encode(b, benchTar(b), EncodeOptions{})
	dst := make([]byte, MaxChunkSize+DecodeSlack)
	b.SetBytes(e.TarSize)
	b.ReportAllocs()
	for b.Loop() {
		for i := range e.Chunks {
			if _, err := e.index.Decompress(i, e.frame(i), dst); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func BenchmarkVerifyLayer(b *testing.B) {
	e := encode(b, benchTar(b), EncodeOptions{})
	b.SetBytes(e.TarSize)
	for b.Loop() {
		if err := VerifyLayer(b.Context(), bytes.NewReader(e.blob), e.indexBytes(), e.Layer, e.DiffID); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkLayout opens the index of a layer of 100,000 entries.
func BenchmarkLayout(b *testing.B) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for i := range 100_000 {
		addFile(b, w, fmt.Sprintf("usr/share/package-%d/file-%d", i/50, i), []byte("some data"))
	}
	if err := w.Close(); err != nil {
		b.Fatal(err)
	}
	e := encode(b, buf.Bytes(), EncodeOptions{})
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var l *Layout
	for b.Loop() {
		var err error
		if l, err = e.index.Layout(); err != nil {
			b.Fatal(err)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc), "B/layout")
	b.ReportMetric(float64(e.IndexSize), "B/index")
	runtime.KeepAlive(l)
}

// BenchmarkEntries reads the headers of layers: of 40,000 plain files, and of the layers of the test image python-app.
func BenchmarkEntries(b *testing.B) {
	b.Run("plain", func(b *testing.B) {
		readEntries(b, encode(b, filesTar(b, 40_000, 19), EncodeOptions{}).index)
	})
	b.Run("python-app", func(b *testing.B) {
		var layers []*Index
		forBuiltLayers(b, "python-app", func(tar []byte) { layers = append(layers, encode(b, tar, EncodeOptions{}).index) })
		readEntries(b, layers...)
	})
}

func readEntries(b *testing.B, layers ...*Index) {
	b.ReportAllocs()
	entries, cpu := 0, cpuTime(b)
	for b.Loop() {
		for _, x := range layers {
			r := x.Entries()
			for {
				if _, err := r.Next(); err == io.EOF {
					break
				} else if err != nil {
					b.Fatal(err)
				}
				entries++
			}
			r.Close()
		}
	}
	b.ReportMetric(float64((cpuTime(b)-cpu).Nanoseconds())/float64(entries), "cpu-ns/entry")
}

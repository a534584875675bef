package cache

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

func benchLayer(b *testing.B) *layer { return newLayer(b, 0, 64<<20) }

// benchChunks calls bench with a layer of chunks as most are, as those in the rest of a large file are, and of larger ones.
func benchChunks(b *testing.B, bench func(b *testing.B, ly *layer)) {
	for _, size := range []int{128 << 10, 512 << 10, 1 << 20} {
		ly := newLayer(b, size, 64<<20)
		b.Run(fmt.Sprintf("chunks=%dKiB", size>>10), func(b *testing.B) { bench(b, ly) })
	}
}

// Reads of what is on disk and verified.
func BenchmarkReadWarm(b *testing.B) {
	ly := benchLayer(b)
	c := openCache(b, b.TempDir())
	l := openLayer(b, c, ly, ly.serve())
	readAll(b, l, ly, 1<<20)
	for _, n := range []int{4 << 10, 128 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dKiB", n>>10), func(b *testing.B) {
			b.SetBytes(int64(n))
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				p := make([]byte, n)
				for pb.Next() {
					if _, err := l.ReadAt(b.Context(), p, rand.Int64N(64<<20-int64(n))); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}

// Random reads that miss: the time to decode, verify and write a chunk.
func BenchmarkReadMiss(b *testing.B) {
	ly := benchLayer(b)
	c := openCache(b, b.TempDir())
	l := openLayer(b, c, ly, ly.serve())
	p := make([]byte, 128<<10)
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		if i%500 == 499 {
			l.store.forget(0, l.store.n)
		}
		if _, err := l.ReadAt(b.Context(), p[:1], 512+int64(i*7919%500)*int64(len(p))); err != nil {
			b.Fatal(err)
		}
	}
}

// The first use of a chunk after a restart: read whole and verified.
func BenchmarkReadFirstUse(b *testing.B) {
	ly := benchLayer(b)
	c := openCache(b, b.TempDir())
	l := openLayer(b, c, ly, ly.serve())
	readAll(b, l, ly, 1<<20)
	p := make([]byte, 128<<10)
	b.SetBytes(int64(len(p)))
	b.ResetTimer()
	for i := range b.N {
		if i%500 == 499 {
			l.store.verified.clearAll()
		}
		if _, err := l.ReadAt(b.Context(), p[:1], 512+int64(i*7919%500)*int64(len(p))); err != nil {
			b.Fatal(err)
		}
	}
}

// A 64 MiB file read once from start to end, one read at a time, 5 ms away.
func BenchmarkReadColdSequential(b *testing.B) {
	benchChunks(b, func(b *testing.B, ly *layer) {
		for _, n := range []int{16 << 10, 128 << 10, 1 << 20} {
			b.Run(fmt.Sprintf("reads=%dKiB", n>>10), func(b *testing.B) { readCold(b, ly, n) })
		}
	})
}

// readCold reads the layer's file in reads of n bytes.
func readCold(b *testing.B, ly *layer, n int) {
	b.SetBytes(64 << 20)
	var requests, bytes, misses int64
	for range b.N {
		b.StopTimer()
		c := openCache(b, b.TempDir())
		blob := ly.serve()
		blob.latency = 5 * time.Millisecond
		l := openLayer(b, c, ly, blob)
		p := make([]byte, n)
		b.StartTimer()
		for off := int64(512); off < 512+64<<20; off += int64(n) {
			if _, err := l.ReadAt(b.Context(), p, off); err != nil && err != io.EOF {
				b.Fatal(err)
			}
		}
		b.StopTimer()
		requests += blob.requests.Load()
		bytes += blob.bytes.Load()
		misses += c.Stats().Misses
		must(b, c.Close())
	}
	b.ReportMetric(float64(requests)/float64(b.N), "requests/op")
	b.ReportMetric(float64(misses)/float64(b.N), "misses/op")
	b.ReportMetric(float64(bytes)/float64(b.N)/float64(ly.frames(512, 64<<20)), "fetched/needed")
}

// Random 4 KiB reads of a 64 MiB file: what is fetched against the frames of the chunks touched, and by each of the first reads, which are sparse.
func BenchmarkReadColdRandom(b *testing.B) {
	benchChunks(b, func(b *testing.B, ly *layer) {
		for _, reads := range []int{10, 300} {
			b.Run(fmt.Sprintf("reads=%d", reads), func(b *testing.B) { readColdRandom(b, ly, reads) })
		}
	})
}

func readColdRandom(b *testing.B, ly *layer, reads int) {
	for range b.N {
		c := openCache(b, b.TempDir())
		blob := ly.serve()
		l := openLayer(b, c, ly, blob)
		touched := newBitmap(ly.index.NumChunks())
		p := make([]byte, 4<<10)
		for range reads {
			off := 512 + rand.Int64N(64<<20-4<<10)
			if _, err := l.ReadAt(b.Context(), p, off); err != nil {
				b.Fatal(err)
			}
			for i := ly.index.Find(off); i <= ly.index.Find(off+4<<10-1); i++ {
				touched.set(i)
			}
		}
		must(b, c.Close())
		var needed int64
		for i := range ly.index.NumChunks() {
			if touched.has(i) {
				needed += ly.index.Chunk(i).BlobSize
			}
		}
		b.ReportMetric(float64(blob.bytes.Load())/float64(needed), "fetched/needed")
		b.ReportMetric(float64(blob.bytes.Load())/float64(reads), "B/read")
		b.ReportMetric(float64(blob.requests.Load()), "requests/op")
	}
}

// BenchmarkProof proves a layer of 850 MB that is on disk, and one that is not, beside sha256sum and openssl on the same tar: how much more processor time that takes than theirs.
func BenchmarkProof(b *testing.B) {
	sizes := []int{}
	for i := range 2000 {
		sizes = append(sizes, 20_000+i*400, 3000, 700)
	}
	ly := newLayer(b, 0, sizes...)
	path := filepath.Join(b.TempDir(), "tar")
	must(b, os.WriteFile(path, ly.tar, 0o600))
	cpu := func(who int) time.Duration {
		var u unix.Rusage
		must(b, unix.Getrusage(who, &u))
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	others := map[string]time.Duration{}
	for name, args := range map[string][]string{"sha256sum": {"sha256sum", path}, "openssl": {"openssl", "dgst", "-sha256", path}} {
		for range 3 {
			before := cpu(unix.RUSAGE_CHILDREN)
			must(b, exec.Command(args[0], args[1:]...).Run())
			if took := cpu(unix.RUSAGE_CHILDREN) - before; others[name] == 0 || took < others[name] {
				others[name] = took
			}
		}
	}
	for _, here := range []bool{true, false} {
		b.Run(fmt.Sprintf("here=%v", here), func(b *testing.B) {
			c, err := Open(b.TempDir(), Options{NoReadAhead: true, Limit: 4 << 30})
			must(b, err)
			defer func() { must(b, c.Close()) }()
			blob := ly.serve()
			l := openLayer(b, c, ly, blob)
			if here {
				must(b, l.Complete(b.Context(), blob))
			}
			b.SetBytes(ly.index.TarSize)
			before := cpu(unix.RUSAGE_SELF)
			for b.Loop() {
				if !here {
					l.store.forget(0, l.store.n)
				}
				s := l.Sweep(b.Context(), ly.index, blob, false)
				must(b, artifact.ProveTar(b.Context(), ly.index, ly.index.DiffID, func(int) ([]byte, error) { return s.Next() }, false))
			}
			took := (cpu(unix.RUSAGE_SELF) - before).Seconds() / float64(b.N)
			for name, other := range others {
				b.ReportMetric(took/other.Seconds(), "x-"+name)
			}
		})
	}
}

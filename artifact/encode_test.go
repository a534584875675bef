package artifact

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

func TestRoundTrip(t *testing.T) {
	for name, tar := range corpus(t) {
		t.Run(name, func(t *testing.T) {
			checkLayer(t, encode(t, tar, EncodeOptions{}))
			checkLayer(t, encode(t, tar, EncodeOptions{ChunkSize: 1000 + len(tar)/200}))
			if len(tar) < 50000 {
				checkLayer(t, encode(t, tar, EncodeOptions{ChunkSize: blockSize}))
				checkLayer(t, encode(t, tar, EncodeOptions{ChunkSize: MaxChunkSize}))
			}
		})
	}
}

func TestRefused(t *testing.T) {
	for name, tar := range refused(t) {
		t.Run(name, func(t *testing.T) {
			if _, err := readTar(tar); err == nil {
				t.Fatal("archive/tar reads it")
			}
			if _, err := EncodeLayer(t.Context(), io.Discard, bytes.NewReader(tar), EncodeOptions{}); !errors.Is(err, ErrInvalid) {
				t.Fatalf("got %v, want %v", err, ErrInvalid)
			}
		})
	}
}

// TestInsecurePaths: names that leave the directory are no matter of the format, whatever archive/tar is told to think of them.
func TestInsecurePaths(t *testing.T) {
	tar := kindsTar(t)
	want := encode(t, tar, EncodeOptions{})
	t.Setenv("GODEBUG", "tarinsecurepath=0")
	if _, err := readTar(tar); err == nil {
		t.Fatal("archive/tar does not mind ../outside")
	}
	got := encode(t, tar, EncodeOptions{})
	if got.Digest != want.Digest {
		t.Error("another blob")
	}
	if _, err := got.index.Layout(); err != nil {
		t.Error(err)
	}
}

// TestGNUTar reads what GNU tar writes, sparse files first of all.
func TestGNUTar(t *testing.T) {
	gnutar, err := exec.LookPath("tar")
	if err != nil {
		t.Skip("no tar command: nothing to compare with")
	}
	dir := sparseFiles(t)
	for _, args := range []string{"--format=gnu", "--format=posix --sparse-version=0.0", "--format=posix --sparse-version=0.1", "--format=posix --sparse-version=1.0"} {
		t.Run(args, func(t *testing.T) {
			cmd := exec.Command(gnutar, append(strings.Fields(args), "--sparse", "-cf", "-", "-C", dir, ".")...)
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("%v: %v", cmd, err)
			}
			e := encode(t, out, EncodeOptions{ChunkSize: 64 << 10})
			checkLayer(t, e)
			sparse := 0
			if _, err := e.index.Walk(func(e *Entry) error {
				if e.Sparse != nil {
					sparse++
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			if sparse != 3 {
				t.Fatalf("%d sparse members, want 3", sparse)
			}
		})
	}
}

// sparseFiles makes a directory with sparse files.
func sparseFiles(t *testing.T) string {
	dir := t.TempDir()
	many := make([]int64, 50)
	for i := range many {
		many[i] = int64(i) * 65536
	}
	for name, offs := range map[string][]int64{"few": {0, 100000, 1 << 20}, "many": many, "hole": nil} {
		writeSparse(t, filepath.Join(dir, name), 4<<20, offs)
	}
	return dir
}

// TestZstdCommand decodes a blob with the reference implementation.
func TestZstdCommand(t *testing.T) {
	path, err := exec.LookPath("zstd")
	if err != nil {
		t.Skip("no zstd command: nothing to compare with")
	}
	for name, tar := range corpus(t) {
		cmd := exec.Command(path, "-dc")
		cmd.Stdin = bytes.NewReader(encode(t, tar, EncodeOptions{}).blob)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !bytes.Equal(out, tar) {
			t.Errorf("%s: zstd -d gives other bytes than the tar", name)
		}
	}
}

func TestDeterministic(t *testing.T) {
	tar := append(filesTar(t, 60, 1), text(rand.New(rand.NewPCG(15, 16)), 200000)...)
	want := encode(t, tar, EncodeOptions{Workers: 1})
	for _, workers := range []int{0, 2, 5} {
		for name, r := range map[string]io.Reader{"all": bytes.NewReader(tar), "bytes": iotest.OneByteReader(bytes.NewReader(tar)), "eof with data": iotest.DataErrReader(bytes.NewReader(tar))} {
			var b bytes.Buffer
			got, err := EncodeLayer(t.Context(), &b, r, EncodeOptions{Workers: workers})
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(b.Bytes(), want.blob) || got.Digest != want.Digest {
				t.Errorf("%d workers, %s: another blob", workers, name)
			}
		}
	}
}

// TestChunkBounds pins what a change of a layer does to its chunks: little.
func TestChunkBounds(t *testing.T) {
	chunks := func(tar []byte) (sums map[[32]byte]bool, n int) {
		e := encode(t, tar, EncodeOptions{})
		sums = map[[32]byte]bool{}
		for i := range e.Chunks {
			c := e.index.Chunk(i)
			if c.TarSize > defaultChunkSize {
				t.Fatalf("chunk %d has %d bytes", i, c.TarSize)
			}
			sums[c.Digest] = true
		}
		return sums, e.Chunks
	}
	var files []file
	r := rand.New(rand.NewPCG(11, 12))
	for i := range 1000 {
		files = append(files, file{fmt.Sprintf("usr/share/doc/%d/readme", i), text(r, 100+r.IntN(10000))})
	}
	big := file{"usr/lib/big.so", text(r, 1<<20+12345)}
	files = append(files, big)
	old, n := chunks(tarOf(t, files))
	if mean := 5000 * 1000 / n; mean < defaultChunkSize/3 {
		t.Errorf("chunks have %d bytes on average", mean)
	}
	for name, change := range map[string]func(fs []file) []file{
		"grow": func(fs []file) []file {
			fs[500].data = append(bytes.Clone(fs[500].data), text(r, 100)...)
			return fs
		},
		"remove":          func(fs []file) []file { return append(fs[:500], fs[501:]...) },
		"insert at front": func(fs []file) []file { return append([]file{{"new", text(r, 700)}}, fs...) },
	} {
		t.Run(name, func(t *testing.T) {
			changed, n := chunks(tarOf(t, change(append([]file{}, files...))))
			fresh := 0
			for sum := range changed {
				if !old[sum] {
					fresh++
				}
			}
			if fresh > 5 {
				t.Errorf("%d of %d chunks are new", fresh, n)
			}
		})
	}
	t.Run("large file elsewhere", func(t *testing.T) {
		elsewhere, _ := chunks(tarOf(t, []file{{"x", text(r, 5000)}, {"opt/copy.so", big.data}, {"y", text(r, 5000)}}))
		b := pad(bytes.Clone(big.data))
		for off := 0; off < len(b); off += defaultChunkSize {
			sum := sha256.Sum256(b[off:min(off+defaultChunkSize, len(b))])
			if !elsewhere[sum] || !old[sum] {
				t.Fatalf("no chunk of its own for the file's bytes from %d", off)
			}
		}
	})
}

// TestPadding: who reads the last block of a long file needs no chunk but those of its data. A chunk size that is no multiple of blocks may leave no room for that.
func TestPadding(t *testing.T) {
	tar := tarOf(t, []file{{"a", noise(2700)}, {"b", noise(10)}})
	for size, end := range map[int]int64{2048: alignBlock(blockSize + 2700), 2600: alignBlock(blockSize + 2700), 2000: alignBlock(blockSize + 2700), 1000: blockSize + 2700} {
		e := encode(t, tar, EncodeOptions{ChunkSize: size})
		checkLayer(t, e)
		last := e.index.Chunk(e.index.Find(blockSize + 2700 - 1))
		if got := last.TarOffset + last.TarSize; got != end {
			t.Errorf("chunks of %d bytes: that with the end of the data ends at %d, want %d", size, got, end)
		}
	}
}

type file struct {
	name string
	data []byte
}

func tarOf(t testing.TB, files []file) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		addFile(t, w, f.name, f.data)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestEncodeErrors(t *testing.T) {
	tar := filesTar(t, 200, 3)
	errBroken := errors.New("broken")
	before := runtime.NumGoroutine()
	for _, o := range []EncodeOptions{{ChunkSize: -1}, {ChunkSize: 511}, {ChunkSize: MaxChunkSize + 1}} {
		if _, err := EncodeLayer(t.Context(), io.Discard, bytes.NewReader(tar), o); err == nil {
			t.Errorf("%+v is accepted", o)
		}
	}
	for n := range int64(20) {
		r := io.MultiReader(io.LimitReader(bytes.NewReader(tar), n*10001), iotest.ErrReader(errBroken))
		if _, err := EncodeLayer(t.Context(), io.Discard, r, EncodeOptions{}); !errors.Is(err, errBroken) || errors.Is(err, ErrInvalid) {
			t.Errorf("read error: got %v", err)
		}
		w := &limitedWriter{left: n * 10001, err: errBroken}
		if _, err := EncodeLayer(t.Context(), w, bytes.NewReader(tar), EncodeOptions{}); !errors.Is(err, errBroken) {
			t.Errorf("write error: got %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		r = io.TeeReader(bytes.NewReader(tar), &limitedWriter{left: n * 10001, err: errBroken, call: cancel})
		if _, err := EncodeLayer(ctx, io.Discard, r, EncodeOptions{}); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: got %v", err)
		}
		cancel()
	}
	for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), before)
		}
	}
}

// limitedWriter takes a number of bytes. Then it fails, or if there is a function calls it and goes on.
type limitedWriter struct {
	left int64
	err  error
	call func()
}

func (w *limitedWriter) Write(p []byte) (int, error) {
	if w.left -= int64(len(p)); w.left > 0 {
		return len(p), nil
	}
	if w.call != nil {
		w.call()
		return len(p), nil
	}
	return 0, w.err
}

// TestLargeFile pins how a data run that is large in chunks is cut, with small chunks: 512 bytes, and 2 KiB from 1 MiB on. So a file has the same chunks
// wherever it is, and keeps them when it grows.
func TestLargeFile(t *testing.T) {
	const size, large = blockSize, largeFactor * blockSize
	r := rand.New(rand.NewPCG(19, 20))
	big := text(r, headChunks*size+100*large+1234)
	before, behind := file{"etc/motd", text(r, 700)}, file{"var/lib/x", text(r, 5000)}
	chunks := func(e *encoded) map[[32]byte]bool {
		sums := map[[32]byte]bool{}
		for i := range e.Chunks {
			sums[e.index.Chunk(i).Digest] = true
		}
		return sums
	}
	raw := tarOf(t, []file{before, {"models/weights", big}, behind})
	e := encode(t, raw, EncodeOptions{ChunkSize: size, Workers: 1})
	checkLayer(t, e)
	if encode(t, raw, EncodeOptions{ChunkSize: size, Workers: 5}).Digest != e.Digest {
		t.Error("another blob with 5 workers")
	}
	others := map[string]map[[32]byte]bool{
		"here":      chunks(e),
		"elsewhere": chunks(encode(t, tarOf(t, []file{behind, {"opt/copy", big}, before}), EncodeOptions{ChunkSize: size})),
		"grown":     chunks(encode(t, tarOf(t, []file{before, {"models/weights", append(bytes.Clone(big), text(r, 3*large)...)}}), EncodeOptions{ChunkSize: size})),
	}
	for padded, off := pad(bytes.Clone(big)), 0; off < len(big); {
		end := off + size
		if off >= headChunks*size {
			end = off + large
		}
		if end > len(big) {
			delete(others, "grown") // the end is not the end there
		}
		sum := sha256.Sum256(padded[off:min(end, len(padded))])
		for name, sums := range others {
			if !sums[sum] {
				t.Fatalf("%s: no chunk of its own for the file's bytes from %d to %d", name, off, end)
			}
		}
		off = end
	}
}

// TestLargeIndex: the index of a layer with a large file, which every pull fetches, is small.
func TestLargeIndex(t *testing.T) {
	pr, pw := io.Pipe()
	go writeLargeTar(pw, 1, 1<<30)
	e, err := EncodeLayer(t.Context(), io.Discard, pr, EncodeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if most := int64(175_000); e.IndexSize > most { // 393,500 with chunks of 128 KiB alone
		t.Errorf("an index of %d bytes for a file of 1 GiB in %d chunks, want at most %d", e.IndexSize, e.Chunks, most)
	}
}

// TestEncodeMemory encodes layers much larger than the memory that encoding may take, with as many workers as there may be.
func TestEncodeMemory(t *testing.T) {
	for _, c := range []struct{ chunk, files, size int }{{0, 20, 8 << 20}, {0, 1, 512 << 20}, {MaxChunkSize, 20, 8 << 20}} {
		pr, pw := io.Pipe()
		done := make(chan error, 1)
		go func() { done <- writeLargeTar(pw, c.files, c.size) }()
		var base runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&base)
		peak := &heapPeak{}
		if _, err := EncodeLayer(t.Context(), peak, pr, EncodeOptions{ChunkSize: c.chunk, Workers: maxWorkers}); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		used := int64(peak.max) - int64(base.HeapInuse)
		t.Logf("%d files of %d, chunks of %d: %d MiB", c.files, c.size, c.chunk, used>>20)
		if used > 64<<20 {
			t.Errorf("%d files of %d, chunks of %d: encoding takes %d MiB of memory", c.files, c.size, c.chunk, used>>20)
		}
	}
}

// heapPeak watches the heap while it is written to.
type heapPeak struct {
	writes int
	max    uint64
}

func (p *heapPeak) Write(b []byte) (int, error) {
	if p.writes++; p.writes%4 == 0 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		p.max = max(p.max, m.HeapInuse)
	}
	return len(b), nil
}

// writeLargeTar writes n files of size bytes each, a multiple of 1 MiB: zeros.
func writeLargeTar(w *io.PipeWriter, n, size int) error {
	data := make([]byte, 1<<20)
	tw := tar.NewWriter(w)
	for i := range n {
		if err := tw.WriteHeader(&tar.Header{Name: fmt.Sprint(i), Typeflag: tar.TypeReg, Size: int64(size)}); err != nil {
			return w.CloseWithError(err)
		}
		for range size / len(data) {
			if _, err := tw.Write(data); err != nil {
				return w.CloseWithError(err)
			}
		}
	}
	return w.CloseWithError(tw.Close())
}

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	kgzip "github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// BenchmarkCreate converts one gzip layer of 3 GB, as a process, and beside it `gzip -d | zstd -3`, which does a part of
// the same work. Both are measured in MB of tar for each second of processor time, because that is what a machine with
// many layers has; peak-MiB is the most memory that the process had.
func BenchmarkCreate(b *testing.B) {
	const tarSize = 3 << 30
	dir := b.TempDir()
	blob, err := benchImage(b, filepath.Join(dir, "layout"), tarSize)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("streamctl", func(b *testing.B) {
		b.SetBytes(tarSize)
		var cpu time.Duration
		var peak float64
		for b.Loop() {
			c := exec.Command(os.Args[0], "create", "--force", "--record", "", "--temp-dir", dir, "oci:"+filepath.Join(dir, "layout")+":v1")
			c.Env = append(os.Environ(), "STREAMCTL_TEST_MAIN=peak")
			out, err := c.Output()
			if err != nil {
				b.Fatal(err)
			}
			cpu += c.ProcessState.UserTime() + c.ProcessState.SystemTime()
			// Not rusage's Maxrss, which a child inherits from its parent.
			_, hwm, _ := strings.Cut(string(out), "VmHWM:")
			var kib float64
			if _, err := fmt.Sscan(hwm, &kib); err != nil {
				b.Fatal(err)
			}
			peak = max(peak, kib/1024)
		}
		b.ReportMetric(float64(b.N)*tarSize/1e6/cpu.Seconds(), "MB/cpu-s")
		b.ReportMetric(peak, "peak-MiB")
	})
	b.Run("gzip-d|zstd-3", func(b *testing.B) {
		for _, tool := range []string{"gzip", "zstd"} {
			if _, err := exec.LookPath(tool); err != nil {
				b.Skipf("%s is not in $PATH", tool)
			}
		}
		b.SetBytes(tarSize)
		var cpu time.Duration
		for b.Loop() {
			un, re := exec.Command("gzip", "-dc", blob), exec.Command("zstd", "-3", "-q", "-c")
			if re.Stdin, err = un.StdoutPipe(); err != nil {
				b.Fatal(err)
			}
			for _, c := range []*exec.Cmd{un, re} {
				if err := c.Start(); err != nil {
					b.Fatal(err)
				}
			}
			// The reader first: waiting for the writer closes its pipe.
			for _, c := range []*exec.Cmd{re, un} {
				if err := c.Wait(); err != nil {
					b.Fatal(err)
				}
				cpu += c.ProcessState.UserTime() + c.ProcessState.SystemTime()
			}
		}
		b.ReportMetric(float64(b.N)*tarSize/1e6/cpu.Seconds(), "MB/cpu-s")
	})
}

// benchImage makes an OCI layout with an image of one layer, whose blob it names: files of all sizes whose content
// compresses as that of images does, to a good third.
func benchImage(b *testing.B, dir string, tarSize int64) (blob string, err error) {
	b.Helper()
	p, tag, err := converter.Open("oci:"+dir+":v1", converter.OpenOptions{})
	if err != nil {
		return "", err
	}
	f, err := os.Create(filepath.Join(b.TempDir(), "layer"))
	if err != nil {
		return "", err
	}
	defer f.Close()
	dgst, diffID := digest.Canonical.Digester(), digest.Canonical.Digester()
	zw, err := kgzip.NewWriterLevel(io.MultiWriter(f, dgst.Hash()), gzip.BestSpeed)
	if err != nil {
		return "", err
	}
	if err := writeBenchTar(io.MultiWriter(zw, diffID.Hash()), tarSize); err != nil {
		return "", err
	}
	if err := zw.Close(); err != nil {
		return "", err
	}
	size, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return "", err
	}
	layer := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: dgst.Digest(), Size: size}
	err = p.PutBlob(b.Context(), layer, func() (io.ReadCloser, error) { return os.Open(f.Name()) })
	if err != nil {
		return "", err
	}
	put := func(mediaType string, v any, manifest bool) (ocispec.Descriptor, error) {
		raw, err := json.Marshal(v)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
		if manifest {
			return d, p.PutManifest(b.Context(), d, raw, tag)
		}
		return d, p.PutBlob(b.Context(), d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil })
	}
	config, err := put(ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{diffID.Digest()}},
	}, false)
	if err != nil {
		return "", err
	}
	_, err = put(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{layer},
	}, true)
	return filepath.Join(dir, "blobs", "sha256", layer.Digest.Encoded()), err
}

// writeBenchTar writes words, as programs and texts have them, in files of 100 bytes to 30 MB.
func writeBenchTar(w io.Writer, size int64) error {
	rnd := rand.New(rand.NewPCG(1, 2))
	words := make([][]byte, 20_000)
	for i := range words {
		words[i] = make([]byte, 3+rnd.IntN(10))
		for j := range words[i] {
			words[i][j] = byte(rnd.IntN(256))
		}
	}
	pool := make([]byte, 0, 64<<20)
	for len(pool) < cap(pool)-16 {
		pool = append(pool, words[int(float64(len(words))*rnd.Float64()*rnd.Float64())]...)
	}
	tw := tar.NewWriter(w)
	for i := 0; size > 1<<20; i++ {
		n := min(int64(100)<<rnd.IntN(18), size/2)
		off := rnd.IntN(len(pool) - int(n))
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("dir%d/file%d", i/100, i), Mode: 0o644, Size: n}); err != nil {
			return err
		}
		if _, err := tw.Write(pool[off : off+int(n)]); err != nil {
			return err
		}
		size -= n + 1024
	}
	return tw.Close()
}

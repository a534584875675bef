package artifact

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// TestSizes pins the layout: what changes it is another version of the format.
func TestSizes(t *testing.T) {
	b := appendIndexHeader(nil, &Index{table: make([]byte, tableEntrySize)}, make([]byte, sha256.Size))
	for name, c := range map[string][2]int{
		"index header":      {len(b), 72},
		"field offsets":     {offDiffID + sha256.Size, indexHeaderSize},
		"table entry":       {offDigest + sha256.Size, 48},
		"MaxChunkSize":      {MaxChunkSize, 4 << 20},
		"MaxIndexSize":      {MaxIndexSize, 512 << 20},
		"MaxHeadersSize":    {MaxHeadersSize, 4 << 30},
		"MaxManifestSize":   {MaxManifestSize, 4 << 20},
		"MaxLayers":         {MaxLayers, 4096},
		"maxWindow":         {maxWindow, 8 << 20},
		"maxEntryHeaders":   {maxEntryHeaders, 8 << 20},
		"defaultChunkSize":  {defaultChunkSize, 128 << 10},
		"largeChunkSize":    {EncodeOptions{}.withDefaults().largeChunkSize(), 512 << 10},
		"headChunks":        {headChunks * defaultChunkSize, 256 << 20},
		"frame of no bytes": {int(maxFrameSize(0)), 64},
		"frame of 128 KiB":  {int(maxFrameSize(128 << 10)), 128<<10 + 512 + 64},
		"magic":             {len(indexMagic), 8},
	} {
		if c[0] != c[1] {
			t.Errorf("%s: got %d, want %d", name, c[0], c[1])
		}
	}
	if n := int64(MaxIndexSize/tableEntrySize) * int64(maxFrameSize(MaxChunkSize)); n+MaxIndexSize > maxBlobSize {
		t.Errorf("a blob may have %d bytes, more than maxBlobSize", n)
	}
}

func TestDecodeIndexRefuses(t *testing.T) {
	le := binary.LittleEndian
	e := encode(t, filesTar(t, 5, 1), EncodeOptions{ChunkSize: 4096})
	entry := func(b []byte, i int) []byte { return b[indexHeaderSize+i*tableEntrySize:] }
	set32 := func(off int, n uint32) func([]byte) []byte {
		return func(b []byte) []byte { le.PutUint32(b[off:], n); return b }
	}
	set64 := func(off int, n uint64) func([]byte) []byte {
		return func(b []byte) []byte { le.PutUint64(b[off:], n); return b }
	}
	for _, c := range []struct {
		name   string
		change func(b []byte) []byte
		want   error
	}{
		{"nothing", func(b []byte) []byte { return nil }, ErrInvalid},
		{"no table", func(b []byte) []byte { return resize(b[:indexHeaderSize]) }, ErrInvalid},
		{"short header", func(b []byte) []byte { return resize(b[:indexHeaderSize-1]) }, ErrInvalid},
		{"short table", func(b []byte) []byte { return resize(b[:indexHeaderSize+tableEntrySize*e.Chunks-1]) }, ErrInvalid},
		{"truncated", func(b []byte) []byte { return b[:len(b)-1] }, ErrInvalid},
		{"too long", func(b []byte) []byte { return append(b, 0) }, ErrInvalid},
		{"skippable magic", set32(0, 0xFD2FB528), ErrInvalid},
		{"magic", func(b []byte) []byte { b[15] = 'y'; return b }, ErrInvalid},
		{"version", set32(offVersion, 2), ErrUnsupported},
		{"no chunks", set32(offChunks, 0), ErrInvalid},
		{"one chunk less", set32(offChunks, uint32(e.Chunks-1)), ErrInvalid},
		{"chunks overflow", set32(offChunks, 1<<32-1), ErrInvalid},
		{"tar size", set64(offTarSize, uint64(e.TarSize+1)), ErrInvalid},
		{"negative tar size", set64(offTarSize, 1<<63), ErrInvalid},
		{"headers size", set64(offHeadersSize, uint64(e.TarSize+1)), ErrInvalid},
		{"headers size overflow", set64(offHeadersSize, 1<<63), ErrInvalid},
		{"tar end decreases", func(b []byte) []byte { le.PutUint64(entry(b, 1), 1); return b }, ErrInvalid},
		{"tar end repeats", func(b []byte) []byte { copy(entry(b, 1)[:8], entry(b, 0)[:8]); return b }, ErrInvalid},
		{"first chunk empty", func(b []byte) []byte { le.PutUint64(entry(b, 0), 0); return b }, ErrInvalid},
		{"frame end decreases", func(b []byte) []byte { le.PutUint64(entry(b, 1)[8:], 1); return b }, ErrInvalid},
		{"frame empty", func(b []byte) []byte { copy(entry(b, 1)[8:16], entry(b, 0)[8:16]); return b }, ErrInvalid},
		{"frame too large", func(b []byte) []byte { le.PutUint64(entry(b, e.Chunks-1)[8:], 1<<40); return b }, ErrInvalid},
		{"tar wraps around", func(b []byte) []byte { le.PutUint64(entry(b, 0), 1<<64-1); return b }, ErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := DecodeIndex(c.change(bytes.Clone(e.indexBytes()))); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

// resize corrects the size field of an index that was cut.
func resize(b []byte) []byte {
	binary.LittleEndian.PutUint32(b[offSkippableSize:], uint32(len(b)-offIndexMagic))
	return b
}

func TestLayerIndexRefuses(t *testing.T) {
	e := encode(t, filesTar(t, 5, 1), EncodeOptions{ChunkSize: 4096})
	for name, change := range map[string]func(l *Layer){
		"size":   func(l *Layer) { l.IndexSize++ },
		"offset": func(l *Layer) { l.IndexOffset-- },
		"digest": func(l *Layer) { l.IndexDigest = digest.FromString("another") },
	} {
		l := e.Layer
		change(&l)
		if _, err := l.Index(e.indexBytes()); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: got %v, want %v", name, err, ErrInvalid)
		}
	}
}

// forge returns an index of chunks of 4 MiB of a tar of tarSize bytes, with the headers frame.
func forge(t testing.TB, tarSize, headersSize int64, frame []byte) *Index {
	t.Helper()
	x := &Index{TarSize: tarSize, HeadersSize: headersSize, headers: frame}
	for end, more := int64(0), true; more; more = end < tarSize {
		end = min(end+MaxChunkSize, tarSize)
		x.table = binary.LittleEndian.AppendUint64(x.table, uint64(end))
		x.table = binary.LittleEndian.AppendUint64(x.table, uint64(len(x.table)))
		x.table = append(x.table, make([]byte, sha256.Size)...)
	}
	b := append(appendIndexHeader(nil, x, make([]byte, sha256.Size)), x.table...)
	x, err := DecodeIndex(append(b, frame...))
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func compressed(t testing.TB, b []byte, o ...zstd.EOption) []byte {
	var out bytes.Buffer
	w, err := zstd.NewWriter(&out, o...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// bomb returns a zstd frame of b and n zeros, in blocks that say "128 KiB of this byte" (RFC 8878, 3.1.1.2).
func bomb(b []byte, n int) []byte {
	frame := []byte{0x28, 0xb5, 0x2f, 0xfd, 0, 10 << 3} // no sizes, window of 1 MiB
	block := func(last, kind, size int, content ...byte) {
		h := last | kind<<1 | size<<3
		frame = append(append(frame, byte(h), byte(h>>8), byte(h>>16)), content...)
	}
	block(0, 0, len(b), b...)
	for range n >> 17 {
		block(0, 1, 1<<17, 0)
	}
	block(1, 0, 0)
	return frame
}

func TestHostileHeaders(t *testing.T) {
	end := make([]byte, 2*blockSize)
	f := sized("f", 1000)
	good := concat(f, make([]byte, 24), end)
	wide := compressed(t, make([]byte, 9<<20), zstd.WithWindowSize(16<<20))
	n := func(b []byte) int64 { return int64(len(b)) }
	for _, c := range []struct {
		name    string
		tarSize int64
		size    int64
		frame   []byte
		want    error
	}{
		{"good", 1000 + n(good), n(good), compressed(t, good), nil},
		{"not zstd", 1000 + n(good), n(good), []byte("not zstd"), ErrInvalid},
		{"no frame", 1000 + n(good), n(good), nil, ErrInvalid},
		{"truncated frame", 1000 + n(good), n(good), compressed(t, good)[:20], ErrInvalid},
		{"fewer bytes than said", 1000 + n(good), n(good), compressed(t, good[:n(good)-1]), ErrInvalid},
		{"more bytes than said", 1000 + n(good), n(good), compressed(t, append(good, 0)), ErrInvalid},
		{"bomb", 1000 + n(good), n(good), bomb(good, 1<<30), ErrInvalid},
		{"less data than said", 1001 + n(good), n(good), compressed(t, good), ErrInvalid},
		{"more data than said", 999 + n(good), n(good), compressed(t, good), ErrInvalid},
		{"no data at all", n(good), n(good), compressed(t, good), ErrInvalid},
		{"huge data", 1 << 40, n(good), compressed(t, concat(sized("f", 1<<62), end, make([]byte, 24))), ErrInvalid},
		{"data to the end of numbers", 1 << 40, n(good), compressed(t, concat(sized("f", 1<<63-1), end, make([]byte, 24))), ErrInvalid},
		{"no tar", n(good), n(good), compressed(t, text(rand.New(rand.NewPCG(2, 2)), len(good))), ErrInvalid},
		{"window", 9 << 20, 9 << 20, wide, ErrInvalid},
		{"endless extended headers", 20 << 20, 20 << 20, compressed(t, bytes.Repeat(pad(rawMember("x", tar.TypeXHeader, []byte(paxRecord("path", strings.Repeat("p", 400))))), 20<<10)), ErrUnsupported},
		{"extended header of 2 MiB", 3 << 20, 3 << 20, compressed(t, pad(rawMember("x", tar.TypeXHeader, []byte(paxRecord("path", strings.Repeat("p", 3<<20-2*blockSize)))))), ErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := forge(t, c.tarSize, c.size, c.frame)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := x.Layout()
			runtime.ReadMemStats(&after)
			if !errors.Is(err, c.want) {
				t.Errorf("layout: got %v, want %v", err, c.want)
			}
			if n := after.TotalAlloc - before.TotalAlloc; n > 128<<20 {
				t.Errorf("layout allocates %d MiB", n>>20)
			}
			r := x.Entries()
			for err = nil; err == nil; {
				_, err = r.Next()
			}
			if err == io.EOF {
				err = nil
			}
			if !errors.Is(err, c.want) {
				t.Errorf("entries: got %v, want %v", err, c.want)
			}
			r.Close()
			if _, err := r.Next(); err != io.ErrClosedPipe {
				t.Errorf("next after close: %v", err)
			}
		})
	}
}

func TestDecompressRefuses(t *testing.T) {
	e := encode(t, filesTar(t, 5, 1), EncodeOptions{ChunkSize: 4096})
	frame := e.frame(1)
	for i := range frame {
		for _, bit := range []byte{1, 0x80} {
			bad := bytes.Clone(frame)
			bad[i] ^= bit
			// A frame has bits that do not matter. What must never come out is other bytes.
			if b, err := e.index.Decompress(1, bad, nil); err == nil && sha256.Sum256(b) != e.index.Chunk(1).Digest {
				t.Fatalf("byte %d, bit %#x: other bytes without an error", i, bit)
			} else if err != nil && !errors.Is(err, ErrInvalid) {
				t.Fatalf("byte %d: got %v, want %v", i, err, ErrInvalid)
			}
		}
	}
	for name, bad := range map[string][]byte{"another": e.frame(2), "none": nil, "short": frame[:len(frame)-1]} {
		if _, err := e.index.Decompress(1, bad, nil); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: got %v, want %v", name, err, ErrInvalid)
		}
	}
}

// TestDecompressBuffer checks that Decompress uses the caller's buffer, and no more of it than the chunk needs and the slack.
func TestDecompressBuffer(t *testing.T) {
	e := encode(t, filesTar(t, 50, 1), EncodeOptions{ChunkSize: 4096})
	for i := range e.Chunks {
		n := int(e.index.Chunk(i).TarSize)
		buf := bytes.Repeat([]byte{0xaa}, n+100)
		b, err := e.index.Decompress(i, e.frame(i), buf)
		if err != nil {
			t.Fatal(err)
		}
		if &b[0] != &buf[0] || cap(b) != n {
			t.Fatalf("chunk %d: not in the caller's buffer", i)
		}
		if tail := buf[n+DecodeSlack:]; bytes.Count(tail, []byte{0xaa}) != len(tail) {
			t.Fatalf("chunk %d: bytes behind the chunk are overwritten", i)
		}
	}
	// A frame that decodes to much more than its chunk allocates no more than the chunk.
	x := forge(t, 1<<20, 0, nil)
	frame := bomb(nil, 1<<30)
	binary.LittleEndian.PutUint64(x.table[offFrameEnd:], uint64(len(frame)))
	buf := make([]byte, 1<<20)
	if n := testing.AllocsPerRun(1, func() {
		if _, err := x.Decompress(0, frame, buf); !errors.Is(err, ErrInvalid) {
			t.Errorf("bomb: got %v, want %v", err, ErrInvalid)
		}
	}); n > 100 {
		t.Errorf("bomb: %.0f allocations", n)
	}
}

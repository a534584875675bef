package artifact

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"

	"github.com/opencontainers/go-digest"
)

// Seeds are the corpora of the other tests; what fuzzing has found lies in testdata/fuzz.

func FuzzDecodeManifest(f *testing.F) {
	b, err := testManifest().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"schemaVersion":2,"layers":[{}],"subject":{}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := DecodeManifest(b)
		if err != nil {
			checkClass(t, err)
			return
		}
		encoded, err := m.Encode()
		if err != nil {
			t.Fatalf("encode what was decoded: %v", err)
		}
		again, err := DecodeManifest(encoded)
		if err != nil {
			t.Fatalf("decode what was encoded: %v", err)
		}
		if twice, err := again.Encode(); err != nil || !bytes.Equal(encoded, twice) {
			t.Fatalf("encoding changes: %v", err)
		}
	})
}

func FuzzDecodeIndex(f *testing.F) {
	for _, b := range corpus(f) {
		if len(b) < 20000 {
			f.Add(encode(f, b, EncodeOptions{ChunkSize: 1000}).indexBytes())
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := DecodeIndex(b)
		if err != nil {
			checkClass(t, err)
			return
		}
		end, blob := int64(0), int64(0)
		for i := range x.NumChunks() {
			c := x.Chunk(i)
			if c.TarOffset != end || c.BlobOffset != blob || c.TarSize < 0 || c.TarSize > MaxChunkSize || c.BlobSize <= 0 {
				t.Fatalf("chunk %d: %+v", i, c)
			}
			if c.TarSize > 0 && (x.Find(end) != i || x.Find(end+c.TarSize-1) != i) {
				t.Fatalf("chunk %d is not found", i)
			}
			end, blob = end+c.TarSize, blob+c.BlobSize
		}
		if end != x.TarSize || blob != x.FramesSize() {
			t.Fatalf("chunks end at %d and %d, want %d and %d", end, blob, x.TarSize, x.FramesSize())
		}
		if x.HeadersSize < 1<<20 {
			checkWalk(t, x)
		}
	})
}

// FuzzHeaders reads arbitrary headers of a tar of arbitrary size.
func FuzzHeaders(f *testing.F) {
	for _, b := range corpus(f) {
		if len(b) < 20000 {
			e := encode(f, b, EncodeOptions{})
			f.Add(decodeAll(f, e.index.headers), e.TarSize-e.HeadersSize)
		}
	}
	f.Fuzz(func(t *testing.T, headers []byte, data int64) {
		if data < 0 || data > 1<<32 || len(headers) > 1<<20 {
			return
		}
		fixChecksums(headers)
		checkWalk(t, forge(t, int64(len(headers))+data, int64(len(headers)), compressed(t, headers)))
	})
}

// checkWalk checks that entries are in order and inside the tar, or refused.
func checkWalk(t *testing.T, x *Index) {
	end := int64(0)
	layout, err := x.Walk(func(e *Entry) error {
		// The last entry may claim more data than there is: the next step refuses it.
		if e.Offset < end || e.DataOffset < e.Offset || e.DataSize < 0 || e.DataOffset > x.TarSize {
			t.Fatalf("entry %+v in a tar of %d bytes", e, x.TarSize)
		}
		end = e.DataOffset + e.DataSize
		file, off := int64(0), e.DataOffset
		for _, r := range e.Sparse {
			if r.Size <= 0 || r.FileOffset < file || r.FileOffset+r.Size > e.Size || r.TarOffset != off {
				t.Fatalf("entry %q: runs %+v", e.Name, e.Sparse)
			}
			file, off = r.FileOffset+r.Size, off+r.Size
		}
		if e.Sparse != nil && off != end {
			t.Fatalf("entry %q: runs end at %d, want %d", e.Name, off, end)
		}
		return nil
	})
	if err != nil {
		checkClass(t, err)
		return
	}
	data := int64(0)
	for _, r := range layout.runs {
		data += r.n
	}
	if data+x.HeadersSize != x.TarSize {
		t.Fatalf("%d bytes of data and %d of headers in a tar of %d", data, x.HeadersSize, x.TarSize)
	}
}

// FuzzFrame decodes arbitrary frames of a chunk.
func FuzzFrame(f *testing.F) {
	e := encode(f, corpus(f)["kinds"], EncodeOptions{ChunkSize: 1000})
	for i := range e.Chunks {
		f.Add(e.frame(i), e.index.Chunk(i).TarSize)
	}
	f.Add(compressed(f, make([]byte, 1<<20)), int64(10))
	f.Fuzz(func(t *testing.T, frame []byte, n int64) {
		if n <= 0 || n > 1<<20 || len(frame) == 0 || uint64(len(frame)) > maxFrameSize(uint64(n)) {
			return
		}
		x := forge(t, n, 0, nil)
		binary.LittleEndian.PutUint64(x.table[offFrameEnd:], uint64(len(frame)))
		b, err := x.Decompress(0, frame, nil)
		if err == nil {
			t.Fatalf("%d bytes have the digest zero", len(b))
		}
		checkClass(t, err)
	})
}

// FuzzEncodeLayer encodes arbitrary tars: what archive/tar reads to its end is encoded, and proven, and everything else refused.
func FuzzEncodeLayer(f *testing.F) {
	for _, tars := range []map[string][]byte{corpus(f), refused(f)} {
		for _, b := range tars {
			if len(b) < 20000 {
				f.Add(b, uint16(0))
			}
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, size uint16) {
		fixChecksums(b)
		_, wantErr := readTar(b)
		if wantErr == errHuge {
			return
		}
		o := EncodeOptions{ChunkSize: blockSize + int(size)}
		_, err := EncodeLayer(t.Context(), io.Discard, bytes.NewReader(b), o)
		if (err == nil) != (wantErr == nil) {
			t.Fatalf("got %v, archive/tar says %v", err, wantErr)
		}
		if err == nil {
			checkLayer(t, encode(t, b, o))
		} else {
			checkClass(t, err)
		}
	})
}

// FuzzVerifyLayer reads arbitrary blobs.
func FuzzVerifyLayer(f *testing.F) {
	for _, name := range []string{"kinds", "PAX 1.0 sparse", "empty", "513 bytes"} {
		e := encode(f, corpus(f)[name], EncodeOptions{ChunkSize: 1000})
		f.Add(e.blob, uint32(e.IndexSize))
	}
	f.Fuzz(func(t *testing.T, blob []byte, indexSize uint32) {
		if int64(indexSize) > int64(len(blob)) {
			return
		}
		offset := len(blob) - int(indexSize)
		index := blob[offset:]
		l := Layer{Digest: digest.FromBytes(blob), Size: int64(len(blob)), IndexOffset: int64(offset), IndexSize: int64(indexSize), IndexDigest: digest.FromBytes(index)}
		x, err := l.Index(index)
		if err != nil || x.HeadersSize > 1<<20 {
			return
		}
		if err := VerifyLayer(t.Context(), bytes.NewReader(blob), index, l, x.DiffID); err != nil {
			checkClass(t, err)
			return
		}
		if got := decodeAll(t, blob); digest.FromBytes(got) != x.DiffID {
			t.Fatal("proven, but not the tar")
		}
	})
}

// FuzzProveTar: of whatever tar, with one byte of its index's headers changed, both ways to read headers prove nothing.
func FuzzProveTar(f *testing.F) {
	for _, b := range corpus(f) {
		if len(b) < 20000 {
			f.Add(b, uint32(100), byte(1))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, off uint32, flip byte) {
		fixChecksums(b)
		if _, err := EncodeLayer(t.Context(), io.Discard, bytes.NewReader(b), EncodeOptions{}); err != nil || flip == 0 {
			return
		}
		e := encode(t, b, EncodeOptions{ChunkSize: 1000})
		headers := decodeAll(t, e.index.headers)
		if len(headers) == 0 {
			return
		}
		headers[off%uint32(len(headers))] ^= flip
		bad := e.index.withHeaders(compressed(t, headers))
		for _, plainly := range []bool{false, true} {
			if err := ProveTar(t.Context(), e.index, e.DiffID, e.tarChunk, plainly); err != nil {
				t.Fatalf("plainly %v: %v", plainly, err)
			}
			if err := ProveTar(t.Context(), bad, e.DiffID, e.tarChunk, plainly); err == nil {
				t.Fatalf("plainly %v: proven with byte %d of the headers changed", plainly, off)
			} else {
				checkClass(t, err)
			}
		}
	})
}

func checkClass(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrUnsupported) {
		t.Fatalf("neither invalid nor unsupported: %v", err)
	}
}

// fixChecksums corrects the checksum of every header block, which chance does not.
func fixChecksums(b []byte) {
	for off := 0; off+blockSize <= len(b); off += blockSize {
		if block := b[off:][:blockSize]; bytes.HasPrefix(block[257:], []byte("ustar")) {
			checksummed(block)
		}
	}
}

// FuzzSourceTar: whatever the registry gives for a source layer is a tar, or an error.
func FuzzSourceTar(f *testing.F) {
	for _, s := range []string{"", "\x1f\x8b\x08\x00\x00\x00\x00\x00", "\x28\xb5\x2f\xfd\x00\x00", "\x50\x2a\x4d\x18\x01\x00\x00\x00x", "plain text"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		tar, err := SourceTar("", bytes.NewReader(b))
		if err != nil {
			return
		}
		defer tar.Close()
		io.Copy(io.Discard, io.LimitReader(tar, 16<<20))
	})
}

package artifact

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"reflect"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// encoded is a layer in memory.
type encoded struct {
	EncodedLayer
	tar, blob []byte
	index     *Index
}

func (e *encoded) indexBytes() []byte { return e.blob[e.IndexOffset:] }

// tarChunk returns chunk i of the tar as it is.
func (e *encoded) tarChunk(i int) ([]byte, error) {
	c := e.index.Chunk(i)
	return e.tar[c.TarOffset:][:c.TarSize], nil
}

func (e *encoded) frame(i int) []byte {
	c := e.index.Chunk(i)
	return e.blob[c.BlobOffset:][:c.BlobSize]
}

func encode(t testing.TB, tar []byte, o EncodeOptions) *encoded {
	t.Helper()
	var blob bytes.Buffer
	l, err := EncodeLayer(t.Context(), &blob, bytes.NewReader(tar), o)
	if err != nil {
		t.Fatalf("encode: %v", err)
	}
	l.Source = digest.FromBytes(tar)
	e := &encoded{EncodedLayer: l, tar: tar, blob: blob.Bytes()}
	if e.index, err = l.Index(e.indexBytes()); err != nil {
		t.Fatalf("decode what was encoded: %v", err)
	}
	return e
}

// checkLayer checks everything that is promised of an encoded layer.
func checkLayer(t testing.TB, e *encoded) {
	t.Helper()
	if got := decodeAll(t, e.blob); !bytes.Equal(got, e.tar) {
		t.Fatalf("the blob decodes to %d other bytes than the tar's %d", len(got), len(e.tar))
	}
	if e.Digest != digest.FromBytes(e.blob) || e.Size != int64(len(e.blob)) || e.DiffID != digest.FromBytes(e.tar) {
		t.Fatalf("wrong digest or size: %+v", e.EncodedLayer)
	}
	x := e.index
	if x.DiffID != e.DiffID || x.TarSize != int64(len(e.tar)) || x.TarSize != e.TarSize || x.HeadersSize != e.HeadersSize || x.NumChunks() != e.Chunks {
		t.Fatalf("index %d %d %s, encoded %+v", x.TarSize, x.HeadersSize, x.DiffID, e.EncodedLayer)
	}
	layout, err := x.Layout()
	if err != nil {
		t.Fatalf("layout: %v", err)
	}
	checkChunks(t, e, layout)
	checkEntries(t, e, layout)
	if err := VerifyLayer(t.Context(), iotest.HalfReader(bytes.NewReader(e.blob)), e.indexBytes(), e.Layer, e.DiffID); err != nil {
		t.Fatalf("verify: %v", err)
	}
	for _, plainly := range []bool{false, true} {
		if err := ProveTar(t.Context(), x, e.DiffID, e.tarChunk, plainly); err != nil {
			t.Fatalf("prove, plainly %v: %v", plainly, err)
		}
	}
}

func checkChunks(t testing.TB, e *encoded, layout *Layout) {
	t.Helper()
	end := int64(0)
	for i := range e.index.NumChunks() {
		c := e.index.Chunk(i)
		if c.TarOffset != end {
			t.Fatalf("chunk %d begins at %d, want %d", i, c.TarOffset, end)
		}
		end += c.TarSize
		b, err := e.index.Decompress(i, e.frame(i), nil)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b, e.tar[c.TarOffset:end]) {
			t.Fatalf("chunk %d: wrong bytes", i)
		}
		if err := layout.Check(i, b); err != nil {
			t.Fatal(err)
		}
		for _, off := range []int64{c.TarOffset, end - 1} {
			if off >= 0 && off < e.TarSize && e.index.Find(off) != i {
				t.Fatalf("offset %d: found in chunk %d, want %d", off, e.index.Find(off), i)
			}
		}
	}
}

// checkEntries compares the entries with what archive/tar reads from the tar itself.
func checkEntries(t testing.TB, e *encoded, layout *Layout) {
	t.Helper()
	want, err := readTar(e.tar)
	if err != nil {
		t.Fatalf("archive/tar: %v", err)
	}
	headers := bytes.Clone(e.tar)
	removed := int64(0)
	r := e.index.Entries()
	defer r.Close()
	end := int64(0)
	for i := 0; ; i++ {
		got, err := r.Next()
		if err == io.EOF && i == len(want) {
			break
		}
		if err != nil {
			t.Fatalf("entry %d: %v", i, err)
		}
		if !reflect.DeepEqual(got.Header, want[i].Header) {
			t.Fatalf("entry %d: got %+v, want %+v", i, got.Header, want[i].Header)
		}
		if data := got.read(e.tar); !bytes.Equal(data, want[i].data) {
			t.Fatalf("entry %q: wrong data: %d bytes, want %d", got.Name, len(data), len(want[i].data))
		}
		if got.Offset != alignBlock(end) || got.DataOffset < got.Offset+blockSize {
			t.Fatalf("entry %q begins at %d, its data at %d; the data before ends at %d", got.Name, got.Offset, got.DataOffset, end)
		}
		end = got.DataOffset + got.DataSize
		for _, off := range []int64{got.DataOffset - 1, got.DataOffset, end - 1, end} {
			wantFrom, wantEnd := off, off
			if off >= got.DataOffset && off < end {
				wantFrom, wantEnd = got.DataOffset, end
			}
			if from, to := layout.DataRun(off); from != wantFrom || to != wantEnd {
				t.Fatalf("entry %q: data run of %d is %d to %d, want %d to %d", got.Name, off, from, to, wantFrom, wantEnd)
			}
		}
		headers = append(headers[:got.DataOffset-removed], headers[end-removed:]...)
		removed += got.DataSize
	}
	if got := decodeAll(t, e.index.headers); !bytes.Equal(got, headers) {
		t.Fatalf("headers are %d other bytes than the %d of the tar without data", len(got), len(headers))
	}
}

// read returns the file's bytes, holes as zeros.
func (e *Entry) read(tar []byte) []byte {
	if e.Sparse == nil {
		return tar[e.DataOffset:][:e.DataSize]
	}
	b := make([]byte, e.Size)
	for _, r := range e.Sparse {
		copy(b[r.FileOffset:][:r.Size], tar[r.TarOffset:])
	}
	return b
}

type readEntry struct {
	*tar.Header
	data []byte
}

var errHuge = errors.New("more bytes than a test wants to read")

// readTar reads a tar as containerd does: every file to its end.
func readTar(b []byte) ([]readEntry, error) {
	var entries []readEntry
	r := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if err == io.EOF {
			return entries, nil
		}
		if err != nil {
			return nil, err
		}
		const limit = 8 << 20
		data, err := io.ReadAll(io.LimitReader(r, limit))
		if err != nil {
			return nil, err
		}
		if len(data) == limit {
			return nil, errHuge
		}
		entries = append(entries, readEntry{h, data})
	}
}

func decodeAll(t testing.TB, b []byte) []byte {
	t.Helper()
	d, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	got, err := d.DecodeAll(b, nil)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

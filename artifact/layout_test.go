package artifact

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"
)

// TestCheck changes every byte of a tar: a changed header is noticed, and data is left to the chunk's digest.
func TestCheck(t *testing.T) {
	for _, name := range []string{"kinds", "PAX 1.0 sparse", "old GNU extended", "513 bytes", "trailing bytes", "global header"} {
		for _, size := range []int{600, 4096, 128 << 10} {
			e := encode(t, corpus(t)[name], EncodeOptions{ChunkSize: size})
			layout, err := e.index.Layout()
			if err != nil {
				t.Fatal(err)
			}
			isData := map[int64]bool{}
			if _, err := e.index.Walk(func(e *Entry) error {
				for off := range e.DataSize {
					isData[e.DataOffset+off] = true
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			for off := range e.TarSize {
				i := e.index.Find(off)
				c := e.index.Chunk(i)
				b := bytes.Clone(e.tar[c.TarOffset:][:c.TarSize])
				b[off-c.TarOffset] ^= 1
				if err := layout.Check(i, b); (err == nil) != isData[off] || err != nil && !errors.Is(err, ErrInvalid) {
					t.Fatalf("%s, chunks of %d, byte %d (data: %v): got %v", name, size, off, isData[off], err)
				}
			}
			for i := range e.Chunks {
				if err := layout.Check(i, e.tar[:e.index.Chunk(i).TarSize-1]); !errors.Is(err, ErrInvalid) {
					t.Fatalf("short chunk %d: got %v", i, err)
				}
			}
		}
	}
}

// TestLayoutKeys: nobody can know beforehand what headers hash to.
func TestLayoutKeys(t *testing.T) {
	e := encode(t, kindsTar(t), EncodeOptions{ChunkSize: 2000})
	var layouts []*Layout
	for range 2 {
		l, err := e.index.Layout()
		if err != nil {
			t.Fatal(err)
		}
		layouts = append(layouts, l)
		e.index.ForgetLayout()
	}
	a, b := layouts[0], layouts[1]
	if len(a.sums) < 2 || len(a.sums) != len(b.sums) {
		t.Fatalf("%d and %d chunks with headers", len(a.sums), len(b.sums))
	}
	for i := range a.sums {
		if a.sums[i].tag == b.sums[i].tag || a.sums[i].size != b.sums[i].size {
			t.Errorf("chunk %d: its headers hash to %x, of %d bytes, and with another key to %x, of %d", a.sums[i].chunk, a.sums[i].tag, a.sums[i].size, b.sums[i].tag, b.sums[i].size)
		}
	}
}

func TestWalkStops(t *testing.T) {
	e := encode(t, filesTar(t, 5, 1), EncodeOptions{})
	stop, n := errors.New("stop"), 0
	if _, err := e.index.Walk(func(*Entry) error {
		n++
		return stop
	}); err != stop || n != 1 {
		t.Errorf("got %v after %d entries, want %v after 1", err, n, stop)
	}
}

// TestVerifyLayer changes every byte of a blob.
func TestVerifyLayer(t *testing.T) {
	e := encode(t, kindsTar(t), EncodeOptions{ChunkSize: 2000})
	verify := func(blob []byte, l Layer, diffID digest.Digest) error {
		index := bytes.Clone(e.indexBytes())
		if int64(len(blob)) >= l.IndexOffset+l.IndexSize {
			index = blob[l.IndexOffset:][:l.IndexSize]
		}
		return VerifyLayer(t.Context(), bytes.NewReader(blob), index, l, diffID)
	}
	if err := verify(e.blob, e.Layer, e.DiffID); err != nil {
		t.Fatal(err)
	}
	for off := range e.blob {
		bad := bytes.Clone(e.blob)
		bad[off] ^= 1
		if err := verify(bad, e.Layer, e.DiffID); !errors.Is(err, ErrInvalid) {
			t.Fatalf("byte %d changed: got %v", off, err)
		}
	}
	other := digest.FromString("another")
	for name, err := range map[string]error{
		"another tar":   verify(e.blob, e.Layer, other),
		"truncated":     verify(e.blob[:len(e.blob)-1], e.Layer, e.DiffID),
		"only a chunk":  verify(e.frame(0), e.Layer, e.DiffID),
		"nothing":       verify(nil, e.Layer, e.DiffID),
		"bytes behind":  verify(append(bytes.Clone(e.blob), 0), e.Layer, e.DiffID),
		"another index": VerifyLayer(t.Context(), bytes.NewReader(e.blob), e.indexBytes()[1:], e.Layer, e.DiffID),
	} {
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: got %v, want %v", name, err, ErrInvalid)
		}
	}
	broken := errors.New("broken")
	if err := VerifyLayer(t.Context(), iotest.ErrReader(broken), e.indexBytes(), e.Layer, e.DiffID); !errors.Is(err, broken) || errors.Is(err, ErrInvalid) {
		t.Errorf("read error: got %v", err)
	}
}

// TestProveTar: a tar with another byte, or an index with another byte of its headers, is not proven, and nothing is asked twice.
func TestProveTar(t *testing.T) {
	e := encode(t, kindsTar(t), EncodeOptions{ChunkSize: 2000})
	for _, plainly := range []bool{false, true} {
		for off := 0; off < len(e.tar); off += 211 {
			next := 0
			err := ProveTar(t.Context(), e.index, e.DiffID, func(i int) ([]byte, error) {
				if i != next {
					t.Fatalf("asked for chunk %d after %d", i, next-1)
				}
				next++
				c := e.index.Chunk(i)
				b := bytes.Clone(e.tar[c.TarOffset:][:c.TarSize])
				if at := int64(off) - c.TarOffset; at >= 0 && at < c.TarSize {
					b[at] ^= 1
				}
				return b, nil
			}, plainly)
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("byte %d changed: got %v", off, err)
			}
		}
		headers := decodeAll(t, e.index.headers)
		for off := 0; off < len(headers); off += 101 {
			bad := bytes.Clone(headers)
			bad[off] ^= 1
			x := e.index.withHeaders(compressed(t, bad))
			if err := ProveTar(t.Context(), x, e.DiffID, e.tarChunk, plainly); !errors.Is(err, ErrInvalid) {
				t.Fatalf("header byte %d of the index changed: got %v", off, err)
			}
		}
		broken := errors.New("broken")
		for name, c := range map[string]struct {
			err  error
			want error
		}{
			"another diffID": {ProveTar(t.Context(), e.index, digest.FromString("another"), e.tarChunk, plainly), ErrInvalid},
			"a short chunk": {ProveTar(t.Context(), e.index, e.DiffID, func(i int) ([]byte, error) {
				b, err := e.tarChunk(i)
				return b[:len(b)-1], err
			}, plainly), ErrInvalid},
			"an error": {ProveTar(t.Context(), e.index, e.DiffID, func(i int) ([]byte, error) { return nil, broken }, plainly), broken},
		} {
			if !errors.Is(c.err, c.want) || c.want == broken && errors.Is(c.err, ErrInvalid) {
				t.Errorf("%s: got %v, want %v", name, c.err, c.want)
			}
		}
	}
}

// withHeaders is x with another frame of headers.
func (x *Index) withHeaders(frame []byte) *Index {
	return &Index{TarSize: x.TarSize, HeadersSize: x.HeadersSize, DiffID: x.DiffID, table: x.table, headers: frame}
}

// TestVerifyLayerNames checks that a blob that is consistent in itself, but lies, is refused, and with which words.
func TestVerifyLayerNames(t *testing.T) {
	end := make([]byte, 2*blockSize)
	honest := concat(pad(rawMember("file", '0', []byte("some data"))), end)
	renamed := concat(pad(rawMember("elif", '0', []byte("some data"))), end)
	longer := concat(pad(rawMember("file", '0', []byte("some data that is longer"))), end)
	e := encode(t, honest, EncodeOptions{ChunkSize: blockSize})
	for _, c := range []struct {
		name   string
		change func(index *Index)
		want   string
	}{
		{"header byte", func(x *Index) { x.headers = encode(t, renamed, EncodeOptions{}).index.headers }, "chunk 0: tar offset 0: index has another header byte"},
		{"data run", func(x *Index) { x.headers = encode(t, longer, EncodeOptions{}).index.headers }, "chunk 0: tar offset 133: index has another header byte"},
		{"fewer headers", func(x *Index) {
			x.headers, x.HeadersSize = compressed(t, honest[:blockSize]), blockSize
		}, "chunk 1: tar offset 521: index has no more headers"},
		{"diffID", func(x *Index) { x.DiffID = digest.FromString("another") }, "index is of tar " + digest.FromString("another").String()},
		{"chunk digest", func(x *Index) { x.table[tableEntrySize+offDigest] ^= 1 }, "chunk 1: its bytes are not those of its digest"},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := e.index
			lie := &Index{TarSize: x.TarSize, HeadersSize: x.HeadersSize, DiffID: x.DiffID, table: bytes.Clone(x.table), headers: x.headers}
			c.change(lie)
			blob, l := resign(e.blob[:e.IndexOffset], lie)
			err := VerifyLayer(t.Context(), bytes.NewReader(blob), blob[l.IndexOffset:], l, e.DiffID)
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// resign makes a blob of frames and an index, and what a manifest would say about it.
func resign(frames []byte, x *Index) ([]byte, Layer) {
	index := concat(appendIndexHeader(nil, x, hexBytes(x.DiffID)), x.table, x.headers)
	blob := concat(frames, index)
	return blob, Layer{
		Digest: digest.FromBytes(blob), Size: int64(len(blob)), Source: digest.FromString("source"),
		IndexOffset: int64(len(frames)), IndexSize: int64(len(index)), IndexDigest: digest.FromBytes(index),
	}
}

// Who has read all entries need not read them again for the layout.
func TestLayoutOfEntries(t *testing.T) {
	for _, name := range []string{"kinds", "PAX 1.0 sparse", "513 bytes", "trailing bytes"} {
		e := encode(t, corpus(t)[name], EncodeOptions{})
		r := e.index.Entries()
		for {
			if _, err := r.Next(); err == io.EOF {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		r.Close()
		e.index.headers = nil
		if _, err := e.index.Layout(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

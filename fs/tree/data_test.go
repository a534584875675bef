package tree

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

func TestDataOutsideOfTheTar(t *testing.T) {
	for name, e := range map[string]*artifact.Entry{
		"after its end":    {Header: &tar.Header{Size: 513}, DataOffset: 512},
		"far after":        {Header: &tar.Header{Size: 512}, DataOffset: 1 << 62},
		"before":           {Header: &tar.Header{Size: 512}, DataOffset: -512},
		"out of order":     {Header: &tar.Header{Size: 1024}, Sparse: []artifact.SparseRun{{FileOffset: 512, TarOffset: 0, Size: 512}, {FileOffset: 0, TarOffset: 512, Size: 512}}},
		"over each other":  {Header: &tar.Header{Size: 1024}, Sparse: []artifact.SparseRun{{FileOffset: 0, TarOffset: 0, Size: 512}, {FileOffset: 511, TarOffset: 512, Size: 512}}},
		"after its file":   {Header: &tar.Header{Size: 512}, Sparse: []artifact.SparseRun{{FileOffset: 512, TarOffset: 0, Size: 512}}},
		"of negative size": {Header: &tar.Header{Size: 512}, Sparse: []artifact.SparseRun{{FileOffset: 0, TarOffset: 0, Size: -512}}},
	} {
		t.Run(name, func(t *testing.T) {
			e.Name, e.Typeflag = "f", tar.TypeReg
			s := source{entries: func() entryReader { return &entryList{e} }, tarSize: 1024}
			if _, err := merge(context.Background(), []source{s}, 512); !errors.Is(err, artifact.ErrInvalid) {
				t.Errorf("got %v, want %v", err, artifact.ErrInvalid)
			}
		})
	}
}

// sparseTar returns a tar of one PAX 1.0 sparse file: parts are pairs of offset and size.
func sparseTar(size int64, parts ...int64) []byte {
	var body, m bytes.Buffer
	fmt.Fprintf(&m, "%d\n", len(parts)/2)
	for i := 0; i < len(parts); i += 2 {
		fmt.Fprintf(&m, "%d\n%d\n", parts[i], parts[i+1])
		body.WriteString(strings.Repeat(string(rune('a'+i)), int(parts[i+1])))
	}
	m.Write(make([]byte, -m.Len()&511))
	m.Write(body.Bytes())
	var records bytes.Buffer
	for _, r := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=f", fmt.Sprintf("GNU.sparse.realsize=%d", size)} {
		n := len(r) + 4 // the length's own two digits, a space and a newline
		fmt.Fprintf(&records, "%d %s\n", n, r)
	}
	var b bytes.Buffer
	writeRaw(&b, "x", 'x', records.Bytes())
	writeRaw(&b, "GNUSparseFile.0/f", '0', m.Bytes())
	b.Write(make([]byte, 1024))
	return b.Bytes()
}

// writeRaw writes an entry that archive/tar would not.
func writeRaw(b *bytes.Buffer, name string, typeflag byte, body []byte) {
	h := make([]byte, 512)
	copy(h, name)
	copy(h[100:], "0000644\x000000000\x000000000\x00")
	copy(h[124:], fmt.Sprintf("%011o\x00%011o\x00", len(body), testTime.Unix()))
	copy(h[148:], "        ")
	h[156] = typeflag
	copy(h[257:], "ustar\x0000")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	b.Write(h)
	b.Write(body)
	b.Write(make([]byte, -len(body)&511))
}

func TestSparse(t *testing.T) {
	for name, c := range map[string]struct {
		size    int64
		parts   []int64
		extents int  // 0: no data, or
		inImage bool // in the metadata image
	}{
		"aligned":                 {4096, []int64{512, 1024, 2048, 512, 4096, 0}, 2, false},
		"ends with its file":      {1300, []int64{0, 512, 1024, 276}, 2, false},
		"part ends in a block":    {4096, []int64{0, 100}, 0, true},
		"part begins in a block":  {4096, []int64{100, 412, 512, 512}, 0, true},
		"parts follow each other": {4096, []int64{0, 100, 100, 412, 1024, 512}, 2, false},
		"only hole":               {4096, []int64{4096, 0}, 0, false},
		"no parts":                {4096, nil, 0, false},
		"empty":                   {0, nil, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			b := sparseTar(c.size, c.parts...)
			if _, err := mergeAndCompare(t, b, tarOf(t, parseEntries("other")...)); err != nil {
				t.Fatal(err)
			}
			root, err := Merge(context.Background(), chain{}.with(t, b).layers, 512)
			if err != nil {
				t.Fatal(err)
			}
			f := root.Entries[0].Inode
			if len(f.Extents) != c.extents || (f.Data != nil) != c.inImage {
				t.Errorf("got %d extents and %d bytes in the image, want %d and %v", len(f.Extents), len(f.Data), c.extents, c.inImage)
			}
		})
	}
}

func TestSparseLimits(t *testing.T) {
	half := sparseTar(maxData/2+1, 100, 100)
	hidden := tarOf(t, parseEntries("f")...)
	for name, c := range map[string]struct {
		layers [][]byte
		want   error
	}{
		"too much data":                  {[][]byte{sparseTar(maxData+1, 100, 100)}, ErrRefused},
		"hidden files have none":         {[][]byte{half, half, half}, nil},
		"a large hole is no data":        {[][]byte{sparseTar(maxFile, 512, 512)}, nil},
		"too large":                      {[][]byte{sparseTar(maxFile+1, 512, 512), hidden}, ErrRefused},
		"old GNU format (as containerd)": {[][]byte{oldSparse()}, ErrRefused},
	} {
		t.Run(name, func(t *testing.T) {
			var chain chain
			for _, b := range c.layers {
				chain = chain.with(t, b)
			}
			if _, err := Merge(context.Background(), chain.layers, 512); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	if _, err := mergeAndCompare(t, oldSparse()); err == nil {
		t.Error("the old format is not refused")
	}
}

// oldSparse returns a tar with a sparse file of the old GNU format, all hole.
func oldSparse() []byte {
	var b bytes.Buffer
	h := make([]byte, 512)
	copy(h, "f")
	copy(h[100:], "0000644\x000000000\x000000000\x0000000000000\x0000000000000\x00        S")
	copy(h[257:], "ustar  \x00")
	copy(h[483:], "00000001000\x00")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	b.Write(h)
	b.Write(make([]byte, 1024))
	return b.Bytes()
}

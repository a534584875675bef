package tree

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"testing"
	"time"
)

// BenchmarkMerge merges 100,000 entries of five layers: directories of 20 files, a part of which layers above replace or delete.
// What it adds to reading the headers, which depends on their format, is what BenchmarkEntries does not take.
func BenchmarkMerge(b *testing.B) {
	for _, format := range []tar.Format{tar.FormatUSTAR, tar.FormatPAX} {
		b.Run(format.String(), func(b *testing.B) {
			c := benchmarkChain(b, format)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Merge(context.Background(), c.layers, 512); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkEntries(b *testing.B) {
	for _, format := range []tar.Format{tar.FormatUSTAR, tar.FormatPAX} {
		b.Run(format.String(), func(b *testing.B) {
			c := benchmarkChain(b, format)
			b.ReportAllocs()
			for b.Loop() {
				for _, l := range c.layers {
					r := l.Index.Entries()
					for {
						if _, err := r.Next(); err == io.EOF {
							break
						} else if err != nil {
							b.Fatal(err)
						}
					}
					r.Close()
				}
			}
		})
	}
}

func benchmarkChain(t testing.TB, format tar.Format) (c chain) {
	for layer := range 5 {
		var entries []*tar.Header
		for i := range 20000 {
			dir := fmt.Sprintf("usr/lib/python3/dist-packages/package%03d/module%02d/", (i+layer*19000)/400, i/20%20)
			name := fmt.Sprintf("%sfile%d.py", dir, i%20)
			if i%20 == 0 {
				name = dir
			} else if i%20 == 1 && layer > 0 {
				name = dir + whiteoutPrefix + "file1.py"
			}
			h := parseEntries(name)[0]
			if h.Format = format; format == tar.FormatUSTAR {
				h.ModTime = h.ModTime.Truncate(time.Second)
			}
			entries = append(entries, h)
		}
		c = c.with(t, tarOf(t, entries...))
	}
	return c
}

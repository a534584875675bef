package artifact

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"sort"
)

// Layout says which bytes of the tar are data and which are headers, and what the headers hash to in each chunk: what
// is needed to compare a fetched chunk with the index's claim. It may be used by several goroutines.
type Layout struct {
	index *Index
	runs  []dataRun   // in order, not empty
	sums  []headerSum // of the chunks with header bytes, in order

	// While the headers are read: the chunk that header bytes were last seen in, and their hash.
	chunk int
	end   int64 // of the chunk
	hash  hash.Hash
}

type dataRun struct{ off, n int64 }

// headerSum is the SHA-256 of a chunk's header bytes.
type headerSum struct {
	chunk uint32
	sum   [32]byte
}

// Layout returns what the first pass over the headers has found, and makes it if there was none. Its memory is proportional to the number of files and of chunks with header bytes.
func (x *Index) Layout() (*Layout, error) {
	if l := x.layout.Load(); l != nil {
		return l, nil
	}
	return x.Walk(func(*Entry) error { return nil })
}

// ForgetLayout gives back the memory of the layout, until it is needed again.
func (x *Index) ForgetLayout() { x.layout.Store(nil) }

// Walk calls visit with each entry, as Entries yields them, and returns the layout. An error of visit ends it and is returned as it is.
func (x *Index) Walk(visit func(*Entry) error) (*Layout, error) {
	r := x.Entries()
	defer r.Close()
	for {
		e, err := r.Next()
		if err == io.EOF {
			return r.layout, nil
		}
		if err != nil {
			return nil, err
		}
		if err := visit(e); err != nil {
			return nil, err
		}
	}
}

func (l *Layout) addRun(off, n int64) {
	if n > 0 {
		l.runs = append(l.runs, dataRun{off, n})
	}
}

// addHeaders adds the header bytes b, which lie at off in the tar.
func (l *Layout) addHeaders(off int64, b []byte) {
	for len(b) > 0 {
		if off >= l.end {
			l.closeChunk()
			l.chunk = l.index.Find(off)
			c := l.index.Chunk(l.chunk)
			l.end = c.TarOffset + c.TarSize
		}
		n := min(int64(len(b)), l.end-off)
		l.hash.Write(b[:n])
		off, b = off+n, b[n:]
	}
}

func (l *Layout) closeChunk() {
	if l.chunk >= 0 {
		l.sums = append(l.sums, headerSum{uint32(l.chunk), [32]byte(l.hash.Sum(nil))})
		l.hash.Reset()
	}
}

// Check compares the header bytes inside chunk i, whose uncompressed bytes are b, with the index's headers. Its error is ErrInvalid.
func (l *Layout) Check(i int, b []byte) error {
	c := l.index.Chunk(i)
	if int64(len(b)) != c.TarSize {
		return fmt.Errorf("chunk %d: %d bytes, want %d: %w", i, len(b), c.TarSize, ErrInvalid)
	}
	s := sort.Search(len(l.sums), func(s int) bool { return int(l.sums[s].chunk) >= i })
	if s == len(l.sums) || int(l.sums[s].chunk) != i {
		return nil // all data
	}
	h := sha256.New()
	off, end := c.TarOffset, c.TarOffset+c.TarSize
	for r := l.runAt(off); off < end; r++ {
		data := dataRun{off: end}
		if r < len(l.runs) {
			data = l.runs[r]
		}
		if from := min(data.off, end); from > off {
			h.Write(b[off-c.TarOffset : from-c.TarOffset])
		}
		off = data.off + data.n
	}
	if [32]byte(h.Sum(nil)) != l.sums[s].sum {
		return fmt.Errorf("chunk %d: its headers are not those of the index: %w", i, ErrInvalid)
	}
	return nil
}

// DataRun returns the tar offsets where the data run that holds off begins and ends, or off twice if that is a header byte.
func (l *Layout) DataRun(off int64) (from, end int64) {
	if r := l.runAt(off); r < len(l.runs) && l.runs[r].off <= off {
		return l.runs[r].off, l.runs[r].off + l.runs[r].n
	}
	return off, off
}

// runAt returns the first run that ends after off.
func (l *Layout) runAt(off int64) int {
	return sort.Search(len(l.runs), func(r int) bool { return off < l.runs[r].off+l.runs[r].n })
}

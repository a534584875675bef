package tree

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// countedEntries gives n entries, then err.
type countedEntries struct {
	n, given int
	err      error
	mem      []byte // touched by each
	closed   chan struct{}
}

func (c *countedEntries) Next() (*artifact.Entry, error) {
	if c.given == c.n {
		return nil, c.err
	}
	c.given++
	if c.mem != nil {
		_ = fmt.Sprint(c.mem[0])
	}
	e := &artifact.Entry{Header: &tar.Header{}}
	e.Name = fmt.Sprint(c.given)
	return e, nil
}

func (c *countedEntries) Close() { close(c.closed) }

func TestBatches(t *testing.T) {
	bad := errors.New("bad")
	for _, n := range []int{0, 1, batchEntries - 1, batchEntries, batchEntries + 1, 10 * batchEntries} {
		for _, end := range []error{io.EOF, bad} {
			r := &countedEntries{n: n, err: end, closed: make(chan struct{})}
			b := inBatches(r)
			for i := 1; i <= n; i++ {
				if e, err := b.Next(); err != nil || e.Name != fmt.Sprint(i) {
					t.Fatalf("entry %d of %d: %v, %v", i, n, e, err)
				}
			}
			for range 2 {
				if e, err := b.Next(); e != nil || err != end {
					t.Errorf("after %d entries: %v, %v; want %v", n, e, err, end)
				}
			}
			b.Close()
			<-r.closed
		}
	}
}

// TestBatchesClosed: who reads no further leaves nothing behind.
func TestBatchesClosed(t *testing.T) {
	r := &countedEntries{n: 1 << 40, closed: make(chan struct{})}
	b := inBatches(r)
	if _, err := b.Next(); err != nil {
		t.Fatal(err)
	}
	b.Close()
	<-r.closed
	if r.given > 8*batchEntries {
		t.Errorf("%d entries were read for one", r.given)
	}
}

// TestBatchesOfWhatCannotBeRead: an index is a memory map, whose disk may fail; that is an error and not the end of the process.
func TestBatchesOfWhatCannotBeRead(t *testing.T) {
	mem, err := unix.Mmap(-1, 0, 4096, unix.PROT_NONE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	b := inBatches(&countedEntries{n: 10, err: io.EOF, mem: mem, closed: make(chan struct{})})
	defer b.Close()
	if e, err := b.Next(); err == nil || err == io.EOF {
		t.Errorf("got %v, %v", e, err)
	}
}

package tree

import (
	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

// batchEntries is how many entries go from one goroutine to the other at once.
const batchEntries = 128

// batches is an entryReader whose entries are read in a goroutine of its own: decompressing and parsing headers takes as long as applying them.
type batches struct {
	batch
	next    <-chan batch
	closing chan struct{}
	closed  chan struct{}
}

type batch struct {
	entries []*artifact.Entry
	err     error // after entries; nil is that there are more
}

// inBatches reads r, and closes it in the end.
func inBatches(r entryReader) *batches {
	c := make(chan batch, 2)
	b := &batches{next: c, closing: make(chan struct{}), closed: make(chan struct{})}
	go func() {
		defer close(b.closed)
		defer r.Close()
		for {
			n := batch{entries: make([]*artifact.Entry, 0, batchEntries)}
			if fault := mapped.Guard(func() { n.read(r) }); fault != nil { // of the index
				n.err = fault
			}
			select {
			case c <- n:
			case <-b.closing:
				return
			}
			if n.err != nil {
				return
			}
		}
	}()
	return b
}

func (b *batch) read(r entryReader) {
	for b.err == nil && len(b.entries) < cap(b.entries) {
		var e *artifact.Entry
		if e, b.err = r.Next(); b.err == nil {
			b.entries = append(b.entries, e)
		}
	}
}

func (b *batches) Next() (*artifact.Entry, error) {
	for len(b.entries) == 0 {
		if b.err != nil {
			return nil, b.err
		}
		b.batch = <-b.next
	}
	e := b.entries[0]
	b.entries = b.entries[1:]
	return e, nil
}

// Close ends the reading.
func (b *batches) Close() {
	close(b.closing)
	<-b.closed
}

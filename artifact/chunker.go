package artifact

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
)

// chunker decides where chunks end. The aim is that equal files give equal chunks, in whatever layer or version of an image they appear:
//   - A data run longer than a chunk starts a chunk, is cut every size bytes, from headChunks chunks on every large bytes, and ends a chunk with its padding. So a
//     file that grows at its end keeps its chunks, however large it becomes, and who reads the last block of a file fetches nothing of the next.
//   - Small entries share chunks. Before an entry there is a cut with a probability proportional to the entry's size, decided by a hash of its
//     name. So the cuts do not move when a file before them grows or goes.
//   - A chunk that would become too large ends, if possible before an entry.
type chunker struct {
	size  int // most bytes of a chunk
	large int // of one that begins headChunks chunks or more into its data run
	pipe  *pipeline
	job   *job  // being filled; nil at first
	any   bool  // a chunk was submitted
	long  bool  // in a long data run: cut before the next header byte
	run   int64 // bytes of that run until now
}

// entry adds the header bytes of e. The data follows through room and grow.
func (c *chunker) entry(ctx context.Context, e *Entry, headers []byte) error {
	// The first bytes of headers may be the padding of the entry before.
	own := headers[len(headers)-int(e.DataOffset-e.Offset):]
	if err := c.write(ctx, headers[:len(headers)-len(own)]); err != nil {
		return err
	}
	long := e.DataSize > int64(c.size)
	need := int64(len(own))
	if !long {
		need += alignBlock(e.DataSize)
	}
	if c.len() > 0 && (int64(c.len())+need > int64(c.size) || !long && cutBefore(e.Name, need, c.size)) {
		if err := c.submit(ctx); err != nil {
			return err
		}
	}
	if err := c.write(ctx, own); err != nil || !long {
		return err
	}
	c.long, c.run = true, 0
	return c.submit(ctx)
}

// cutBefore reports whether the name of an entry of n bytes asks for a cut before it: with a probability of n/size.
func cutBefore(name string, n int64, size int) bool {
	sum := sha256.Sum256([]byte(name))
	return binary.LittleEndian.Uint64(sum[:])%uint64(size) < uint64(n)
}

// write adds header bytes.
func (c *chunker) write(ctx context.Context, b []byte) error {
	if c.long {
		if n := int(alignBlock(c.run) - c.run); c.len()+n <= c.most() {
			n = min(n, len(b)) // a tar may end in it
			c.job.tar = append(c.job.tar, b[:n]...)
			b = b[n:]
		}
		c.long = false
		if err := c.submit(ctx); err != nil {
			return err
		}
	}
	for len(b) > 0 {
		room, err := c.room(ctx)
		if err != nil {
			return err
		}
		n := copy(room, b)
		c.grow(n)
		b = b[n:]
	}
	return nil
}

// room returns space for the next bytes, at least one. grow says how many of them were used.
func (c *chunker) room(ctx context.Context) ([]byte, error) {
	if c.len() == c.most() {
		if err := c.submit(ctx); err != nil {
			return nil, err
		}
	}
	if c.job == nil {
		var err error
		if c.job, err = c.pipe.take(ctx, c.most()); err != nil {
			return nil, err
		}
	}
	return c.job.tar[len(c.job.tar):c.most()], nil
}

// most returns how many bytes the chunk being filled, or else the next one, may have.
func (c *chunker) most() int {
	if c.long && c.run-int64(c.len()) >= headChunks*int64(c.size) {
		return c.large
	}
	return c.size
}

func (c *chunker) grow(n int) {
	c.job.tar = c.job.tar[:len(c.job.tar)+n]
	c.run += int64(n)
}

func (c *chunker) len() int {
	if c.job == nil {
		return 0
	}
	return len(c.job.tar)
}

// submit ends the chunk, if it has begun.
func (c *chunker) submit(ctx context.Context) error {
	if c.len() > 0 {
		c.pipe.submit(c.job)
		c.job, c.any = nil, true
	}
	return ctx.Err()
}

// finish ends the last chunk: an empty one, if there was none.
func (c *chunker) finish(ctx context.Context) error {
	if c.len() == 0 && !c.any {
		if _, err := c.room(ctx); err != nil {
			return err
		}
		c.pipe.submit(c.job)
		return nil
	}
	return c.submit(ctx)
}

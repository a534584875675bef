package fs

import (
	"context"
	"math/bits"
	"sync"

	"golang.org/x/sync/semaphore"
)

// readMemory bounds the buffers of all READs of a Server. A READ of 128 KiB is usual, so this is two thousand of them.
const readMemory = 256 << 20

// memory hands out the buffers of READs, within a budget. Buffers are used again; their sizes are powers of two.
type memory struct {
	budget  *semaphore.Weighted
	pools   [bits.UintSize]sync.Pool // by the logarithm of the size
	replies sync.Pool                // of *[maxReply]byte, for the answers to others
}

func newMemory() *memory {
	return &memory{budget: semaphore.NewWeighted(readMemory), replies: sync.Pool{New: func() any { return new([maxReply]byte) }}}
}

// get returns a buffer of n bytes, at most maxRead, waiting for others to be put back if need be.
func (m *memory) get(ctx context.Context, n int) ([]byte, error) {
	class := bits.Len(uint(max(n, 4096) - 1))
	if err := m.budget.Acquire(ctx, 1<<class); err != nil {
		return nil, err
	}
	if p, ok := m.pools[class].Get().(*[]byte); ok {
		return (*p)[:n], nil
	}
	return make([]byte, n, 1<<class), nil
}

// put takes back a buffer.
func (m *memory) put(p []byte) {
	m.budget.Release(int64(cap(p)))
	m.pools[bits.Len(uint(cap(p)-1))].Put(&p)
}

package service

import (
	"context"
	"errors"
	"math"
	"sync/atomic"

	"golang.org/x/sync/semaphore"
)

// What conversions hold at most, in bytes, by the bounds of the packages that do it; not the indexes, which grow with the layers.
const (
	layerMemory      = 48 << 20 // of a layer that is converted, more than of one that is verified: 16 workers of 2 MiB, 8 MiB of tar between them, and buffers
	conversionMemory = 16 << 20 // beside that: a manifest and a config, of 4 and 8 MiB
	staticMemory     = 80 << 20 // to find a static profile: 64 MiB of chunks, and indexes
)

// room is what conversions may use in this process.
type room struct {
	conversions *semaphore.Weighted // at once
	beside      *semaphore.Weighted // of those that are at once, each has one of it, and who must be alone has all
	slots       int64               // of conversions, and of beside

	layers *semaphore.Weighted // at once; nil is any number
	most   int64               // of them
	disk   *semaphore.Weighted // bytes; nil is any number
	limit  int64               // of disk
	used   atomic.Int64        // bytes of disk that are reserved
}

func newRoom(l Limits, static bool) *room {
	conversions, layers := split(l, static)
	slots := int64(conversions)
	r := &room{conversions: semaphore.NewWeighted(slots), beside: semaphore.NewWeighted(slots), slots: slots, limit: l.Disk}
	if layers > 0 {
		r.layers, r.most = semaphore.NewWeighted(layers), layers
	}
	if l.Disk > 0 {
		r.disk = semaphore.NewWeighted(l.Disk)
	}
	return r
}

// split says how many conversions, and how many layers of all of them, there may be at once; layers 0 is any number.
func split(l Limits, static bool) (conversions int, layers int64) {
	conversions = max(1, l.Conversions)
	if l.Memory == 0 {
		return conversions, 0
	}
	each := int64(conversionMemory)
	if static {
		each += staticMemory
	}
	for conversions > 1 && int64(conversions)*(each+layerMemory) > l.Memory {
		conversions--
	}
	return conversions, max(1, (l.Memory-int64(conversions)*each)/layerMemory)
}

// reserve waits for room for a layer's conversion: it is converter.Options.Reserve. Nobody who waits for disk holds any, so those who
// hold some get to their end.
func (r *room) reserve(ctx context.Context, n int64) (most int64, release func(), err error) {
	if r.layers != nil {
		if err := r.layers.Acquire(ctx, 1); err != nil {
			return 0, nil, errors.Join(err, context.Cause(ctx))
		}
	}
	most = math.MaxInt64
	if r.disk != nil {
		n = min(r.limit, n)
		if err := r.disk.Acquire(ctx, n); err != nil {
			if r.layers != nil {
				r.layers.Release(1)
			}
			return 0, nil, errors.Join(err, context.Cause(ctx))
		}
		most = n
	}
	r.used.Add(n)
	return most, func() {
		r.used.Add(-n)
		if r.disk != nil {
			r.disk.Release(n)
		}
		if r.layers != nil {
			r.layers.Release(1)
		}
	}, nil
}

// verifying is how many layers are verified at once, where memory is bounded: conversions go on beside it.
const verifying = 2

// verify waits for room to verify layers in: jobs at once, 0 being as many as one likes.
func (r *room) verify(ctx context.Context) (jobs int, release func(), err error) {
	if r.layers == nil {
		return 0, func() {}, nil
	}
	n := min(verifying, r.most)
	if err := r.layers.Acquire(ctx, n); err != nil {
		return 0, nil, errors.Join(err, context.Cause(ctx))
	}
	return int(n), func() { r.layers.Release(n) }, nil
}

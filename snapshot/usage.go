package snapshot

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strconv"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/opencontainers/go-digest"
)

// Usage is upstream's, with what was unpacked in a layer's place, but for a streamed snapshot, of which it is what the node has on disk at the moment. What several snapshots need,
// of one image or of several, is counted once: at the oldest of them.
func (s *Snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	id := ""
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		id, _, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return snapshots.Usage{}, err
	}
	s.mu.Lock()
	all := slices.DeleteFunc(slices.Collect(maps.Values(s.streamed)), func(sn *streamedSnapshot) bool {
		_, is := s.unpacked[sn.id]
		return is
	})
	sn := s.streamed[id]
	unpacked, is := s.unpacked[id]
	s.mu.Unlock()
	if sn == nil {
		u, err := s.Snapshotter.Usage(ctx, key)
		u.Add(unpacked)
		return u, err
	}
	if is {
		return unpacked, nil
	}
	blobs, chain := s.countedAt(sn, all)
	size, err := s.images.Usage(sn.image, chain, blobs)
	return snapshots.Usage{Size: size, Inodes: int64(len(blobs))}, err
}

// countedAt returns the blobs that are counted at sn, and the length of the chain of which the metadata image is, 0 for none.
func (s *Snapshotter) countedAt(sn *streamedSnapshot, all []*streamedSnapshot) (blobs []digest.Digest, chain int) {
	number := func(sn *streamedSnapshot) uint64 {
		n, _ := strconv.ParseUint(sn.id, 10, 64) // upstream counts them
		return n
	}
	slices.SortFunc(all, func(a, b *streamedSnapshot) int { return cmp.Compare(number(a), number(b)) })
	chain = sn.layers
	older := map[digest.Digest]bool{}
	for _, o := range all {
		if number(o) >= number(sn) {
			break
		}
		if o.image == sn.image && o.layers == sn.layers {
			chain = 0
		}
		for _, b := range s.images.Blobs(o.image, o.layers) {
			older[b] = true
		}
	}
	blobs = s.images.Blobs(sn.image, sn.layers)
	return slices.DeleteFunc(blobs, func(b digest.Digest) bool { return older[b] }), chain
}

package stream

import (
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

// Start is the first start of an image's container on this node, as what was read tells: it is over when nothing new of the image was used for Options.StartQuiet, or
// when the image was forgotten.
type Start struct {
	Image      string // its ID, the hex of the artifact's digest
	Repository registryclient.Repository
	Manifest   digest.Digest // of the platform manifest
	Profile    digest.Digest // of which the hot blob was fetched in this life of the daemon, "" if none was
	Source     string        // what that profile is called: artifact.ProfileRecorded and the like
	Mounted    time.Time     // when the mount began
	Took       time.Duration // from then until a chunk was last used for the first time; 0 if that went on for firstUseMax
	Bytes      int64         // of the tars, of the chunks that were used
	Missed     int64         // of the tars, of the chunks that were fetched because a read waited for them. Layers that images share count for all of them
	Misses     int64         // how many those were
}

// end says how the record of a start ended.
type end int

const (
	cut   end = iota // by the daemon's end
	over             // the start is over
	going            // after firstUseMax
)

// beginStart begins to measure a start, which finish tells OnStart of; the device is open until then.
func (img *image) beginStart(d *device, mounted time.Time) (finish func(u *firstUses, how end)) {
	before := d.reads()
	return func(u *firstUses, how end) {
		if img.store.OnStart == nil || how == cut {
			return
		}
		u.mu.Lock()
		last, chunks := u.last, u.chunks
		u.mu.Unlock()
		if len(chunks) == 0 {
			return
		}
		after := d.reads()
		st := Start{
			Image: img.id, Repository: img.rec.Repository, Manifest: img.rec.Manifest, Mounted: mounted,
			Bytes: d.sizeOf(chunks), Missed: after.MissedBytes - before.MissedBytes, Misses: after.Misses - before.Misses,
		}
		if how == over {
			st.Took = last.Sub(mounted)
		}
		if p := img.profile.Load(); p != nil {
			st.Profile, st.Source = p.Digest, p.Annotations[artifact.AnnotationProfileSource]
		}
		img.store.OnStart(st)
	}
}

// reads are the counts of d's layers.
func (d *device) reads() cache.LayerStats {
	var st ImageStatus
	d.addTo(&st)
	return st.Reads
}

// sizeOf adds up the tar's bytes of chunks.
func (d *device) sizeOf(chunks []artifact.HotChunk) (n int64) {
	_ = mapped.Guard(func() { // of indexes: what their disk has lost is not counted
		for _, c := range chunks {
			n += d.indexes[c.Layer].Chunk(c.Chunk).TarSize
		}
	})
	return n
}

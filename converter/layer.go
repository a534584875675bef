package converter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// converted is a layer that is in the place in the artifact's form.
type converted struct {
	encoded artifact.EncodedLayer
	reused  bool
	elapsed time.Duration
}

func (c converted) created(src ocispec.Descriptor) CreatedLayer {
	l := c.encoded
	return CreatedLayer{
		Source: src.Digest, SourceSize: src.Size, Digest: l.Digest, Size: l.Size, IndexSize: l.IndexSize,
		TarSize: l.TarSize, Chunks: l.Chunks, Reused: c.reused, Seconds: c.elapsed.Seconds(),
	}
}

// layerJob is one layer's conversion.
type layerJob struct {
	p      Place
	o      CreateOptions
	src    ocispec.Descriptor
	diffID digest.Digest
	event  Event // what all its events have in common
}

// convertLayers converts the layers of img, several at once, each different one once.
func convertLayers(ctx context.Context, p Place, img *image, o CreateOptions) ([]converted, error) {
	layers, first := img.manifest.Layers, img.first()
	results := make([]converted, len(layers))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(o.jobs())
	for i, src := range layers {
		if first[i] != i {
			continue
		}
		j := layerJob{p: p, o: o, src: src, diffID: img.diffIDs[i], event: Event{
			Platform: platformString(img.platform), Layer: i, Layers: len(layers), Digest: src.Digest, Total: src.Size,
		}}
		g.Go(func() (err error) {
			if results[i], err = j.run(gctx); err != nil {
				return fmt.Errorf("layer %d of %s, %s: %w", i, j.event.Platform, src.Digest, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for i, j := range first {
		if j != i {
			results[i] = converted{encoded: results[j].encoded, reused: true}
		}
	}
	return results, nil
}

func (j *layerJob) report(kind EventKind, e Event) {
	j.event.Kind, j.event.Read, j.event.OutSize, j.event.Elapsed = kind, e.Read, e.OutSize, e.Elapsed
	j.o.Progress.report(j.event)
}

// sourceTries is how often a layer is read from its start when its source fails on the way. (That a request is refused is
// retried below, by the registry's client.)
const sourceTries = 3

func (j *layerJob) run(ctx context.Context) (converted, error) {
	started := time.Now()
	if !j.o.Force {
		enc, ok, err := j.before(ctx)
		if err != nil {
			return converted{}, err
		}
		if ok {
			j.report(LayerReused, Event{OutSize: enc.Size})
			return converted{encoded: enc, reused: true, elapsed: time.Since(started)}, nil
		}
	}
	for try := 1; ; try++ {
		enc, err := j.convert(ctx)
		if err == nil {
			c := converted{encoded: enc, elapsed: time.Since(started)}
			j.o.Record.put(ctx, j.src.Digest, j.o.Encode, enc, j.p.String())
			j.report(LayerDone, Event{Read: j.src.Size, OutSize: enc.Size, Elapsed: c.elapsed})
			return c, nil
		}
		var se *sourceError
		if try == sourceTries || ctx.Err() != nil || !errors.As(err, &se) || !se.temporary {
			return converted{}, err
		}
		select {
		case <-ctx.Done():
			return converted{}, ctx.Err()
		case <-time.After(time.Duration(try) * time.Second):
		}
	}
}

// before looks for what an earlier conversion of the layer has left, in this place or in one that it can be mounted from.
func (j *layerJob) before(ctx context.Context) (artifact.EncodedLayer, bool, error) {
	e, ok := j.o.Record.get(ctx, j.src.Digest, j.o.Encode)
	if !ok || e.Layer.DiffID != j.diffID {
		return artifact.EncodedLayer{}, false, nil
	}
	has, err := j.p.HasBlob(ctx, e.Layer.Digest)
	if err != nil {
		return artifact.EncodedLayer{}, false, fmt.Errorf("look for the layer converted before: %w", err)
	}
	for _, from := range e.Places {
		if has {
			break
		}
		if from == j.p.String() {
			continue // it was there, and is gone
		}
		if has, err = j.p.Mount(ctx, blobDescriptor(e.Layer), from); err != nil {
			return artifact.EncodedLayer{}, false, fmt.Errorf("mount the layer converted before: %w", err)
		}
	}
	if has {
		j.o.Record.put(ctx, j.src.Digest, j.o.Encode, e.Layer, j.p.String())
	}
	return e.Layer, has, nil
}

func blobDescriptor(l artifact.EncodedLayer) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: artifact.LayerMediaType, Digest: l.Digest, Size: l.Size}
}

// overhead is more than the frames and the footer of a small layer have.
const overhead = 4 << 10

// convert reserves room and converts the layer in it, with more room if what comes of it is larger than others are: twice the source and
// beyond, if that was compressed by a window larger than a chunk.
func (j *layerJob) convert(ctx context.Context) (artifact.EncodedLayer, error) {
	for n := j.src.Size + j.src.Size/4 + overhead; ; n *= 2 {
		most, release := int64(math.MaxInt64), func() {}
		if j.o.Reserve != nil {
			var err error
			if most, release, err = j.o.Reserve(ctx, n); err != nil {
				return artifact.EncodedLayer{}, err
			}
		}
		enc, err := j.convertWithin(ctx, most)
		release()
		switch {
		case !errors.Is(err, errOutgrown):
			return enc, err
		case most < n:
			return enc, fmt.Errorf("converted, it has more than %d bytes, which is all the room there may be for it on the temporary disk", most)
		}
	}
}

var errOutgrown = errors.New("the layer has become larger than its room")

// roomWriter writes no more than its room.
type roomWriter struct {
	w    io.Writer
	left int64
}

func (r *roomWriter) Write(p []byte) (int, error) {
	if int64(len(p)) > r.left {
		return 0, errOutgrown
	}
	n, err := r.w.Write(p)
	r.left -= int64(n)
	return n, err
}

// convertWithin streams the layer from its place through the encoder into a file of that many bytes at most, and from there to the place.
func (j *layerJob) convertWithin(ctx context.Context, most int64) (artifact.EncodedLayer, error) {
	var none artifact.EncodedLayer
	out, err := tempFile(j.o.TempDir)
	if err != nil {
		return none, err
	}
	defer out.Close()

	j.report(LayerStarted, Event{})
	enc, err := j.encode(ctx, &roomWriter{out, most})
	if err != nil {
		return none, err
	}
	if enc.DiffID != j.diffID {
		return none, fmt.Errorf("its tar hashes to %s, but the image's config says %s: the image is damaged, no node could unpack it", enc.DiffID, j.diffID)
	}
	j.report(LayerPushing, Event{Read: j.src.Size, OutSize: enc.Size})
	err = j.p.PutBlob(ctx, blobDescriptor(enc), func() (io.ReadCloser, error) {
		return io.NopCloser(io.NewSectionReader(out, 0, enc.Size)), nil
	})
	if err != nil {
		return none, fmt.Errorf("push %s: %w", enc.Digest, err)
	}
	return enc, nil
}

// encode reads the source to its end, so that its digest is proven, too.
func (j *layerJob) encode(ctx context.Context, out io.Writer) (artifact.EncodedLayer, error) {
	var none artifact.EncodedLayer
	rc, err := j.p.Blob(ctx, j.src, 0)
	if err != nil {
		return none, err
	}
	defer rc.Close()
	v, err := newVerifyReader(rc, j.src)
	if err != nil {
		return none, err
	}
	src := &countReader{r: v, report: func(n int64) { j.report(LayerRead, Event{Read: n}) }}
	tar, err := artifact.SourceTar(j.src.MediaType, src)
	if err != nil {
		return none, sourceFirst(v, fmt.Errorf("decompress: %w", err))
	}
	defer tar.Close()
	enc, err := artifact.EncodeLayer(ctx, out, tar, j.o.Encode)
	if err != nil {
		return none, sourceFirst(v, err)
	}
	if _, err := io.Copy(io.Discard, v); err != nil {
		return none, err
	}
	return enc, nil
}

// sourceFirst returns the failure of the source if there was one: what the decoders said after it is no news.
func sourceFirst(v *verifyReader, err error) error {
	if v.err != nil && v.err != io.EOF {
		return v.err
	}
	return err
}

// countReader reports how far it is read.
type countReader struct {
	r      io.Reader
	n      int64
	report func(n int64)
}

func (c *countReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	c.report(c.n)
	return n, err
}

// tempFile makes a file that never has a name, so that nothing is left of it however the process ends. Where the file system has no such
// files (NFS), it has one for a moment.
func tempFile(dir string) (*os.File, error) {
	if dir == "" {
		dir = os.TempDir()
	}
	if fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600); err == nil {
		return os.NewFile(uintptr(fd), filepath.Join(dir, "streamctl")), nil
	}
	f, err := os.CreateTemp(dir, "streamctl-*")
	if err != nil {
		return nil, fmt.Errorf("temporary file for the converted layer: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

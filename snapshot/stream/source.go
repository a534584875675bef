package stream

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

// blob reads one layer blob for the cache. Should it be deleted, as retention rules do with artifacts of images that run on, or be wrong, the tar
// comes from the image's own layer. It is a cache.Rebuilder.
type blob struct {
	store *Store
	image *image // nil while it is looked for
	rec   *record
	layer int
}

func (img *image) blob(layer int) blob { return blob{img.store, img, img.rec, layer} }

func (b blob) ReadRange(ctx context.Context, off, n int64, try int) (io.ReadCloser, error) {
	return b.readRange(ctx, b.rec.Layers[b.layer].Digest, off, n, try)
}

// Gone reports whether err says that the registry has the blob no more, or only as a whole: then the image's own layer is as good, and is read
// once for all.
func (b blob) Gone(err error) bool {
	return errors.Is(err, registryclient.ErrNotFound) || errors.Is(err, registryclient.ErrNoRanges)
}

// Tar returns the tar of the image's own layer.
func (b blob) Tar(ctx context.Context, try int) (io.ReadCloser, error) {
	src, err := b.source(ctx)
	if err != nil {
		return nil, err
	}
	body, err := b.readRange(ctx, src.Digest, 0, src.Size, try)
	if err != nil {
		return nil, err
	}
	t := &sourceTar{body: body, dgst: src.Digest}
	if t.tar, err = artifact.SourceTar(src.MediaType, readerFunc(t.fetch)); err != nil {
		body.Close()
		return nil, t.explain(err)
	}
	return t, nil
}

// source describes the image's own layer. Records of older releases do not, so the image's manifest is asked for.
func (b blob) source(ctx context.Context) (ocispec.Descriptor, error) {
	sources := b.rec.Sources
	if len(sources) == 0 {
		raw, err := b.store.o.Registry.Manifest(ctx, b.rec.Repository, b.rec.Manifest, artifact.MaxManifestSize)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		m, err := artifact.UnmarshalManifest(raw)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		sources = m.Layers
	}
	want := b.rec.Layers[b.layer].Source
	if b.layer >= len(sources) || sources[b.layer].Digest != want {
		return ocispec.Descriptor{}, fmt.Errorf("%w: the image's layer %d is not %s", artifact.ErrInvalid, b.layer, want)
	}
	return sources[b.layer], nil
}

// Source describes a layer of the image that id is of, as the image has it: repository@digest, the layer, and the digest of its tar. It asks the registry only for what older releases have recorded.
func (s *Store) Source(ctx context.Context, id string, layer int) (ref string, d ocispec.Descriptor, diffID digest.Digest, err error) {
	img, err := s.load(id)
	if err == nil && layer >= len(img.rec.Layers) {
		err = fmt.Errorf("no layer %d in image %s of %d", layer, id, len(img.rec.Layers))
	}
	if err == nil {
		d, err = img.blob(layer).source(ctx)
	}
	if err != nil {
		return "", d, "", err
	}
	return img.name(), d, img.rec.DiffIDs[layer], nil
}

// sourceTar is the tar out of a source layer's blob.
type sourceTar struct {
	body io.ReadCloser
	dgst digest.Digest
	tar  io.ReadCloser
	err  error // of body
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func (t *sourceTar) fetch(p []byte) (int, error) {
	n, err := t.body.Read(p)
	if err != nil && err != io.EOF {
		t.err = err
	}
	return n, err
}

func (t *sourceTar) Read(p []byte) (int, error) {
	n, err := t.tar.Read(p)
	if err != nil && err != io.EOF {
		err = t.explain(err)
	}
	return n, err
}

// explain tells bytes that do not decompress, which another host may have right, from bytes that do not come.
func (t *sourceTar) explain(err error) error {
	if t.err != nil {
		return t.err
	}
	return fmt.Errorf("%w: source layer %s: %w", artifact.ErrInvalid, t.dgst, err)
}

func (t *sourceTar) Close() error {
	return errors.Join(t.tar.Close(), t.body.Close())
}

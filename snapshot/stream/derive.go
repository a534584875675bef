package stream

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
)

// difference is between what an index says and what is so, or seems to be.
type difference struct{ error }

func (d difference) Unwrap() error { return d.error }

// derive reads layer i once and compares it with x, its index, and with the diffID of the image's config. Its error is a difference, or why the layer could not be read. If again is set, all bytes
// have the digests that x says, and archive/tar reads all headers.
//
// The artifact's blob may be gone, or have other bytes than x says for every host: then the image's own layer is read instead. Where x claims far more than that has, it is read first: x may claim
// zeros without end, which take long to hash, and the image's own layer shows the lie where it differs.
func (s *Store) derive(ctx context.Context, use *deviceUse, i int, x *artifact.Index, again bool, pace pace) error {
	if first, err := claimsMuch(use, i, x); err != nil {
		return err
	} else if first {
		err := s.deriveFromSource(ctx, use, i, x, again, pace)
		if err == nil || errors.As(err, new(difference)) || ctx.Err() != nil || errors.Is(err, errSlow) || errors.Is(err, errForgotten) {
			return err
		}
	}
	b := use.image.blob(i)
	sweep := use.layers[i].Sweep(ctx, x, b, again)
	defer sweep.Pause()
	err := proveTar(ctx, x, use.image.rec.DiffIDs[i], again, func(c int) ([]byte, error) {
		if err := pace(ctx, sweep.Pause, use.layers[i].Has(c), cost(x.Chunk(c))); err != nil {
			return nil, err
		}
		return sweep.Next()
	})
	if errors.As(err, new(difference)) || ctx.Err() != nil || !b.Gone(err) && !errors.Is(err, artifact.ErrInvalid) {
		return err
	}
	why := err
	if err = s.deriveFromSource(ctx, use, i, x, again, pace); err != nil && !errors.As(err, new(difference)) {
		err = fmt.Errorf("%w; the image's own layer: %w", why, err)
	}
	return err
}

// proveTar is artifact.ProveTar, with its verdict as a difference, and an error of chunk as it is.
func proveTar(ctx context.Context, x *artifact.Index, diffID digest.Digest, plainly bool, chunk func(i int) ([]byte, error)) (err error) {
	var unread error
	if fault := mapped.Guard(func() { // of the index
		err = artifact.ProveTar(ctx, x, diffID, func(i int) (b []byte, err error) {
			b, unread = chunk(i)
			return b, unread
		}, plainly)
	}); fault != nil {
		return fault
	}
	switch {
	case err == nil, ctx.Err() != nil:
		return err
	case unread != nil:
		return unread
	}
	return difference{err}
}

// muchMore and muchFrom are how many times the size of an image's own layer, and how many bytes beyond that, its index may claim before it claims much.
const (
	muchMore = 4
	muchFrom = 1 << 20
)

// claimsMuch reports whether the image's own layer i is read for far less than x claims.
func claimsMuch(use *deviceUse, i int, x *artifact.Index) (bool, error) {
	sources := use.image.rec.Sources // none of older releases
	if i >= len(sources) {
		return false, nil
	}
	n, err := costOf(x)
	return (n-muchFrom)/muchMore > sources[i].Size, err
}

// sourceTries bounds how often the image's own layer is read because it was wrong: another host may have it right.
const sourceTries = 3

// deriveFromSource compares x with the tar of the image's own layer, which proves itself: only if that tar is the one of the diffID, a difference is one.
func (s *Store) deriveFromSource(ctx context.Context, use *deviceUse, i int, x *artifact.Index, again bool, pace pace) error {
	err := s.sourceOnce(ctx, use, i, x, again, pace, 0)
	for try := 1; try < sourceTries && errors.Is(err, artifact.ErrInvalid) && !errors.As(err, new(difference)) && ctx.Err() == nil; try++ {
		next := s.sourceOnce(ctx, use, i, x, again, pace, try)
		if next != nil && !errors.Is(next, artifact.ErrInvalid) {
			return fmt.Errorf("%w; then: %w", err, next) // nobody is left to ask
		}
		err = next
	}
	return err
}

// sourceOnce is deriveFromSource with one reading. An error that is ErrInvalid and no difference says that what was read is not the image's layer.
func (s *Store) sourceOnce(ctx context.Context, use *deviceUse, i int, x *artifact.Index, again bool, pace pace, try int) error {
	rec := use.image.rec
	tar, err := use.image.blob(i).Tar(ctx, try)
	if err != nil {
		return err
	}
	defer tar.Close()
	hash := sha256.New()
	r := io.TeeReader(tar, hash)
	var buf []byte
	err = proveTar(ctx, x, rec.DiffIDs[i], again, func(c int) ([]byte, error) {
		ch := x.Chunk(c)
		if err := pace(ctx, func() {}, false, cost(ch)); err != nil {
			return nil, err
		}
		var err error
		if buf, err = readChunk(r, buf, ch.TarSize); errors.Is(err, io.ErrUnexpectedEOF) || err == io.EOF {
			return nil, difference{fmt.Errorf("chunk %d: the tar ends before it: %w", c, artifact.ErrInvalid)}
		} else if err != nil {
			return nil, err
		}
		if sha256.Sum256(buf) != ch.Digest {
			return nil, difference{fmt.Errorf("chunk %d: the image's own layer has other bytes there than the index: %w", c, artifact.ErrInvalid)}
		}
		return buf, nil
	})
	if err == nil || !errors.As(err, new(difference)) {
		return err
	}
	if _, readErr := io.Copy(io.Discard, pacedReader{ctx, r, pace}); readErr != nil {
		return readErr
	}
	if got := digest.NewDigest(digest.SHA256, hash); got != rec.DiffIDs[i] {
		return fmt.Errorf("the image's layer %d has a tar of %s, its config lists %s: %w", i, got, rec.DiffIDs[i], artifact.ErrInvalid)
	}
	return err
}

// pacedReader reads at a pace.
type pacedReader struct {
	ctx  context.Context // of the one reading that this value lives for
	r    io.Reader
	pace pace
}

func (p pacedReader) Read(b []byte) (int, error) {
	if err := p.pace(p.ctx, func() {}, false, int64(len(b))); err != nil {
		return 0, err
	}
	return p.r.Read(b)
}

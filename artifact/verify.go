package artifact

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"

	"github.com/opencontainers/go-digest"
)

// VerifyLayer reads a whole layer blob and proves it: the blob's digest, every chunk's digest, the tar against diffID, and
// the index against an index derived again from the tar. index is the blob's index, read before (the manifest says where it is), so that the blob
// can be checked as it streams by. Its error names the first difference; it is ErrInvalid or ErrUnsupported, or an error of blob or ctx as it is.
func VerifyLayer(ctx context.Context, blob io.Reader, index []byte, l Layer, diffID digest.Digest) error {
	x, err := l.Index(index)
	if err != nil {
		return err
	}
	sum := sha256.New()
	r := &blobReader{ctx: ctx, index: x, blob: io.TeeReader(blob, sum)}
	if err := ProveTar(ctx, x, diffID, r.read, false); err != nil {
		return fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	if err := r.tail(index); err != nil {
		return fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	if got := digest.NewDigest(digest.SHA256, sum); got != l.Digest {
		return fmt.Errorf("layer %s: blob has digest %s: %w", l.Digest, got, ErrInvalid)
	}
	return nil
}

// ProveTar proves that a tar is the one of diffID, and that x, its index, has its headers: then whatever is read of the tar by way of x is what the image's config promises. chunk is asked for the tar's
// chunks, in order and each once; what it returns is used until it is asked for the next. It need not have compared them with their digests: a tar of the diffID that lies where x says is right. plainly has
// archive/tar read all headers, which takes longer, and leaves no room for a mistake of ours where they begin.
//
// Its error names the first difference; it is ErrInvalid or ErrUnsupported, or an error of chunk or ctx as it is.
func ProveTar(ctx context.Context, x *Index, diffID digest.Digest, chunk func(i int) ([]byte, error), plainly bool) error {
	if x.DiffID != diffID {
		return fmt.Errorf("index is of tar %s, want %s: %w", x.DiffID, diffID, ErrInvalid)
	}
	v := &verifier{ctx: ctx, index: x, read: chunk, diffID: sha256.New(), entries: x.Entries()}
	defer v.entries.Close()
	if err := v.tar(plainly); err != nil {
		return err
	}
	if got := digest.NewDigest(digest.SHA256, v.diffID); got != diffID {
		return fmt.Errorf("tar has digest %s, want %s: %w", got, diffID, ErrInvalid)
	}
	return nil
}

// blobReader reads the chunks and the index of a blob as it streams by.
type blobReader struct {
	ctx   context.Context // of the one VerifyLayer call that this value lives for
	index *Index
	blob  io.Reader
	frame []byte
	chunk []byte
}

func (r *blobReader) read(i int) ([]byte, error) {
	n := int(r.index.Chunk(i).BlobSize)
	if cap(r.frame) < n {
		r.frame = make([]byte, n)
	}
	r.frame = r.frame[:n]
	if _, err := io.ReadFull(r.blob, r.frame); err != nil {
		return nil, fmt.Errorf("chunk %d: %w", i, blobError(err))
	}
	b, err := r.index.Decompress(i, r.frame, r.chunk)
	if err == nil {
		r.chunk = b
	}
	return b, err
}

// tail compares the end of the blob with the index.
func (r *blobReader) tail(index []byte) error {
	b := make([]byte, 64<<10)
	for {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		n, err := r.blob.Read(b)
		if !bytes.HasPrefix(index, b[:n]) {
			return fmt.Errorf("blob does not end in its index: %w", ErrInvalid)
		}
		if index = index[n:]; err == io.EOF && len(index) == 0 {
			return nil
		}
		if err != nil {
			return blobError(err)
		}
	}
}

// blobError classes an error of reading the blob: a short one is invalid.
func blobError(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("blob is too short: %w", ErrInvalid)
	}
	return err
}

// verifier gives a tar to a scanner, and compares its headers with the index's as the scanner asks for them.
type verifier struct {
	ctx     context.Context // of the one ProveTar call that this value lives for
	index   *Index
	read    func(i int) ([]byte, error)
	diffID  hash.Hash
	entries *EntryReader // read for its header bytes

	next    int    // the chunk that is read next
	pos     int64  // tar offset of the unread bytes of the chunk before it
	unread  []byte // those bytes
	compare []byte
	err     error // what went wrong here rather than in the tar's framing
}

// tar reads all chunks.
func (v *verifier) tar(plainly bool) error {
	s := newScanner(v)
	s.plainly = plainly
	for {
		if _, err := s.next(); err == io.EOF {
			break
		} else if err != nil {
			return v.fault(err)
		}
	}
	for {
		if _, err := s.tail(); err == io.EOF {
			break
		} else if err != nil {
			return v.fault(err)
		}
	}
	if err := v.entries.src.finish(); err != io.EOF {
		return headersError(err)
	}
	return nil
}

// fault prefers the verifier's own error to what the scanner made of it.
func (v *verifier) fault(err error) error {
	if v.err != nil {
		return v.err
	}
	return fmt.Errorf("tar offset %d: %w: %w", v.pos, err, ErrInvalid)
}

// fill reads a chunk if all bytes of the one before are read.
func (v *verifier) fill() error {
	for len(v.unread) == 0 {
		if v.next == v.index.NumChunks() {
			return io.EOF
		}
		if v.err = v.chunk(v.next); v.err != nil {
			return v.err
		}
		v.next++
	}
	return nil
}

func (v *verifier) chunk(i int) error {
	if err := v.ctx.Err(); err != nil {
		return err
	}
	b, err := v.read(i)
	if err != nil {
		return err
	}
	if want := v.index.Chunk(i).TarSize; int64(len(b)) != want {
		return fmt.Errorf("chunk %d: %d bytes, want %d: %w", i, len(b), want, ErrInvalid)
	}
	v.diffID.Write(b)
	v.unread = b
	return nil
}

// take consumes n bytes, which are there.
func (v *verifier) take(n int) []byte {
	b := v.unread[:n]
	v.unread, v.pos = v.unread[n:], v.pos+int64(n)
	return b
}

func (v *verifier) header(p []byte) (int, error) {
	if err := v.fill(); err != nil {
		return 0, err
	}
	n := copy(p, v.unread)
	if cap(v.compare) < n {
		v.compare = make([]byte, n)
	}
	want := v.compare[:n]
	m, err := readFull(v.entries.src, want)
	for i := range m {
		if want[i] != p[i] {
			v.err = fmt.Errorf("chunk %d: tar offset %d: index has another header byte: %w", v.next-1, v.pos+int64(i), ErrInvalid)
			return 0, v.err
		}
	}
	if err != nil {
		v.err = fmt.Errorf("chunk %d: tar offset %d: index has no more headers: %w", v.next-1, v.pos+int64(m), headersError(err))
		return 0, v.err
	}
	v.take(n)
	return n, nil
}

func (v *verifier) data(n int64) error {
	if v.err = v.entries.src.data(n); v.err != nil {
		v.err = fmt.Errorf("chunk %d: tar offset %d: index has less data: %w", v.next-1, v.pos, ErrInvalid)
		return v.err
	}
	for n > 0 {
		if err := v.fill(); err == io.EOF {
			return io.ErrUnexpectedEOF
		} else if err != nil {
			return err
		}
		n -= int64(len(v.take(int(min(n, int64(len(v.unread)))))))
	}
	return nil
}

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
	if x.DiffID != diffID {
		return fmt.Errorf("layer %s: index is of tar %s, want %s: %w", l.Digest, x.DiffID, diffID, ErrInvalid)
	}
	sum := sha256.New()
	v := &verifier{ctx: ctx, index: x, blob: io.TeeReader(blob, sum), diffID: sha256.New(), entries: x.Entries()}
	defer v.entries.Close()
	if err := v.tar(); err != nil {
		return fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	if err := v.tail(index); err != nil {
		return fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	if got := digest.NewDigest(digest.SHA256, v.diffID); got != diffID {
		return fmt.Errorf("layer %s: tar has digest %s, want %s: %w", l.Digest, got, diffID, ErrInvalid)
	}
	if got := digest.NewDigest(digest.SHA256, sum); got != l.Digest {
		return fmt.Errorf("layer %s: blob has digest %s: %w", l.Digest, got, ErrInvalid)
	}
	return nil
}

// verifier reads the tar out of a blob for a scanner, and compares its headers with the index's as the scanner asks for them.
type verifier struct {
	ctx     context.Context // of the one VerifyLayer call that this value lives for
	index   *Index
	blob    io.Reader
	diffID  hash.Hash
	entries *EntryReader // read for its header bytes

	next    int    // the chunk that is read next
	pos     int64  // tar offset of the unread bytes of the chunk before it
	unread  []byte // those bytes
	frame   []byte
	chunk   []byte
	compare []byte
	err     error // what went wrong here rather than in the tar's framing
}

// tar reads all chunks.
func (v *verifier) tar() error {
	s := newScanner(v)
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

// tail compares the end of the blob with the index.
func (v *verifier) tail(index []byte) error {
	b := make([]byte, 64<<10)
	for {
		if err := v.ctx.Err(); err != nil {
			return err
		}
		n, err := v.blob.Read(b)
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

// fill reads a chunk if all bytes of the one before are read.
func (v *verifier) fill() error {
	for len(v.unread) == 0 {
		if v.next == v.index.NumChunks() {
			return io.EOF
		}
		if v.err = v.read(v.next); v.err != nil {
			return v.err
		}
		v.next++
	}
	return nil
}

func (v *verifier) read(i int) error {
	if err := v.ctx.Err(); err != nil {
		return err
	}
	n := int(v.index.Chunk(i).BlobSize)
	if cap(v.frame) < n {
		v.frame = make([]byte, n)
	}
	v.frame = v.frame[:n]
	if _, err := io.ReadFull(v.blob, v.frame); err != nil {
		return fmt.Errorf("chunk %d: %w", i, blobError(err))
	}
	b, err := v.index.Decompress(i, v.frame, v.chunk)
	if err != nil {
		return err
	}
	v.diffID.Write(b)
	v.chunk, v.unread = b, b
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

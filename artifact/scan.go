package artifact

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
)

const (
	blockSize = 512

	// maxEntryHeaders bounds the header bytes before one entry. archive/tar takes at most 1 MiB for each of an entry's
	// extended headers and sparse map; only headers that override each other can reach this.
	maxEntryHeaders = 8 << 20

	tailSize = 32 << 10 // bytes of the tail read at once
)

// errSparse: a sparse map names more or less data than the member has, so that reading the member would fail.
var errSparse = fmt.Errorf("sparse map and size of the data differ: %w", tar.ErrHeader)

// source is where a scanner takes a tar from.
type source interface {
	// header reads header bytes, as io.Reader does.
	header(p []byte) (int, error)
	// data passes over the next n bytes, which are data. If the tar ends before, that is io.ErrUnexpectedEOF.
	data(n int64) error
}

// scanner divides a tar into headers and data runs. archive/tar does the framing, so that there is no second opinion of where an entry
// begins: what it reads to find the next entry is headers, and what it skips between two entries is the data run. It is known that it skips n
// bytes by a Seek over n-1 of them and a Read of the last (so that it notices a truncated tar); of a sparse member, whose size it hides, this
// tells whether there is as much data as the map says. Should another release of Go do otherwise, every tar with such data is refused.
//
// Most headers leave nothing to an opinion: plainHeader reads them, and what follows them. archive/tar begins again at the next that it does not.
type scanner struct {
	src     source
	plainly bool  // leave plain headers to archive/tar, too
	pos     int64 // tar offset
	end     int64 // where the data run of the last entry ends: bytes before are data, bytes after headers

	tr     *tar.Reader // has read the last entry's headers; nil if they were a plain one, and before the first entry
	unread []byte      // what a new tr begins with
	plain  *tar.Header // what tr has met and left to us

	raw []byte // the header bytes before pos, back to the last entry's data run
}

func newScanner(src source) *scanner { return &scanner{src: src} }

// next returns the next entry and leaves the header bytes read on the way in s.raw. At the end of the archive it returns
// io.EOF; s.raw then holds what the end was recognized by, and tail returns the rest.
func (s *scanner) next() (*Entry, error) {
	s.raw = s.raw[:0]
	offset := alignBlock(s.end)
	hdr, err := s.header()
	if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
		return nil, err
	}
	e := &Entry{Header: hdr, Offset: offset, DataOffset: s.pos}
	switch hdr.Typeflag {
	case tar.TypeLink, tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeDir, tar.TypeFifo:
		// No data run, whatever Size says.
	default:
		e.DataSize = hdr.Size
		if runs, ok := sparseMap(hdr, s.raw[len(s.raw)-int(s.pos-offset):]); ok {
			e.setSparse(runs)
		}
	}
	if e.DataSize > math.MaxInt64-blockSize-s.pos {
		return nil, fmt.Errorf("entry %q: size %d: %w", hdr.Name, e.DataSize, tar.ErrHeader)
	}
	s.end = s.pos + e.DataSize
	return e, nil
}

// header returns the header of the next entry, and the error with it that archive/tar has.
func (s *scanner) header() (*tar.Header, error) {
	if s.tr == nil && s.plainly {
		s.tr = tar.NewReader(s)
	}
	if s.tr == nil {
		block, err := s.skip()
		if err != nil {
			return nil, err
		}
		if h := plainHeader(block); h != nil {
			return h, nil
		}
		s.tr, s.unread = tar.NewReader(s), block[:]
	}
	h, err := s.tr.Next()
	if s.plain != nil {
		h, err = s.plain, nil
		s.plain, s.tr = nil, nil
	}
	return h, err
}

// skip does what archive/tar does behind a plain header: it passes over the data run and reads the padding and the next block.
func (s *scanner) skip() (*[blockSize]byte, error) {
	if n := s.end - s.pos; n > 0 {
		if err := s.src.data(n); err != nil {
			return nil, err
		}
		s.pos = s.end
	}
	padding := int(alignBlock(s.pos) - s.pos)
	s.raw = slices.Grow(s.raw, padding+blockSize)[:padding+blockSize]
	n, err := readFull(s.src, s.raw)
	s.pos += int64(n)
	if s.raw = s.raw[:n]; n == padding+blockSize {
		return (*[blockSize]byte)(s.raw[padding:]), nil
	}
	if err == io.EOF && n > padding {
		err = io.ErrUnexpectedEOF
	}
	return nil, err
}

// tail returns the next header bytes after the end of the archive, valid until the next call, and io.EOF after the last.
func (s *scanner) tail() ([]byte, error) {
	s.raw = slices.Grow(s.raw[:0], tailSize)[:tailSize]
	for {
		n, err := s.src.header(s.raw)
		s.pos += int64(n)
		if n > 0 && (err == nil || err == io.EOF) {
			return s.raw[:n], nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// Read is called by archive/tar. It ends at an entry that begins with a plain header.
func (s *scanner) Read(p []byte) (int, error) {
	if len(s.unread) > 0 {
		n := copy(p, s.unread)
		s.unread = s.unread[n:]
		return n, nil
	}
	first := s.pos == alignBlock(s.end) && len(p) == blockSize
	n, err := s.read(p)
	if first && n == blockSize && !s.plainly {
		if s.plain = plainHeader((*[blockSize]byte)(p)); s.plain != nil {
			return 0, errPlain
		}
	}
	return n, err
}

// read takes from src what archive/tar asks for, if that is what it should.
func (s *scanner) read(p []byte) (int, error) {
	n := int64(len(p))
	if s.pos < s.end {
		// The last byte of what is skipped. archive/tar does not look at it.
		if n != 1 || s.pos != s.end-1 {
			return 0, errSparse
		}
		if err := s.src.data(n); err != nil {
			return 0, err
		}
		s.pos++
		return 1, nil
	}
	if padding := alignBlock(s.end) - s.end; s.pos == s.end && n != padding && (n != blockSize || padding != 0) {
		return 0, errSparse
	}
	if len(s.raw)+len(p) > maxEntryHeaders {
		return 0, fmt.Errorf("headers of one entry exceed %d bytes: %w", maxEntryHeaders, ErrUnsupported)
	}
	got, err := s.src.header(p)
	s.pos += int64(got)
	s.raw = append(s.raw, p[:got]...)
	return got, err
}

// Seek is called by archive/tar to skip all of the data run but its last byte.
func (s *scanner) Seek(off int64, whence int) (int64, error) {
	if off == 0 && whence == io.SeekCurrent {
		return s.pos, nil
	}
	if whence != io.SeekCurrent || s.pos+off != s.end-1 {
		return 0, errSparse
	}
	if err := s.src.data(off); err != nil {
		return 0, err
	}
	s.pos += off
	return s.pos, nil
}

// readFull reads header bytes until p is full.
func readFull(src source, p []byte) (int, error) {
	n := 0
	for n < len(p) {
		m, err := src.header(p[n:])
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

func alignBlock(n int64) int64 { return (n + blockSize - 1) &^ (blockSize - 1) }

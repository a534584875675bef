package artifact

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// Entry is an entry of a layer's tar.
type Entry struct {
	*tar.Header
	Offset     int64 // tar offset of the entry's first block (of its extended headers, if any)
	DataOffset int64 // tar offset of the data run
	DataSize   int64 // length of the data run in the tar: Size unless the member is sparse
	// Sparse maps the file's data if the member is sparse (Header.Size is then the logical size), in order, without overlaps,
	// holes left out; nil for others. A sparse member that is all hole has an empty, non-nil map.
	Sparse []SparseRun
}

// SparseRun says that n bytes of a file at FileOffset lie at TarOffset.
type SparseRun struct{ FileOffset, TarOffset, Size int64 }

// EntryReader yields the entries of a layer in the tar's order.
type EntryReader struct {
	scan   *scanner
	src    *indexSource
	layout *Layout // filled on the way, and the index's at the end
	err    error   // what every later Next returns
}

// Entries reads the headers from the start. Next returns io.EOF after the last entry; other errors are ErrInvalid or ErrUnsupported.
func (x *Index) Entries() *EntryReader {
	src := &indexSource{headers: x.HeadersSize, datas: x.TarSize - x.HeadersSize}
	r := &EntryReader{scan: newScanner(src), src: src}
	if r.layout, r.err = newLayout(x); r.err != nil {
		return r
	}
	src.zr, r.err = zstd.NewReader(bytes.NewReader(x.headers), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecodeBuffersBelow(0))
	if r.err != nil {
		r.err = headersError(r.err)
	}
	return r
}

// Next returns the next entry.
func (r *EntryReader) Next() (*Entry, error) {
	if r.err != nil {
		return nil, r.err
	}
	e, err := r.scan.next()
	if err == nil || err == io.EOF {
		r.layout.addHeaders(r.scan.pos-int64(len(r.scan.raw)), r.scan.raw)
	}
	if err == io.EOF {
		if err = r.tail(); err == io.EOF {
			r.layout.finish()
		}
	}
	if err != nil && err != io.EOF {
		err = headersError(err)
	}
	if err != nil {
		r.err = err
		return nil, err
	}
	r.layout.addRun(e.DataOffset, e.DataSize)
	return e, nil
}

// tail reads what follows the end of the archive. It returns io.EOF if the headers end where they should.
func (r *EntryReader) tail() error {
	for {
		b, err := r.scan.tail()
		if err == io.EOF {
			return r.src.finish()
		}
		if err != nil {
			return err
		}
		r.layout.addHeaders(r.scan.pos-int64(len(b)), b)
	}
}

// Close releases the decoder.
func (r *EntryReader) Close() {
	if r.src.zr != nil {
		r.src.zr.Close()
	}
	r.err = io.ErrClosedPipe
}

// headersError classes an error of reading the headers: they were read from memory, so what is wrong is the headers.
func headersError(err error) error {
	if errors.Is(err, ErrInvalid) || errors.Is(err, ErrUnsupported) {
		return fmt.Errorf("headers: %w", err)
	}
	return fmt.Errorf("headers: %w: %w", err, ErrInvalid)
}

// indexSource gives a scanner the tar without its data.
type indexSource struct {
	zr      *zstd.Decoder
	headers int64 // bytes of headers left
	datas   int64 // bytes of data left
}

func (s *indexSource) header(p []byte) (int, error) {
	if s.headers == 0 {
		return 0, io.EOF
	}
	n, err := s.zr.Read(p[:min(int64(len(p)), s.headers)])
	s.headers -= int64(n)
	if err == io.EOF && s.headers > 0 {
		return n, fmt.Errorf("%d bytes missing: %w", s.headers, ErrInvalid)
	}
	if err == io.EOF {
		err = nil
	}
	return n, err
}

func (s *indexSource) data(n int64) error {
	if n > s.datas {
		return io.ErrUnexpectedEOF
	}
	s.datas -= n
	return nil
}

// finish returns io.EOF if headers and data are used up.
func (s *indexSource) finish() error {
	if s.datas != 0 {
		return fmt.Errorf("%d bytes of the tar are neither headers nor data: %w", s.datas, ErrInvalid)
	}
	n, err := io.ReadFull(s.zr, make([]byte, 1))
	if n != 0 {
		return fmt.Errorf("more bytes than the index says: %w", ErrInvalid)
	}
	return err
}

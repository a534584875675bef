package artifact

import (
	"archive/tar"
	"bytes"
	"strconv"
	"strings"
)

// archive/tar reads sparse members but does not tell their maps, so they are parsed here once more. It has validated them
// before: order, bounds, and numbers, so nothing is checked again and a number that cannot be parsed cannot occur.

// fileRun is a run of data of a sparse file.
type fileRun struct{ off, n int64 }

// setSparse derives the data run and the runs in the tar from the map of a sparse member.
func (e *Entry) setSparse(runs []fileRun) {
	e.Sparse, e.DataSize = []SparseRun{}, 0
	for _, r := range runs {
		if r.n > 0 {
			e.Sparse = append(e.Sparse, SparseRun{FileOffset: r.off, TarOffset: e.DataOffset + e.DataSize, Size: r.n})
			e.DataSize += r.n
		}
	}
}

// sparseMap returns the map of a sparse member. headers is everything from the entry's first block to its data run.
func sparseMap(hdr *tar.Header, headers []byte) ([]fileRun, bool) {
	if hdr.Typeflag == tar.TypeGNUSparse {
		return oldGNUMap(headers[mainHeader(headers):]), true
	}
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil, false
	}
	major, minor := hdr.PAXRecords["GNU.sparse.major"], hdr.PAXRecords["GNU.sparse.minor"]
	list := hdr.PAXRecords["GNU.sparse.map"] // version 0.1, and 0.0 as archive/tar presents it
	switch {
	case major == "1" && minor == "0":
		return pax10Map(headers[mainHeader(headers)+blockSize:]), true
	case major == "0" && (minor == "0" || minor == "1"), major == "" && minor == "" && list != "":
		return fileRuns(strings.Split(list, ",")), true
	}
	return nil, false
}

// mainHeader returns the offset of an entry's own header block, behind its extended headers.
func mainHeader(headers []byte) int64 {
	off := int64(0)
	for {
		b := headers[off:]
		switch b[156] {
		case tar.TypeXHeader, tar.TypeGNULongName, tar.TypeGNULongLink:
			off += blockSize + alignBlock(parseNumber(b[124:136]))
		default:
			return off
		}
	}
}

// oldGNUMap parses the map in a header block of type S and the extension blocks behind it.
// https://www.gnu.org/software/tar/manual/html_node/Standard.html
func oldGNUMap(b []byte) []fileRun {
	var runs []fileRun
	slots, n := b[386:], 4
	for {
		for i := range n {
			s := slots[24*i:]
			if s[0] == 0 {
				break
			}
			runs = append(runs, fileRun{parseNumber(s[:12]), parseNumber(s[12:24])})
		}
		if extended := slots[24*n] != 0; !extended {
			return runs
		}
		b = b[blockSize:]
		slots, n = b, 21
	}
}

// pax10Map parses the map at the head of a PAX 1.0 sparse member: decimal numbers, each ended by a newline, the count first.
// https://www.gnu.org/software/tar/manual/html_node/PAX-1.html
func pax10Map(b []byte) []fileRun {
	line, b, _ := bytes.Cut(b, []byte{'\n'})
	count, _ := strconv.ParseInt(string(line), 10, 64)
	fields := make([]string, 0, 2*count)
	for range 2 * count {
		line, b, _ = bytes.Cut(b, []byte{'\n'})
		fields = append(fields, string(line))
	}
	return fileRuns(fields)
}

// fileRuns parses pairs of offset and size.
func fileRuns(fields []string) []fileRun {
	var runs []fileRun
	for ; len(fields) >= 2; fields = fields[2:] {
		off, _ := strconv.ParseInt(fields[0], 10, 64)
		n, _ := strconv.ParseInt(fields[1], 10, 64)
		runs = append(runs, fileRun{off, n})
	}
	return runs
}

// parseNumber parses a number of a header block: octal, or base 256 if the first bit is set.
func parseNumber(b []byte) int64 {
	if b[0]&0x80 != 0 {
		x := int64(b[0] & 0x7f)
		for _, c := range b[1:] {
			x = x<<8 | int64(c)
		}
		return x
	}
	s, _, _ := strings.Cut(strings.Trim(string(b), " \x00"), "\x00")
	x, _ := strconv.ParseInt(s, 8, 64)
	return x
}

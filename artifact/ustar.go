package artifact

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"time"
)

// errPlain ends the archive/tar reader that meets a plain header.
var errPlain = errors.New("a plain header")

// plainHeader returns the header that block is, if it is of the kind that nearly all entries of images have (98% in the test images), and nil
// for any other. It returns what archive/tar does, in a tenth of the time. A plain header is all ASCII, in the USTAR format, of a type from
// regular file to fifo, its numbers are octal and end in NUL, and its checksum is right. So there is nothing to interpret.
// https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html#tag_20_94_13_06
func plainHeader(block *[blockSize]byte) *tar.Header {
	sum, ascii := sumASCII(block)
	kind := block[156]
	if !ascii || kind < tar.TypeReg || kind > tar.TypeFifo || string(block[257:265]) != "ustar\x0000" || [12]byte(block[500:]) != [12]byte{} {
		return nil
	}
	o := octal{ok: block[155] == ' '}
	if o.parse(block[148:155]) != sum {
		return nil
	}
	h := &tar.Header{
		Typeflag: kind,
		Name:     string(cstring(block[:100])),
		Linkname: string(cstring(block[157:257])),
		Size:     o.parse(block[124:136]),
		Mode:     o.parse(block[100:108]),
		Uid:      int(o.parse(block[108:116])),
		Gid:      int(o.parse(block[116:124])),
		Uname:    string(cstring(block[265:297])),
		Gname:    string(cstring(block[297:329])),
		ModTime:  time.Unix(o.parse(block[136:148]), 0),
		Devmajor: o.parse(block[329:337]),
		Devminor: o.parse(block[337:345]),
		Format:   tar.FormatUSTAR,
	}
	if prefix := cstring(block[345:500]); len(prefix) > 0 {
		h.Name = string(prefix) + "/" + h.Name
	}
	if !o.ok {
		return nil
	}
	return h
}

// sumASCII returns the sum of the bytes, those of the checksum itself taken for spaces, if all are ASCII.
func sumASCII(b *[blockSize]byte) (sum int64, ok bool) {
	const evens = 0x00ff00ff00ff00ff
	var all, sums uint64 // sums has four sums of 128 bytes of 7 bits each
	for i := 0; i < blockSize; i += 8 {
		w := binary.LittleEndian.Uint64(b[i:])
		all |= w
		sums += w&evens + w>>8&evens
	}
	sum = int64(sums * 0x0001000100010001 >> 48)
	for _, c := range b[148:156] {
		sum += ' ' - int64(c)
	}
	return sum, all&0x8080808080808080 == 0
}

// octal parses the numbers of a header. ok tells whether all were digits with NULs behind them, or only NULs, which is 0.
type octal struct{ ok bool }

func (o *octal) parse(b []byte) (n int64) {
	digits := cstring(b)
	for _, c := range digits {
		o.ok = o.ok && '0' <= c && c <= '7'
		n = n<<3 | int64(c-'0')
	}
	o.ok = o.ok && len(digits) < len(b) && len(bytes.Trim(b[len(digits):], "\x00")) == 0
	return n
}

// cstring returns b up to its first NUL.
func cstring(b []byte) []byte {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		return b[:i]
	}
	return b
}

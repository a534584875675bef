package artifact

import (
	"archive/tar"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// corpus returns tars that every test of the format must get right, by name.
func corpus(t testing.TB) map[string][]byte {
	end := make([]byte, 2*blockSize)
	file := rawMember("f", tar.TypeReg, []byte("x"))
	data := text(rand.New(rand.NewPCG(1, 2)), 4*blockSize)
	runs := []fileRun{{0, 512}, {4096, 1024}, {100000, 512}, {200000, 0}}
	many := make([]fileRun, 60)
	for i := range many {
		many[i] = fileRun{int64(i) * 4096, 17}
	}
	return map[string][]byte{
		"empty":             {},
		"one zero block":    make([]byte, blockSize),
		"only the end":      end,
		"record of zeros":   make([]byte, 20*blockSize),
		"unterminated":      pad(file),
		"one zero at end":   append(pad(file), make([]byte, blockSize)...),
		"513 bytes":         file,
		"half a padding":    append(bytes.Clone(file), make([]byte, 100)...),
		"tar behind a tar":  concat(pad(file), end, pad(rawMember("g", tar.TypeReg, []byte("y"))), end),
		"trailing bytes":    concat(pad(file), end, []byte("what follows is opaque")),
		"long tail":         concat(pad(file), end, text(rand.New(rand.NewPCG(3, 4)), 300000)),
		"kinds":             kindsTar(t),
		"small files":       filesTar(t, 300, 5),
		"sizes around cuts": sizesTar(t),
		"incompressible":    concat(pad(rawMember("r", tar.TypeReg, noise(150000))), pad(file), end),
		"global header":     concat(pad(rawMember("g", tar.TypeXGlobalHeader, []byte(paxRecord("comment", "c")+paxRecord("GNU.sparse.map", "0,1")+paxRecord("GNU.sparse.numblocks", "1")))), pad(file), end),
		"base 256 sizes":    concat(base256Member("b", data[:700]), pad(file), end),
		"old GNU sparse":    concat(oldGNUSparse("s", 200000, runs, data[:total(runs)]), pad(file), end),
		"old GNU extended":  concat(oldGNUSparse("s", 300000, many, data[:total(many)]), pad(file), end),
		"old GNU all hole":  concat(oldGNUSparse("s", 5000, nil, nil), pad(file), end),
		"GNU long S":        concat(pad(rawMember("././@LongLink", tar.TypeGNULongName, []byte(strings.Repeat("n", 2000)))), oldGNUSparse("s", 300000, many, data[:total(many)]), end),
		"PAX 0.0 sparse":    concat(paxSparse("0.0", 200000, runs, data[:total(runs)]), pad(file), end),
		"PAX 0.1 sparse":    concat(paxSparse("0.1", 200000, runs, data[:total(runs)]), pad(file), end),
		"PAX 1.0 sparse":    concat(paxSparse("1.0", 200000, runs, data[:total(runs)]), pad(file), end),
		"PAX 1.0 long map":  concat(paxSparse("1.0", 300000, many, data[:total(many)]), pad(file), end),
		"PAX 1.0 all hole":  concat(paxSparse("1.0", 5000, nil, nil), pad(file), end),
		"PAX 1.0 one byte":  concat(paxSparse("1.0", 5000, []fileRun{{4000, 1}}, []byte("1")), pad(file), end),
		"repeated headers":  concat(bytes.Repeat(pad(rawMember("x", tar.TypeXHeader, []byte(paxRecord("path", "p")))), 50), pad(file), end),
	}
}

// refused returns what archive/tar, and so containerd, cannot read to the end.
func refused(t testing.TB) map[string][]byte {
	file := pad(rawMember("f", tar.TypeReg, text(rand.New(rand.NewPCG(5, 6)), 3000)))
	sparse := func(n int) []byte {
		return concat(paxSparse("1.0", 5000, []fileRun{{0, 1024}}, make([]byte, n)), file)
	}
	gnu := func(runs []fileRun, n int) []byte {
		return concat(oldGNUSparse("s", 5000, runs, make([]byte, n)), file)
	}
	damaged := bytes.Clone(file)
	damaged[10] ^= 1
	return map[string][]byte{
		"half a header":              file[:100],
		"truncated data":             file[:2000],
		"truncated before last byte": file[:blockSize+2999],
		"data of a byte missing":     rawMember("f", tar.TypeReg, []byte("x"))[:blockSize],
		"no tar":                     text(rand.New(rand.NewPCG(7, 8)), 5000),
		"checksum":                   damaged,
		"zero block, then a header":  concat(make([]byte, blockSize), file),
		"less data than the map":     sparse(512),
		"more data than the map":     sparse(2048),
		"map of nothing, one byte":   gnu(nil, 1),
		"map of nothing, 512 bytes":  gnu(nil, 512),
		"map of one byte, no data":   gnu([]fileRun{{0, 1}}, 0),
		"map of 1024 bytes, no data": gnu([]fileRun{{0, 1024}}, 0),
		"map of one byte, two":       gnu([]fileRun{{0, 1}}, 2),
		"map of two bytes, one":      gnu([]fileRun{{0, 2}}, 1),
		"map out of order":           gnu([]fileRun{{600, 100}, {0, 100}}, 200),
		"map beyond the file":        gnu([]fileRun{{4999, 2}}, 2),
		"huge size":                  concat(sized("f", 1<<62), file),
	}
}

// kindsTar has an entry of each kind and format.
func kindsTar(t testing.TB) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, data string) {
		h.Size = int64(len(data))
		if err := errors.Join(w.WriteHeader(&h), errOf(io.WriteString(w, data))); err != nil {
			t.Fatalf("%s: %v", h.Name, err)
		}
	}
	now := time.Unix(1700000000, 123456789)
	add(tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755}, "")
	add(tar.Header{Name: "d/f", Typeflag: tar.TypeReg, Mode: 0o4755, Uid: 1, Gid: 2}, "content")
	add(tar.Header{Name: "d/empty", Typeflag: tar.TypeReg}, "")
	add(tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "d/f"}, "")
	add(tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "d/f"}, "")
	add(tar.Header{Name: "c", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, "")
	add(tar.Header{Name: "b", Typeflag: tar.TypeBlock, Devmajor: 8, Devminor: 1}, "")
	add(tar.Header{Name: "p", Typeflag: tar.TypeFifo}, "")
	add(tar.Header{Name: "contiguous", Typeflag: tar.TypeCont}, "like a regular file")
	add(tar.Header{Name: "x", Typeflag: tar.TypeReg, ModTime: now, AccessTime: now, Format: tar.FormatPAX,
		PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b\x00c"}}, "extended")
	add(tar.Header{Name: strings.Repeat("long/", 60) + "pax", Typeflag: tar.TypeReg, Format: tar.FormatPAX}, "p")
	add(tar.Header{Name: strings.Repeat("long/", 60) + "gnu", Typeflag: tar.TypeReg, Format: tar.FormatGNU}, "g")
	add(tar.Header{Name: "gnu link", Typeflag: tar.TypeSymlink, Linkname: strings.Repeat("t", 300), Format: tar.FormatGNU}, "")
	add(tar.Header{Name: "../outside", Typeflag: tar.TypeReg}, "o")
	add(tar.Header{Name: ".wh.f", Typeflag: tar.TypeReg}, "")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	// Types 1 to 6 have no body whatever their size field says.
	return concat(sized("link with a size", 5000, tar.TypeLink), sized("dir with a size", 1, tar.TypeDir), b.Bytes())
}

// sizesTar has files of sizes at which something changes.
func sizesTar(t testing.TB) []byte {
	r := rand.New(rand.NewPCG(9, 10))
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, n := range []int{0, 1, 2, 511, 512, 513, 4096, 65536, 130000, 130560, 131071, 131072, 131073, 131584, 262144, 262145, 500000} {
		addFile(t, w, fmt.Sprintf("file-%d", n), text(r, n))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// filesTar has n files of some kilobytes, as a layer of source code has.
func filesTar(t testing.TB, n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 0))
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := range n {
		addFile(t, w, fmt.Sprintf("usr/lib/package-%d/module_%d.py", i/20, i), text(r, 200+r.IntN(9000)))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func addFile(t testing.TB, w *tar.Writer, name string, data []byte) {
	h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(data)), ModTime: time.Unix(1700000000, 0)}
	if err := errors.Join(w.WriteHeader(h), errOf(w.Write(data))); err != nil {
		t.Fatal(err)
	}
}

func errOf(_ int, err error) error { return err }

// text returns n bytes that compress as source code does, to about a third: words of a small vocabulary, often in the phrases just used.
func text(r *rand.Rand, n int) []byte {
	words := rand.NewZipf(r, 1.2, 3, 5000)
	b := make([]byte, 0, n+256)
	for len(b) < n {
		if len(b) > 100 && r.IntN(4) == 0 {
			from := len(b) - 1 - r.IntN(min(len(b)-1, 8000))
			b = append(b, b[from:min(from+20+r.IntN(60), len(b))]...)
			continue
		}
		b = strconv.AppendUint(b, words.Uint64()*2654435761%1000003, 36)
		b = append(b, " \n,.("[r.IntN(5)])
	}
	return b[:n]
}

// noise returns n bytes that do not compress.
func noise(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

// rawMember returns a header block and the data, without padding: what archive/tar's Writer does not write.
func rawMember(name string, kind byte, data []byte) []byte {
	return append(sized(name, int64(len(data)), kind), data...)
}

// sized returns the header block of a member of n bytes, a regular file unless kind says otherwise.
func sized(name string, n int64, kind ...byte) []byte {
	b := make([]byte, blockSize)
	copy(b, name)
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	putNumber(b[124:136], n)
	copy(b[136:], "00000000000\x00")
	b[156] = tar.TypeReg
	if len(kind) > 0 {
		b[156] = kind[0]
	}
	copy(b[257:], "ustar\x0000")
	return checksummed(b)
}

// putNumber writes n in octal, or in base 256 if it is too large.
func putNumber(b []byte, n int64) {
	if s := fmt.Sprintf("%0*o\x00", len(b)-1, n); len(s) == len(b) {
		copy(b, s)
		return
	}
	putBase256(b, n)
}

func putBase256(b []byte, n int64) {
	for i := range b {
		b[len(b)-1-i] = byte(n)
		n >>= 8
	}
	b[0] |= 0x80
}

func checksummed(b []byte) []byte {
	copy(b[148:], "        ")
	sum := 0
	for _, c := range b[:blockSize] {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

func base256Member(name string, data []byte) []byte {
	b := sized(name, int64(len(data)))
	putBase256(b[124:136], int64(len(data)))
	return pad(append(checksummed(b), data...))
}

// pad fills up to a whole block.
func pad(b []byte) []byte { return append(b, make([]byte, alignBlock(int64(len(b)))-int64(len(b)))...) }

func concat(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func paxRecord(k, v string) string {
	n := len(k) + len(v) + 3
	for n != len(strconv.Itoa(n))+len(k)+len(v)+3 {
		n = len(strconv.Itoa(n)) + len(k) + len(v) + 3
	}
	return fmt.Sprintf("%d %s=%s\n", n, k, v)
}

// oldGNUSparse returns a member of type S of the logical size n.
func oldGNUSparse(name string, n int64, runs []fileRun, data []byte) []byte {
	b := sized(name, int64(len(data)), tar.TypeGNUSparse)
	copy(b[257:], "ustar  \x00")
	putNumber(b[483:495], n)
	slots := b[386:482]
	ext := []byte{}
	for i, r := range runs {
		if len(slots) == 0 {
			if i == 4 {
				b[482] = 1
			} else {
				ext[len(ext)-8] = 1
			}
			ext = append(ext, make([]byte, blockSize)...)
			slots = ext[len(ext)-blockSize:][:21*24]
		}
		putNumber(slots[:12], r.off)
		putNumber(slots[12:24], r.n)
		slots = slots[24:]
	}
	return pad(concat(checksummed(b), ext, data))
}

// paxSparse returns a sparse member of the logical size n as GNU tar --format=posix --sparse-version=version writes it.
func paxSparse(version string, n int64, runs []fileRun, data []byte) []byte {
	var records, body string
	var list []string
	for _, r := range runs {
		list = append(list, strconv.FormatInt(r.off, 10), strconv.FormatInt(r.n, 10))
	}
	switch version {
	case "0.0":
		records = paxRecord("GNU.sparse.size", strconv.FormatInt(n, 10)) + paxRecord("GNU.sparse.numblocks", strconv.Itoa(len(runs)))
		for i := 0; i < len(list); i += 2 {
			records += paxRecord("GNU.sparse.offset", list[i]) + paxRecord("GNU.sparse.numbytes", list[i+1])
		}
	case "0.1":
		records = paxRecord("GNU.sparse.size", strconv.FormatInt(n, 10)) + paxRecord("GNU.sparse.numblocks", strconv.Itoa(len(runs))) +
			paxRecord("GNU.sparse.name", "sparse-0.1") + paxRecord("GNU.sparse.map", strings.Join(list, ","))
	case "1.0":
		records = paxRecord("GNU.sparse.major", "1") + paxRecord("GNU.sparse.minor", "0") +
			paxRecord("GNU.sparse.name", "sparse-1.0") + paxRecord("GNU.sparse.realsize", strconv.FormatInt(n, 10))
		body = strings.Join(append([]string{strconv.Itoa(len(runs))}, append(list, "")...), "\n")
	}
	return concat(pad(rawMember("x", tar.TypeXHeader, []byte(records))),
		pad(rawMember("s", tar.TypeReg, append(pad([]byte(body)), data...))))
}

// total returns the bytes of data that a map names.
func total(runs []fileRun) int {
	n := int64(0)
	for _, r := range runs {
		n += r.n
	}
	return int(n)
}

// writeSparse writes a file of n bytes with some data at each of offs and holes between.
func writeSparse(t testing.TB, path string, n int64, offs []int64) {
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, off := range offs {
		if _, err := f.WriteAt(bytes.Repeat([]byte{1, 2, 3}, 1000), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(n); err != nil {
		t.Fatal(err)
	}
}

func hexBytes(d digest.Digest) []byte {
	b, err := hex.DecodeString(d.Encoded())
	if err != nil {
		panic(err)
	}
	return b
}

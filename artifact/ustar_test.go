package artifact

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"testing/iotest"
	"time"
)

// TestPlainHeader gives every byte of headers that archive/tar writes other values: plainHeader reads what is left plain, as archive/tar does.
func TestPlainHeader(t *testing.T) {
	for _, h := range []tar.Header{
		{Name: "usr/bin/true", Mode: 0o755, Uid: 1, Gid: 2, Size: 35208, ModTime: time.Unix(1700000000, 0), Uname: "root", Gname: "bin"},
		{Name: string(bytes.Repeat([]byte("long/"), 40)), Typeflag: tar.TypeDir, Mode: 0o1777},
		{Name: string(bytes.Repeat([]byte{'n'}, 100)), Linkname: string(bytes.Repeat([]byte{'l'}, 100)), Typeflag: tar.TypeSymlink},
		{Name: "dev/sda", Typeflag: tar.TypeBlock, Devmajor: 8, Devminor: 0o7777777},
	} {
		var b bytes.Buffer
		h.Format = tar.FormatUSTAR
		if err := tar.NewWriter(&b).WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		block := [blockSize]byte(b.Bytes())
		star := block // Schily's tar puts other fields where the prefix ends
		copy(star[508:], "tar\x00")
		if checksummed(star[:]); plainHeader(&star) != nil {
			t.Errorf("%q: a STAR header is plain", h.Name)
		}
		if plainHeader(&block) == nil {
			t.Errorf("%q is not plain", h.Name)
		}
		taken := 0
		for i := range block {
			for _, c := range []byte("\x00 07189Agx\x7f\x80\xff" + string(block[i]^1)) {
				for _, fix := range []bool{false, true} {
					changed := block
					changed[i] = c
					if fix {
						checksummed(changed[:])
					}
					got := plainHeader(&changed)
					if got == nil {
						continue
					}
					want, err := tar.NewReader(bytes.NewReader(changed[:])).Next()
					if err != nil || !reflect.DeepEqual(got, want) {
						t.Fatalf("%q with byte %d %q: got %+v, want %+v, %v", h.Name, i, c, got, want, err)
					}
					taken++
				}
			}
		}
		if taken < 4000 {
			t.Errorf("%q: of its changed headers only %d are plain", h.Name, taken)
		}
	}
}

// TestScanPlain reads tars with archive/tar alone, and with plain headers read without it.
func TestScanPlain(t *testing.T) {
	tars := corpus(t)
	for name, b := range refused(t) {
		tars["refused: "+name] = b
	}
	tars["example"] = read(t, filepath.Join("testdata", "example.tar"))
	for seed := range uint64(2000) {
		tars[fmt.Sprintf("seed %d", seed)] = mixedTar(rand.New(rand.NewPCG(seed, 20)))
	}
	plain, all := 0, 0
	for name, b := range tars {
		p, n := checkScan(t, name, b)
		plain, all = plain+p, all+n
	}
	if plain < all/4 || plain == all {
		t.Errorf("%d of %d headers are plain", plain, all)
	}
}

// TestScanBuilt reads the layers of the test images (with FULL: all) both ways.
func TestScanBuilt(t *testing.T) {
	image := "debian-base"
	if os.Getenv("FULL") != "" {
		image = "*"
	}
	forBuiltLayers(t, image, func(b []byte) {
		want, got := scan(b, wholeReader, true), scan(b, wholeReader, false)
		compareScans(t, "layer", got, want)
		t.Logf("%d of %d headers are plain", got.plain, len(got.entries))
		if got.plain < len(got.entries)*9/10 {
			t.Errorf("a layer of %d bytes: only %d of %d headers are plain", len(b), got.plain, len(got.entries))
		}
	})
}

func FuzzScan(f *testing.F) {
	for _, tars := range []map[string][]byte{corpus(f), refused(f)} {
		for _, b := range tars {
			if len(b) < 20000 {
				f.Add(b, true)
			}
		}
	}
	for seed := range uint64(100) {
		f.Add(mixedTar(rand.New(rand.NewPCG(seed, 21))), seed%2 == 0)
	}
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix {
			fixChecksums(b)
		}
		checkScan(t, "fuzz", b)
	})
}

// checkScan reads b both ways, and again as what an index has of it. It returns how many of the headers are plain.
func checkScan(t *testing.T, name string, b []byte) (plain, all int) {
	t.Helper()
	broken := func(r io.Reader) io.Reader { return io.MultiReader(r, iotest.ErrReader(io.ErrClosedPipe)) }
	for _, wrap := range []func(io.Reader) io.Reader{wholeReader, iotest.HalfReader, iotest.DataErrReader, broken} {
		got := scan(b, wrap, false)
		compareScans(t, name, got, scan(b, wrap, true))
		plain, all = plain+got.plain, all+len(got.entries)
	}
	return plain, all
}

func wholeReader(r io.Reader) io.Reader { return r }

// scanned is what a scanner makes of a tar.
type scanned struct {
	entries []Entry
	headers [][]byte // before each entry, at the end, and the tail
	err     error
	read    int64 // bytes of the tar, up to the error
	plain   int   // entries that archive/tar has not seen
}

// scan reads a tar; with onlyTar archive/tar reads all headers.
func scan(b []byte, wrap func(io.Reader) io.Reader, onlyTar bool) (got scanned) {
	src := &readerSource{r: wrap(bytes.NewReader(b))}
	s := newScanner(src)
	if onlyTar {
		s.tr = tar.NewReader(framedByTar{s})
	}
	for got.err == nil {
		var e *Entry
		if e, got.err = s.next(); got.err == nil {
			got.entries = append(got.entries, *e)
		}
		if s.tr == nil && got.err == nil {
			got.plain++
		}
		got.headers = append(got.headers, bytes.Clone(s.raw))
	}
	for end := got.err == io.EOF; end; end = got.err == nil {
		var tail []byte
		tail, got.err = s.tail()
		got.headers = append(got.headers, bytes.Clone(tail))
	}
	got.read = src.n
	return got
}

func compareScans(t *testing.T, name string, got, want scanned) {
	t.Helper()
	for i := range min(len(got.entries), len(want.entries)) {
		if !reflect.DeepEqual(got.entries[i], want.entries[i]) {
			t.Fatalf("%s: entry %d:\n got %+v %+v\nwant %+v %+v", name, i, got.entries[i], got.entries[i].Header, want.entries[i], want.entries[i].Header)
		}
	}
	if len(got.entries) != len(want.entries) || fmt.Sprint(got.err) != fmt.Sprint(want.err) || got.read != want.read {
		t.Fatalf("%s: got %d entries, %v at %d, want %d, %v at %d", name, len(got.entries), got.err, got.read, len(want.entries), want.err, want.read)
	}
	if !slices.EqualFunc(got.headers, want.headers, bytes.Equal) {
		t.Fatalf("%s: other header bytes", name)
	}
}

// framedByTar keeps a scanner from looking for plain headers.
type framedByTar struct{ *scanner }

func (s framedByTar) Read(p []byte) (int, error) { return s.read(p) }

// readerSource gives a scanner the tar in r.
type readerSource struct {
	r io.Reader
	n int64 // bytes read
}

func (s *readerSource) header(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.n += int64(n)
	return n, err
}

func (s *readerSource) data(n int64) error {
	got, err := io.CopyN(io.Discard, s.r, n)
	s.n += got
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// mixedTar returns members of all formats, most of them plain, and damages some.
func mixedTar(r *rand.Rand) []byte {
	var b []byte
	runs := []fileRun{{0, 512}, {4096, 17}}
	for range 1 + r.IntN(12) {
		name, size := fmt.Sprintf("dir/file-%d", r.IntN(100)), []int{0, 1, 511, 512, 513, 1500}[r.IntN(6)]
		var m []byte
		switch r.IntN(16) {
		case 0:
			m = pad(rawMember("x", tar.TypeXHeader, []byte(paxRecord("path", name)+paxRecord("size", "700"))))
		case 1:
			m = pad(rawMember("g", tar.TypeXGlobalHeader, []byte(paxRecord("mtime", "1.5"))))
		case 2:
			m = pad(rawMember("L", []byte("LK")[r.IntN(2)], bytes.Repeat([]byte("n"), 150)))
		case 3:
			m = oldGNUSparse(name, 5000, runs, make([]byte, 529-r.IntN(2)))
		case 4:
			m = paxSparse([]string{"0.0", "0.1", "1.0"}[r.IntN(3)], 5000, runs, make([]byte, 529-r.IntN(2)))
		case 5:
			m = base256Member(name, make([]byte, size))
		case 6:
			m = make([]byte, blockSize)
		default:
			m = pad(rawMember(name, "00000000123456\x007S"[r.IntN(17)], make([]byte, size)))
			if '1' <= m[156] && m[156] <= '6' {
				m = m[:blockSize]
			}
			if r.IntN(4) == 0 {
				copy(m[345:], "a prefix")
				checksummed(m)
			}
		}
		if r.IntN(20) == 0 {
			m[r.IntN(blockSize)] = byte(r.Uint32())
			if r.IntN(3) > 0 {
				checksummed(m)
			}
		}
		b = append(b, m...)
	}
	switch r.IntN(4) {
	case 0:
		b = b[:r.IntN(len(b)+1)]
	case 1:
		b = append(b, make([]byte, 2*blockSize+r.IntN(100))...)
	}
	return b
}

// forBuiltLayers calls f with the tar of each layer of test images (make images), or skips the test.
func forBuiltLayers(t testing.TB, image string, f func(tar []byte)) {
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	blobs, err := filepath.Glob(filepath.Join(cache, "test-images", "oci", image, "blobs", "sha256", "*"))
	if err != nil {
		t.Fatal(err)
	}
	if len(blobs) == 0 {
		t.Skip("not built (`make images` builds the test images): ", image)
	}
	for _, path := range blobs {
		blob := bytes.NewReader(read(t, path))
		if c, _ := blob.ReadByte(); c == '{' {
			continue // a manifest, or a config
		}
		blob.UnreadByte()
		r, err := SourceTar("", blob)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		f(b)
	}
}

package artifact

import (
	"archive/tar"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var update = flag.Bool("update", false, "write the golden files and the examples of docs/format.md")

const (
	formatDoc        = "../docs/format.md"
	exampleChunkSize = 2048
)

// TestGolden compares an encoded layer and its manifest with files of a release before, and the examples of docs/format.md with them. If the blob
// differs, layers converted before no longer equal those converted now: change encoderVersion or chunkerVersion, and then the files.
func TestGolden(t *testing.T) {
	tarPath := filepath.Join("testdata", "example.tar")
	if *update {
		write(t, tarPath, exampleTar(t))
	}
	e := encode(t, read(t, tarPath), EncodeOptions{ChunkSize: exampleChunkSize})
	checkLayer(t, e)
	m := &Manifest{
		Subject:  ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("the image's manifest"), Size: 527},
		Config:   ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromString("the image's config"), Size: 1469},
		Platform: ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"},
		Created:  time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Layers:   []Layer{e.Layer},

		Converter: "streamctl v1.2.3 (" + EncodeOptions{ChunkSize: exampleChunkSize}.ID() + ")",
	}
	m.Layers[0].Source = digest.FromString("the image's layer")
	manifest, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	golden(t, filepath.Join("testdata", "example.blob"), e.blob)
	golden(t, filepath.Join("testdata", "example.json"), manifest)
	doc := string(read(t, formatDoc))
	doc = replaceExample(t, doc, "blob", annotate(e))
	doc = replaceExample(t, doc, "manifest", string(manifest)+"\n")
	golden(t, formatDoc, []byte(doc))
}

func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		write(t, path, got)
	}
	if want := read(t, path); !bytes.Equal(got, want) {
		t.Errorf("%s is not what is made now (go test -run Golden -update writes it):\n%s", path, got)
	}
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

func exampleTar(t testing.TB) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	when := time.Unix(1767323045, 0)
	for _, h := range []struct {
		tar.Header
		data string
	}{
		{tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755}, ""},
		{tar.Header{Name: "etc/motd", Typeflag: tar.TypeReg, Mode: 0o644}, "Hello, world!\n"},
		{tar.Header{Name: "etc/services", Typeflag: tar.TypeReg, Mode: 0o644}, strings.Repeat("streaming 443/tcp\n", 150)},
		{tar.Header{Name: "etc/issue", Typeflag: tar.TypeSymlink, Linkname: "motd", Mode: 0o777}, ""},
	} {
		h.ModTime, h.Size = when, int64(len(h.data))
		if err := errors.Join(w.WriteHeader(&h.Header), errOf(io.WriteString(w, h.data))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// replaceExample replaces the code block behind the comment <!-- name: ... --> of a document.
func replaceExample(t *testing.T, doc, name, text string) string {
	t.Helper()
	before, rest, ok1 := strings.Cut(doc, "<!-- "+name+":")
	comment, rest, ok2 := strings.Cut(rest, "```")
	lang, rest, ok3 := strings.Cut(rest, "\n")
	_, after, ok4 := strings.Cut(rest, "```")
	if !ok1 || !ok2 || !ok3 || !ok4 {
		t.Fatalf("no example %q", name)
	}
	return before + "<!-- " + name + ":" + comment + "```" + lang + "\n" + text + "```" + after
}

// annotate dumps a blob field by field.
func annotate(e *encoded) string {
	var b strings.Builder
	off := 0
	field := func(n int, format string, args ...any) {
		note := "  " + fmt.Sprintf(format, args...)
		for end := off + n; off < end; {
			m := min(16, end-off)
			line := fmt.Sprintf("%04x  %-48s%s", off, fmt.Sprintf("% x", e.blob[off:][:m]), note)
			b.WriteString(strings.TrimRight(line, " ") + "\n")
			off, note = off+m, ""
		}
	}
	for i := range e.Chunks {
		c := e.index.Chunk(i)
		field(int(c.BlobSize), "frame of chunk %d: tar %d to %d", i, c.TarOffset, c.TarOffset+c.TarSize)
	}
	field(4, "index: magic of the skippable frame")
	field(4, "size of what follows: %d", e.IndexSize-8)
	field(8, "magic %q", indexMagic)
	field(4, "version %d", indexVersion)
	field(4, "%d chunks", e.Chunks)
	field(8, "tar: %d bytes", e.TarSize)
	field(8, "headers: %d bytes", e.HeadersSize)
	field(32, "diffID: SHA-256 of the tar")
	for i := range e.Chunks {
		c := e.index.Chunk(i)
		field(8, "chunk %d ends at %d in the tar", i, c.TarOffset+c.TarSize)
		field(8, "and at %d in the blob", c.BlobOffset+c.BlobSize)
		field(32, "SHA-256 of its %d bytes", c.TarSize)
	}
	field(len(e.index.headers), "headers, one frame")
	return b.String()
}

// TestEncoderVersion ties EncodeOptions.ID to the compressor that is built in: another version may write other bytes.
func TestEncoderVersion(t *testing.T) {
	mod := string(read(t, "../go.mod"))
	if want := "github.com/klauspost/compress v" + strings.TrimPrefix(encoderVersion, "klauspost-"); !strings.Contains(mod, want) {
		t.Errorf("encoderVersion is %q, but go.mod does not have %q", encoderVersion, want)
	}
	if got, want := (EncodeOptions{}).ID(), "tar-index-v1/chunk=3.131072/zstd=klauspost-1.20.4"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if (EncodeOptions{Workers: 3}).ID() != (EncodeOptions{ChunkSize: defaultChunkSize}).ID() {
		t.Error("ID depends on what does not decide the bytes")
	}
}

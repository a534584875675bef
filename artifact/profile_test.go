package artifact

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"reflect"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func testHotHead() *HotHead {
	return &HotHead{
		Profile: Profile{
			Layers: []digest.Digest{digest.FromString("a"), digest.FromString("b")},
			Chunks: []HotChunk{{1, 7}, {0, 0}, {1, 6}, {0, 70000}},
		},
		Indexes: []int64{MaxHotIndex, 0},
	}
}

func TestHotHeadRoundTrip(t *testing.T) {
	for name, want := range map[string]*HotHead{"some": testHotHead(), "none": {}} {
		t.Run(name, func(t *testing.T) {
			b, err := want.Encode()
			if err != nil {
				t.Fatal(err)
			}
			r := bytes.NewReader(append(b, "frames"...))
			got, err := ReadHotHead(r)
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("read %+v, %v, want %+v", got, err, want)
			}
			if rest, _ := io.ReadAll(r); string(rest) != "frames" {
				t.Errorf("what follows the head is %q, want all of it", rest)
			}
		})
	}
}

func TestBadHotHeads(t *testing.T) {
	valid, err := testHotHead().Encode()
	if err != nil {
		t.Fatal(err)
	}
	set := func(off int, v uint32) []byte {
		b := bytes.Clone(valid)
		binary.LittleEndian.PutUint32(b[off:], v)
		return b
	}
	list := len(valid) - 4*hotEntrySize
	for name, c := range map[string]struct {
		b    []byte
		want error
	}{
		"no magic":           {set(offSkippableMagic, 1), ErrInvalid},
		"another frame":      {set(offIndexMagic, 1), ErrInvalid},
		"newer version":      {set(offHotVersion, 3), ErrUnsupported},
		"wrong size":         {set(offSkippableSize, 9), ErrInvalid},
		"4 G layers":         {set(offHotLayers, math.MaxUint32), ErrInvalid},
		"4 G chunks":         {set(offHotChunks, math.MaxUint32), ErrInvalid},
		"no such layer":      {set(list, 2), ErrInvalid},
		"no index so large":  {set(list+4, 1<<31), ErrInvalid},
		"a chunk twice":      {append(bytes.Clone(valid[:len(valid)-8]), valid[list:list+8]...), ErrInvalid},
		"a layer twice":      {append(append(bytes.Clone(valid[:hotHeaderSize+hotLayerSize]), valid[hotHeaderSize:hotHeaderSize+hotLayerSize]...), valid[list:]...), ErrInvalid},
		"too large an index": {set(hotHeaderSize+32, MaxHotIndex+1), ErrInvalid},
		"index of 2^60":      {set(hotHeaderSize+36, 1<<28), ErrInvalid},
		"cut in the header":  {valid[:20], io.ErrUnexpectedEOF},
		"cut in the digests": {valid[:50], io.ErrUnexpectedEOF},
	} {
		if _, err := ReadHotHead(bytes.NewReader(c.b)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if _, err := (&HotHead{Profile: Profile{Chunks: []HotChunk{{0, 0}}}}).Encode(); !errors.Is(err, ErrInvalid) {
		t.Errorf("a chunk of no layer is encoded: %v", err)
	}
}

func testProfileManifest() *ProfileManifest {
	return &ProfileManifest{
		Subject: testManifest().Subject,
		Hot:     ocispec.Descriptor{MediaType: HotMediaType, Digest: digest.FromString("hot"), Size: 12345},
		Source:  ProfileRecorded,
		Created: time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC),
	}
}

func TestProfileManifest(t *testing.T) {
	want := testProfileManifest()
	b, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeProfileManifest(b)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("decoded %+v, %v, want %+v", got, err, want)
	}
	if _, err := DecodeManifest(b); !errors.Is(err, ErrInvalid) {
		t.Errorf("a profile is taken for an artifact: %v", err)
	}
	for name, c := range map[string]struct {
		from, to string
		want     error
	}{
		"newer version":   {`"streaming.version": "v1"`, `"streaming.version": "v2"`, ErrUnsupported},
		"another type":    {ProfileType, ArtifactType, ErrInvalid},
		"no subject":      {`"subject"`, `"object"`, ErrInvalid},
		"negative size":   {"12345", "-1", ErrInvalid},
		"too large":       {"12345", "70368744177665", ErrInvalid},
		"digest of none":  {string(want.Hot.Digest), "sha256:1", ErrInvalid},
		"not a hot blob":  {HotMediaType, LayerMediaType, ErrInvalid},
		"no time":         {"2026-01-02T", "2026-13-02T", ErrInvalid},
		"not a manifest":  {ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, ErrInvalid},
		"another size":    {`"streaming.hot.size": "12345"`, `"streaming.hot.size": "12346"`, ErrInvalid},
		"no size":         {`"streaming.hot.size": "12345"`, `"streaming.hot.size": ""`, ErrInvalid},
		"another blob":    {`"streaming.hot.digest": "` + string(want.Hot.Digest), `"streaming.hot.digest": "` + string(want.Subject.Digest), ErrInvalid},
		"not even an 'o'": {"{", "", ErrInvalid},
	} {
		bad := bytes.Replace(b, []byte(c.from), []byte(c.to), 1)
		if _, err := DecodeProfileManifest(bad); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func FuzzReadHotHead(f *testing.F) {
	b, err := testHotHead().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ReadHotHead(bytes.NewReader(b))
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				checkClass(t, err)
			}
			return
		}
		again, err := p.Encode()
		if err != nil || !bytes.Equal(again, b[:len(again)]) && binary.LittleEndian.Uint32(b[offHotChunks+4:]) == 0 {
			t.Fatalf("encoded as %x, %v", again, err)
		}
	})
}

func FuzzDecodeProfileManifest(f *testing.F) {
	b, err := testProfileManifest().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := DecodeProfileManifest(b)
		if err != nil {
			checkClass(t, err)
			return
		}
		if _, err := m.Encode(); err != nil {
			t.Fatalf("encode what was decoded: %v", err)
		}
	})
}

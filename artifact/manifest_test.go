package artifact

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func testManifest() *Manifest {
	return &Manifest{
		Subject:  ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("subject"), Size: 1234},
		Config:   ocispec.Descriptor{MediaType: "application/vnd.docker.container.image.v1+json", Digest: digest.FromString("config"), Size: 567},
		Platform: ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"},
		Created:  time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC),
		Layers: []Layer{
			{Digest: digest.FromString("a"), Size: 1200, IndexOffset: 1000, IndexSize: 200, IndexDigest: digest.FromString("ai"), Source: digest.FromString("as")},
			{Digest: digest.FromString("b"), Size: 10 << 30, IndexOffset: 10<<30 - 5000, IndexSize: 5000, IndexDigest: digest.FromString("bi"), Source: digest.FromString("bs")},
		},
	}
}

func TestManifestRoundTrip(t *testing.T) {
	for name, change := range map[string]func(m *Manifest){
		"all":        func(m *Manifest) {},
		"no variant": func(m *Manifest) { m.Platform.Variant = "" },
		"no time":    func(m *Manifest) { m.Created = time.Time{} },
		"no layers":  func(m *Manifest) { m.Layers = nil },
		"config as it was": func(m *Manifest) {
			m.Config.Annotations = map[string]string{"a": "<b>"}
			m.Config.Data = []byte("{}")
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := testManifest()
			change(m)
			b, err := m.Encode()
			if err != nil {
				t.Fatal(err)
			}
			got, err := DecodeManifest(b)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, m) {
				t.Errorf("got %+v, want %+v", got, m)
			}
			again, err := got.Encode()
			if err != nil || !bytes.Equal(again, b) {
				t.Errorf("encoded again: %v\n%s\nwant\n%s", err, again, b)
			}
		})
	}
}

func TestManifestRefuses(t *testing.T) {
	good, err := testManifest().Encode()
	if err != nil {
		t.Fatal(err)
	}
	layer := func(m map[string]any) map[string]any { return m["layers"].([]any)[1].(map[string]any) }
	annotate := func(key string, v any) func(m map[string]any) {
		return func(m map[string]any) { layer(m)["annotations"].(map[string]any)[key] = v }
	}
	set := func(path string, v any) func(m map[string]any) {
		return func(m map[string]any) {
			keys := strings.Split(path, "/")
			for _, k := range keys[:len(keys)-1] {
				m = m[k].(map[string]any)
			}
			m[keys[len(keys)-1]] = v
		}
	}
	sha512 := "sha512:" + strings.Repeat("0", 128)
	for _, c := range []struct {
		name   string
		change func(m map[string]any)
		want   error
	}{
		{"unknown field", set("extension", map[string]any{}), nil},
		{"unknown annotation", set("annotations/x", "y"), nil},
		{"schema version", set("schemaVersion", 1), ErrInvalid},
		{"media type", set("mediaType", ocispec.MediaTypeImageIndex), ErrInvalid},
		{"no media type", set("mediaType", nil), ErrInvalid},
		{"artifact type", set("artifactType", "application/vnd.another"), ErrInvalid},
		{"format", set("annotations/streaming.format", "another"), ErrUnsupported},
		{"version", set("annotations/streaming.version", "v2"), ErrUnsupported},
		{"no annotations", set("annotations", nil), ErrUnsupported},
		{"no os", set("annotations/streaming.platform.os", ""), ErrInvalid},
		{"no architecture", set("annotations/streaming.platform.arch", ""), ErrInvalid},
		{"time", set("annotations/org.opencontainers.image.created", "yesterday"), ErrInvalid},
		{"no subject", set("subject", nil), ErrInvalid},
		{"subject digest", set("subject/digest", "sha256:00"), ErrInvalid},
		{"subject algorithm", set("subject/digest", sha512), ErrInvalid},
		{"subject size", set("subject/size", -1), ErrInvalid},
		{"config digest", set("config/digest", "../../etc/passwd"), ErrInvalid},
		{"config media type", set("config/mediaType", ""), ErrInvalid},
		{"types", set("layers", "many"), ErrInvalid},
		{"layer media type", func(m map[string]any) { layer(m)["mediaType"] = ocispec.MediaTypeImageLayerGzip }, ErrInvalid},
		{"layer digest", func(m map[string]any) { layer(m)["digest"] = sha512 }, ErrInvalid},
		{"layer size", func(m map[string]any) { layer(m)["size"] = 10<<30 + 1 }, ErrInvalid},
		{"layer negative", func(m map[string]any) { layer(m)["size"] = -1 }, ErrInvalid},
		{"layer too large", func(m map[string]any) {
			layer(m)["size"] = maxBlobSize + 1
			annotate(AnnotationIndexOffset, fmt.Sprint(maxBlobSize+1-5000))(m)
		}, ErrInvalid},
		{"no index", func(m map[string]any) { layer(m)["annotations"] = nil }, ErrInvalid},
		{"index digest", annotate(AnnotationIndexDigest, "sha256:"), ErrInvalid},
		{"source digest", annotate(AnnotationSourceDigest, ""), ErrInvalid},
		{"index offset", annotate(AnnotationIndexOffset, "1"), ErrInvalid},
		{"index offset negative", annotate(AnnotationIndexOffset, "-1"), ErrInvalid},
		{"index offset spelled otherwise", annotate(AnnotationIndexOffset, fmt.Sprintf("+%d", 10<<30-5000)), ErrInvalid},
		{"index size", annotate(AnnotationIndexSize, "5001"), ErrInvalid},
		{"index size huge", annotate(AnnotationIndexSize, "99999999999999999999"), ErrInvalid},
		{"index is all", func(m map[string]any) {
			annotate(AnnotationIndexOffset, "0")(m)
			layer(m)["size"] = 5000
		}, ErrInvalid},
		{"index too small", func(m map[string]any) {
			annotate(AnnotationIndexSize, "119")(m)
			annotate(AnnotationIndexOffset, fmt.Sprint(10<<30-119))(m)
		}, ErrInvalid},
		{"too many layers", func(m map[string]any) {
			m["layers"] = make([]any, MaxLayers+1)
			for i := range m["layers"].([]any) {
				m["layers"].([]any)[i] = map[string]any{}
			}
		}, ErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			var m map[string]any
			d := json.NewDecoder(bytes.NewReader(good))
			d.UseNumber()
			if err := d.Decode(&m); err != nil {
				t.Fatal(err)
			}
			c.change(m)
			b, err := json.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := DecodeManifest(b); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	for name, b := range map[string][]byte{"nothing": nil, "null": []byte("null"), "twice": append(good, good...), "too long": append(good, bytes.Repeat([]byte{' '}, MaxManifestSize)...)} {
		if _, err := DecodeManifest(b); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: got %v, want %v", name, err, ErrInvalid)
		}
	}
	m := testManifest()
	m.Layers[0].IndexOffset++
	if _, err := m.Encode(); !errors.Is(err, ErrInvalid) {
		t.Errorf("encode of what would be refused: got %v", err)
	}
}

// A manifest's layers take memory for what they say, not for how many empty ones fit into it.
func TestManifestMemory(t *testing.T) {
	b := append(bytes.Repeat([]byte("{},"), MaxManifestSize/3-10), "{}]}"...)
	b = append([]byte(`{"layers":[`), b...)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := UnmarshalManifest(b); !errors.Is(err, ErrInvalid) {
		t.Errorf("got %v, want %v", err, ErrInvalid)
	}
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > 32<<20 {
		t.Errorf("%d bytes were allocated for a manifest of %d", got, len(b))
	}
}

// Where a key is there twice, containerd's and our idea of the layers must not differ.
func TestManifestKeyTwice(t *testing.T) {
	b := []byte(`{"layers":[{"size":1},{"size":2}],"Layers":[{"size":3}]}`)
	var want ocispec.Manifest
	if err := json.Unmarshal(b, &want); err != nil {
		t.Fatal(err)
	}
	got, err := UnmarshalManifest(b)
	if err != nil || !reflect.DeepEqual(*got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
}

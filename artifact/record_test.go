package artifact

import (
	"encoding/json"
	"errors"
	"reflect"
	"testing"

	"github.com/opencontainers/go-digest"
)

func TestProfileJSON(t *testing.T) {
	p := &Profile{Layers: []digest.Digest{digest.FromString("a"), digest.FromString("b")}, Chunks: []HotChunk{{1, 7}, {0, 3}}}
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"version":1,"layers":["` + p.Layers[0].String() + `","` + p.Layers[1].String() + `"],"chunks":[[1,7],[0,3]]}`
	if string(b) != want {
		t.Errorf("got %s, want %s", b, want)
	}
	got := &Profile{}
	if err := json.Unmarshal(b, got); err != nil || !reflect.DeepEqual(got, p) {
		t.Errorf("got %v, %v, want %v", got, err, p)
	}
	for name, c := range map[string]struct {
		json string
		want error
	}{
		"another version": {`{"version":2}`, ErrUnsupported},
		"no pair":         {`{"version":1,"layers":["` + p.Layers[0].String() + `"],"chunks":[[0]]}`, ErrInvalid},
		"no such layer":   {`{"version":1,"layers":[],"chunks":[[0,1]]}`, ErrInvalid},
		"twice":           {`{"version":1,"layers":["` + p.Layers[0].String() + `"],"chunks":[[0,1],[0,1]]}`, ErrInvalid},
		"no digest":       {`{"version":1,"layers":["x"],"chunks":[]}`, ErrInvalid},
	} {
		if err := json.Unmarshal([]byte(c.json), &Profile{}); !errors.Is(err, c.want) {
			t.Errorf("%s: error %v, want %v", name, err, c.want)
		}
	}
}

func TestMergeProfiles(t *testing.T) {
	a, b := digest.FromString("a"), digest.FromString("b")
	got := MergeProfiles([]*Profile{
		{Layers: []digest.Digest{a, b}, Chunks: []HotChunk{{0, 1}, {0, 2}, {1, 1}, {0, 9}}},
		{Layers: []digest.Digest{b, a}, Chunks: []HotChunk{{0, 1}, {1, 1}, {1, 2}}}, // the same chunks, b's first
		{Layers: []digest.Digest{a, b}, Chunks: []HotChunk{{0, 1}, {1, 1}, {0, 8}}},
	})
	// Of three, what two have: a's 1 at 0, 1, 0; b's 1 at 2, 0, 1; a's 2 at 1, 2.
	want := &Profile{Layers: []digest.Digest{a, b}, Chunks: []HotChunk{{0, 1}, {1, 1}, {0, 2}}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

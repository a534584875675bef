package artifact

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
)

// profileVersion is that of a profile's JSON form, which nodes keep and exchange.
const profileVersion = 1

// profileJSON is a profile as JSON: {"version":1,"layers":["sha256:..."],"chunks":[[LAYER,CHUNK],...]}.
type profileJSON struct {
	Version int             `json:"version"`
	Layers  []digest.Digest `json:"layers"`
	Chunks  [][2]int        `json:"chunks"`
}

// MarshalJSON returns p's JSON form.
func (p *Profile) MarshalJSON() ([]byte, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	j := profileJSON{Version: profileVersion, Layers: p.Layers, Chunks: make([][2]int, len(p.Chunks))}
	for i, c := range p.Chunks {
		j.Chunks[i] = [2]int{c.Layer, c.Chunk}
	}
	return json.Marshal(j)
}

// UnmarshalJSON reads p's JSON form. Errors are ErrInvalid, ErrUnsupported and encoding/json's.
func (p *Profile) UnmarshalJSON(b []byte) error {
	var j struct {
		Version int                 `json:"version"`
		Layers  List[digest.Digest] `json:"layers"`
		Chunks  [][]int             `json:"chunks"`
	}
	if err := json.Unmarshal(b, &j); err != nil {
		return err
	}
	if j.Version != profileVersion {
		return fmt.Errorf("profile of version %d: %w", j.Version, ErrUnsupported)
	}
	*p = Profile{Layers: j.Layers, Chunks: make([]HotChunk, len(j.Chunks))}
	for i, c := range j.Chunks {
		if len(c) != 2 {
			return fmt.Errorf("profile: entry %d has %d numbers: %w", i, len(c), ErrInvalid)
		}
		p.Chunks[i] = HotChunk{Layer: c[0], Chunk: c[1]}
	}
	return p.check()
}

// MergeProfiles makes one profile of several records of the same image: the chunks that at least half of them have, in the order of their
// mean place among those that have them.
func MergeProfiles(list []*Profile) *Profile {
	type chunk struct {
		HotChunk
		seen, first int
		places      float64 // added up
	}
	merged := &Profile{}
	layers := map[digest.Digest]int{}
	at := map[HotChunk]int{}
	var chunks []chunk
	for _, p := range list {
		for _, l := range p.Layers {
			if _, ok := layers[l]; !ok {
				layers[l] = len(merged.Layers)
				merged.Layers = append(merged.Layers, l)
			}
		}
		for place, c := range p.Chunks {
			c.Layer = layers[p.Layers[c.Layer]]
			i, ok := at[c]
			if !ok {
				i = len(chunks)
				at[c] = i
				chunks = append(chunks, chunk{HotChunk: c, first: i})
			}
			chunks[i].seen++
			chunks[i].places += float64(place)
		}
	}
	chunks = slices.DeleteFunc(chunks, func(c chunk) bool { return 2*c.seen < len(list) })
	slices.SortFunc(chunks, func(a, b chunk) int {
		return cmp.Or(cmp.Compare(a.places/float64(a.seen), b.places/float64(b.seen)), a.first-b.first)
	})
	for _, c := range chunks {
		merged.Chunks = append(merged.Chunks, c.HotChunk)
	}
	return merged
}

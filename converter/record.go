package converter

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// Record remembers the layers that were converted, so that they need not be again: neither for another image with the same
// layer, nor in another repository. It is a directory with a file for each layer and way of encoding,
//
//	DIR/SHA256(EncodeOptions.ID)[:16]/ALGORITHM-HEX.json
//
// written in one step, so that several processes may share it. It is a cache: what is damaged is not there, and all of it
// may be deleted at any time. What it says is believed only as far as the place has the blob and the diffID is the config's.
type Record struct {
	dir string
}

// NewRecord returns the record in dir, which is made when the first layer is recorded.
func NewRecord(dir string) *Record { return &Record{dir: dir} }

// recordPlaces is how many places are remembered for a layer: the first of them in the right registry will do.
const recordPlaces = 8

type recordEntry struct {
	Source  digest.Digest         `json:"source"`
	Options string                `json:"options"`
	Layer   artifact.EncodedLayer `json:"layer"`
	Places  []string              `json:"places"` // that had it, the latest first
}

func (r *Record) path(source digest.Digest, o artifact.EncodeOptions) (string, bool) {
	if r == nil || source.Validate() != nil {
		return "", false
	}
	return filepath.Join(r.dir, digest.FromString(o.ID()).Encoded()[:16], source.Algorithm().String()+"-"+source.Encoded()+".json"), true
}

func (r *Record) get(source digest.Digest, o artifact.EncodeOptions) (recordEntry, bool) {
	path, ok := r.path(source, o)
	if !ok {
		return recordEntry{}, false
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return recordEntry{}, false
	}
	var e recordEntry
	if json.Unmarshal(raw, &e) != nil || e.Source != source || e.Options != o.ID() || e.Layer.Digest.Validate() != nil {
		return recordEntry{}, false
	}
	return e, true
}

// put records a layer. That it cannot is no reason to stop: the layer is converted again then.
func (r *Record) put(source digest.Digest, o artifact.EncodeOptions, l artifact.EncodedLayer, place string) {
	path, ok := r.path(source, o)
	if !ok {
		return
	}
	e := recordEntry{Source: source, Options: o.ID(), Layer: l, Places: []string{place}}
	if old, ok := r.get(source, o); ok && old.Layer.Digest == l.Digest {
		if len(old.Places) > 0 && old.Places[0] == place {
			return
		}
		for _, p := range old.Places {
			if len(e.Places) < recordPlaces && !slices.Contains(e.Places, p) {
				e.Places = append(e.Places, p)
			}
		}
	}
	e.Layer.Source = "" // an image's business
	raw, err := json.MarshalIndent(e, "", "  ")
	if err != nil {
		return
	}
	_ = replaceFile(path, bytes.NewReader(append(raw, '\n')))
}

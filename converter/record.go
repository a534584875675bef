package converter

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// Record remembers the layers that were converted, so that they need not be again: neither for another image with the same
// layer, nor in another repository, nor by another process. It has an entry for each layer and way of encoding. It is a cache: what is
// damaged is not there, and all of it may be deleted at any time. What it says is believed only as far as the place has the blob and
// the diffID is the config's.
type Record struct {
	store Store
}

// Store keeps the entries of a Record, of a kilobyte or so, by keys of the form "HEX/ALGORITHM-HEX". Both methods may be called from
// several goroutines at once, and by several processes. That one cannot do what it should is no reason to stop: the layer is converted
// again then.
type Store interface {
	Get(ctx context.Context, key string) (entry []byte, ok bool)
	Put(ctx context.Context, key string, entry []byte)
}

// NewRecord returns the record in dir, which is made when the first layer is recorded. Its entries are files,
//
//	DIR/SHA256(EncodeOptions.ID)[:16]/ALGORITHM-HEX.json
//
// each written in one step, so that several processes may share it.
func NewRecord(dir string) *Record { return RecordIn(directory(dir)) }

// RecordIn returns the record that is kept in s.
func RecordIn(s Store) *Record { return &Record{s} }

type directory string

func (d directory) path(key string) string {
	return filepath.Join(string(d), filepath.FromSlash(key)+".json")
}

func (d directory) Get(_ context.Context, key string) ([]byte, bool) {
	raw, err := os.ReadFile(d.path(key))
	return raw, err == nil
}

func (d directory) Put(_ context.Context, key string, entry []byte) {
	_ = replaceFile(d.path(key), bytes.NewReader(entry))
}

// recordPlaces is how many places are remembered for a layer: the first of them in the right registry will do.
const recordPlaces = 8

type recordEntry struct {
	Source  digest.Digest         `json:"source"`
	Options string                `json:"options"`
	Layer   artifact.EncodedLayer `json:"layer"`
	Places  []string              `json:"places"` // that had it, the latest first
}

func (r *Record) key(source digest.Digest, o artifact.EncodeOptions) (string, bool) {
	if r == nil || source.Validate() != nil {
		return "", false
	}
	return digest.FromString(o.ID()).Encoded()[:16] + "/" + source.Algorithm().String() + "-" + source.Encoded(), true
}

func (r *Record) get(ctx context.Context, source digest.Digest, o artifact.EncodeOptions) (recordEntry, bool) {
	key, ok := r.key(source, o)
	if !ok {
		return recordEntry{}, false
	}
	raw, ok := r.store.Get(ctx, key)
	var e recordEntry
	if !ok || json.Unmarshal(raw, &e) != nil || e.Source != source || e.Options != o.ID() || e.Layer.Digest.Validate() != nil {
		return recordEntry{}, false
	}
	return e, true
}

// put records a layer.
func (r *Record) put(ctx context.Context, source digest.Digest, o artifact.EncodeOptions, l artifact.EncodedLayer, place string) {
	key, ok := r.key(source, o)
	if !ok {
		return
	}
	e := recordEntry{Source: source, Options: o.ID(), Layer: l, Places: []string{place}}
	if old, ok := r.get(ctx, source, o); ok && old.Layer.Digest == l.Digest {
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
	r.store.Put(ctx, key, append(raw, '\n'))
}

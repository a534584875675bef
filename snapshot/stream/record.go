package stream

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/mapped"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
)

const (
	recordVersion = 1
	recordName    = "image.json"
)

// record is what the node keeps of an image: all that mounting it takes, but for its indexes.
type record struct {
	Version    int                       `json:"version"`
	Artifact   digest.Digest             `json:"artifact"`         // of the artifact's manifest
	Manifest   digest.Digest             `json:"manifest"`         // of the image's platform manifest
	Config     digest.Digest             `json:"config,omitempty"` // of the image's config: the image's ID for CRI. Releases before it wrote none
	Repository registryclient.Repository `json:"repository"`       // where its blobs are read: that of its first pull
	ChainIDs   []digest.Digest           `json:"chainIDs"`         // of the image's own config, bottom first
	DiffIDs    []digest.Digest           `json:"diffIDs"`          // likewise
	Layers     []artifact.Layer          `json:"layers"`
	Sources    []ocispec.Descriptor      `json:"sources,omitempty"`   // the image's own layers: type, digest, size. Releases before it wrote none
	Converter  string                    `json:"converter,omitempty"` // as the artifact claims

	Others []registryclient.Repository `json:"others,omitempty"` // where its blobs are read, too: see places.go
}

func loadRecord(dir string) (*record, error) {
	b, err := os.ReadFile(filepath.Join(dir, recordName))
	if err != nil {
		return nil, err
	}
	rec := &record{}
	if err := json.Unmarshal(b, rec); err != nil {
		return nil, err
	}
	if rec.Version != recordVersion {
		return nil, fmt.Errorf("%s is of version %d, this release knows %d", filepath.Join(dir, recordName), rec.Version, recordVersion)
	}
	if n := len(rec.Layers); n == 0 || len(rec.ChainIDs) != n || len(rec.DiffIDs) != n {
		return nil, fmt.Errorf("%s is damaged", filepath.Join(dir, recordName))
	}
	for _, d := range rec.digests() {
		if err := d.Validate(); err != nil {
			return nil, fmt.Errorf("%s is damaged: digest %q: %w", filepath.Join(dir, recordName), string(d), err)
		}
	}
	return rec, nil
}

func (rec *record) digests() []digest.Digest {
	list := slices.Concat([]digest.Digest{rec.Artifact, rec.Manifest}, rec.ChainIDs, rec.DiffIDs)
	for _, l := range rec.Layers {
		list = append(list, l.Digest, l.IndexDigest, l.Source)
	}
	for _, d := range rec.Sources {
		list = append(list, d.Digest)
	}
	if rec.Config != "" {
		list = append(list, rec.Config)
	}
	return list
}

// Origin is one of the repositories where an image's blobs are read.
type Origin struct {
	Repository registryclient.Repository
	Config     digest.Digest // of the image's config; "" if that is not known, of what older releases have recorded
}

// Origins lists those of all images on disk. An error says that there may be others.
func (s *Store) Origins() (list []Origin, err error) {
	dirs, err := os.ReadDir(filepath.Join(s.o.Root, "images"))
	for _, d := range dirs {
		rec, loadErr := loadRecord(s.imageDir(d.Name()))
		if errors.Is(loadErr, os.ErrNotExist) {
			continue // it goes, or does not come
		}
		if loadErr != nil {
			err = errors.Join(err, loadErr)
			continue
		}
		for _, repo := range append([]registryclient.Repository{rec.Repository}, rec.Others...) {
			list = append(list, Origin{repo, rec.Config})
		}
	}
	return list, err
}

// save makes the record durable: snapshots refer to it, and a node must be able to mount them again without a registry.
func (rec *record) save(dir string) error {
	b, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := ledger.WriteFile(dir, recordName, b); err != nil {
		return err
	}
	return ledger.SyncDir(filepath.Dir(dir))
}

// mapIndex maps, verifies and decodes the index file at path against what the artifact's manifest says of layer l. The
// map lives as long as the Index: a reader that comes late, after an unmount that was only lazy, still finds it.
func mapIndex(path string, l artifact.Layer) (*artifact.Index, error) {
	return mapDecoded(path, l.Index)
}

func indexPath(root string, index digest.Digest) string {
	return filepath.Join(root, "indexes", index.Encoded())
}

// Indexes returns what opens the indexes that a Store in root has, by digest: cache.Options.Index. What is read with them is verified otherwise.
func Indexes(root string) func(dgst digest.Digest) (*artifact.Index, error) {
	return func(dgst digest.Digest) (*artifact.Index, error) {
		return mapDecoded(indexPath(root, dgst), artifact.DecodeIndex)
	}
}

func mapDecoded(path string, decode func([]byte) (*artifact.Index, error)) (*artifact.Index, error) {
	mem, err := mapFile(path)
	if err != nil {
		return nil, err
	}
	x, err := decode(mem)
	if err != nil {
		unix.Munmap(mem)
		return nil, err
	}
	runtime.AddCleanup(x, func(mem []byte) { unix.Munmap(mem) }, mem)
	return x, nil
}

// verifyMetadata reads the metadata image at path and compares it with its own digest.
func verifyMetadata(path string) error {
	mem, err := mapFile(path)
	if err != nil {
		return err
	}
	defer unix.Munmap(mem)
	m, err := erofs.Open(mem)
	if err != nil {
		return err
	}
	return m.Verify()
}

func mapFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return mapped.Open(f)
}

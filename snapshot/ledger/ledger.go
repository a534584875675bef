// Package ledger remembers, durably, which layers were proven on this node and which artifacts are in quarantine.
//
// A layer is proven when its tar, as the artifact's index has it, hashes to the diffID of the image's own config, and its headers are the index's. What was proven is the pair of the two
// digests: another index may claim the same diffID and lie. A pair stays proven for ever, whatever the cache gives back, because each chunk is verified with an index that was proven. An index that was
// found to lie is in quarantine until somebody clears it, whatever images name it.
//
// On disk, below the directory of a Ledger, each file the JSON of a Proof or a Quarantine with a version, written whole or not at all, mode 0600:
//
//	proven/<hex of the diffID>/<hex of the index's digest>
//	quarantined/<hex of the index's digest>
//
// What cannot be read is taken for what is safe: a proof is none, a quarantine is one. Fields that are not known are ignored, and a newer version stays and counts like what cannot be read.
//
// The package proves nothing and knows no registries, mounts or images.
package ledger

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	version = 1

	// maxProofs bounds the proofs that Retain leaves, and unusedFor says how long one of what no image uses stays: an image that comes back is not proven twice.
	maxProofs = 65_536
	unusedFor = 90 * 24 * time.Hour

	tmpInfix = ".tmp" // in the names of files that are being written
)

// Key names what is proven: a tar, and the index of it.
type Key struct {
	DiffID digest.Digest `json:"diffID"`
	Index  digest.Digest `json:"index"`
}

// Proof says that the tar of an index is that of a diffID.
type Proof struct {
	Key
	At         time.Time     `json:"at"`
	Bytes      int64         `json:"bytes"`              // of the tar
	Artifact   digest.Digest `json:"artifact,omitempty"` // that it was proven of, by its manifest
	Manifest   digest.Digest `json:"manifest,omitempty"` // of the image's platform manifest
	Repository string        `json:"repository,omitempty"`
}

// Quarantine says that an index lies, and what is known of whom it came from.
type Quarantine struct {
	Key
	At         time.Time     `json:"at"`
	Artifact   digest.Digest `json:"artifact,omitempty"`
	Manifest   digest.Digest `json:"manifest,omitempty"`
	Repository string        `json:"repository,omitempty"`
	Signer     string        `json:"signer,omitempty"`    // "" if nobody's signature was checked
	Converter  string        `json:"converter,omitempty"` // as the artifact claims
	Why        string        `json:"why"`                 // the first difference
}

// file is what a file holds.
type file[T any] struct {
	Version int `json:"version"`
	Entry   T   `json:"entry"`
}

// Ledger is safe for concurrent use. Questions are answered from memory.
type Ledger struct {
	dir string
	log *slog.Logger

	writing sync.Mutex // one change of the disk at a time. LOCK ORDER: before mu

	mu          sync.Mutex
	proven      map[Key]Proof
	quarantined map[digest.Digest]Quarantine // by index
	unsaved     map[digest.Digest]bool       // quarantines that the disk has refused
}

// Open opens or creates the ledger in dir. It fails only if dir cannot be made or listed. log may be nil.
func Open(dir string, log *slog.Logger) (*Ledger, error) {
	l := &Ledger{
		dir: dir, log: cmp.Or(log, slog.Default()),
		proven: map[Key]Proof{}, quarantined: map[digest.Digest]Quarantine{}, unsaved: map[digest.Digest]bool{},
	}
	for _, d := range []string{l.provenDir(), l.quarantinedDir()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("open ledger: %w", err)
		}
	}
	if err := errors.Join(l.loadProofs(), l.loadQuarantines()); err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	return l, nil
}

func (l *Ledger) provenDir() string      { return filepath.Join(l.dir, "proven") }
func (l *Ledger) quarantinedDir() string { return filepath.Join(l.dir, "quarantined") }

func (l *Ledger) proofDir(diffID digest.Digest) string {
	return filepath.Join(l.provenDir(), diffID.Encoded())
}

func (l *Ledger) loadProofs() error {
	dirs, err := os.ReadDir(l.provenDir())
	if err != nil {
		return err
	}
	for _, d := range dirs {
		dir := filepath.Join(l.provenDir(), d.Name())
		files, err := os.ReadDir(dir)
		if err != nil {
			l.log.Warn("proofs cannot be read: these layers are proven again", "dir", dir, "error", err)
			continue
		}
		for _, f := range files {
			path := filepath.Join(dir, f.Name())
			if removeTmp(path) {
				continue
			}
			k := Key{fromName(d.Name()), fromName(f.Name())}
			p, err := read[Proof](path)
			if err == nil && (p.Key != k || k.validate() != nil) {
				err = errors.New("it is of another layer than its name says")
			}
			if err != nil {
				l.log.Warn("a proof cannot be read: the layer is proven again", "file", path, "error", err)
				continue
			}
			l.proven[k] = p
		}
	}
	return nil
}

func (l *Ledger) loadQuarantines() error {
	files, err := os.ReadDir(l.quarantinedDir())
	if err != nil {
		return err
	}
	for _, f := range files {
		path := filepath.Join(l.quarantinedDir(), f.Name())
		index := fromName(f.Name())
		if removeTmp(path) || index.Validate() != nil {
			continue // a file of somebody else's
		}
		q, err := read[Quarantine](path)
		if err == nil && q.Index != index {
			err = errors.New("it is of another index than its name says")
		}
		if err != nil {
			l.log.Warn("the record of a quarantine cannot be read: the quarantine stands", "file", path, "error", err)
			q = Quarantine{Key: Key{Index: index}, Why: fmt.Sprintf("the record of the quarantine cannot be read: %v", err)}
		}
		l.quarantined[index] = q
	}
	return nil
}

// fromName returns the digest whose hex names a file.
func fromName(name string) digest.Digest { return digest.NewDigestFromEncoded(digest.SHA256, name) }

// validate refuses what does not name a file: digests come from manifests.
func (k Key) validate() error {
	for _, d := range []digest.Digest{k.DiffID, k.Index} {
		if err := d.Validate(); err != nil {
			return fmt.Errorf("digest %q: %w", string(d), err)
		}
		if d.Algorithm() != digest.SHA256 {
			return fmt.Errorf("digest %q: not SHA-256", string(d))
		}
	}
	return nil
}

func removeTmp(path string) bool {
	if !strings.Contains(filepath.Base(path), tmpInfix) {
		return false
	}
	os.Remove(path) // of a process that was killed
	return true
}

func read[T any](path string) (entry T, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return entry, err
	}
	var f file[T]
	if err := json.Unmarshal(b, &f); err != nil {
		return entry, err
	}
	if f.Version != version {
		return entry, fmt.Errorf("version %d, this release knows %d", f.Version, version)
	}
	return f.Entry, nil
}

func write[T any](dir, name string, entry T) error {
	b, err := json.Marshal(file[T]{version, entry})
	if err != nil {
		return err
	}
	if err = os.Mkdir(dir, 0o700); err == nil {
		err = SyncDir(filepath.Dir(dir))
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return WriteFile(dir, name, b)
}

// Proven reports whether k was proven, and is not in quarantine.
func (l *Ledger) Proven(k Key) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, ok := l.proven[k]
	_, bad := l.quarantined[k.Index]
	return ok && !bad
}

// Prove enters p. It is durable before Proven says so; an error leaves the layer unproven.
func (l *Ledger) Prove(p Proof) error {
	if err := p.validate(); err != nil {
		return fmt.Errorf("enter a proof: %w", err)
	}
	l.writing.Lock()
	defer l.writing.Unlock()
	if err := write(l.proofDir(p.DiffID), p.Index.Encoded(), p); err != nil {
		return fmt.Errorf("enter the proof of %s: %w", p.DiffID, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.proven[p.Key] = p
	return nil
}

// Quarantined returns the quarantine of an index, if it is in one.
func (l *Ledger) Quarantined(index digest.Digest) (Quarantine, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	q, ok := l.quarantined[index]
	return q, ok
}

// Quarantine enters q. It counts at once, even if the disk refuses it, which is the error: Save tries again. The quarantine that an index has already stands.
func (l *Ledger) Quarantine(q Quarantine) error {
	if err := q.validate(); err != nil {
		return fmt.Errorf("enter a quarantine: %w", err)
	}
	l.mu.Lock()
	if _, ok := l.quarantined[q.Index]; !ok {
		l.quarantined[q.Index] = q
		l.unsaved[q.Index] = true
	}
	l.mu.Unlock()
	return l.Save()
}

// Save writes the quarantines that the disk has refused. Nothing is written if there are none.
func (l *Ledger) Save() error {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.mu.Lock()
	var list []Quarantine
	for index := range l.unsaved {
		list = append(list, l.quarantined[index])
	}
	l.mu.Unlock()
	var errs []error
	for _, q := range list {
		if err := write(l.quarantinedDir(), q.Index.Encoded(), q); err != nil {
			errs = append(errs, fmt.Errorf("enter the quarantine of %s: %w", q.Index, err))
			continue
		}
		l.mu.Lock()
		delete(l.unsaved, q.Index)
		l.mu.Unlock()
	}
	return errors.Join(errs...)
}

// Clear ends the quarantine of an index, which is then proven anew; fs.ErrNotExist if there is none.
func (l *Ledger) Clear(index digest.Digest) error {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.mu.Lock()
	_, ok := l.quarantined[index]
	var proofs []Key // it was entered after them, and need not say of which tar they are
	for k := range l.proven {
		if k.Index == index {
			proofs = append(proofs, k)
		}
	}
	l.mu.Unlock()
	if !ok {
		return fmt.Errorf("index %s is in no quarantine: %w", index, fs.ErrNotExist)
	}
	for _, k := range proofs { // while the quarantine stands: a proof that is known to be wrong must not be what is left
		if err := remove(l.proofDir(k.DiffID), index); err != nil {
			return fmt.Errorf("clear the quarantine of %s: its proof: %w", index, err)
		}
		l.mu.Lock()
		delete(l.proven, k)
		l.mu.Unlock()
	}
	if err := remove(l.quarantinedDir(), index); err != nil {
		return fmt.Errorf("clear the quarantine of %s: %w", index, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.quarantined, index)
	delete(l.unsaved, index)
	return nil
}

// remove removes the file of an index in dir, durably, if it is there.
func remove(dir string, index digest.Digest) error {
	err := os.Remove(filepath.Join(dir, index.Encoded()))
	if err == nil {
		err = SyncDir(dir)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Count returns how many proofs and how many quarantines are entered.
func (l *Ledger) Count() (proofs, quarantines int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.proven), len(l.quarantined)
}

// List returns what is entered, oldest first.
func (l *Ledger) List() (proofs []Proof, quarantines []Quarantine) {
	l.mu.Lock()
	for _, p := range l.proven {
		proofs = append(proofs, p)
	}
	for _, q := range l.quarantined {
		quarantines = append(quarantines, q)
	}
	l.mu.Unlock()
	slices.SortFunc(proofs, func(a, b Proof) int { return cmp.Or(a.At.Compare(b.At), cmp.Compare(a.Index, b.Index)) })
	slices.SortFunc(quarantines, func(a, b Quarantine) int { return cmp.Or(a.At.Compare(b.At), cmp.Compare(a.Index, b.Index)) })
	return proofs, quarantines
}

// Retain drops proofs of what is not used, when they are 90 days old, and the oldest of more than 65,536; never a quarantine. What cannot be removed comes back with the next Open.
func (l *Ledger) Retain(used func(Key) bool) {
	l.writing.Lock()
	defer l.writing.Unlock()
	proofs, _ := l.List()
	over := len(proofs) - maxProofs
	for _, p := range proofs {
		if used(p.Key) || over <= 0 && time.Since(p.At) < unusedFor {
			continue
		}
		over--
		l.mu.Lock()
		delete(l.proven, p.Key)
		l.mu.Unlock()
		os.Remove(filepath.Join(l.proofDir(p.DiffID), p.Index.Encoded()))
		os.Remove(l.proofDir(p.DiffID)) // if it is empty
	}
}

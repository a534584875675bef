package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/pelletier/go-toml/v2"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/criproxy"
	nodefs "github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// Safe mode. A daemon that has failed to start maxFailedStarts times running starts as what it can be without its own parts: a plain overlay
// snapshotter, so that images are pulled and run in the normal way. Containers and images that are there go on as far as the parts that
// work allow. The start after that one is a normal one again, and if it fails, the next is safe again. Where somebody keeps descriptors, who runs
// the daemon again too, it ends after safeFor for that: what is mended, or was a killer's doing, needs no command.

const (
	// maxFailedStarts is how many starts fail before one is safe.
	maxFailedStarts = 3
	// safeFor is how long safe mode lasts. A start that fails after it costs a second in which containerd's calls wait.
	safeFor = 10 * time.Minute
)

// starts counts failed starts in a file of root. One that is lost or damaged, or another program's, says that none have failed: an upgrade that does not start is no reason
// for the program that is put back to be safe.
type starts struct {
	path string
	startRecord
}

// startRecord is the file, as JSON.
type startRecord struct {
	Failed  int    `json:"failed"` // starts running
	Reason  string `json:"reason"` // of the last one
	Program string `json:"program"`
}

// thisProgram names the file that runs: one that is put in its place is another.
func thisProgram() string {
	var st unix.Stat_t
	if unix.Stat("/proc/self/exe", &st) != nil {
		return ""
	}
	return fmt.Sprintf("%d:%d:%d", st.Dev, st.Ino, st.Ctim.Nano())
}

func readStarts(root string) *starts {
	s := &starts{path: filepath.Join(root, "failed-starts")}
	b, err := os.ReadFile(s.path)
	if err == nil && json.Unmarshal(b, &s.startRecord) != nil || s.Program != thisProgram() {
		s.startRecord = startRecord{}
	}
	return s
}

// begin says whether the start that begins now is safe, and why. It counts as failed, as long as nothing else is said: who dies cannot.
func (s *starts) begin() (safe string, err error) {
	if s.Failed >= maxFailedStarts {
		return s.Reason, nil
	}
	return "", s.write(s.Failed+1, "the daemon ended while it was starting")
}

// failed says why the start that has begun came to nothing.
func (s *starts) failed(why error) error { return s.write(s.Failed, why.Error()) }

// succeeded forgets the failures; after a safe start all but the last.
func (s *starts) succeeded(safe bool) error {
	if safe {
		return s.write(maxFailedStarts-1, s.Reason)
	}
	if err := os.Remove(s.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (s *starts) write(failed int, reason string) error {
	s.startRecord = startRecord{failed, reason, thisProgram()}
	b, err := json.Marshal(s.startRecord)
	if err != nil {
		return err
	}
	if err := os.WriteFile(s.path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(s.path+".new", s.path)
}

// salvage makes a configuration of the defaults and of those lines of a damaged file that are right by themselves: with another root the daemon would have
// other snapshots, with another address it would not be found, and with another cache_size chunks in use would go.
func salvage(file string) config {
	c := defaults()
	b, err := os.ReadFile(file)
	if err != nil {
		return c
	}
	for line := range strings.Lines(string(b)) {
		with := c
		if toml.NewDecoder(strings.NewReader(line)).DisallowUnknownFields().Decode(&with) == nil && with.validate() == nil {
			c = with
		}
	}
	return c
}

// configured is the configuration with which the daemon serves: of a damaged file what can be used.
func configured(file string) config {
	c, err := loadConfig(file)
	if err != nil {
		c = salvage(cmp.Or(file, defaultConfig))
	}
	return c
}

// attempt makes a panic of f an error, a fault in a mapped file included.
func attempt[T any](f func() (T, error)) (v T, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			slog.Error("panic", "value", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return f()
}

// startSafe opens what can be opened, in safe mode for why. Nothing is streamed that is not there already, and what is there is held against the policy as ever.
func startSafe(c config, why string, keep nodefs.Keeper, cri *criproxy.Store, log *slog.Logger, onPull func(snapshot.Pull), onProof func(stream.Proof)) (*node, *snapshot.Snapshotter, error) {
	safe := reason.New(reason.SafeMode, fmt.Errorf("the daemon is in safe mode, in which nothing new is streamed: %s", why))
	g, err := c.gate(revocations(c.Root))
	if err != nil {
		log.Error("signatures cannot be checked: what is streamed already and was signed is used as before", "error", err)
	}
	g.allow = func(registryclient.Repository) error { return safe }
	n, err := attempt(func() (*node, error) { return newNode(c, g, keep, false, cri, onProof) })
	var images snapshot.Images = noImages{safe, c.trust()}
	if err != nil {
		log.Error("streamed images cannot be used until the daemon is restarted without this error", "error", err)
		n = &node{cri: cri}
		if err := n.openRegistry(c); err != nil { // with which the layers of what cannot be mounted are unpacked
			log.Error("what of streamed images is not on the node cannot be fetched in the normal way either", "error", err)
		}
	} else {
		images = n.images
	}
	start := func() (*snapshot.Snapshotter, error) { return n.snapshotter(c, images, log, onPull) }
	sn, err := attempt(start)
	if err == nil {
		return n, sn, nil
	}
	damage := damageOf(filepath.Join(c.Root, "metadata.db"))
	if damage == nil {
		return n, nil, err
	}
	aside, asideErr := setAside(c.Root)
	if asideErr != nil {
		return n, nil, errors.Join(err, asideErr)
	}
	log.Error("the database of snapshots is damaged: images have to be removed and pulled again, and containers made again; what they wrote is kept",
		"error", err, "damage", damage, "kept_in", aside)
	sn, err = attempt(start)
	return n, sn, err
}

// damageOf says what is wrong with the content of the database at path; nil if nothing is, or it cannot be read. It looks at a copy, because a
// database that panicked stays open, and locked.
func damageOf(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	dir, err := os.MkdirTemp("", "streaming-snapshotter-damage-")
	if err != nil {
		return nil
	}
	defer os.RemoveAll(dir)
	name := filepath.Join(dir, "metadata.db")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		return nil
	}
	_, err = attempt(func() (struct{}, error) {
		db, err := bolt.Open(name, 0o600, &bolt.Options{ReadOnly: true, PreLoadFreelist: true})
		if err != nil {
			return struct{}{}, err
		}
		defer db.Close()
		return struct{}{}, db.View(func(tx *bolt.Tx) error {
			var damage error
			for err := range tx.Check() {
				damage = errors.Join(damage, err)
			}
			return damage
		})
	})
	return err
}

// setAside moves the database and the directories of its snapshots, which a new database would number anew, out of the way. What is mounted
// there stays mounted.
func setAside(root string) (string, error) {
	aside := filepath.Join(root, "damaged-"+time.Now().UTC().Format("20060102T150405.000"))
	if err := os.Mkdir(aside, 0o700); err != nil {
		return "", err
	}
	for _, name := range []string{"metadata.db", "snapshots"} {
		if err := os.Rename(filepath.Join(root, name), filepath.Join(aside, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
	}
	return aside, nil
}

// noImages is what the snapshotter has of streamed images when they cannot be used.
type noImages struct {
	why   error
	rules trust.Rules
}

func (no noImages) Find(context.Context, string, digest.Digest) (string, []digest.Digest, error) {
	return "", nil, no.why
}
func (no noImages) Mount(context.Context, string, int, string) error { return no.why }
func (no noImages) Usable(string) error                              { return no.why } // the image's own layers are unpacked instead
func (noImages) Pulled(string, string) error                         { return nil }
func (no noImages) Vet(context.Context, string) error {
	if no.rules.Has(trust.Signed) || no.rules.Has(trust.Proven) {
		return no.why // nobody can say what is mounted
	}
	return nil
}
func (no noImages) Source(context.Context, string, int) (string, ocispec.Descriptor, digest.Digest, error) {
	return "", ocispec.Descriptor{}, "", no.why
}
func (noImages) Unmount(string) error                              { return nil }
func (noImages) Mounted(string) bool                               { return true } // for all that is known: nothing is detached
func (noImages) Forget(string) error                               { return nil }
func (noImages) Retain(func(string) bool) error                    { return nil }
func (noImages) Blobs(string, int) []digest.Digest                 { return nil }
func (noImages) Usage(string, int, []digest.Digest) (int64, error) { return 0, nil }

package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// A streamed snapshot may become one that must not be used, because its artifact is in quarantine, or was let in by another policy than that of today. containerd never asks for a chain that it has: it pulls
// nothing again, and whatever is started or pulled on the snapshot comes here. So the image's own layers are unpacked, those of such snapshots that are below, each over the ones below it: from then on they are plain overlay,
// but for the place where their files are. So are layers that were unpacked on such a snapshot before, see stale. The same containerd does it that does it in a pull, and has the privileges that it takes, which this process has not. What runs goes on with what it had mounted.
//
// A layer is made beside its place, with what it takes on disk in a file, and moved there at once. What a killed daemon leaves is removed at the next start.
//
// While a call waits, containerd holds a lock that its garbage collection wants, for which all other calls that make snapshots wait then. So a call waits no longer than Wait, whatever a registry does: its error says
// that it is to be tried again, as the kubelet does, and what it has waited for goes on.
const (
	// Wait is the default of Snapshotter.Wait. A pull's Prepare may wait as long once more for a search (stream.Options.PullWait), and others for that: together less than the two minutes that the kubelet gives to make a container.
	Wait = 50 * time.Second
	// unpacksAtOnce is how many layers are unpacked at a time: nobody pulls many at once in the normal way either.
	unpacksAtOnce = 2

	unpackedName   = "unpacked"   // in the directory of a snapshot: fs, the layer's files, usage, and on
	unpackingInfix = "unpacking-" // the same in the making, with work, overlay's
	replacedInfix  = "replaced-"  // the same before it was unpacked once more: what runs may have it mounted
	usageName      = "usage"      // snapshots.Usage in JSON
)

// Layer is a layer that is to be unpacked, and where it can be had.
type Layer struct {
	ChainID digest.Digest
	Number  int // of its image, from 0
	// Ref and Manifest are of the image whose pull it is unpacked for; "" for a container's start.
	Ref      string
	Manifest digest.Digest
	// Source has the layer as that image has it that it was streamed for, and nothing for one that was not. It may be gone, or in the hands of whoever attached the artifact.
	Source Source
}

// Source is one of an image's own layers.
type Source struct {
	Ref    string             // repository@digest; "" if it is not known
	Layer  ocispec.Descriptor // type, digest, size
	DiffID digest.Digest      // as the image's config lists it
}

type unpacking struct {
	done chan struct{}
	err  error
}

// ready sees to it that what name stands on is there, and has nothing of what must not be used, for what is prepared as key with the labels l: the topmost streamed snapshot that is not unpacked is mounted, and is returned, nil if there is none.
// Of the image not nothing is asked for once more that must not be used.
func (s *Snapshotter) ready(ctx context.Context, key, name string, l labels, not string) (base *streamedSnapshot, err error) {
	for {
		if base, err = s.streamedBase(ctx, name); err != nil {
			return nil, err
		}
		sn := base
		if base != nil {
			if err = s.images.Usable(base.image); err == nil || base.image != not && !s.unpacking(base.id) {
				err = s.mount(ctx, base, s.Unpack == nil && unpacks(key)) // what is unpacked onto what is not trusted has its directories' modes and owners
			}
			if err != nil && (s.Unpack == nil || ctx.Err() != nil || s.images.Usable(base.image) == nil) {
				return base, err
			}
		}
		if err == nil {
			if sn, err = s.stale(ctx, name); err != nil || sn == nil {
				return base, err
			}
			err = errStale
		}
		if unpackErr := s.unpack(ctx, sn, l, err); unpackErr != nil {
			return nil, fmt.Errorf("%w; nor can the image's own layers be unpacked: %w", err, unpackErr)
		}
	}
}

// unpacking reports whether the layer of snapshot id is being unpacked.
func (s *Snapshotter) unpacking(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.unpacks[id] != nil
}

// unpack unpacks the layer of sn and those below it that it takes, once for all who want it at a time, and goes on when nobody waits any more: they ask again.
func (s *Snapshotter) unpack(ctx context.Context, sn *streamedSnapshot, l labels, why error) error {
	if s.Unpack == nil {
		return errors.New("nothing is here that unpacks them")
	}
	s.mu.Lock()
	u := s.unpacks[sn.id]
	if u == nil && s.closed {
		s.mu.Unlock()
		return errors.New("the daemon is stopping")
	}
	if u == nil {
		u = &unpacking{done: make(chan struct{})}
		s.unpacks[sn.id] = u
		own, cancel := context.WithCancel(context.WithoutCancel(ctx))
		stop := context.AfterFunc(s.ctx, cancel)
		s.running.Go(func() {
			defer close(u.done)
			defer cancel()
			defer stop()
			u.err = s.unpackNow(own, sn, l, why)
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.unpacks, sn.id)
		})
	}
	s.mu.Unlock()
	select {
	case <-u.done:
		return u.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Snapshotter) unpackNow(ctx context.Context, sn *streamedSnapshot, l labels, why error) (err error) {
	if s.unpackedAt(sn.id) != "" {
		if again, err := s.isStale(sn.id); err != nil || !again {
			return err
		}
	}
	if _, err := s.ready(ctx, "", sn.parent, l, sn.image); err != nil {
		return err
	}
	lower, on, err := s.lowerDirs(ctx, sn.parent)
	if err != nil {
		return err
	}
	began := time.Now()
	layer := Layer{ChainID: digest.Digest(sn.ref), Number: sn.layers - 1}
	if l.check() == nil {
		layer.Ref, layer.Manifest = l.ref, l.manifest
	}
	log := s.log.With("image", sn.image, "layer", layer.Number, "chain", sn.ref)
	if sn.image == "" {
		// Images that containerd has say where it is.
	} else if layer.Source.Ref, layer.Source.Layer, layer.Source.DiffID, err = s.images.Source(ctx, sn.image, layer.Number); err != nil {
		log.Warn("where a layer's image is from is not known; others that have it are asked", "error", err)
	}
	dir := ""
	defer func() {
		if dir != "" {
			err = errors.Join(err, os.RemoveAll(dir)) // unless it is in its place
		}
	}()
	err = s.Unpack(ctx, layer, func(do func([]mount.Mount) error) (err error) {
		select {
		case s.slots <- struct{}{}:
			defer func() { <-s.slots }()
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := os.RemoveAll(dir); err != nil { // what a try before has left
			return err
		}
		if dir, err = os.MkdirTemp(filepath.Dir(s.fsPath(sn.id)), unpackingInfix); err != nil {
			return err
		}
		mounts, err := layerMounts(dir, lower)
		if err == nil {
			err = noteOn(dir, on)
		}
		if err != nil {
			return err
		}
		return do(mounts)
	})
	if err == nil {
		err = s.place(sn, dir)
	}
	if err == nil {
		log.Warn("a layer was unpacked in the place of what must not be used", "took", time.Since(began), "why", why)
	}
	return err
}

// layerMounts makes the directories of a layer in dir, and returns what it is to be unpacked into, as upstream would.
func layerMounts(dir string, lower []string) ([]mount.Mount, error) {
	files, work := filepath.Join(dir, "fs"), filepath.Join(dir, "work")
	if err := errors.Join(os.Mkdir(files, 0o755), os.Mkdir(work, 0o711)); err != nil {
		return nil, err
	}
	if len(lower) == 0 {
		return []mount.Mount{{Type: "bind", Source: files, Options: []string{"rw", "rbind"}}}, nil
	}
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"workdir=" + work, "upperdir=" + files, "lowerdir=" + strings.Join(lower, ":")}}}, nil
}

// lowerDirs lists the directories of name and its ancestors, top first, down to a streamed snapshot that is mounted, on, which has all below it.
func (s *Snapshotter) lowerDirs(ctx context.Context, name string) (dirs []string, on string, err error) {
	if name == "" {
		return nil, "", nil
	}
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		for name != "" {
			id, info, _, err := storage.GetInfo(ctx, name)
			if err != nil {
				return err
			}
			sn, err := parseStreamed(id, info)
			if err != nil {
				return err
			}
			at := s.unpackedAt(id)
			if sn != nil && at == "" {
				dirs, on = append(dirs, s.fsPath(id)), id
				return nil
			}
			if at == "" {
				at = s.fsPath(id)
			}
			dirs = append(dirs, at)
			name = info.Parent
		}
		return nil
	})
	return dirs, on, err
}

// place has the layer of sn that was unpacked in dir be the one that is used.
func (s *Snapshotter) place(sn *streamedSnapshot, dir string) error {
	usage, err := usageOf(filepath.Join(dir, "fs"))
	if err != nil {
		return err
	}
	b, err := json.Marshal(usage)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, usageName), b, 0o600)
	}
	if err == nil {
		err = os.RemoveAll(filepath.Join(dir, "work"))
	}
	if err == nil {
		err = syncFS(dir)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err != nil:
		return err
	case s.streamed[sn.id] == nil && sn.image != "":
		return fmt.Errorf("streamed snapshot %s was removed", sn.ref)
	}
	at := filepath.Join(filepath.Dir(dir), unpackedName)
	if _, again := s.unpacked[sn.id]; again {
		aside := filepath.Join(filepath.Dir(dir), strings.Replace(filepath.Base(dir), unpackingInfix, replacedInfix, 1))
		if err := os.Rename(at, aside); err != nil {
			return err
		}
		delete(s.unpacked, sn.id)
	}
	if err := os.Rename(dir, at); err != nil {
		return err
	}
	s.unpacked[sn.id] = usage
	return nil // if a power loss undoes it, it is done again
}

// unpackedAt returns where the files of the layer of snapshot id are if it is unpacked, or "".
func (s *Snapshotter) unpackedAt(id string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, is := s.unpacked[id]; !is {
		return ""
	}
	return filepath.Join(filepath.Dir(s.fsPath(id)), unpackedName, "fs")
}

// loadUnpacked reads whether the layer of snapshot id was unpacked, and removes what was half. What cannot be read is taken for no: it is unpacked again.
func (s *Snapshotter) loadUnpacked(id, name string) error {
	parent := filepath.Dir(s.fsPath(id))
	left, err := filepath.Glob(filepath.Join(parent, unpackingInfix+"*"))
	for _, dir := range left {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	if err != nil {
		s.log.Warn("what a killed daemon has half unpacked stays until the next start", "snapshot", name, "error", err)
	}
	dir := filepath.Join(parent, unpackedName)
	b, err := os.ReadFile(filepath.Join(dir, usageName))
	var usage snapshots.Usage
	if err == nil {
		err = json.Unmarshal(b, &usage)
	}
	if err != nil {
		return os.RemoveAll(dir)
	}
	s.unpacked[id] = usage
	return nil
}

// atUnpacked puts the places of unpacked layers into upstream's mounts.
func (s *Snapshotter) atUnpacked(mounts []mount.Mount) {
	replace := func(dir string) string {
		if id := filepath.Base(filepath.Dir(dir)); s.fsPath(id) == dir {
			if at := s.unpackedAt(id); at != "" {
				return at
			}
		}
		return dir
	}
	for i, m := range mounts {
		mounts[i].Source = replace(m.Source)
		for j, o := range m.Options {
			if list, ok := strings.CutPrefix(o, "lowerdir="); ok {
				dirs := strings.Split(list, ":")
				for k, d := range dirs {
					dirs[k] = replace(d)
				}
				m.Options[j] = "lowerdir=" + strings.Join(dirs, ":")
			}
		}
	}
}

// usageOf returns what a tree takes on disk.
func usageOf(dir string) (u snapshots.Usage, err error) {
	seen := map[uint64]bool{}
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		if err != nil || seen[st.Ino] {
			return err
		}
		seen[st.Ino] = true
		u.Inodes++
		u.Size += st.Blocks * 512
		return nil
	})
	return u, err
}

// syncFS makes all durable that was written to the file system of path.
func syncFS(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return os.NewSyscallError("syncfs", unix.Syncfs(int(f.Fd())))
}

// Walk is upstream's, without the reference of what must not be used: containerd takes the first snapshot that it is shown with the one that it looks for, and there may be a good one beside it.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	s.mu.Lock() // before the transaction: nothing waits for it inside
	hidden := map[string]bool{}
	for _, sn := range s.streamed {
		if !s.mayServe(sn) {
			hidden[sn.name] = true
		}
	}
	s.mu.Unlock()
	return s.Snapshotter.Walk(ctx, func(ctx context.Context, info snapshots.Info) error {
		if hidden[info.Name] {
			delete(info.Labels, snapshots.LabelSnapshotRef) // of a map that was read for this
		}
		return fn(ctx, info)
	}, filters...)
}

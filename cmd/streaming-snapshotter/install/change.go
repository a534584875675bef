package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// file is a file as it was, or as it is to be.
type file struct {
	Path   string            `json:"path"`
	Absent bool              `json:"absent,omitempty"` // there is none
	Link   string            `json:"link,omitempty"`   // it is a symbolic link to this
	Mode   uint32            `json:"mode,omitempty"`   // of stat(2), without the type
	UID    int               `json:"uid"`
	GID    int               `json:"gid"`
	Time   time.Time         `json:"time,omitzero"` // of its last change; zero is now
	Xattrs map[string][]byte `json:"xattrs,omitempty"`
	Digest digest.Digest     `json:"digest,omitempty"` // of the content
	data   []byte
}

// regular is a file of root's.
func regular(path string, mode uint32, data []byte) file {
	return file{Path: path, Mode: mode, Digest: digest.FromBytes(data), data: data}
}

// same reports whether both have the same content, mode and owner.
func (f file) same(g file) bool {
	return f.Absent == g.Absent && f.Link == g.Link && f.Mode == g.Mode && f.UID == g.UID && f.GID == g.GID && f.Digest == g.Digest
}

// untouched reports whether what is at f.Path is all that f says.
func (f file) untouched() bool {
	is, err := readFile(f.Path)
	return err == nil && is.same(f) && is.Time.Equal(f.Time) && maps.EqualFunc(is.Xattrs, f.Xattrs, bytes.Equal)
}

// readFile reads what is at path, which may be nothing. Directories and devices are errors.
func readFile(path string) (f file, err error) {
	var st unix.Stat_t
	err = unix.Lstat(path, &st)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return file{Path: path, Absent: true}, nil
	}
	if err != nil {
		return f, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	f = file{Path: path, UID: int(st.Uid), GID: int(st.Gid)}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		f.Link, err = os.Readlink(path)
		return f, err
	case unix.S_IFREG:
	default:
		return f, fmt.Errorf("%s is no file", path)
	}
	f.Mode, f.Time = st.Mode&^unix.S_IFMT, time.Unix(st.Mtim.Unix())
	if f.data, err = os.ReadFile(path); err != nil {
		return f, err
	}
	f.Digest = digest.FromBytes(f.data)
	f.Xattrs, err = xattrsOf(path)
	return f, err
}

// xattrsOf returns none where the file system knows none.
func xattrsOf(path string) (map[string][]byte, error) {
	names := make([]byte, 64<<10) // the kernel's limit
	n, err := unix.Llistxattr(path, names)
	if errors.Is(err, unix.ENOTSUP) || err == nil && n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, &fs.PathError{Op: "listxattr", Path: path, Err: err}
	}
	xattrs := map[string][]byte{}
	for name := range strings.SplitSeq(strings.TrimRight(string(names[:n]), "\x00"), "\x00") {
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, &fs.PathError{Op: "getxattr", Path: path, Err: err}
		}
		xattrs[name] = value[:n]
	}
	return xattrs, nil
}

// temporary is where a file is made before it is put in its place: no glob of *.toml or systemd's finds it.
func temporary(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".streaming-snapshotter-new")
}

// put makes what is at f.Path what f says, by one rename, and syncs it. A directory that is missing is made.
func (f file) put() error {
	dir, tmp := filepath.Dir(f.Path), temporary(f.Path)
	if !f.Absent {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := f.tidy(); err != nil {
		return err
	}
	if f.Absent {
		if err := os.Remove(f.Path); errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			return nil
		} else if err != nil {
			return err
		}
		return SyncDir(dir)
	}
	if f.Link != "" {
		if err := errors.Join(os.Symlink(f.Link, tmp), os.Lchown(tmp, f.UID, f.GID)); err != nil {
			return err
		}
	} else if err := f.write(tmp); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	if err := os.Rename(tmp, f.Path); err != nil {
		return err
	}
	return SyncDir(dir)
}

// tidy removes what a put that was cut short has left.
func (f file) tidy() error {
	if err := os.Remove(temporary(f.Path)); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
		return err
	}
	return nil
}

func (f file) write(path string) error {
	w, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = w.Write(f.data)
	err = errors.Join(err, unix.Fchown(int(w.Fd()), f.UID, f.GID), unix.Fchmod(int(w.Fd()), f.Mode))
	for name, value := range f.Xattrs {
		if err2 := unix.Fsetxattr(int(w.Fd()), name, value, 0); err2 != nil {
			err = errors.Join(err, fmt.Errorf("set %s of %s: %w", name, path, err2))
		}
	}
	err = errors.Join(err, w.Sync(), w.Close())
	if err == nil && !f.Time.IsZero() {
		err = os.Chtimes(path, time.Time{}, f.Time)
	}
	return err
}

// SyncDir makes what was renamed or removed in a directory last.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// record is what the installer knows of a host, as JSON in a file of its directory. Contents are beside it, by digest.
type record struct {
	Version   int      `json:"version"`
	Before    []file   `json:"before"`    // what uninstall puts back: as it was before the first install
	Installed []file   `json:"installed"` // what is there instead
	Dirs      []string `json:"dirs"`      // made for them, the deepest last
	Root      string   `json:"root"`      // the daemon's directory
	Address   string   `json:"address"`   // and its socket
	CRIProxy  string   `json:"cri_proxy"` // and that of its proxy of CRI; "" is none
	Made      bool     `json:"made"`      // there was no Root before the first install
	Ended     bool     `json:"ended"`     // an uninstall has, but for the removal of Dirs and Root
	Change    *change  `json:"change,omitempty"`
}

// change is one under way: who finds it, undoes it.
type change struct {
	Before   []file   `json:"before"`
	After    []file   `json:"after"`  // what these are to be
	Theirs   int      `json:"theirs"` // so many of both, the last ones, are containerd's
	Dirs     []string `json:"dirs"`
	Fresh    bool     `json:"fresh"`             // the host had no daemon before, and nothing that it keeps
	Running  bool     `json:"running"`           // the daemon ran before
	Restart  []string `json:"restart,omitempty"` // the command that restarts containerd, if its configuration is changed
	Released bool     `json:"released"`          // containerd's files are put back, and no part of this any more
	Name     string   `json:"name"`              // of the snapshotter in it
	Root     string   `json:"root"`              // the daemon's directory
	Made     bool     `json:"made"`              // which was not there before
	Address  string   `json:"address"`           // and its socket
	CRI      string   `json:"cri_proxy"`         // and that of its proxy of CRI; "" is none
}

// store is the installer's directory.
type store struct {
	dir string
	record
}

const recordVersion = 1

func openStore(dir string) (*store, error) {
	s := &store{dir: dir}
	b, err := os.ReadFile(s.path("record.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &s.record)
	}
	if err == nil && s.Version != recordVersion {
		err = fmt.Errorf("version %d is a newer release's: use its program", s.Version)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.path("record.json"), err)
	}
	return s, nil
}

func (s *store) path(name string) string { return filepath.Join(s.dir, name) }

// installed reports whether something is installed.
func (s *store) installed() bool { return len(s.Installed) > 0 }

// write replaces the record.
func (s *store) write(r record) error {
	r.Version = recordVersion
	b, err := json.MarshalIndent(r, "", "  ")
	if err == nil {
		err = regular(s.path("record.json"), 0o600, b).put()
	}
	if err == nil {
		s.record = r
	}
	return err
}

// begin notes that files are to be changed, with all that is needed to undo it; c says what else is. From then on it is undone, unless commit comes.
func (s *store) begin(files []file, c change) error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	if err := SyncDir(filepath.Dir(s.dir)); err != nil {
		return err
	}
	_, err := os.Lstat(c.Root)
	c.Made, c.After = c.Fresh && errors.Is(err, fs.ErrNotExist), files
	for _, f := range files {
		was, err := readFile(f.Path)
		if err != nil {
			return err
		}
		if !was.Absent && was.Link == "" {
			if err := regular(s.path(was.Digest.Encoded()), 0o600, was.data).put(); err != nil {
				return err
			}
		}
		c.Before = append(c.Before, was)
		for dir := filepath.Dir(f.Path); !f.Absent; dir = filepath.Dir(dir) {
			if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
				break
			}
			if !slices.Contains(c.Dirs, dir) {
				c.Dirs = append(c.Dirs, dir)
			}
		}
	}
	for _, f := range files[len(files)-c.Theirs:] { // for takeBack
		if f.Digest == "" {
			continue
		}
		if err := regular(s.path(f.Digest.Encoded()), 0o600, f.data).put(); err != nil {
			return err
		}
	}
	slices.Sort(c.Dirs)
	r := s.record
	r.Change = &c
	return s.write(r)
}

// load returns f with its content.
func (s *store) load(f file) (_ file, err error) {
	if f.Absent || f.Link != "" {
		return f, nil
	}
	if f.data, err = os.ReadFile(s.path(f.Digest.Encoded())); err != nil {
		return f, err
	}
	if digest.FromBytes(f.data) != f.Digest {
		return f, fmt.Errorf("what is kept of %s is damaged: %s", f.Path, s.path(f.Digest.Encoded()))
	}
	return f, nil
}

// apply makes the files what they are to be. It can be done again.
func apply(ctx interface{ Err() error }, files []file) error {
	for _, f := range files {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := f.put(); err != nil {
			return err
		}
	}
	return nil
}

// undo puts back what the change has replaced. The change stays noted until forget: whatever else has to be done can be done again.
func (s *store) undo() error {
	return s.putBack(s.Change.Before)
}

// putBack leaves alone what is as it was: who watches it sees nothing, and a full disk takes it. What fails is tried once more, after the rest has made room.
func (s *store) putBack(files []file) error {
	var err error
	for range 2 {
		var errs []error
		for _, f := range slices.Backward(files) {
			errs = append(errs, s.putBackOne(f))
		}
		if err = errors.Join(errs...); err == nil {
			break
		}
	}
	return errors.Join(err, removeDirs(s.Change.Dirs))
}

func (s *store) putBackOne(f file) error {
	f, err := s.load(f)
	if err != nil {
		return err
	}
	if f.untouched() {
		return f.tidy()
	}
	return f.put()
}

// release puts containerd's files back, and leaves the rest of the change as it is. It can be done again.
func (s *store) release() error {
	c := *s.Change
	own := len(c.Before) - c.Theirs
	if err := s.putBack(c.Before[own:]); err != nil {
		return err
	}
	c.Before, c.After, c.Theirs, c.Released = c.Before[:own], c.After[:own], 0, true
	r := s.record
	r.Change = &c
	return s.write(r)
}

// removeDirs removes those that are empty.
func removeDirs(dirs []string) error {
	var errs []error
	for _, dir := range slices.Backward(dirs) {
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// forget ends a change that was undone.
func (s *store) forget() error {
	r := s.record
	r.Change = nil
	if !s.installed() {
		s.record = r
		return s.remove()
	}
	if err := s.write(r); err != nil {
		return err
	}
	return s.sweep()
}

// end ends the last change, an uninstall: nothing of it is undone any more, and what is left to do is removal.
func (s *store) end() error {
	return s.write(record{Dirs: s.Dirs, Root: s.Root, Made: s.Made, Ended: true})
}

// remove removes the directory, and the record first: without the rest of it, it would be of no use, and in the way.
func (s *store) remove() error {
	if err := (file{Path: s.path("record.json"), Absent: true}).put(); err != nil {
		return err
	}
	return os.RemoveAll(s.dir)
}

// commit ends a change that stands: its files are installed now.
func (s *store) commit() error {
	r := record{Before: slices.Clone(s.Before), Dirs: slices.Clone(s.Dirs), Root: s.Change.Root, Address: s.Change.Address, CRIProxy: s.Change.CRI, Made: s.Made || s.Change.Made}
	now := map[string]file{}
	for _, f := range append(slices.Clone(s.Installed), s.Change.After...) {
		now[f.Path] = f
	}
	for k, was := range s.Change.Before {
		at := slices.IndexFunc(r.Before, func(f file) bool { return f.Path == was.Path })
		if at < 0 {
			r.Before = append(r.Before, was)
		} else if k >= len(s.Change.Before)-s.Change.Theirs {
			if err := s.renew(&r.Before[at], was, now); err != nil {
				return err
			}
		}
	}
	for _, path := range slices.Sorted(maps.Keys(now)) {
		r.Installed = append(r.Installed, now[path])
	}
	for _, dir := range s.Change.Dirs {
		if !slices.Contains(r.Dirs, dir) {
			r.Dirs = append(r.Dirs, dir)
		}
	}
	slices.Sort(r.Dirs)
	if err := s.write(r); err != nil {
		return err
	}
	return s.sweep()
}

// sweep removes contents that nothing refers to.
func (s *store) sweep() error {
	keep := map[string]bool{"record.json": true}
	for _, f := range slices.Concat(s.Before, s.Installed) { // of the latter, containerd's are here
		if f.Digest != "" {
			keep[f.Digest.Encoded()] = true
		}
	}
	entries, err := os.ReadDir(s.dir)
	for _, e := range entries {
		if !keep[e.Name()] {
			err = errors.Join(err, os.Remove(s.path(e.Name())))
		}
	}
	return err
}

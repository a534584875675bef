package install

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts need root")
	}
}

// containerd finds the program of a version; "" is the newest, beside which make build puts the others.
func containerd(t *testing.T, version string) string {
	t.Helper()
	program, err := exec.LookPath("containerd")
	if err == nil && version != "" {
		program, err = exec.LookPath(filepath.Join(filepath.Dir(program), "../containerd-"+version, "containerd"))
	}
	if err != nil {
		t.Skip(err)
	}
	return program
}

// on returns an installer for a containerd, with files in a directory; names ending in .toml in conf.d are drop-ins.
func on(t *testing.T, program string, files map[string]string) *installer {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(strings.ReplaceAll(text, "DIR", dir)), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	return &installer{
		o: Options{Address: "/run/streaming-snapshotter/snapshotter.sock", Root: "/var/lib/streaming-snapshotter"},
		c: Containerd{Program: program, Config: filepath.Join(dir, "config.toml")},
	}
}

var noted change

// formCase is what containerd's files may be, and what is made of them.
type formCase struct {
	files map[string]string
	pull  string   // how CRI pulls then; "" if there is no way
	wrote []string // in order
}

const others = "[plugins.'io.containerd.cri.v1.runtime']\n  restrict_oom_score_adj = true\n"

// forms are those that containerd's files may have, and forms17 those of containerd 1.7, where what is imported replaces all of CRI's settings: the snapshotter's are added to
// where the others are.
func forms() map[string]formCase {
	return map[string]formCase{
		"no file":          {nil, "transfer", []string{"conf.d/streaming-snapshotter.toml", "config.toml"}},
		"empty":            {map[string]string{"config.toml": ""}, "transfer", []string{"conf.d/streaming-snapshotter.toml", "config.toml"}},
		"imports":          {map[string]string{"config.toml": "version = 4\nimports = ['DIR/conf.d/*.toml']\n" + others}, "transfer", []string{"conf.d/streaming-snapshotter.toml"}},
		"relative imports": {map[string]string{"config.toml": "version = 3\nimports = ['more/*.toml']\n" + others}, "transfer", []string{"more/streaming-snapshotter.toml"}},
		"no imports":       {map[string]string{"config.toml": "# mine\nversion = 3\n" + others, "conf.d/ignored.toml": "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  max_concurrent_downloads = 9\n"}, "transfer", []string{"conf.d/streaming-snapshotter.toml", "config.toml"}},
		"version 2":        {map[string]string{"config.toml": "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  max_concurrent_downloads = 5\n  [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n    snapshotter = \"overlayfs\"\n"}, "local", []string{"conf.d/streaming-snapshotter.toml", "config.toml"}},
		"forced to local":  {map[string]string{"config.toml": "version = 3\nimports = ['DIR/conf.d/*.toml']\n[plugins.'io.containerd.cri.v1.images']\n  use_local_image_pull = true\n  disable_snapshot_annotations = true\n"}, "local", []string{"conf.d/streaming-snapshotter.toml"}},
		"annotated":        {map[string]string{"config.toml": "version = 3\nimports = ['DIR/conf.d/*.toml']\n[plugins.'io.containerd.cri.v1.images']\n  disable_snapshot_annotations = false\n"}, "local", []string{"conf.d/streaming-snapshotter.toml"}},
		"registry mirrors": {map[string]string{"config.toml": "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry.mirrors.'docker.io']\n  endpoint = ['https://mirror.example.com']\n"}, "local", []string{"conf.d/streaming-snapshotter.toml", "config.toml"}},
		"list replaced":    {map[string]string{"config.toml": "version = 3\nimports = ['DIR/conf.d/*.toml']\n", "conf.d/z.toml": "version = 3\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = 'linux'\n  snapshotter = 'overlayfs'\n"}, "transfer", []string{"conf.d/zz-streaming-snapshotter.toml"}},
		"name taken":       {map[string]string{"config.toml": "version = 3\nimports = ['DIR/conf.d/*.toml']\n", "conf.d/streaming-snapshotter.toml": "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  max_concurrent_downloads = 5\n"}, "local", []string{"conf.d/zz-streaming-snapshotter.toml"}},
		"another imported": {map[string]string{"config.toml": "version = 3\nimports = ['DIR/other.toml']\n[plugins.'io.containerd.cri.v1.images'] # CRI\n  snapshotter = 'overlayfs'\n", "other.toml": "version = 3\n" + others}, "transfer", []string{"config.toml"}},
		"not migrated":     {map[string]string{"config.toml": "version = 2\nimports = ['DIR/other.toml']\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\n  snapshotter = 'overlayfs'\n", "other.toml": "version = 2\n"}, "transfer", []string{"config.toml"}},
		"two keys":         {map[string]string{"config.toml": "version = 2\nimports = ['DIR/other.toml']\n[plugins]\n  [plugins.'io.containerd.grpc.v1.cri']\n    image_pull_with_sync_fs = true\n    [plugins.'io.containerd.grpc.v1.cri'.containerd]\n      snapshotter = 'native'\n      disable_snapshot_annotations = true\n      [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\n        runtime_type = 'io.containerd.runc.v2'", "other.toml": "version = 2\n"}, "local", []string{"config.toml"}},
	}
}

const aks = `version = 2
oom_score = -999
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "mcr.example.com/pause:3.6"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    disable_snapshot_annotations = true
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "/etc/containerd/certs.d"
[proxy_plugins]
  [proxy_plugins.other]
    type = "snapshot"
    address = "/run/other.sock"
`

func forms17() map[string]formCase {
	return map[string]formCase{
		"no file":          {nil, "local", []string{"config.toml"}},
		"Debian":           {map[string]string{"config.toml": "version = 2\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    [plugins.\"io.containerd.grpc.v1.cri\".cni]\n      bin_dir = \"/opt/cni/bin\"\n"}, "local", []string{"config.toml"}},
		"AKS":              {map[string]string{"config.toml": aks}, "local", []string{"config.toml"}},
		"AKS and imports":  {map[string]string{"config.toml": strings.Replace(aks, "oom", "imports = ['DIR/conf.d/*.toml']\noom", 1), "conf.d/z.toml": "version = 2\n[grpc]\n  max_recv_message_size = 1000000\n"}, "local", []string{"config.toml"}},
		"imports alone":    {map[string]string{"config.toml": "version = 2\nimports = ['DIR/conf.d/*.toml']\noom_score = -999\n"}, "local", []string{"config.toml"}},
		"CRI in a drop-in": {map[string]string{"config.toml": "version = 2\nimports = ['DIR/conf.d/*.toml']\n", "conf.d/cri.toml": "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"mcr.example.com/pause:3.6\"\n"}, "", nil},
		"version 1":        {map[string]string{"config.toml": "[plugins.cri]\n  sandbox_image = \"mcr.example.com/pause:3.6\"\n"}, "local", []string{"config.toml"}},
	}
}

// In each form that containerd's files may have, the snapshotter gets into the configuration in effect, and all else stays as it was, or it is an error that says what would not.
// Nothing is changed for finding out.
func TestContainerdFiles(t *testing.T) {
	versions := []string{""}
	if os.Getenv("FULL") != "" {
		versions = append(versions, "1.7", "2.2", "2.3")
	}
	for _, version := range versions {
		program, cases := containerd(t, version), forms()
		if version == "1.7" {
			cases = forms17()
		}
		for name, c := range cases {
			t.Run(strings.TrimSpace(version+" "+name), func(t *testing.T) {
				if text, ok := c.files["config.toml"]; ok && version == "2.2" {
					c.files["config.toml"] = strings.ReplaceAll(text, "version = 4", "version = 3")
				}
				if name == "version 2" && version == "2.2" { // where a file of version 3 beside it keeps one of version 2 from being migrated
					c.wrote = []string{"config.toml"}
				}
				in := on(t, program, c.files)
				if c.pull != "" {
					checkForm(t, in, c)
				} else if files, _, err := in.containerdFiles(t.Context()); err == nil || !strings.Contains(err.Error(), "sandbox_image, too") {
					t.Errorf("got %v, %v", files, err)
				}
			})
		}
	}
}

// checkForm wants the snapshotter in containerd's configuration as c says, and the rest as it was.
func checkForm(t *testing.T, in *installer, c formCase) {
	t.Helper()
	dir := filepath.Dir(in.c.Config)
	was := treeOf(t, dir)
	files, found, err := in.containerdFiles(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if is := treeOf(t, dir); !reflect.DeepEqual(is, was) {
		t.Errorf("to find out has changed\n%v\nto\n%v", was, is)
	}
	if found.Pull != c.pull || found.Snapshotter != Name {
		t.Errorf("got %+v, want %s", found, c.pull)
	}
	var wrote []string
	for _, f := range files {
		rel, _ := filepath.Rel(dir, f.Path)
		wrote = append(wrote, rel)
		if st, ok := was[rel]; ok && f.Mode != uint32(st.mode) {
			t.Errorf("%s would have mode %o", rel, f.Mode)
		}
	}
	if !reflect.DeepEqual(wrote, c.wrote) {
		t.Errorf("would write %q, want %q", wrote, c.wrote)
	}
	if err := apply(t.Context(), files); err != nil {
		t.Fatal(err)
	}
	if again, _, err := in.containerdFiles(t.Context()); err != nil || len(again) > 0 {
		t.Errorf("after that, there is %v to write, %v", again, err)
	}
	dump, err := in.dump(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"restrict_oom_score_adj = true", "max_concurrent_downloads = 5", "mirror.example.com", "image_pull_with_sync_fs = true", "mcr.example.com/pause", "oom_score = -999", "/run/other.sock"} {
		if strings.Contains(fmt.Sprint(c.files), text) && !strings.Contains(string(dump), text) {
			t.Errorf("%s is lost", text)
		}
	}
	if strings.Contains(string(dump), "max_concurrent_downloads = 9") {
		t.Error("a drop-in that was ignored is in effect")
	}
}

// What ends an install before it has begun, a configuration that cannot be read for instance, is an error, and leaves it to the next one.
func TestBegin(t *testing.T) {
	needRoot(t)
	want := errors.New("no configuration")
	for range 2 {
		if err := Install(t.Context(), func() (Options, error) { return Options{}, want }); !errors.Is(err, want) {
			t.Errorf("got %v", err)
		}
	}
}

// What cannot be written safely is an error that says why, and changes nothing.
func TestContainerdFilesRefused(t *testing.T) {
	for name, c := range map[string]struct{ config, want string }{
		"no TOML":      {"version 3\n", "cannot read its configuration as it is"},
		"CRI disabled": {"disabled_plugins = ['cri']\n", "kubelet and crictl cannot pull at all"}, // as Docker's package has it
		"inline table": {"version = 3\nimports = ['DIR/other.toml']\nplugins = {'io.containerd.cri.v1.images' = {snapshotter = 'overlayfs'}}\n", "config.toml itself"},
	} {
		t.Run(name, func(t *testing.T) {
			in := on(t, containerd(t, ""), map[string]string{"config.toml": c.config, "other.toml": "version = 3\n"})
			dir := filepath.Dir(in.c.Config)
			was := treeOf(t, dir)
			files, _, err := in.containerdFiles(t.Context())
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, %v, want %q", files, err, c.want)
			}
			if is := treeOf(t, dir); !reflect.DeepEqual(is, was) {
				t.Errorf("%v became %v", was, is)
			}
		})
	}
}

// entry is all that is compared of a file.
type entry struct {
	mode     fs.FileMode
	uid, gid uint32
	time     time.Time // zero for directories
	content  string    // or the target of a link
	xattrs   string
}

func treeOf(t *testing.T, dir string) map[string]entry {
	t.Helper()
	tree := map[string]entry{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		e := entry{mode: fs.FileMode(st.Mode & 0o7777), uid: st.Uid, gid: st.Gid}
		rel, _ := filepath.Rel(dir, path)
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			e.content, err = os.Readlink(path)
		case !d.IsDir():
			b, readErr := os.ReadFile(path)
			x, xErr := xattrsOf(path)
			e.content, e.xattrs, e.time, err = string(b), fmt.Sprint(x), time.Unix(st.Mtim.Unix()), errors.Join(readErr, xErr)
		}
		tree[rel] = e
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// TestCutShort cuts a change short after each file, and what undoes it too: whoever comes next puts back everything, absence included.
func TestCutShort(t *testing.T) {
	needRoot(t)
	change := func(dir string) []file {
		at := func(name string) string { return filepath.Join(dir, name) }
		return []file{
			regular(at("plain"), 0o755, []byte("new")), regular(at("new/deeper/file"), 0o644, []byte("new")), {Path: at("wants/link"), Link: "/new"},
			regular(at("link"), 0o644, []byte("new")), regular(at("sub/file"), 0o644, []byte("new")), {Path: at("gone"), Absent: true}, regular(at("private"), 0o644, []byte("new")), {Path: at("missing/none"), Absent: true},
		}
	}
	for cut := 0; cut <= len(change("")); cut++ {
		dir := t.TempDir()
		host, state := filepath.Join(dir, "host"), filepath.Join(dir, "state")
		if err := os.MkdirAll(filepath.Join(host, "sub"), 0o755); err != nil {
			t.Fatal(err)
		}
		for name, mode := range map[string]os.FileMode{"plain": 0o644, "sub/file": 0o640, "gone": 0o600, "private": 0o4711} {
			path := filepath.Join(host, name)
			if err := errors.Join(os.WriteFile(path, []byte("the old "+name), 0o600), os.Chown(path, 12, 34), unix.Chmod(path, uint32(mode)),
				unix.Setxattr(path, "user.mine", []byte("a\x00b"), 0), os.Chtimes(path, time.Time{}, time.Unix(1e9, 5))); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Symlink("plain", filepath.Join(host, "link")); err != nil {
			t.Fatal(err)
		}
		was := treeOf(t, host)
		inode := func(f file) uint64 {
			var st unix.Stat_t
			_ = unix.Lstat(f.Path, &st) // or there is none
			return st.Ino
		}
		files := change(host)
		var inodes []uint64
		for _, f := range files {
			inodes = append(inodes, inode(f))
		}
		reopen := func() *store {
			s, err := openStore(state)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		if err := reopen().begin(files, noted); err != nil {
			t.Fatal(err)
		}
		if err := apply(t.Context(), files[:cut]); err != nil {
			t.Fatal(err)
		}
		if cut < len(files) && !files[cut].Absent { // killed before the rename
			os.MkdirAll(filepath.Dir(files[cut].Path), 0o755)
			if err := os.WriteFile(temporary(files[cut].Path), []byte("ne"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if cut > 0 { // and somebody tidies up
			if err := os.RemoveAll(filepath.Join(host, "sub")); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 { // cut short itself, at its end
			if err := reopen().undo(); err != nil {
				t.Fatal(err)
			}
		}
		if is := treeOf(t, host); !reflect.DeepEqual(is, was) {
			t.Errorf("after %d files\n%v\nbecame\n%v", cut, was, is)
		}
		for i, f := range files {
			if i >= cut && !strings.Contains(f.Path, "/sub/") && inode(f) != inodes[i] {
				t.Errorf("after %d files another file is at %s, which was not changed", cut, f.Path)
			}
		}
		if err := reopen().forget(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(state); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the record is left: %v", err)
		}
	}
}

// TestUndoOnFullDisk: what was changed is put back where there is no room for it before what was added is gone, and what was not changed takes none.
func TestUndoOnFullDisk(t *testing.T) {
	needRoot(t)
	host := t.TempDir()
	if err := unix.Mount("test", host, "tmpfs", 0, "size=400k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(host, unix.MNT_DETACH) })
	at := func(name string) string { return filepath.Join(host, name) }
	big := func(text string) []byte { return []byte(strings.Repeat(text, 100_000/len(text))) }
	for _, name := range []string{"changed", "not changed"} {
		if err := os.WriteFile(at(name), big("old"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	was := treeOf(t, host)
	s, err := openStore(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	files := []file{regular(at("added"), 0o755, big("new")), regular(at("changed"), 0o644, big("new")), regular(at("not changed"), 0o644, big("new"))}
	if err := errors.Join(s.begin(files, noted), apply(t.Context(), files[:2])); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at("of others"), make([]byte, 1<<20), 0o644); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	if err := s.undo(); err != nil {
		t.Error(err)
	}
	if err := os.Remove(at("of others")); err != nil {
		t.Error(err)
	}
	if is := treeOf(t, host); !reflect.DeepEqual(is, was) {
		t.Error("not all is as it was")
	}
}

// TestPrintChangeWithoutSecrets: what is printed is a pod's log.
func TestPrintChangeWithoutSecrets(t *testing.T) {
	const auth = "[auth]\n  username = 'u'\n  password = 'hush1'\n  identitytoken='hush2'\n  \"auth\" = 'hush3'\n"
	var b strings.Builder
	printChange(&b, regular("f", 0o600, []byte(auth+"a = 1\n")), regular("f", 0o600, []byte(strings.ReplaceAll(auth, "hush3", "hush4")+"a = 1\n")))
	if s := b.String(); strings.Contains(s, "hush") || !strings.Contains(s, "password = ...") || !strings.Contains(s, "username = 'u'") || !strings.Contains(s, "a = 1") {
		t.Errorf("printed\n%s", s)
	}
}

// TestUpgrade: what uninstall puts back is what was there before the first install, whatever later ones have replaced.
func TestUpgrade(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	path, more, state := filepath.Join(dir, "program"), filepath.Join(dir, "made/more"), filepath.Join(dir, "state")
	if err := os.WriteFile(path, []byte("first"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, files := range [][]file{{regular(path, 0o755, []byte("second"))}, {regular(path, 0o755, []byte("third")), regular(more, 0o644, []byte("third"))}} {
		s, err := openStore(state)
		if err == nil {
			err = s.begin(files, noted)
		}
		if err == nil {
			err = apply(t.Context(), files)
		}
		if err == nil {
			err = s.commit()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	s, err := openStore(state)
	if err != nil || len(s.Before) != 2 || len(s.Installed) != 2 || s.Change != nil || !reflect.DeepEqual(s.Dirs, []string{filepath.Dir(more)}) {
		t.Fatalf("%+v, %v", s, err)
	}
	if f, err := s.load(s.Before[0]); err != nil || string(f.data) != "first" || !s.Before[1].Absent {
		t.Errorf("%+v, %v", s.Before, err)
	}
	if entries, err := os.ReadDir(state); err != nil || len(entries) != 2 {
		t.Errorf("kept: %v, %v", entries, err)
	}
}

// TestPrintChange: the diffs are those of diff -u, where one hunk will do.
func TestPrintChange(t *testing.T) {
	for _, c := range [][2]string{{"a\nb\nc\nd\ne\nf\n", "a\nb\nc\nd\nnew\ne\nf\n"}, {"", "a\nb\n"}, {"a\nb\n", ""}, {"a\nb", "a\nc\n"}, {"1\n2\n3\n4\n5\n6\n7\n8\n9\n", "1\n2\n3\n4\nfive\n6\n7\n8\n9\n"}} {
		dir := t.TempDir()
		a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
		if err := errors.Join(os.WriteFile(a, []byte(c[0]), 0o600), os.WriteFile(b, []byte(c[1]), 0o600)); err != nil {
			t.Fatal(err)
		}
		want, _ := exec.Command("diff", "-U3", a, b).Output() // its status says that they differ
		var got strings.Builder
		printChange(&got, regular(a, 0o600, []byte(c[0])), regular(a, 0o600, []byte(c[1])))
		if hunk := func(s string) string { return strings.ReplaceAll(s[strings.Index(s, "@@"):], ",1 ", " ") }; hunk(got.String()) != hunk(string(want)) {
			t.Errorf("got\n%swant\n%s", got.String(), want)
		}
	}
}

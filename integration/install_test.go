package integration_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// installTest is what TestInstall does in one of its Debians.
type installTest struct {
	Debian     string
	App, Other string   // references of images that stream, with systemdSeed and the next one
	Forms      []string // of containerd's configuration; the last one goes through a reboot
	Containerd string   // the program
	Old        string   // containerd 1.7, for the form of its name
}

// TestInstall boots Debians with a real systemd and a containerd of their own, and installs there with the commands: systemd 252, with the keeper, and 257, without; with
// containerd's configuration in each of its forms.
func TestInstall(t *testing.T) {
	if text := os.Getenv(insideSystemd); text != "" {
		var c installTest
		if err := json.Unmarshal([]byte(text), &c); err != nil {
			t.Fatal(err)
		}
		if before, ok := rebooted(t); ok {
			afterReboot(t, c, before)
			return
		}
		for i, form := range c.Forms {
			t.Run(form, func(t *testing.T) { installOnHost(t, c, form, i == 0, i == len(c.Forms)-1) })
			if t.Failed() {
				return
			}
		}
		return
	}
	images := debians(t)
	registry := startRegistry(t, registrytest.Options{})
	app, other := registry.Host()+"/app:v1", registry.Host()+"/other:v1"
	for i, ref := range []string{app, other} {
		pushSmall(t, ref, systemdSeed+uint64(i))
		run(t, "streamctl", "create", "--record", "", ref)
	}
	pushSmall(t, registry.Host()+"/team/app:v1", systemdSeed+2) // for installDocumented
	programs := buildForDebian(t)
	first, old := []string{"no file", "version 2"}, ""
	if os.Getenv("FULL") != "" {
		first, old = []string{"no file", "1.7", "version 2"}, filepath.Join(programsOf(t, "1.7"), "containerd")
	}
	for _, c := range []installTest{
		{Debian: "systemd", Forms: first},
		{Debian: "systemd-trixie", Forms: []string{"list replaced", "another file imported", "forced to local", bare, documented, "annotated"}},
	} {
		t.Run(c.Debian, func(t *testing.T) {
			root, checkout := filepath.Join(tempDir(t), "root"), checkout(t)
			c.App, c.Other, c.Containerd, c.Old = app, other, filepath.Join(toolsDir(checkout), "containerd"), old
			runInside(t, root, filepath.Join(images, c.Debian), checkout, programs, "TestInstall", c)
			bootTest(t, root, checkout, "TestInstall", 2, filepath.Dir(toolsDir(checkout)))
		})
	}
}

// bare is the form of a host without systemd: install sees none, containerd is run by one.
const bare = "no systemd"

// forms are the files of containerd's configuration before an install, by their paths below /etc/containerd.
var forms = map[string]map[string]string{
	"no file":               {},
	"version 2":             {"config.toml": "# kept as it is\nversion = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  restrict_oom_score_adj = true\n"},
	"list replaced":         {"config.toml": "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n", "conf.d/z.toml": "version = 3\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = 'linux'\n  snapshotter = 'overlayfs'\n"},
	"another file imported": {"config.toml": "version = 3\nimports = ['/etc/containerd/other.toml']\n[plugins.'io.containerd.cri.v1.images'] # CRI\n  snapshotter = 'overlayfs'\n", "other.toml": "version = 3\n[plugins.'io.containerd.cri.v1.runtime']\n  restrict_oom_score_adj = true\n"},
	documented:              {"config.toml": "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = '/etc/containerd/certs.d'\n"},
	bare:                    {"config.toml": "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n"},
	"forced to local":       {"config.toml": "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  max_concurrent_downloads = 5\n  discard_unpacked_layers = true\n"},
	"annotated":             {"config.toml": "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n[plugins.'io.containerd.cri.v1.images']\n  disable_snapshot_annotations = false\n"},
	"1.7": {"config.toml": `version = 2
oom_score = -500
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "/etc/containerd/certs.d"
`},
}

const containerdUnit = `[Service]
Type=notify
Environment=PATH=%s:%s:/usr/bin:/usr/sbin
ExecStart=%s
KillMode=process
Delegate=yes
[Install]
WantedBy=multi-user.target
`

// hosted is a host with containerd's unit, and what install has found there.
type hosted struct {
	*testing.T
	c   installTest
	old bool // it is containerd 1.7
	was map[string]hostFile
}

// hostFile is all that is compared of a file.
type hostFile struct {
	Mode     uint32
	UID, GID uint32
	Time     int64  // ns, of regular files
	Content  []byte // or a link's target
}

func (f hostFile) String() string {
	return fmt.Sprintf("{mode %o of %d:%d, changed %d: %.500q}", f.Mode, f.UID, f.GID, f.Time, f.Content)
}

// ownRoot is the daemon's, and keptFile is a file in one that was there before an install.
const (
	ownRoot  = "/var/lib/streaming-snapshotter"
	keptFile = ownRoot + "/of-another"
)

// files are those of the host where an install has something to do.
func (h *hosted) files() map[string]hostFile {
	h.Helper()
	tree := map[string]hostFile{}
	for _, dir := range []string{"/etc", "/usr/local", ownRoot, "/var/lib/streaming-snapshotter-install"} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); errors.Is(err, fs.ErrNotExist) {
				return nil // a daemon that runs has removed it meanwhile
			} else if err != nil {
				return &fs.PathError{Op: "lstat", Path: path, Err: err}
			}
			f := hostFile{Mode: st.Mode, UID: st.Uid, GID: st.Gid}
			switch st.Mode & unix.S_IFMT {
			case unix.S_IFLNK:
				var link string
				link, err = os.Readlink(path)
				f.Content = []byte(link)
			case unix.S_IFREG:
				f.Content, err = os.ReadFile(path)
				f.Time = st.Mtim.Nano()
			}
			tree[path] = f
			if path == ownRoot+"/devices" { // what the daemon serves there may come from the registry
				return fs.SkipDir
			}
			return err
		})
		if err != nil {
			h.Fatal(err)
		}
	}
	return tree
}

// unchanged wants the files to be as they were, byte for byte. In a directory of the snapshotter that was there before, there may be more.
func (h *hosted) unchanged(after string) {
	h.Helper()
	is := h.files()
	if _, ok := h.was[ownRoot]; ok {
		maps.DeleteFunc(is, func(path string, _ hostFile) bool { return strings.HasPrefix(path, ownRoot+"/") && path != keptFile })
	}
	h.compare(h.was, is, after)
}

// asInstalled wants all files but the daemon's and the installer's own to be as they were with the install.
func (h *hosted) asInstalled(installed map[string]hostFile, after string) {
	h.Helper()
	is := h.files()
	for _, tree := range []map[string]hostFile{installed, is} {
		maps.DeleteFunc(tree, func(path string, _ hostFile) bool { return strings.HasPrefix(path, ownRoot) })
	}
	h.compare(installed, is, after)
}

func (h *hosted) compare(was, is map[string]hostFile, after string) {
	h.Helper()
	for path, f := range is {
		if before, ok := was[path]; !ok {
			h.Errorf("%s: %s is left", after, path)
		} else if !reflect.DeepEqual(before, f) {
			h.Errorf("%s: %s was %v and is %v", after, path, before, f)
		}
	}
	for path := range was {
		if _, ok := is[path]; !ok {
			h.Errorf("%s: %s is gone", after, path)
		}
	}
}

func (h *hosted) must(args ...string) string {
	h.Helper()
	out := run(h.T, args...)
	h.endedWell(args, out)
	return out
}

// badEnd is what a command says of a daemon that it has stopped, and that has failed then.
const badEnd = "did not end as it should"

// endedWell: a daemon that works ends with success when it is stopped, whatever it is about.
func (h *hosted) endedWell(args []string, out string) {
	h.Helper()
	if strings.Contains(out, badEnd) && args[0] != "/opt/"+brokenRelease {
		h.Errorf("%q says\n%s\n%s", args, out, h.journal())
	}
}

// journal is the end of what our units and systemd say of them.
func (h *hosted) journal() string {
	h.Helper()
	out, _ := tryRun(h.T, "journalctl", "--no-pager", "-n", "100", "-u", node.Unit, "-u", keeperUnit)
	return out
}

func (h *hosted) ctr(args ...string) string {
	h.Helper()
	return h.must(append([]string{filepath.Join(filepath.Dir(h.containerd()), "ctr"), "--namespace", node.Namespace}, args...)...)
}

func (h *hosted) crictl(args ...string) string {
	h.Helper()
	return h.must(append([]string{"crictl", "--runtime-endpoint", "unix:///run/containerd/containerd.sock", "--timeout", "60s"}, args...)...)
}

// unit is containerd's.
func (h *hosted) unit() []byte {
	return fmt.Appendf(nil, containerdUnit, filepath.Dir(h.containerd()), filepath.Dir(h.c.Containerd), h.containerd())
}

// containerd is the program.
func (h *hosted) containerd() string {
	if h.old {
		return h.c.Old
	}
	return h.c.Containerd
}

// fails runs a command that must fail with a text.
func (h *hosted) fails(want string, args ...string) {
	h.Helper()
	out, err := tryRun(h.T, args...)
	if err == nil || !strings.Contains(err.Error(), want) {
		h.Errorf("%q: got %v, want %q\n%s", args, err, want, out)
	}
	h.endedWell(args, out)
}

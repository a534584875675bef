package integration_test

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/traps"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
)

// checked is what of `check -o json` is looked at.
type checked struct {
	Containerd struct{ Version, Snapshotter, Pull string }
	Traps      []traps.Trap
	Unknown    []string
	Image      *struct {
		Reason   reason.Code
		Artifact string
		Layers   int
	}
	exit int
}

func (c checked) codes() (list []traps.Code) {
	for _, t := range c.Traps {
		list = append(list, t.Code)
	}
	return list
}

// runCheck runs `check` on the node.
func runCheck(t *testing.T, n *node.Node, args ...string) (c checked) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "streaming-snapshotter", append([]string{"check", "-o", "json", "--config", n.ConfigFile(), "--containerd", filepath.Join(n.Dir, "run/c.sock")}, args...)...)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if err := json.Unmarshal(out, &c); err != nil {
		t.Fatalf("%v in %q, %v", err, out, cmd.ProcessState)
	}
	c.exit = cmd.ProcessState.ExitCode()
	return c
}

// TestCheck: on a node that is well check says so, and what it says of an image is what a pull of it does; each trap of containerd's configuration has its name.
func TestCheck(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref, plain := registry.Host()+"/app:v1", registry.Host()+"/plain:v1"
	img := pushSmall(t, ref, 81)
	pushSmall(t, plain, 82)
	run(t, "streamctl", "create", "--record", "", ref)
	for _, pull := range []node.Pull{node.Transfer, node.Local} {
		t.Run(string(pull), func(t *testing.T) {
			// A quarter of the disk, the default, may be more than it has left.
			n := startNode(t, node.Options{Pull: pull, Stream: []string{registry.Host() + "/*"}, Config: "cache_size = \"1GiB\""})
			registry.Reset()
			c := runCheck(t, n, ref)
			if c.exit != 0 || len(c.Traps) > 0 || len(c.Unknown) > 0 || c.Containerd.Version == "" || c.Containerd.Snapshotter != node.Snapshotter || c.Containerd.Pull != string(pull) {
				t.Errorf("a good node: %+v", c)
			}
			if c.Image == nil || c.Image.Reason != "" || c.Image.Artifact == "" || c.Image.Layers != 3 {
				t.Errorf("an image that is streamed: %+v", c.Image)
			}
			if got := wholeLayers(t, registry, img); got > 0 {
				t.Errorf("check has downloaded %d layers", got)
			}
			if c := runCheck(t, n, plain); c.exit != 1 || len(c.Traps) > 0 || c.Image == nil || c.Image.Reason != reason.NoArtifact {
				t.Errorf("an image without artifact: %+v, %+v", c, c.Image)
			}
			if c := runCheck(t, n, registry.Host()+"/none:v1"); c.exit != 2 || len(c.Traps) > 0 {
				t.Errorf("no image: %+v", c)
			}
			checkOtherContainerd(t, n)
			checkTraps(t, n, pull)
		})
	}
}

// checkOtherContainerd has the daemon's configuration say another socket of containerd's, at which nobody answers.
func checkOtherContainerd(t *testing.T, n *node.Node) {
	t.Helper()
	text, err := os.ReadFile(n.ConfigFile())
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(tempDir(t), "config.toml")
	if err := os.WriteFile(config, []byte(strings.Replace(string(text), "/run/c.sock", "/run/none.sock", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if c := runCheck(t, n, "--config", config); c.exit != 1 || !slices.Equal(c.codes(), []traps.Code{"CRI_CONTAINERD"}) {
		t.Errorf("another containerd: %+v", c)
	}
}

// checkTraps puts the node's containerd into each trap, one after the other.
func checkTraps(t *testing.T, n *node.Node, pull node.Pull) {
	dropIn := filepath.Join(n.Dir, "conf.d/streaming-snapshotter.toml")
	main := filepath.Join(n.Dir, "containerd.toml")
	later := filepath.Join(n.Dir, "conf.d/z.toml")
	type trap struct {
		file, old, new string
		want           traps.Code
		fails          bool // containerd does not start with it
	}
	cases := map[string]trap{
		"no imports":      {main, "imports = ", "oom_score = 0 # ", traps.NoImports, false},
		"no drop-in":      {dropIn, "", "", traps.NoProxyPlugin, false},
		"other address":   {dropIn, "run/s.sock", "run/t.sock", traps.WrongAddress, false},
		"other root":      {dropIn, "root = ", "other_root = ", traps.WrongRoot, false},
		"not for CRI":     {dropIn, "[plugins.'io.containerd.cri.v1.images']\n  snapshotter = \"streaming\"", "[plugins.'io.containerd.cri.v1.images']\n  snapshotter = \"overlayfs\"", traps.NotForCRI, false},
		"rebase":          {dropIn, `"remap-ids"`, `"remap-ids", "rebase"`, traps.Rebase, false},
		"no TOML":         {dropIn, "version = 3", "version 3", traps.Unreadable, true},
		"not restarted":   {dropIn, "proxy_plugins.streaming", "proxy_plugins.streaming2", traps.NotLoaded, true},
		"list replaced":   {later, "", "version = 3\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = \"linux\"\n  snapshotter = \"overlayfs\"\n", traps.NoUnpackConfig, false},
		"not annotated":   {dropIn, `enable_remote_snapshot_annotations = "true"`, ``, traps.NoAnnotations, false},
		"only ours":       {dropIn, "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = \"linux\"\n  snapshotter = \"overlayfs\"\n  differ = \"walking\"\n", "", traps.UnpackReplaced, false},
		"forced to local": {later, "", "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  max_concurrent_downloads = 5\n", traps.NoAnnotations, false},
	}
	if pull == node.Local {
		cases = map[string]trap{
			"annotations disabled":      {dropIn, "disable_snapshot_annotations = false", "disable_snapshot_annotations = true\n  use_local_image_pull = true", traps.NoAnnotations, false},
			"annotations not mentioned": {dropIn, "disable_snapshot_annotations = false", "", traps.NoUnpackConfig, false},
		}
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			old, err := os.ReadFile(c.file)
			text := c.new
			if c.old != "" {
				text = strings.ReplaceAll(string(old), c.old, c.new)
			}
			if text == string(old) && err == nil {
				t.Fatalf("%s has no %q", c.file, c.old)
			}
			if err := os.WriteFile(c.file, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err != nil {
					os.Remove(c.file)
				} else if err := os.WriteFile(c.file, old, 0o644); err != nil {
					t.Error(err)
				}
			}()
			if !c.fails {
				if err := n.RestartContainerd(t.Context(), false); err != nil {
					t.Fatal(err)
				}
			}
			got := runCheck(t, n)
			if got.exit != 1 || !slices.Contains(got.codes(), c.want) {
				t.Errorf("got %+v, want %s", got, c.want)
			}
		})
	}
}

package traps

import (
	"slices"
	"strings"
	"testing"
)

// good is what of `containerd config dump` of 2.4.2 with deploy/containerd/transfer.toml is looked at.
const good = `version = 4
root = '/c'
state = '/run/c'
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'streaming'
  disable_snapshot_annotations = true
  max_concurrent_downloads = 3
  use_local_image_pull = false
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  snapshotter = ''
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  snapshotter = 'streaming'
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  snapshotter = 'overlayfs'
[proxy_plugins.streaming]
  type = 'snapshot'
  address = '/s.sock'
  capabilities = ['remap-ids']
[proxy_plugins.streaming.exports]
  root = '/s'
  enable_remote_snapshot_annotations = 'true'
`

// old is that of 1.7.
const old = `version = 2
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "streaming"
  disable_snapshot_annotations = false
[proxy_plugins.streaming]
  type = "snapshot"
  address = "/s.sock"
[proxy_plugins.streaming.exports]
  root = "/s"
`

func TestFind(t *testing.T) {
	local := strings.NewReplacer("annotations = true", "annotations = false", "snapshotter = 'streaming'\n[[", "snapshotter = 'erofs'\n[[").Replace(good)
	cases := map[string]struct {
		from      string
		old, new  string
		want      []Code
		pull, why string
	}{
		"transfer":                    {good, "", "", nil, "transfer", ""},
		"local":                       {local, "", "", nil, "local", "disable_snapshot_annotations = false"},
		"2.0":                         {local, "  use_local_image_pull = false\n", "", nil, "local", "containerd 2.0, disable_snapshot_annotations = false"},
		"2.0, not annotated":          {good, "  use_local_image_pull = false\n", "", []Code{NoAnnotations}, "local", "containerd 2.0"},
		"told to":                     {good, "pull = false", "pull = true", []Code{NoAnnotations}, "local", "use_local_image_pull"},
		"1.7":                         {old, "", "", nil, "local", "containerd 1.7"},
		"no TOML":                     {good, "version = 4", "version 4", []Code{Unreadable}, "", ""},
		"no plugin":                   {good, "[proxy_plugins", "[other", []Code{NoProxyPlugin}, "", ""},
		"CRI disabled":                {good, "version = 4", "version = 4\ndisabled_plugins = ['io.containerd.grpc.v1.cri']", []Code{NoCRI}, "transfer", ""},
		"1.7, CRI disabled":           {"disabled_plugins = ['cri']\n" + old, "[proxy_plugins", "[other", []Code{NoCRI, NoProxyPlugin}, "", ""},
		"other address":               {good, "/s.sock", "/other.sock", []Code{WrongAddress}, "", ""},
		"other address, other name":   {strings.ReplaceAll(good, "plugins.streaming", "plugins.mine"), "/s.sock", "/other.sock", []Code{WrongAddress}, "", ""},
		"address with scheme":         {good, "/s.sock", "unix:///s.sock", nil, "transfer", ""},
		"type":                        {good, "type = 'snapshot'", "type = 'content'", []Code{WrongType}, "transfer", ""},
		"root":                        {good, "root = '/s'\n", "", []Code{WrongRoot}, "transfer", ""},
		"rebase":                      {good, "['remap-ids']", "['remap-ids', 'rebase']", []Code{Rebase}, "transfer", ""},
		"not for CRI":                 {good, "snapshotter = 'streaming'\n  dis", "snapshotter = 'overlayfs'\n  dis", []Code{NotForCRI}, "transfer", ""},
		"for a runtime":               {strings.Replace(good, "snapshotter = ''", "snapshotter = 'streaming'", 1), "snapshotter = 'streaming'\n  dis", "snapshotter = 'overlayfs'\n  dis", nil, "transfer", ""},
		"no export":                   {good, "  enable_remote_snapshot_annotations = 'true'\n", "", []Code{NoAnnotations}, "transfer", ""},
		"local, not annotated":        {good, "= 3", "= 5", []Code{NoAnnotations}, "local", "max_concurrent_downloads"},
		"1.7, no plugin":              {old, "[proxy_plugins", "[other", []Code{NoProxyPlugin}, "", ""},
		"1.7, not annotated":          {old, "annotations = false", "annotations = true", []Code{NoAnnotations}, "local", "containerd 1.7"},
		"no entry":                    {local, "annotations = false", "annotations = true", []Code{NoUnpackConfig}, "transfer", ""},
		"list without overlayfs":      {good, "'overlayfs'", "'native'", []Code{UnpackReplaced}, "transfer", ""},
		"list with overlayfs instead": {good, "snapshotter = 'streaming'\n[[", "snapshotter = 'native'\n[[", []Code{NoUnpackConfig}, "transfer", ""},
	}
	found := map[Code]bool{NoImports: true, NotLoaded: true} // below, and where containerd is asked: integration's TestCheck
	for name, c := range cases {
		for _, code := range c.want {
			found[code] = true
		}
		t.Run(name, func(t *testing.T) {
			dump := c.from
			if c.old != "" {
				if dump = strings.ReplaceAll(dump, c.old, c.new); dump == c.from {
					t.Fatalf("no %q", c.old)
				}
			}
			f := Find([]byte(dump), Want{Address: "/s.sock", Root: "/s"})
			var got []Code
			for _, trap := range f.Traps {
				got = append(got, trap.Code)
				if trap.Text == "" || trap.Remedy == "" || !slices.Contains(All(), trap.Code) {
					t.Errorf("%+v", trap)
				}
			}
			if !slices.Equal(got, c.want) || f.Pull != c.pull || f.Why != c.why {
				t.Errorf("got %+v, want %v, %q for %q", f, c.want, c.pull, c.why)
			}
		})
	}
	if len(found) != len(All()) {
		t.Errorf("%d of %d traps are tested", len(found), len(All()))
	}
	for dump, remedy := range map[string]string{"version = 4": `["/etc/containerd/conf.d/*.toml"]`, "version = 2": "1.7.toml"} {
		f := Find([]byte(dump), Want{Address: "/s.sock", DropIns: []string{"/etc/containerd/conf.d/s.toml"}})
		if len(f.Traps) != 1 || f.Traps[0].Code != NoImports || !strings.Contains(f.Traps[0].Remedy, remedy) {
			t.Errorf("%s: got %+v", dump, f.Traps)
		}
	}
}

package install

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/traps"
)

// TestUse: in each form that containerd's files may have, the snapshotter serves a runtime handler alone, one like the default; or all of CRI, and then nobody any more, and again.
func TestUse(t *testing.T) {
	const runc = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\n  runtime_type = 'io.containerd.runc.v2'\n  pod_annotations = ['mine']\n" +
		"  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]\n    SystemdCgroup = true\n"
	for name, files := range map[string]map[string]string{
		"no file":          nil,
		"imports":          {"config.toml": "version = 3\nimports = ['DIR/conf.d/*.toml']\n" + runc},
		"no imports":       {"config.toml": "version = 3\n" + runc},
		"forced to local":  {"config.toml": "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  max_concurrent_downloads = 5\n" + runc},
		"version 2":        {"config.toml": "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\n  runtime_type = 'io.containerd.runc.v2'\n  [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc.options]\n    SystemdCgroup = true\n"},
		"list replaced":    {"config.toml": "version = 3\nimports = ['DIR/conf.d/*.toml']\n" + runc, "conf.d/z.toml": "version = 3\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = 'linux'\n  snapshotter = 'overlayfs'\n"},
		"another imported": {"config.toml": "version = 3\nimports = ['DIR/other.toml']\n[plugins.'io.containerd.cri.v1.images'] # CRI\n  snapshotter = 'overlayfs'\n" + runc, "other.toml": "version = 3\n"},
	} {
		t.Run(name, func(t *testing.T) {
			in := on(t, containerd(t, ""), files)
			write := func(u use, uses ...string) []byte {
				t.Helper()
				in.use = u
				list, _, err := in.containerdFiles(t.Context())
				if err == nil {
					err = apply(t.Context(), list)
				}
				if err != nil {
					t.Fatal(err)
				}
				dump, err := in.dump(t.Context(), nil)
				if err != nil {
					t.Fatal(err)
				}
				if got := traps.Find(dump, traps.Want{Address: in.o.Address, Root: in.o.Root}); !slices.Equal(got.Uses, uses) || got.Snapshotter != Name {
					t.Errorf("%+v: it is used by %q, want %q; traps %v", u, got.Uses, uses, got.Traps)
				}
				if again, _, err := in.containerdFiles(t.Context()); err != nil || len(again) > 0 {
					t.Errorf("%+v: after that, there is %v to write, %v", u, again, err)
				}
				return dump
			}
			dump := write(use{runtime: "lazy"}, "runtime lazy")
			if s, err := snapshotterOf(dump); err != nil || s != "overlayfs" {
				t.Errorf("CRI pulls with %s, %v", s, err)
			}
			var c struct {
				Plugins struct {
					Runtime struct {
						Containerd struct{ Runtimes map[string]map[string]any }
					} `toml:"io.containerd.cri.v1.runtime"`
					Images struct {
						Platforms map[string]map[string]any `toml:"runtime_platforms"`
					} `toml:"io.containerd.cri.v1.images"`
				}
			}
			if err := toml.Unmarshal(dump, &c); err != nil {
				t.Fatal(err)
			}
			runtimes := c.Plugins.Runtime.Containerd.Runtimes
			want, got := set(runtimes["runc"]), set(runtimes["lazy"])
			want["snapshotter"] = Name
			if !reflect.DeepEqual(got, want) || strings.Contains(string(dump), "SystemdCgroup = true") != (files != nil) || c.Plugins.Images.Platforms["lazy"]["snapshotter"] != Name {
				t.Errorf("the handler is %v and %v, want one like %v", got, c.Plugins.Images.Platforms, want)
			}

			in = on(t, containerd(t, ""), files)
			write(use{}, "cri")
			in.use = use{runtime: "lazy"}
			if list, _, err := in.containerdFiles(t.Context()); err == nil || !strings.Contains(err.Error(), "uninstall first") {
				t.Errorf("a runtime where all of CRI pulls with it: %v, %v", list, err)
			}
			other := on(t, containerd(t, ""), files)
			other.use = use{runtime: "runc"}
			if list, _, err := other.containerdFiles(t.Context()); err == nil || !strings.Contains(err.Error(), "runtime handler runc already") {
				t.Errorf("a runtime that is there: %v, %v", list, err)
			}
			if s, err := snapshotterOf(write(use{retired: "overlayfs"})); err != nil || s != "overlayfs" {
				t.Errorf("retired, CRI pulls with %s, %v", s, err)
			}
			write(use{}, "cri")
		})
	}
}

// Package traps finds what in containerd's effective configuration keeps images from being streamed, or pulls from working.
//
// The principle: what counts is the configuration in effect, as containerd itself prints it (`containerd config dump`), with imports merged and old versions
// migrated, and not what a file says. The package asks nobody and changes nothing; it is given the text.
package traps

import (
	"fmt"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Code names a trap for programs.
type Code string

const (
	// Unreadable: containerd cannot read its configuration, or what it prints is no TOML.
	Unreadable Code = "CONFIG_UNREADABLE"
	// NoImports: a drop-in names the snapshotter, and is not imported.
	NoImports Code = "NO_IMPORTS"
	// NoCRI: containerd's CRI, by which kubelet and crictl pull, is switched off.
	NoCRI Code = "CRI_DISABLED"
	// NoProxyPlugin: no proxy plugin has the snapshotter's address.
	NoProxyPlugin Code = "NO_PROXY_PLUGIN"
	// WrongAddress: the proxy plugin that seems to be meant has another address.
	WrongAddress Code = "WRONG_ADDRESS"
	// WrongType: the proxy plugin is of another type than "snapshot".
	WrongType Code = "WRONG_TYPE"
	// NotLoaded: the configuration has the proxy plugin, the containerd that runs has not.
	NotLoaded Code = "NOT_LOADED"
	// NotForCRI: CRI pulls with another snapshotter.
	NotForCRI Code = "SNAPSHOTTER_NOT_SET"
	// NoAnnotations: the snapshotter is not told which image is pulled.
	NoAnnotations Code = "NO_ANNOTATIONS"
	// NoUnpackConfig: pulls go through the transfer service, which knows nothing of the snapshotter: all of them fail.
	NoUnpackConfig Code = "NO_UNPACK_CONFIG"
	// UnpackReplaced: the list unpack_config lacks overlayfs, which containerd's own has: pulls for what else runs on the node fail.
	UnpackReplaced Code = "UNPACK_CONFIG_REPLACED"
	// WrongRoot: kubelet measures another directory than the one where the images are.
	WrongRoot Code = "WRONG_ROOT"
	// Rebase: the proxy plugin announces a capability with which containerd names no parents, and nothing can be streamed.
	Rebase Code = "REBASE"
)

// All returns the list.
func All() []Code {
	return []Code{Unreadable, NoCRI, NoImports, NoProxyPlugin, WrongAddress, WrongType, NotLoaded, NotForCRI, NoAnnotations, NoUnpackConfig, UnpackReplaced, WrongRoot, Rebase}
}

// Trap is one of them, found.
type Trap struct {
	Code   Code   `json:"code"`
	Text   string `json:"text"`   // what is wrong, with the names
	Remedy string `json:"remedy"` // what to do
}

// Want is what the snapshotter's own configuration says.
type Want struct {
	Address string   // of its socket
	Root    string   // of its files
	DropIns []string // files with the address, in the directories that containerd is told to import from as a rule
}

// Found is what there is to say of a configuration.
type Found struct {
	Version     int64    `json:"config_version"`
	Root        string   `json:"root"` // containerd's
	State       string   `json:"state"`
	Snapshotter string   `json:"snapshotter"`    // the proxy plugin's name; "" if there is none
	Pull        string   `json:"pull"`           // "local" or "transfer"
	Why         string   `json:"why,omitempty"`  // the keys for which pulls are local
	Uses        []string `json:"uses,omitempty"` // what pulls with it: "cri", "runtime NAME"
	HostsDirs   []string `json:"-"`              // where CRI looks for hosts.toml; none: it does not
	HostsHere   bool     `json:"-"`              // the configuration itself says mirrors or credentials of registries
	Traps       []Trap   `json:"traps"`
}

func (f *Found) trap(c Code, remedy, format string, a ...any) {
	f.Traps = append(f.Traps, Trap{c, fmt.Sprintf(format, a...), remedy})
}

// effective is what of a printed configuration is looked at.
type effective struct {
	Version      int64            `toml:"version"`
	Root         string           `toml:"root"`
	State        string           `toml:"state"`
	Disabled     []string         `toml:"disabled_plugins"`
	ProxyPlugins map[string]proxy `toml:"proxy_plugins"`
	Plugins      struct {
		Images  *images `toml:"io.containerd.cri.v1.images"`
		Runtime struct {
			Containerd containerd `toml:"containerd"`
		} `toml:"io.containerd.cri.v1.runtime"`
		CRI *struct { // of containerd 1.7
			Containerd containerd `toml:"containerd"`
			Registry   registry   `toml:"registry"`
		} `toml:"io.containerd.grpc.v1.cri"`
		Transfer struct {
			Unpack []struct {
				Snapshotter string `toml:"snapshotter"`
			} `toml:"unpack_config"`
		} `toml:"io.containerd.transfer.v1.local"`
	} `toml:"plugins"`
}

type proxy struct {
	Type         string            `toml:"type"`
	Address      string            `toml:"address"`
	Capabilities []string          `toml:"capabilities"`
	Exports      map[string]string `toml:"exports"`
}

type images struct {
	Snapshotter        string                 `toml:"snapshotter"`
	DisableAnnotations bool                   `toml:"disable_snapshot_annotations"`
	Discard            bool                   `toml:"discard_unpacked_layers"`
	Downloads          int64                  `toml:"max_concurrent_downloads"`
	SyncFS             bool                   `toml:"image_pull_with_sync_fs"`
	Local              *bool                  `toml:"use_local_image_pull"` // nil before 2.1, where all pulls are
	RuntimePlatforms   map[string]snapshotter `toml:"runtime_platforms"`
	Registry           registry               `toml:"registry"`
}

type registry struct {
	ConfigPath string         `toml:"config_path"`
	Mirrors    map[string]any `toml:"mirrors"`
	Configs    map[string]any `toml:"configs"`
	Auths      map[string]any `toml:"auths"`
}

type containerd struct {
	Snapshotter        string                 `toml:"snapshotter"`
	DisableAnnotations bool                   `toml:"disable_snapshot_annotations"`
	Runtimes           map[string]snapshotter `toml:"runtimes"`
}

type snapshotter struct {
	Snapshotter string `toml:"snapshotter"`
}

// Find reads what `containerd config dump` has printed. Text that cannot be read is a trap.
func Find(dump []byte, w Want) Found {
	f := Found{Traps: []Trap{}}
	var c effective
	if err := toml.Unmarshal(dump, &c); err != nil {
		f.trap(Unreadable, "run `containerd config dump`, and mend what it says", "containerd's effective configuration: %v", err)
		return f
	}
	f.Version, f.Root, f.State = c.Version, c.Root, c.State
	c.checkCRI(&f)
	p, ok := c.plugin(&f, w)
	if !ok {
		return f
	}
	f.checkPlugin(p, w)
	runtimes, cri, annotated := c.cri(&f)
	f.checkUse(cri, runtimes)
	switch {
	case f.Pull == "local" && !annotated:
		f.trap(NoAnnotations, "set disable_snapshot_annotations = false there (deploy/containerd/local.toml; 1.7.toml for containerd 1.7)",
			"pulls are local, for %s, and disable_snapshot_annotations is true: the snapshotter is not told which image is pulled (NO_LABELS), and everything is pulled in full", f.Why)
	case f.Pull == "transfer" && p.Exports["enable_remote_snapshot_annotations"] != "true":
		f.trap(NoAnnotations, `set enable_remote_snapshot_annotations = "true" in [proxy_plugins.`+f.Snapshotter+`.exports] (deploy/containerd/transfer.toml)`,
			"the exports of proxy plugin %s lack enable_remote_snapshot_annotations: the snapshotter is not told which image is pulled (NO_LABELS), and everything is pulled in full", f.Snapshotter)
	}
	f.checkUnpack(&c)
	return f
}

// checkCRI looks whether CRI is there, and notes where it looks for registry hosts.
func (c *effective) checkCRI(f *Found) {
	if at := slices.IndexFunc(c.Disabled, func(name string) bool {
		return slices.Contains([]string{"cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"}, name)
	}); at >= 0 {
		f.trap(NoCRI, "take it out of disabled_plugins in containerd's configuration, and restart containerd", "disabled_plugins has %q, as Docker's package of containerd comes: kubelet and crictl cannot pull at all", c.Disabled[at])
	}
	var r registry
	switch {
	case c.Plugins.Images != nil:
		r = c.Plugins.Images.Registry
	case c.Plugins.CRI != nil:
		r = c.Plugins.CRI.Registry
	}
	f.HostsDirs = slices.DeleteFunc(strings.Split(r.ConfigPath, ":"), func(dir string) bool { return dir == "" })
	f.HostsHere = len(r.Mirrors)+len(r.Configs)+len(r.Auths) > 0
}

// plugin finds the proxy plugin with the address of w.
func (c *effective) plugin(f *Found, w Want) (proxy, bool) {
	names := make([]string, 0, len(c.ProxyPlugins))
	for name := range c.ProxyPlugins {
		names = append(names, name)
	}
	slices.Sort(names)
	other := ""
	for _, name := range names {
		p := c.ProxyPlugins[name]
		if strings.TrimPrefix(p.Address, "unix://") == w.Address {
			f.Snapshotter = name
			return p, true
		}
		if name == "streaming" || p.Exports["root"] == w.Root {
			other = name
		}
	}
	switch {
	case other != "":
		f.trap(WrongAddress, fmt.Sprintf("make both the same: address in [proxy_plugins.%s], and address in the snapshotter's configuration", other),
			"proxy plugin %s has address %s, the snapshotter serves on %s: pulls fail", other, c.ProxyPlugins[other].Address, w.Address)
	case len(w.DropIns) > 0:
		remedy := fmt.Sprintf("run `streaming-snapshotter install`; or add a line imports = [%q] to containerd's configuration, above the first table, and restart containerd", dirOf(w.DropIns[0])+"/*.toml")
		if c.old() {
			remedy = "run `streaming-snapshotter install`; or put its tables into containerd's configuration file itself (deploy/containerd/1.7.toml), and restart containerd: what 1.7 imports replaces all that the file says of CRI"
		}
		f.trap(NoImports, remedy, "%s is there and not in effect: a configuration file without an `imports` line ignores it", strings.Join(w.DropIns, ", "))
	default:
		remedy := "run `streaming-snapshotter install`; or copy deploy/containerd/transfer.toml, or local.toml, to /etc/containerd/conf.d, and restart containerd"
		if c.old() {
			remedy = "run `streaming-snapshotter install`; or put the tables of deploy/containerd/1.7.toml into containerd's configuration file, and restart containerd"
		}
		f.trap(NoProxyPlugin, remedy, "no proxy plugin has the address %s: containerd does not know the snapshotter", w.Address)
	}
	return proxy{}, false
}

// old reports whether it is containerd 1.7's.
func (c *effective) old() bool { return c.Version == 2 }

func dirOf(file string) string { return file[:strings.LastIndexByte(file, '/')] }

func (f *Found) checkPlugin(p proxy, w Want) {
	if p.Type != "snapshot" {
		f.trap(WrongType, `set type = "snapshot" there`, "proxy plugin %s is of type %q", f.Snapshotter, p.Type)
	}
	if got := p.Exports["root"]; got != w.Root {
		f.trap(WrongRoot, fmt.Sprintf("set root = %q in [proxy_plugins.%s.exports]", w.Root, f.Snapshotter),
			"the exports of proxy plugin %s say root = %q, the snapshotter's is %s: kubelet measures another directory, and does not collect images when the disk is full", f.Snapshotter, got, w.Root)
	}
	if slices.Contains(p.Capabilities, "rebase") {
		f.trap(Rebase, "take \"rebase\" out of capabilities there", "proxy plugin %s announces the capability rebase, which it does not have", f.Snapshotter)
	}
}

// cri says how CRI pulls: who pulls for a runtime with a snapshotter of its own, with which one all others, and whether local pulls are annotated.
func (c *effective) cri(f *Found) (runtimes map[string]string, name string, annotated bool) {
	runtimes = map[string]string{}
	add := func(of map[string]snapshotter) {
		for r, s := range of {
			if s.Snapshotter != "" {
				runtimes[r] = s.Snapshotter
			}
		}
	}
	if i := c.Plugins.Images; i != nil {
		add(c.Plugins.Runtime.Containerd.Runtimes)
		add(i.RuntimePlatforms)
		var why []string
		for _, k := range []struct {
			key string
			is  bool
		}{
			{"containerd 2.0", i.Local == nil}, {"use_local_image_pull", i.Local != nil && *i.Local}, {"disable_snapshot_annotations = false", !i.DisableAnnotations}, {"discard_unpacked_layers", i.Discard},
			{"registry.mirrors", len(i.Registry.Mirrors) > 0}, {"registry.configs", len(i.Registry.Configs) > 0}, {"registry.auths", len(i.Registry.Auths) > 0},
			{"max_concurrent_downloads", i.Downloads != 3}, {"image_pull_with_sync_fs", i.SyncFS},
		} {
			if k.is {
				why = append(why, k.key)
			}
		}
		f.Pull, f.Why = "transfer", strings.Join(why, ", ")
		if len(why) > 0 {
			f.Pull = "local"
		}
		return runtimes, i.Snapshotter, !i.DisableAnnotations
	}
	f.Pull, f.Why = "local", "containerd 1.7"
	if c.Plugins.CRI == nil {
		return runtimes, "", false
	}
	add(c.Plugins.CRI.Containerd.Runtimes)
	return runtimes, c.Plugins.CRI.Containerd.Snapshotter, !c.Plugins.CRI.Containerd.DisableAnnotations
}

func (f *Found) checkUse(cri string, runtimes map[string]string) {
	if cri == f.Snapshotter {
		f.Uses = append(f.Uses, "cri")
	}
	for r, s := range runtimes {
		if s == f.Snapshotter {
			f.Uses = append(f.Uses, "runtime "+r)
		}
	}
	slices.Sort(f.Uses)
	if len(f.Uses) == 0 {
		f.trap(NotForCRI, fmt.Sprintf("set snapshotter = %q in [plugins.'io.containerd.cri.v1.images'] (1.7: [plugins.\"io.containerd.grpc.v1.cri\".containerd]), or for a runtime", f.Snapshotter),
			"CRI pulls with the snapshotter %q, and no runtime with %s", cri, f.Snapshotter)
	}
}

// checkUnpack looks at the transfer service's list, which a file that sets it replaces.
func (f *Found) checkUnpack(c *effective) {
	has := map[string]bool{}
	for _, u := range c.Plugins.Transfer.Unpack {
		has[u.Snapshotter] = true
	}
	if f.Pull == "transfer" && !has[f.Snapshotter] {
		f.trap(NoUnpackConfig, "add an entry of unpack_config for it (deploy/containerd/transfer.toml); a file that is imported later replaces the list",
			"pulls go through the transfer service, whose unpack_config has no entry for %s: every pull fails with `no unpack platforms defined`", f.Snapshotter)
	}
	if has[f.Snapshotter] && !has["overlayfs"] {
		f.trap(UnpackReplaced, "repeat the entry for overlayfs beside the one for "+f.Snapshotter+" (deploy/containerd/transfer.toml)",
			"unpack_config has no entry for overlayfs: a list that is set replaces containerd's own, and pulls with overlayfs fail")
	}
}

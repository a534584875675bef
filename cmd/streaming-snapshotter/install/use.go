package install

import (
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/traps"
)

// use says who is to pull with the snapshotter. The zero value is all of CRI.
type use struct {
	runtime string // pods of this runtime handler, which is made, and no others
	retired string // nobody any more: CRI pulls with the snapshotter of this name
}

// wrong lists the traps, and that it is not u who uses the snapshotter.
func (u use) wrong(f traps.Found) (list []traps.Trap) {
	for _, t := range f.Traps {
		if t.Code != traps.NotForCRI || u.retired == "" {
			list = append(list, t)
		}
	}
	switch {
	case u.retired != "" && len(f.Uses) > 0:
		list = append(list, traps.Trap{Code: traps.NotForCRI, Text: strings.Join(f.Uses, ", ") + " would go on with the snapshotter"})
	case u.runtime != "" && len(list) == 0 && !slices.Contains(f.Uses, "runtime "+u.runtime):
		list = append(list, traps.Trap{Code: traps.NotForCRI, Text: "no runtime " + u.runtime + " pulls with the snapshotter"})
	}
	return list
}

// meant matches the keys that the settings are about.
func (u use) meant() *regexp.Regexp {
	keys := `imports|version|proxy_plugins\.` + Name + `|plugins\.io\.containerd\.transfer\.v1\.local\.unpack_config|` +
		`plugins\.(io\.containerd\.cri\.v1\.images|io\.containerd\.grpc\.v1\.cri\.containerd)\.(snapshotter|disable_snapshot_annotations)`
	if u.runtime != "" {
		keys += `|plugins\.(io\.containerd\.cri\.v1\.runtime\.containerd\.runtimes|io\.containerd\.grpc\.v1\.cri\.containerd\.runtimes|io\.containerd\.cri\.v1\.images\.runtime_platforms)\.` + regexp.QuoteMeta(u.runtime)
	}
	return regexp.MustCompile(`^(` + keys + `)(\.|$)`)
}

// handlerLike returns a copy of the runtime that pods have by default, with the snapshotter, for a handler of this name; what is not set there is left out.
func handlerLike(dump []byte, name string) (map[string]any, error) {
	type runtimes struct {
		Containerd struct {
			Default  string                    `toml:"default_runtime_name"`
			Runtimes map[string]map[string]any `toml:"runtimes"`
		} `toml:"containerd"`
	}
	var c struct {
		Plugins struct {
			Runtime runtimes `toml:"io.containerd.cri.v1.runtime"`
			CRI     runtimes `toml:"io.containerd.grpc.v1.cri"` // of 1.7
		} `toml:"plugins"`
	}
	if err := toml.Unmarshal(dump, &c); err != nil {
		return nil, err
	}
	of := c.Plugins.Runtime.Containerd
	if of.Default == "" {
		of = c.Plugins.CRI.Containerd
	}
	if other, taken := of.Runtimes[name]; taken && other["snapshotter"] != Name {
		return nil, fmt.Errorf("nothing was changed: containerd has a runtime handler %s already: choose another name for --runtime", name)
	}
	r := of.Runtimes[of.Default]
	if r == nil {
		return nil, fmt.Errorf("containerd's configuration has no default runtime (%q) to make another like it", of.Default)
	}
	r = set(r)
	r["snapshotter"] = Name
	return r, nil
}

// set returns what of m is more than nothing.
func set(m map[string]any) map[string]any {
	some := map[string]any{}
	for k, v := range m {
		if below, ok := v.(map[string]any); ok {
			v = set(below)
		}
		if r := reflect.ValueOf(v); r.IsValid() && !r.IsZero() && (r.Kind() != reflect.Map && r.Kind() != reflect.Slice || r.Len() > 0) {
			some[k] = v
		}
	}
	return some
}

// tablesOf is what m comes to as a table, and those below it.
func tablesOf(name string, m map[string]any) []table {
	t, below := table{name: name}, []table(nil)
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if v, ok := m[k].(map[string]any); ok {
			below = append(below, tablesOf(name+"."+k, v)...)
			continue
		}
		text, err := toml.Marshal(map[string]any{k: m[k]})
		if err != nil {
			continue // it came out of TOML
		}
		_, value, _ := strings.Cut(string(text), " = ")
		t.values = append(t.values, [2]string{k, strings.TrimSpace(value)})
	}
	return append([]table{t}, below...)
}

package install

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/traps"
)

// Name is that of the proxy plugin in containerd's configuration.
const Name = "streaming"

// form is one way to write the snapshotter into containerd's configuration.
type form struct {
	name  string
	files []file
}

// containerdFiles finds the files that have in.use use the snapshotter, and change nothing else: those of the first form with which containerd's own program makes an
// effective configuration that has no trap, and is otherwise what it was. There are none if containerd's configuration is so already.
func (in *installer) containerdFiles(ctx context.Context) ([]file, traps.Found, error) {
	now, err := in.dump(ctx, nil)
	if err != nil {
		return nil, traps.Found{}, fmt.Errorf("containerd cannot read its configuration as it is: %w", err)
	}
	want := traps.Want{Address: in.o.Address, Root: in.o.Root}
	found := traps.Find(now, want)
	if len(in.use.wrong(found)) == 0 {
		return nil, found, nil
	}
	if at := slices.IndexFunc(found.Traps, func(t traps.Trap) bool { return t.Code == traps.NoCRI }); at >= 0 { // no form mends it
		return nil, found, fmt.Errorf("nothing was changed: %s: %s", found.Traps[at].Text, found.Traps[at].Remedy)
	}
	if in.use.runtime != "" && slices.Contains(found.Uses, "cri") {
		return nil, found, fmt.Errorf("nothing was changed: CRI pulls everything with the snapshotter %s on this host, not runtime %s alone: uninstall first", found.Snapshotter, in.use.runtime)
	}
	forms, err := in.forms(now)
	if err != nil {
		return nil, found, err
	}
	var why []error
	for _, f := range forms {
		dump, err := in.dump(ctx, f.files)
		if ctx.Err() != nil {
			return nil, found, ctx.Err()
		}
		if err != nil {
			why = append(why, fmt.Errorf("%s: %w", f.name, err))
			continue
		}
		found = traps.Find(dump, want)
		lost, err := otherChanges(now, dump, in.use)
		if err != nil {
			return nil, found, err
		}
		wrong := in.use.wrong(found)
		if len(wrong) == 0 && len(lost) == 0 {
			return f.files, found, nil
		}
		for _, t := range wrong {
			why = append(why, fmt.Errorf("%s: %s: %s", f.name, t.Code, t.Text))
		}
		if len(lost) > 0 {
			why = append(why, fmt.Errorf("%s: it would change %s, too", f.name, strings.Join(lost, ", ")))
		}
	}
	return nil, found, fmt.Errorf("nothing was changed: no way was found to write the snapshotter into containerd's configuration %s\n%w", in.c.Config, errors.Join(why...))
}

// forms lists the ways, the best first.
func (in *installer) forms(dump []byte) (list []form, err error) {
	path := in.c.Config
	main, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var has struct {
		Version int      `toml:"version"`
		Imports []string `toml:"imports"`
	}
	var effective struct {
		Version int `toml:"version"`
	}
	if err := errors.Join(toml.Unmarshal(main, &has), toml.Unmarshal(dump, &effective)); err != nil {
		return nil, err
	}
	var entries []map[string]any // none for 1.7, where CRI does not use the transfer service
	if effective.Version > 2 {
		if entries, err = unpackEntries(dump); err != nil {
			return nil, err
		}
	}
	was, err := readFile(path)
	if err != nil {
		return nil, err
	}
	var handler map[string]any
	if in.use.runtime != "" {
		if handler, err = handlerLike(dump, in.use.runtime); err != nil {
			return nil, err
		}
	}
	type place struct {
		name  string
		files func(s settings) []file
	}
	var places []place
	for _, i := range has.Imports {
		if !filepath.IsAbs(i) {
			i = filepath.Join(filepath.Dir(path), i)
		}
		for _, name := range []string{"streaming-snapshotter.toml", "zz-streaming-snapshotter.toml"} { // what comes last, counts
			if base := filepath.Base(i); base != "*.toml" && base != name { // one that an install has imported by its name
				continue
			}
			dropIn := filepath.Join(filepath.Dir(i), name)
			places = append(places, place{dropIn, func(s settings) []file { return []file{regular(dropIn, 0o644, s.dropIn())} }})
		}
	}
	if len(has.Imports) == 0 {
		dropIn := filepath.Join(filepath.Dir(path), "conf.d/streaming-snapshotter.toml") // where containerd has them by default since 2.2
		places = append(places, place{dropIn + " with an `imports` line for it", func(s settings) []file {
			return []file{regular(dropIn, 0o644, s.dropIn()), replaced(was, withImports(main, effective.Version, dropIn))}
		}})
	}
	itself := func(version int) func(s settings) []file {
		return func(s settings) []file {
			s.version = version
			return []file{replaced(was, s.edit(main))}
		}
	}
	switch {
	case effective.Version == 2: // what 1.7 imports replaces all that the file says of CRI, also what somebody will write there later
		if was.Absent {
			main, has.Version = []byte("version = 2\n"), 2
		}
		places = slices.Insert(places, 0, place{path + " itself", itself(has.Version)})
	case !was.Absent:
		places = append(places, place{path + " itself", itself(has.Version)})
		if has.Version < 3 { // containerd 2 migrates CRI's snapshotter only beside runtimes, and takes what stands in its new place already
			places = append(places, place{path + " itself, by the names of version 3", itself(3)})
		}
	}
	version := min(effective.Version, 3) // 2 is containerd 1.7's; 3 is understood by all of 2.x
	for _, local := range []bool{false, true} {
		for _, p := range places {
			s := settings{in.use, in.o.Address, in.o.Root, version, local, effective.Version > 2, entries, handler}
			list = append(list, form{p.name + ", " + s.pull(), p.files(s)})
		}
	}
	return list, nil
}

// replaced is was with other content. A symbolic link becomes a file.
func replaced(was file, data []byte) file {
	f := regular(was.Path, 0o644, data)
	if !was.Absent && was.Link == "" {
		f.Mode, f.UID, f.GID, f.Xattrs = was.Mode, was.UID, was.GID, was.Xattrs
	}
	return f
}

// withImports returns main with a line that imports file, at the top, where it belongs to no table.
func withImports(main []byte, version int, file string) []byte {
	line := fmt.Sprintf("imports = [%q]\n", file)
	if len(main) == 0 {
		return fmt.Appendf(nil, "version = %d\n%s", version, line)
	}
	at := regexp.MustCompile(`(?m)^version\s*=.*\n`).FindIndex(main)
	if at == nil {
		return append([]byte(line), main...)
	}
	return slices.Concat(main[:at[1]], []byte(line), main[at[1]:])
}

// unpackEntries returns the transfer service's list in effect. containerd does not print its own, which stands where none is set.
func unpackEntries(dump []byte) ([]map[string]any, error) {
	var c struct {
		Plugins struct {
			Transfer struct {
				Unpack []map[string]any `toml:"unpack_config"`
			} `toml:"io.containerd.transfer.v1.local"`
		} `toml:"plugins"`
	}
	err := toml.Unmarshal(dump, &c)
	if c.Plugins.Transfer.Unpack == nil {
		return []map[string]any{{"platform": "linux", "snapshotter": "overlayfs", "differ": "walking"}}, err
	}
	return slices.DeleteFunc(c.Plugins.Transfer.Unpack, func(e map[string]any) bool { return e["snapshotter"] == Name }), err
}

// settings are what containerd's configuration has to say.
type settings struct {
	use
	address, root string
	version       int // of the file's form
	local         bool
	remap         bool             // containerd makes ID-mapped mounts, as 1.7 does not
	entries       []map[string]any // of unpack_config, beside the snapshotter's
	handler       map[string]any   // the runtime handler
}

func (s settings) pull() string {
	if s.local {
		return "local pulls"
	}
	return "pulls as they are"
}

// table is a table of TOML with the lines of its values.
type table struct {
	name   string
	values [][2]string // key, value
}

// tables are those to write, but for unpack_config.
func (s settings) tables() []table {
	images, runtimes := "plugins.'io.containerd.cri.v1.images'", "plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes."
	switch {
	case s.version < 2:
		images = "plugins.cri.containerd"
		runtimes = images + ".runtimes."
	case s.version == 2:
		images = `plugins."io.containerd.grpc.v1.cri".containerd`
		runtimes = images + ".runtimes."
	}
	cri := table{name: images}
	if s.runtime == "" {
		cri.values = [][2]string{{"snapshotter", fmt.Sprintf("%q", cmp.Or(s.retired, Name))}}
	}
	if s.local {
		cri.values = append(cri.values, [2]string{"disable_snapshot_annotations", "false"})
	}
	plugin := [][2]string{{"type", `"snapshot"`}, {"address", fmt.Sprintf("%q", s.address)}}
	if s.remap {
		plugin = append(plugin, [2]string{"capabilities", `["remap-ids"]`})
	}
	list := []table{
		{"proxy_plugins." + Name, plugin},
		{"proxy_plugins." + Name + ".exports", [][2]string{{"root", fmt.Sprintf("%q", s.root)}, {"enable_remote_snapshot_annotations", `"true"`}}},
	}
	if len(cri.values) > 0 {
		list = append(list, cri)
	}
	if s.runtime == "" {
		return list
	}
	list = append(list, tablesOf(runtimes+s.runtime, s.handler)...)
	if s.version > 2 { // before containerd 2.3, pulls know the runtime's snapshotter from here alone
		list = append(list, table{images + ".runtime_platforms." + s.runtime, [][2]string{{"snapshotter", fmt.Sprintf("%q", Name)}}})
	}
	return list
}

// unpack is unpack_config with all its entries, for a list that is set replaces the one of before.
func (s settings) unpack() string {
	if s.entries == nil {
		return ""
	}
	var b strings.Builder
	for _, e := range append([]map[string]any{{"platform": "linux", "snapshotter": Name, "differ": "walking"}}, s.entries...) {
		text, err := toml.Marshal(e)
		if err != nil {
			continue // it came out of TOML
		}
		fmt.Fprintf(&b, "\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n%s", text)
	}
	return b.String()
}

const written = "# Written by `streaming-snapshotter install`; uninstall removes it.\n"

// dropIn is a file of its own.
func (s settings) dropIn() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%sversion = %d\n", written, s.version)
	for _, t := range s.tables() {
		t.write(&b)
	}
	b.WriteString(s.unpack())
	return b.Bytes()
}

func (t table) write(b *bytes.Buffer) {
	fmt.Fprintf(b, "\n[%s]\n", t.name)
	for _, v := range t.values {
		fmt.Fprintf(b, "  %s = %s\n", v[0], v[1])
	}
}

// edit returns main with the settings in their tables. What it does not understand containerd will refuse, or otherChanges sees it.
func (s settings) edit(main []byte) []byte {
	text := string(main)
	if text != "" && !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	for _, t := range s.tables() {
		text = t.set(text)
	}
	if !strings.Contains(text, "unpack_config") {
		text += s.unpack()
	}
	return []byte(text)
}

// set returns text with the values of t.
func (t table) set(text string) string {
	plain := func(name string) string {
		return strings.NewReplacer(`"`, "", "'", "", " ", "", "\t", "").Replace(name)
	}
	header := regexp.MustCompile(`^\s*\[([^\[\]]+)\]\s*(#.*)?$`)
	lines := strings.SplitAfter(text, "\n")
	begin := slices.IndexFunc(lines, func(l string) bool {
		m := header.FindStringSubmatch(strings.TrimRight(l, "\r\n"))
		return m != nil && plain(m[1]) == plain(t.name)
	})
	if begin < 0 {
		var b bytes.Buffer
		t.write(&b)
		return text + b.String()
	}
	for _, v := range t.values {
		end := begin + 1
		for end < len(lines) && !strings.HasPrefix(strings.TrimSpace(lines[end]), "[") {
			end++
		}
		key := regexp.MustCompile(`^(\s*)` + regexp.QuoteMeta(v[0]) + `\s*=`)
		at := slices.IndexFunc(lines[begin+1:end], key.MatchString)
		line := fmt.Sprintf("%s = %s\n", v[0], v[1])
		if at >= 0 {
			lines[begin+1+at] = key.FindStringSubmatch(lines[begin+1+at])[1] + line
		} else {
			lines = slices.Insert(lines, begin+1, "  "+line)
		}
	}
	return strings.Join(lines, "")
}

// otherChanges lists the keys in which two configurations differ beyond what u means.
func otherChanges(before, after []byte, u use) ([]string, error) {
	var was, is map[string]any
	if err := errors.Join(toml.Unmarshal(before, &was), toml.Unmarshal(after, &is)); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(differences("", was, is), u.meant().MatchString), nil
}

func differences(path string, was, is any) (list []string) {
	a, ok := was.(map[string]any)
	b, ok2 := is.(map[string]any)
	if !ok || !ok2 {
		if !reflect.DeepEqual(was, is) {
			return []string{path}
		}
		return nil
	}
	keys := map[string]bool{}
	for k := range a {
		keys[k] = true
	}
	for k := range b {
		keys[k] = true
	}
	for k := range keys {
		at := k
		if path != "" {
			at = path + "." + k
		}
		// A table that is there on one side only is looked into, so that its keys are named.
		if _, has := a[k]; !has {
			if _, isTable := b[k].(map[string]any); isTable {
				list = append(list, differences(at, map[string]any{}, b[k])...)
				continue
			}
		}
		list = append(list, differences(at, a[k], b[k])...)
	}
	slices.Sort(list)
	return list
}

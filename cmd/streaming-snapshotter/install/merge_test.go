package install

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/traps"
)

// TestTakeBack: what others have changed stays, wherever it is, and what cannot be told apart is left to them.
func TestTakeBack(t *testing.T) {
	const was, installed = "version = 2\noom = 1\n[a]\n  x = 1\n", "version = 2\noom = 1\n[a]\n  snapshotter = 's'\n  x = 1\n\n[ours]\n  y = 1\n"
	for name, c := range map[string]struct{ was, installed, is, want string }{
		"nothing":          {was, installed, installed, was},
		"at the end":       {was, installed, installed + "[b]\n  z = 1\n", was + "[b]\n  z = 1\n"},
		"at the top":       {was, installed, "# mine\n" + installed, "# mine\n" + was},
		"a line":           {was, installed, "version = 2\noom = 2\n[a]\n  snapshotter = 's'\n  x = 1\n\n[ours]\n  y = 1\n", "version = 2\noom = 2\n[a]\n  x = 1\n"},
		"beside":           {was, installed, "version = 2\noom = 1\n[a]\n  snapshotter = 's'\n  x = 2\n\n[ours]\n  y = 1\n", "version = 2\noom = 1\n[a]\n  x = 2\n"},
		"in ours":          {was, installed, "version = 2\noom = 1\n[a]\n  snapshotter = 's'\n  x = 1\n\n[ours]\n  y = 2\n", ""},
		"ours":             {was, installed, "version = 2\noom = 1\n[a]\n  snapshotter = 'other'\n  x = 1\n\n[ours]\n  y = 1\n", ""},
		"ours, taken out":  {was, installed, "version = 2\noom = 2\n[a]\n  x = 1\n\n[ours]\n  y = 1\n", "version = 2\noom = 2\n[a]\n  x = 1\n"},
		"all of it":        {was, installed, was, was},
		"no end of a line": {"a = 1", "a = 1\nours = 1\n", "b = 1\na = 1\nours = 1\n", "b = 1\na = 1"},
		"of nothing":       {"", "ours = 1\n", "ours = 1\nb = 1\n", "b = 1\n"},
	} {
		t.Run(name, func(t *testing.T) {
			if got, ok := takeBack([]byte(c.was), []byte(c.installed), []byte(c.is)); ok != (c.want != "") || ok && string(got) != c.want {
				t.Errorf("got %v, %q, want %q", ok, got, c.want)
			}
		})
	}
}

// TestEditedByHand: what others have written into containerd's main file since the install stays there, if an uninstall can tell it from what install has written.
func TestEditedByHand(t *testing.T) {
	const timeouts = "\n[timeouts]\n  \"io.containerd.timeout.task.state\" = \"3s\"\n"
	cases := map[string]map[string]string{"": forms()["another imported"].files}
	if os.Getenv("FULL") != "" {
		cases["1.7"] = map[string]string{"config.toml": aks}
	}
	for version, files := range cases {
		for name, c := range map[string]struct {
			edit    func(text string) string // the same before and after the install
			discard bool
			stays   bool
			want    string // of the error
		}{
			"at the end":      {func(s string) string { return s + timeouts }, false, true, ""},
			"at the top":      {func(s string) string { return "# mine\n" + s }, false, true, ""},
			"to be discarded": {func(s string) string { return s + timeouts }, true, false, ""},
			"in a table of ours": {func(s string) string {
				return s + map[string]string{"": "  max_concurrent_downloads = 9\n", "1.7": "  address = '/run/moved.sock'\n"}[version]
			}, false, false, "changed since the install; what install has written there cannot be taken out by itself"},
			"a line of ours": {func(s string) string {
				return strings.Replace(s, `snapshotter = "streaming"`, `snapshotter = "native"`, 1)
			}, false, false, "changed since the install; take the change back"},
		} {
			t.Run(strings.TrimSpace(version+" "+name), func(t *testing.T) {
				in, was, is := installedOn(t, version, files)
				rewrite(t, in, c.edit(is))
				in.o.DiscardChanges = c.discard
				r, err := putsBack(t, in)
				if c.want != "" {
					if err == nil || !strings.Contains(err.Error(), c.want) {
						t.Errorf("got %v, want %q", err, c.want)
					}
					return
				}
				want := was
				if c.stays {
					want = c.edit(want)
				}
				if got := mainFile(t, in); err != nil || got != want || (len(r.merged) == 1) != c.stays {
					t.Errorf("%v: got\n%s\nwant\n%s", err, got, want)
				}
			})
		}
	}
}

// TestRewritten: whoever writes containerd's files anew between two installs, as what provisions nodes does at each boot, finds that after an uninstall and not what was there
// before the first install.
func TestRewritten(t *testing.T) {
	const anew = "version = 3\nimports = ['DIR/other.toml']\n# anew\n[plugins.'io.containerd.cri.v1.images']\n  max_concurrent_downloads = 7\n"
	cut := func(is string) string { return strings.ReplaceAll(is, `snapshotter = "streaming"`, "") }
	for name, c := range map[string]struct {
		edit  func(was, is string) string
		first bool   // an uninstall puts back what was there before the first install, and not what edit returned
		err   string // of the uninstall
	}{
		"as it was":                 {func(was, _ string) string { return was }, true, ""},
		"but for a line":            {func(was, _ string) string { return was + "# more\n" }, false, ""},
		"wholly":                    {func(string, string) string { return anew }, false, ""},
		"gone":                      {func(string, string) string { return "" }, false, ""},
		"a part of ours is gone":    {func(_, is string) string { return cut(is) }, true, ""},
		"a part and theirs":         {func(_, is string) string { return "# top\n" + cut(is) }, false, "changed since the install"},
		"theirs in a table of ours": {func(_, is string) string { return cut(is) + "  max_concurrent_downloads = 9\n" }, false, "changed since the install"},
	} {
		t.Run(name, func(t *testing.T) {
			in, was, is := installedOn(t, "", forms()["another imported"].files)
			edited := strings.ReplaceAll(c.edit(was, is), "DIR", filepath.Dir(in.c.Config))
			rewrite(t, in, edited)
			installsInto(t, in)
			if again := mainFile(t, in); again == edited {
				t.Fatalf("the second install has changed nothing:\n%s", again)
			}
			_, err := putsBack(t, in)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("got %v, want %q", err, c.err)
				}
				return
			}
			want := edited
			if c.first {
				want = was
			}
			if got := mainFile(t, in); err != nil || got != want {
				t.Errorf("%v: got\n%s\nwant\n%s", err, got, want)
			}
		})
	}
}

// installedOn is containerd of version with files, into which an install has written, and its main file before and after that.
func installedOn(t *testing.T, version string, files map[string]string) (in *installer, was, is string) {
	t.Helper()
	in = on(t, containerd(t, version), files)
	var err error
	if in.s, err = openStore(filepath.Join(t.TempDir(), "state")); err != nil {
		t.Fatal(err)
	}
	was = mainFile(t, in)
	installsInto(t, in)
	return in, was, mainFile(t, in)
}

func mainFile(t *testing.T, in *installer) string {
	t.Helper()
	b, err := os.ReadFile(in.c.Config)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func rewrite(t *testing.T, in *installer, text string) {
	t.Helper()
	if err := os.WriteFile(in.c.Config, []byte(text), 0); err != nil {
		t.Fatal(err)
	}
}

// putsBack does of an uninstall what is about containerd's files.
func putsBack(t *testing.T, in *installer) (r removal, err error) {
	t.Helper()
	now, err := in.dump(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = in.filesBefore(t.Context(), &r, now, traps.Find(now, traps.Want{Address: in.o.Address, Root: in.o.Root})); err != nil {
		return r, err
	}
	return r, apply(t.Context(), r.files)
}

// installsInto writes the snapshotter into containerd's configuration.
func installsInto(t *testing.T, in *installer) {
	t.Helper()
	files, _, err := in.containerdFiles(t.Context())
	if err == nil {
		err = in.s.begin(files, change{Theirs: len(files)})
	}
	if err == nil {
		err = apply(t.Context(), files)
	}
	if err == nil {
		err = in.s.commit()
	}
	if err == nil {
		in.s, err = openStore(in.s.dir)
	}
	if err != nil {
		t.Fatal(err)
	}
}

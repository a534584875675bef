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
				in := on(t, containerd(t, version), files)
				var err error
				if in.s, err = openStore(filepath.Join(t.TempDir(), "state")); err != nil {
					t.Fatal(err)
				}
				was, err := os.ReadFile(in.c.Config)
				if err != nil {
					t.Fatal(err)
				}
				installsInto(t, in)
				is, err := os.ReadFile(in.c.Config)
				if err == nil {
					err = os.WriteFile(in.c.Config, []byte(c.edit(string(is))), 0)
				}
				if err != nil {
					t.Fatal(err)
				}
				now, err := in.dump(t.Context(), nil)
				if err != nil {
					t.Fatal(err)
				}
				in.o.DiscardChanges = c.discard
				var r removal
				_, err = in.filesBefore(t.Context(), &r, now, traps.Find(now, traps.Want{Address: in.o.Address, Root: in.o.Root}))
				if c.want != "" {
					if err == nil || !strings.Contains(err.Error(), c.want) {
						t.Errorf("got %v, want %q", err, c.want)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if err := apply(t.Context(), r.files); err != nil {
					t.Fatal(err)
				}
				want := string(was)
				if c.stays {
					want = c.edit(want)
				}
				if got, err := os.ReadFile(in.c.Config); err != nil || string(got) != want || (len(r.merged) == 1) != c.stays {
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
	for name, c := range map[string]struct {
		edit func(was, is string) string
		err  string // of the uninstall; without one there is what edit has returned
	}{
		"as it was":       {func(was, _ string) string { return was }, ""},
		"but for a line":  {func(was, _ string) string { return was + "# more\n" }, ""},
		"wholly":          {func(string, string) string { return anew }, ""},
		"gone":            {func(string, string) string { return "" }, ""},
		"a part of ours":  {func(_, is string) string { return "# top\n" + strings.ReplaceAll(is, `snapshotter = "streaming"`, "") }, "changed since the install"},
		"a table of ours": {func(_, is string) string { return "# top\n" + is[:strings.Index(is, "[proxy_plugins")] }, "changed since the install"},
	} {
		t.Run(name, func(t *testing.T) {
			in := on(t, containerd(t, ""), forms()["another imported"].files)
			var err error
			if in.s, err = openStore(filepath.Join(t.TempDir(), "state")); err != nil {
				t.Fatal(err)
			}
			before, err := os.ReadFile(in.c.Config)
			if err != nil {
				t.Fatal(err)
			}
			installsInto(t, in)
			is, err := os.ReadFile(in.c.Config)
			if err != nil {
				t.Fatal(err)
			}
			edited := strings.ReplaceAll(c.edit(string(before), string(is)), "DIR", filepath.Dir(in.c.Config))
			if err := os.WriteFile(in.c.Config, []byte(edited), 0); err != nil {
				t.Fatal(err)
			}
			installsInto(t, in)
			again, err := os.ReadFile(in.c.Config)
			if err != nil || string(again) == edited {
				t.Fatalf("the second install has changed nothing: %v\n%s", err, again)
			}
			now, err := in.dump(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			var r removal
			_, err = in.filesBefore(t.Context(), &r, now, traps.Find(now, traps.Want{Address: in.o.Address, Root: in.o.Root}))
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("got %v, want %q", err, c.err)
				}
				return
			}
			if err == nil {
				err = apply(t.Context(), r.files)
			}
			if got, err2 := os.ReadFile(in.c.Config); err != nil || err2 != nil || string(got) != edited {
				t.Errorf("%v, %v: got\n%s\nwant\n%s", err, err2, got, edited)
			}
		})
	}
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

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

package criproxy

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/credentials"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

// The cases of containerd's TestParseAuth, and more.
func TestCredentialOf(t *testing.T) {
	b64 := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	for name, c := range map[string]struct {
		auth *runtime.AuthConfig
		want Credential
	}{
		"nothing":            {nil, Credential{}},
		"empty":              {&runtime.AuthConfig{}, Credential{}},
		"password":           {&runtime.AuthConfig{Username: "u", Password: "p:q"}, Credential{User: "u", Secret: "p:q"}},
		"without password":   {&runtime.AuthConfig{Username: "u"}, Credential{}},
		"identity token":     {&runtime.AuthConfig{IdentityToken: "it"}, Credential{Secret: "it"}},
		"auth":               {&runtime.AuthConfig{Auth: b64("u:p:q")}, Credential{User: "u", Secret: "p:q"}},
		"auth, zeros behind": {&runtime.AuthConfig{Auth: b64("u:p\x00\x00")}, Credential{User: "u", Secret: "p"}},
		"auth is no base64":  {&runtime.AuthConfig{Auth: "%%"}, Credential{}},
		"auth has no colon":  {&runtime.AuthConfig{Auth: b64("up")}, Credential{}},
		"password and auth":  {&runtime.AuthConfig{Username: "u", Password: "p", Auth: b64("v:q"), IdentityToken: "it"}, Credential{User: "u", Secret: "p"}},
		"token and auth":     {&runtime.AuthConfig{IdentityToken: "it", Auth: b64("v:q")}, Credential{Secret: "it"}},
		"registry token":     {&runtime.AuthConfig{RegistryToken: "rt"}, Credential{}},
		"address":            {&runtime.AuthConfig{Username: "u", Password: "p", ServerAddress: "https://r.example:5000/v2"}, Credential{Host: "r.example:5000", User: "u", Secret: "p"}},
		"address, no scheme": {&runtime.AuthConfig{Username: "u", Password: "p", ServerAddress: "r.example"}, Credential{}},
		"malformed address":  {&runtime.AuthConfig{Username: "u", Password: "p", ServerAddress: "r.example:5000"}, Credential{}},
	} {
		if got, ok := credentialOf(c.auth); ok != (c.want != Credential{}) || ok && got != c.want {
			t.Errorf("%s: got %+v, %t, want %+v", name, got, ok, c.want)
		}
	}
}

// keep is a Store's options with its files in directories of the test's own.
func keep(t *testing.T) Options {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "criproxy-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return Options{File: filepath.Join(t.TempDir(), "credentials"), Key: filepath.Join(dir, "sub", "key"), OnFile: func(err error) { t.Errorf("the file: %v", err) }}
}

const (
	repo  = registryclient.Repository("r.example/a")
	image = "r.example/a:v1"
)

// begin begins a pull.
func begin(s *Store, ref string, auth *runtime.AuthConfig) (done func(id string)) {
	return s.Begin(&runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: ref}, Auth: auth})
}

// pullWith is a pull with a password, that gets an image.
func pullWith(s *Store, ref, password, id string) {
	if done := begin(s, ref, &runtime.AuthConfig{Username: "u", Password: password}); done != nil {
		done(id)
	}
}

// lookup is the Store's, for a place where repo is called name.
func lookup(t *testing.T, s *Store, repo, name registryclient.Repository) []credentials.Login {
	t.Helper()
	list, err := s.Lookup(t.Context(), registryclient.Place{Image: repo, Names: []registryclient.Repository{name}})
	if err != nil {
		t.Error(err)
	}
	return list
}

// want compares the passwords for a repository.
func want(t *testing.T, s *Store, repo registryclient.Repository, passwords ...string) {
	t.Helper()
	var got []string
	for _, l := range lookup(t, s, repo, repo) {
		got = append(got, l.Secret)
	}
	if !slices.Equal(got, passwords) {
		t.Helper()
		t.Errorf("%s: got %q, want %q", repo, got, passwords)
	}
}

func TestStore(t *testing.T) {
	s := Open(Options{File: filepath.Join(t.TempDir(), "none")})
	want(t, s, repo)
	done := begin(s, image, &runtime.AuthConfig{Username: "u", Password: "1"})
	want(t, s, repo, "1")
	want(t, s, "r.example/b")
	want(t, s, "q.example/a")
	second := begin(s, image, &runtime.AuthConfig{Username: "u", Password: "2"})
	want(t, s, repo, "2", "1")
	second("")
	want(t, s, repo, "1")
	done("sha256:1")
	want(t, s, repo, "1")

	// A failed pull takes nothing from the one that has worked; one without, or with what is malformed, has nothing.
	pullWith(s, image, "1", "")
	pullWith(s, image, "2", "")
	want(t, s, repo, "1")
	if begin(s, image, nil) != nil || begin(s, image, &runtime.AuthConfig{Auth: "%%"}) != nil || begin(s, "::", &runtime.AuthConfig{Username: "u", Password: "p"}) != nil {
		t.Error("kept what is no credential")
	}

	// Several of one image, by tag or by digest: the last ones.
	for i := range maxCredentials {
		pullWith(s, "r.example/a@sha256:"+strings.Repeat("0", 64), fmt.Sprint("n", i), "sha256:1")
	}
	want(t, s, repo, "n3", "n2", "n1", "n0")
	pullWith(s, image, "n1", "sha256:1")
	want(t, s, repo, "n1", "n3", "n2", "n0")
	pullWith(s, image, "n1", "sha256:2")
	want(t, s, repo, "n1", "n3", "n2", "n0")

	// Docker Hub's short names are what containerd makes of them.
	pullWith(s, "busybox", "hub", "sha256:3")
	want(t, s, "docker.io/library/busybox", "hub")

	// With the images they go.
	var images []Image
	var dropped []registryclient.Repository
	drop := func(r registryclient.Repository) { dropped = append(dropped, r) }
	wantDropped := func(want ...registryclient.Repository) {
		t.Helper()
		if !slices.Equal(dropped, want) {
			t.Errorf("dropped %v, want %v", dropped, want)
		}
		dropped = nil
	}
	s.Follow(func() ([]Image, error) { return images, errors.New("cannot tell") }, drop)
	wantDropped()
	want(t, s, "docker.io/library/busybox", "hub")
	images = []Image{{repo, "sha256:1"}, {repo, "sha256:2"}, {"r.example/old", ""}}
	s.Follow(func() ([]Image, error) { return images, nil }, drop)
	want(t, s, "docker.io/library/busybox")
	wantDropped("docker.io/library/busybox")
	pullWith(s, "r.example/old:v1", "old", "sha256:1")
	want(t, s, "r.example/old", "old")
	images = images[1:]
	s.Sweep()
	want(t, s, repo, "n1")
	pullWith(s, image, "other", "sha256:4") // in the normal way
	want(t, s, repo, "n1")
	wantDropped()
	pullWith(s, "r.example/b:v1", "other", "sha256:4")
	pullWith(s, "r.example/b:v1", "other", "")
	wantDropped("r.example/b", "r.example/b")
	images = nil
	s.Sweep()
	want(t, s, repo)
	want(t, s, "r.example/old")
	wantDropped("r.example/old", repo)

	// Every host of the repository, or one.
	mirror := registryclient.Repository("m.example/proxy/a")
	done = begin(s, image, &runtime.AuthConfig{Username: "u", Password: "p"})
	want(t, s, repo, "p")
	if got := lookup(t, s, repo, mirror); !slices.Equal(got, []credentials.Login{{User: "u", Secret: "p"}}) {
		t.Errorf("for a mirror: %v", got)
	}
	done("")
	done = begin(s, image, &runtime.AuthConfig{IdentityToken: "it", ServerAddress: "https://m.example"})
	want(t, s, repo)
	if got := lookup(t, s, repo, mirror); !slices.Equal(got, []credentials.Login{{Secret: "it"}}) {
		t.Errorf("for its own host: %v", got)
	}
	done("")
	done = begin(s, "busybox", &runtime.AuthConfig{Username: "u", Password: "hub", ServerAddress: "https://registry-1.docker.io"})
	want(t, s, "docker.io/library/busybox", "hub")
	done("")
}

func TestFile(t *testing.T) {
	o := keep(t)
	s := Open(o)
	if _, err := os.Stat(o.File); !os.IsNotExist(err) {
		t.Errorf("a file of nothing: %v", err)
	}
	pullWith(s, image, "one secret", "sha256:1")
	pullWith(s, image, "two secret", "sha256:2")
	begin(s, image, &runtime.AuthConfig{Username: "u", Password: "under way"})
	for _, name := range []string{o.File, o.Key} {
		if fi, err := os.Stat(name); err != nil || fi.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", name, fi, err)
		}
	}
	b, err := os.ReadFile(o.File)
	if err != nil || strings.Contains(string(b), "secret") || strings.Contains(string(b), "r.example") {
		t.Errorf("the file can be read: %q, %v", b, err)
	}
	s = Open(o) // as after a kill
	want(t, s, repo, "two secret", "one secret")
	pullWith(s, image, "three", "sha256:3")
	s = Open(o)
	want(t, s, repo, "three", "two secret", "one secret")
	s.Follow(func() ([]Image, error) { return []Image{{repo, "sha256:1"}, {repo, "sha256:3"}}, nil }, nil)
	want(t, Open(o), repo, "three", "one secret")
	s.Follow(func() ([]Image, error) { return nil, nil }, nil)
	if left, err := os.ReadDir(filepath.Dir(o.File)); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// A file that cannot be used is no hindrance, and the next pull makes another one.
func TestFileUnusable(t *testing.T) {
	flip := func(t *testing.T, name string, at int) {
		t.Helper()
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		b[at] ^= 1
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		harm func(t *testing.T, o *Options)
		told string // at the next start; "" is nothing
	}{
		"nothing":           {func(*testing.T, *Options) {}, "-"},
		"of another boot":   {func(t *testing.T, o *Options) { os.RemoveAll(filepath.Dir(o.Key)) }, ""},
		"of another key":    {func(t *testing.T, o *Options) { flip(t, o.Key, 3) }, "damaged, or not of the key"},
		"header":            {func(t *testing.T, o *Options) { flip(t, o.File, 31) }, "another release's"},
		"one bit":           {func(t *testing.T, o *Options) { flip(t, o.File, len(header)+20) }, "damaged"},
		"nonce":             {func(t *testing.T, o *Options) { flip(t, o.File, len(header)) }, "damaged"},
		"empty":             {func(t *testing.T, o *Options) { os.Truncate(o.File, 0) }, "damaged"},
		"short":             {func(t *testing.T, o *Options) { os.Truncate(o.File, int64(len(header))+5) }, "damaged"},
		"short key":         {func(t *testing.T, o *Options) { os.Truncate(o.Key, 31) }, "want 32 bytes"},
		"key for everybody": {func(t *testing.T, o *Options) { os.Chmod(o.Key, 0o640) }, "nobody but its owner"},
		"key is a link": {func(t *testing.T, o *Options) {
			os.Rename(o.Key, o.Key+"2")
			os.Symlink(o.Key+"2", o.Key)
		}, "too many levels of symbolic links"},
		"file is a directory": {func(t *testing.T, o *Options) {
			os.Remove(o.File)
			os.Mkdir(o.File, 0o700)
		}, "is a directory"},
		"memory only": {func(t *testing.T, o *Options) { o.Key = "" }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			o := keep(t)
			pullWith(Open(o), image, "old", "sha256:1")
			c.harm(t, &o)
			var told []string
			o.OnFile = func(err error) { told = append(told, fmt.Sprint(err)) }
			s := Open(o)
			if c.told == "-" {
				want(t, s, repo, "old")
				return
			}
			want(t, s, repo)
			if got := strings.Join(told, "; "); (c.told == "") != (got == "") || !strings.Contains(got, c.told) {
				t.Errorf("told %q, want %q", got, c.told)
			}
			if _, err := os.Lstat(o.File); !os.IsNotExist(err) {
				t.Errorf("still there: %v", err)
			}
			pullWith(s, image, "new", "sha256:1")
			want(t, s, repo, "new")
			if o.Key != "" {
				want(t, Open(o), repo, "new")
			}
		})
	}
}

// What cannot be written is served all the same, and told once.
func TestFileNotWritten(t *testing.T) {
	o := keep(t)
	onDisk := o
	onDisk.Key = filepath.Join(t.TempDir(), "key") // which a reboot would leave
	noDir := o
	noDir.File = filepath.Join(t.TempDir(), "none", "credentials")
	for name, o := range map[string]Options{"key on a disk": onDisk, "no directory": noDir} {
		t.Run(name, func(t *testing.T) {
			var told []error
			o.OnFile = func(err error) { told = append(told, err) }
			s := Open(o)
			told = nil
			pullWith(s, image, "1", "sha256:1")
			pullWith(s, image, "2", "sha256:1")
			want(t, s, repo, "2", "1")
			if len(told) != 1 || told[0] == nil || !strings.Contains(told[0].Error(), "not kept over a restart") {
				t.Errorf("told %v", told)
			}
			if _, err := os.Stat(o.Key); name == "key on a disk" && err == nil {
				t.Error("a key was written to a disk")
			}
			os.Mkdir(filepath.Dir(o.File), 0o700)
			pullWith(s, image, "3", "sha256:1")
			if name == "no directory" && (len(told) != 2 || told[1] != nil) {
				t.Errorf("told %v", told)
			}
		})
	}
}

// What was dropped does not come back from a file that could not be written since.
func TestFileFailsLater(t *testing.T) {
	o := keep(t)
	s := Open(o)
	pullWith(s, image, "1", "sha256:1")
	pullWith(s, image, "2", "sha256:2")
	if err := os.Mkdir(o.File+".new", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(o.File+".new", "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s.o.OnFile = nil
	s.Follow(func() ([]Image, error) { return []Image{{repo, "sha256:2"}}, nil }, nil)
	want(t, s, repo, "2")
	want(t, Open(o), repo)
}

func TestStoreRace(t *testing.T) {
	o := keep(t)
	s := Open(o)
	s.Follow(func() ([]Image, error) { return []Image{{repo, "sha256:1"}}, nil }, nil)
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for k := range 20 {
				pullWith(s, image, fmt.Sprint(i), []string{"sha256:1", "odd", ""}[k%3])
				lookup(t, s, repo, repo)
				s.Sweep()
			}
		})
	}
	all.Wait()
	last := lookup(t, s, repo, repo)
	if len(last) != maxCredentials {
		t.Errorf("kept %d", len(last))
	}
	if got := lookup(t, Open(o), repo, repo); !slices.Equal(got, last) {
		t.Errorf("the file has %v, want %v", got, last)
	}
}

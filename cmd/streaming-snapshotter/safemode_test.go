package main

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/fdstore"
	nodefs "github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// askStatus runs `status -o json` until want is true of what it says.
func askStatus(t *testing.T, config string, want func(status) bool) status {
	t.Helper()
	var s status
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		c := exec.Command(os.Args[0], "status", "-o", "json", "--config", config)
		c.Env = append(os.Environ(), asCommand+"=1")
		out, err := c.Output()
		if err != nil {
			continue
		}
		s = status{}
		if err := json.Unmarshal(out, &s); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if want(s) {
			return s
		}
	}
	t.Fatalf("the status is still %+v", s)
	return s
}

// prepare makes an ordinary snapshot, as of an ordinary image.
func prepare(t *testing.T, address, key string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	sn := connect(t, address)
	mounts, err := sn.Prepare(ctx, key, "")
	if err != nil || len(mounts) != 1 {
		t.Fatalf("prepare: %v, %v", mounts, err)
	}
	if err := sn.Commit(ctx, key+" committed", key); err != nil {
		t.Fatal(err)
	}
	if info, err := sn.Stat(ctx, key+" committed"); err != nil || info.Kind != snapshots.KindCommitted {
		t.Fatalf("stat: %+v, %v", info, err)
	}
}

// pullListed begins to pull an image from a repository that is listed in good configurations of TestSafeMode, in the normal way.
func pullListed(t *testing.T, address string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	dgst := digest.FromString("").String()
	if _, err := connect(t, address).Prepare(ctx, "listed", "", snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef: dgst, snapshotters.TargetRefLabel: "127.0.0.1:1/app", snapshotters.TargetManifestDigestLabel: dgst,
	})); err != nil {
		t.Error(err)
	}
}

// Whatever is damaged, a supervised daemon serves ordinary images after some failed starts and says why; mended, it is a normal one again.
func TestSafeMode(t *testing.T) {
	write := func(path, text string) func(t *testing.T, root string) {
		return func(t *testing.T, root string) {
			name := filepath.Join(root, path)
			if err := os.RemoveAll(name); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	overwrite := func(from, to int64) func(t *testing.T, root string) {
		return func(t *testing.T, root string) {
			f, err := os.OpenFile(filepath.Join(root, "metadata.db"), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt([]byte(strings.Repeat("damaged.", int(to-from)/8)), from); err != nil {
				t.Fatal(err)
			}
		}
	}
	cases := map[string]struct {
		damage func(t *testing.T, root string)
		reason string // part of it
		config bool   // damaged
		loses  bool   // the snapshots
	}{
		"key":     {write("../config.toml.add", "strem = []\n"), `unknown key "strem"`, true, false},
		"TOML":    {write("../config.toml.add", "stream = [\n"), "config.toml", true, false},
		"cache":   {write("cache", "x"), "cache", false, false},
		"images":  {write("images", "x"), "images", false, false},
		"devices": {write("devices", "x"), "devices", false, false},
		"db head": {overwrite(0, 64<<10), "database", false, true},
		"db body": {overwrite(8<<10, 32<<10), "", false, true},
		"db cut": {func(t *testing.T, root string) {
			if err := os.Truncate(filepath.Join(root, "metadata.db"), 9<<10); err != nil {
				t.Fatal(err)
			}
		}, "", false, true},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			if os.Getenv("FULL") == "" && !slices.Contains([]string{"key", "cache", "db cut"}, name) {
				return // each takes seconds of starts
			}
			t.Parallel()
			dir := t.TempDir()
			root, address, config := filepath.Join(dir, "root"), filepath.Join(dir, "s.sock"), filepath.Join(dir, "config.toml")
			t.Cleanup(func() { unix.Unmount(filepath.Join(root, "devices"), unix.MNT_DETACH) })
			good, err := os.ReadFile(writeConfig(t, root, address))
			if err != nil {
				t.Fatal(err)
			}
			good = append(good, "mount_mode = 'file'\nstream = ['127.0.0.1:1/*']\n"...) // in file mode nothing else can be tried
			if err := os.WriteFile(config, good, 0o600); err != nil {
				t.Fatal(err)
			}
			p := serving(t, config, address)
			prepare(t, address, "before")
			p.signal(unix.SIGTERM)
			if err := p.wait(); err != nil {
				t.Fatalf("%v\n%s", err, &p.stderr)
			}
			c.damage(t, root)
			if c.config {
				bad, err := os.ReadFile(config + ".add")
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(config, append(bad, good...), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			s := start(t, "supervise", "--", "serve", "--config", config)
			defer func() {
				if t.Failed() {
					s.Process.Kill()
					s.wait()
					t.Log(s.stderr.String())
				}
			}()
			got := askStatus(t, config, func(s status) bool { return s.SafeMode != "" })
			if !strings.Contains(got.SafeMode, c.reason) || len(got.Problems) == 0 {
				t.Errorf("%+v\n%s", got, &s.stderr)
			}
			prepare(t, address, "in safe mode")
			pullListed(t, address)
			checkKept(t, root, address, c.loses)

			// Mended.
			for _, name := range []string{"cache", "images", "devices"} {
				if fi, err := os.Lstat(filepath.Join(root, name)); err == nil && !fi.IsDir() {
					os.Remove(filepath.Join(root, name))
				}
			}
			if err := os.WriteFile(config, good, 0o600); err != nil {
				t.Fatal(err)
			}
			s.signal(unix.SIGHUP)
			askStatus(t, config, func(s status) bool { return s.SafeMode == "" })
			prepare(t, address, "after")
			s.signal(unix.SIGTERM)
			if err := s.wait(); err != nil {
				t.Errorf("%v\n%s", err, &s.stderr)
			}
			if said := s.stderr.String(); !strings.Contains(said, "normal pull") || !strings.Contains(said, "is in safe mode, in which nothing new is streamed: "+strings.Trim(strconv.Quote(got.SafeMode), `"`)) {
				t.Errorf("the log does not say why a pull was a normal one:\n%s", said)
			}
			if _, err := os.Stat(filepath.Join(root, "failed-starts")); !os.IsNotExist(err) {
				t.Errorf("failures are still counted: %v", err)
			}
		})
	}
}

// Killed three times while it started, the daemon is in safe mode for a time, and then ends, to be started as usual.
func TestSafeModeEnds(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	root, address, socket := filepath.Join(dir, "root"), filepath.Join(dir, "s.sock"), filepath.Join(dir, "k.sock")
	config := writeConfig(t, root, address)
	none, err := fdstore.Open()
	if err != nil {
		t.Fatal(err)
	}
	k, err := fdstore.NewKeeper(socket, none, func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	keeping, stop := context.WithCancel(context.Background())
	kept := make(chan error, 1)
	go func() { kept <- k.Serve(keeping) }()
	defer func() {
		if st, err := fdstore.OpenKeeper(socket); err != nil || nodefs.Release(st) != nil {
			t.Errorf("release: %v", err)
		}
		stop()
		<-kept
	}()
	if err := os.Mkdir(root, 0o700); err != nil {
		t.Fatal(err)
	}
	for range maxFailedStarts { // what a killed one leaves
		if _, err := readStarts(root).begin(); err != nil {
			t.Fatal(err)
		}
	}
	for _, safe := range []bool{true, false} {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		st, err := fdstore.OpenKeeper(socket)
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- serve(ctx, config, st, 5*time.Second) }()
		if s := askStatus(t, config, func(status) bool { return true }); (s.SafeMode != "") != safe {
			t.Errorf("safe mode: %q, want %t", s.SafeMode, safe)
		}
		if !safe {
			cancel()
		}
		select {
		case err := <-served:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("it does not end")
		}
	}
}

// TestStartsOfAnotherProgram: what an upgrade has failed at does not put the program that comes back into safe mode.
func TestStartsOfAnotherProgram(t *testing.T) {
	root := t.TempDir()
	for range maxFailedStarts {
		if _, err := readStarts(root).begin(); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(root, "failed-starts")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if safe, err := readStarts(root).begin(); safe == "" || err != nil {
		t.Fatalf("not safe after %d failed starts: %v", maxFailedStarts, err)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(b), thisProgram(), "another", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if safe, err := readStarts(root).begin(); safe != "" || err != nil {
		t.Errorf("safe for the failures of another program: %q, %v", safe, err)
	}
}

// checkKept: the snapshot of before is there, or the database and the directories are kept aside.
func checkKept(t *testing.T, root, address string, lost bool) {
	t.Helper()
	_, err := connect(t, address).Stat(context.Background(), "before committed")
	aside, _ := filepath.Glob(filepath.Join(root, "damaged-*", "metadata.db"))
	dirs, _ := filepath.Glob(filepath.Join(root, "damaged-*", "snapshots", "*"))
	if lost && (err == nil || len(aside) != 1 || len(dirs) == 0) {
		t.Errorf("kept aside: %v, %v; snapshot: %v", aside, dirs, err)
	}
	if !lost && (err != nil || len(aside) != 0) {
		t.Errorf("snapshot: %v; kept aside: %v", err, aside)
	}
}

// The socket of status says what the daemon logged, and ends with it.
func TestStatus(t *testing.T) {
	dir := t.TempDir()
	address := filepath.Join(dir, "s.sock")
	config := writeConfig(t, filepath.Join(dir, "root"), address)
	start(t, "status", "--config", config).wantFailure("no daemon answers")
	p := serving(t, config, address)
	s := askStatus(t, config, func(s status) bool { return s.MountMode != "" })
	if s.SafeMode != "" || s.Kept || s.StreamedCount != 0 || s.Since == "" {
		t.Errorf("%+v", s)
	}
	text := statusText(t, config)
	for _, want := range []string{"version: ", "\nimages: 0 streamed, 0 of them mounted, at 0 places\n", "\nstream: nothing is listed in the configuration", "\ncache: 0 B of "} {
		if !strings.Contains(text, want) {
			t.Errorf("want %q in\n%s", want, text)
		}
	}
	start(t, "status", "-o", "yaml").wantFailure("text or json")
	p.signal(unix.SIGTERM)
	if err := p.wait(); err != nil {
		t.Error(err)
	}
	start(t, "status", "--config", config).wantFailure("no daemon answers")
}

// The status says how the registry's hosts and the cache's disk are: what fails, why, and that it works again.
func TestStatusOfTrouble(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	dir := t.TempDir()
	root, address := filepath.Join(dir, "root"), filepath.Join(dir, "s.sock")
	config := writeConfig(t, root, address)
	addConfig(t, config, "stream = ['"+reg.Host()+"/*']\ncache_size = '1GiB'\nbackground_bandwidth = '0'")
	disk := filepath.Join(root, "cache")
	if err := os.MkdirAll(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("small", disk, "tmpfs", 0, "size=8k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(disk, unix.MNT_DETACH) })
	p := serving(t, config, address)
	t.Cleanup(func() { // when the containers are unmounted
		p.signal(unix.SIGTERM)
		if err := p.wait(); err != nil {
			t.Errorf("%v\n%s", err, &p.stderr)
		}
	})
	container, _ := streamed(t, connect(t, address), reg.Host()+"/app")
	files, err := filepath.Glob(filepath.Join(container, "*"))
	if err != nil || len(files) != 2 {
		t.Fatalf("got files %q, %v, want two", files, err)
	}
	if _, err := os.ReadFile(files[0]); err != nil { // more than the disk takes
		t.Fatal(err)
	}
	s := askStatus(t, config, func(s status) bool { return s.NotCaching })
	if !strings.Contains(s.CacheError, unix.ENOSPC.Error()) || s.CacheLimit != 1<<30 {
		t.Errorf("the cache on a full disk: %+v", s)
	}
	if len(s.Hosts) != 1 || s.Hosts[0].String() != reg.Host()+": ok" {
		t.Errorf("got hosts %+v", s.Hosts)
	}

	back := reg.Inject(registrytest.Any, -1, registrytest.Status(http.StatusServiceUnavailable))
	waits := make(chan error)
	go func() {
		_, err := os.ReadFile(files[1])
		waits <- err
	}()
	s = askStatus(t, config, func(s status) bool { return len(s.Hosts) == 1 && s.Hosts[0].State == "away" })
	if h := s.Hosts[0]; h.Since == "" || !strings.Contains(h.Error, "503") {
		t.Errorf("got host %+v", h)
	}
	text := statusText(t, config)
	for _, want := range []string{"\nimages: 1 streamed, 1 of them mounted, at 1 places\n", "\nhost: " + reg.Host() + ": away since ", ", NOT CACHING: "} {
		if !strings.Contains(text, want) {
			t.Errorf("want %q in\n%s", want, text)
		}
	}
	for _, what := range []string{"go on without caching", "host is away"} {
		if strings.Count(text, what) != 1 {
			t.Errorf("want one line that says %q in\n%s", what, text)
		}
	}

	back()
	if err := unix.Mount("", disk, "", unix.MS_REMOUNT, "size=10m"); err != nil {
		t.Fatal(err)
	}
	if err := <-waits; err != nil {
		t.Error(err)
	}
	s = askStatus(t, config, func(s status) bool { return !s.NotCaching && s.Hosts[0].State == "ok" })
	if s.CacheError == "" || s.CacheBytes == 0 {
		t.Errorf("after the repair: %+v", s)
	}
	if len(s.Problems) > 0 {
		t.Errorf("what is well again is still a problem:\n%s", strings.Join(s.Problems, "\n"))
	}
}

// The status says that chunks on disk were damaged, and the log where.
func TestStatusOfDamage(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	dir := t.TempDir()
	root, address := filepath.Join(dir, "root"), filepath.Join(dir, "s.sock")
	config := writeConfig(t, root, address)
	addConfig(t, config, "stream = ['"+reg.Host()+"/*']\nbackground_bandwidth = '0'")
	stop := func(p *process) {
		p.signal(unix.SIGTERM)
		if err := p.wait(); err != nil {
			t.Errorf("%v\n%s", err, &p.stderr)
		}
	}
	ref := reg.Host() + "/app"
	p := serving(t, config, address)
	first, _ := streamed(t, connect(t, address), ref)
	want := t.TempDir()
	if err := os.CopyFS(want, os.DirFS(first)); err != nil {
		t.Fatal(err)
	}
	unix.Unmount(first, 0)
	stop(p)
	files, err := filepath.Glob(filepath.Join(root, "cache", "*", "data"))
	if err != nil || len(files) != 2 {
		t.Fatalf("got %q, %v, want the files of two layers", files, err)
	}
	b, err := os.ReadFile(files[0])
	if err == nil {
		b[len(b)/2] ^= 1
		err = os.WriteFile(files[0], b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	p = serving(t, config, address)
	second := container(t, connect(t, address), ref, "second")
	once, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := compareAgain(once, want, second); err != nil {
		t.Error(err)
	}
	s := askStatus(t, config, func(s status) bool { return s.Cache.DamagedChunks == 1 })
	if len(s.Problems) != 1 || !strings.Contains(s.Problems[0], files[0]) || !strings.Contains(s.Problems[0], "layer=") {
		t.Errorf("problems: %q, want one that names %s", s.Problems, files[0])
	}
	if text := statusText(t, config); !strings.Contains(text, ", chunks found damaged on disk and fetched again: 1\n") {
		t.Error(text)
	}
	unix.Unmount(second, 0)
	stop(p)
}

// statusText is what status prints.
func statusText(t *testing.T, config string) string {
	t.Helper()
	c := exec.Command(os.Args[0], "status", "--config", config)
	c.Env = append(os.Environ(), asCommand+"=1")
	out, err := c.Output()
	if err != nil {
		t.Error(err)
	}
	return string(out)
}

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// asCommand makes the test's executable the command.
const asCommand = "STREAMING_SNAPSHOTTER_TEST_AS_COMMAND"

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// process is the command, running.
type process struct {
	*exec.Cmd
	t      *testing.T
	stderr bytes.Buffer
	stdout *bufio.Reader
	tmp    string // its TMPDIR
	exited chan error
}

func start(t *testing.T, args ...string) *process {
	t.Helper()
	return startProgram(t, os.Args[0], args...)
}

func startProgram(t *testing.T, program string, args ...string) *process {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	p := &process{Cmd: exec.Command(program, args...), t: t, tmp: t.TempDir(), exited: make(chan error, 1)}
	p.Env = append(os.Environ(), asCommand+"=1", "TMPDIR="+p.tmp)
	p.Stderr = &p.stderr
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.stdout, p.Stdout = bufio.NewReader(out), w
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	go func() { p.exited <- p.Wait() }()
	t.Cleanup(func() {
		p.Process.Kill() // fails if it has ended
		p.wait()
		out.Close()
	})
	return p
}

// wait waits for the end of the process and returns its error. It may be called again.
func (p *process) wait() error {
	p.t.Helper()
	select {
	case err := <-p.exited:
		p.exited <- err
		return err
	case <-time.After(60 * time.Second):
		p.t.Fatalf("%s does not end", p.Args)
		return nil
	}
}

func (p *process) signal(s os.Signal) {
	p.t.Helper()
	if err := p.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// wantFailure waits for the end, which must come with all of texts on standard error, and with nothing left behind.
func (p *process) wantFailure(texts ...string) {
	p.t.Helper()
	if err := p.wait(); err == nil {
		p.t.Errorf("%s: succeeded, want an error", p.Args)
	}
	for _, text := range texts {
		if !strings.Contains(p.stderr.String(), text) {
			p.t.Errorf("%s: want %q in\n%s", p.Args, text, &p.stderr)
		}
	}
	p.wantNothingLeft()
}

func (p *process) wantNothingLeft() {
	p.t.Helper()
	if left, err := os.ReadDir(p.tmp); err != nil || len(left) != 0 {
		p.t.Errorf("%s: left in TMPDIR: %v, %v", p.Args, left, err)
	}
}

func writeConfig(t *testing.T, root, address string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.toml")
	text := fmt.Sprintf("root = %q\naddress = %q\nhosts_dir = ''\n", root, address)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// serving starts the daemon and waits until it serves.
func serving(t *testing.T, config, address string) *process {
	t.Helper()
	p := start(t, "serve", "--config", config)
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		conn, err := net.Dial("unix", address)
		if err == nil {
			conn.Close()
			return p
		}
		if time.Now().After(deadline) {
			p.Process.Kill()
			p.wait()
			t.Fatalf("the daemon does not serve: %v\n%s", err, &p.stderr)
		}
	}
}

func TestServe(t *testing.T) {
	dir := t.TempDir()
	root, address := filepath.Join(dir, "root"), filepath.Join(dir, "run", "s.sock")
	config := writeConfig(t, root, address)
	devices := filepath.Join(root, "devices")
	t.Cleanup(func() { unix.Unmount(devices, unix.MNT_DETACH) }) // if the test fails between two daemons
	p := serving(t, config, address)
	start(t, "serve", "--config", config).wantFailure(root + " is in use by another")
	start(t, "serve", "--config", writeConfig(t, root+"2", address)).wantFailure(address + " is served by another")

	// Killed, it leaves its lock, its socket and its mount. Its successor goes on with them.
	p.signal(unix.SIGKILL)
	p.wait()
	p = serving(t, config, address)
	sn := connect(t, address)
	if _, err := sn.Stat(context.Background(), "nothing"); !errdefs.IsNotFound(err) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
	p.signal(unix.SIGTERM) // while a client is connected
	if err := p.wait(); err != nil {
		t.Errorf("%v\n%s", err, &p.stderr)
	}
	if _, err := os.Lstat(address); !os.IsNotExist(err) {
		t.Errorf("the socket: %v, want it gone", err)
	}
	p.wantNothingLeft()
	if mounted, err := mountinfo.Mounted(devices); err != nil || mounted {
		t.Errorf("the killed daemon's mount is still there: %v, %v", mounted, err)
	}
}

// Stopped while containers use its mounts, the daemon ends in time and without an error, and so does its successor.
func TestServeInUse(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	dir := t.TempDir()
	address := filepath.Join(dir, "s.sock")
	config := writeConfig(t, filepath.Join(dir, "root"), address)
	t.Cleanup(func() { unix.Unmount(filepath.Join(dir, "root", "devices"), unix.MNT_DETACH) }) // if the test fails
	addConfig(t, config, "stream = ['"+reg.Host()+"/*']")
	p := serving(t, config, address)
	sn := connect(t, address)
	for _, app := range []string{"one", "two", "three"} {
		ref := reg.Host() + "/" + app
		container, manifest := streamed(t, sn, ref)
		if files, err := os.ReadDir(container); err != nil || len(files) != 2 {
			t.Fatalf("container: %v, %v, want two files\n%s", files, err, &p.stderr)
		}
		wantFirstUses(t, config, container, ref, manifest)
	}
	for i := range 2 {
		if i > 0 {
			p = serving(t, config, address)
		}
		began := time.Now()
		p.signal(unix.SIGTERM)
		if err := p.wait(); err != nil {
			t.Errorf("%v\n%s", err, &p.stderr)
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("took %v", took)
		}
	}
}

// wantFirstUses reads the files of a container, and wants the record of that from the daemon.
func wantFirstUses(t *testing.T, config, container, ref, manifest string) {
	t.Helper()
	if err := os.CopyFS(t.TempDir(), os.DirFS(container)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{ref, ref + "@" + manifest} {
		p := start(t, "profile", "export", "--config", config, name)
		record := &artifact.Profile{}
		err := json.NewDecoder(p.stdout).Decode(record)
		if waitErr := p.wait(); err != nil || waitErr != nil || len(record.Chunks) < 2 {
			t.Errorf("profile export %s: %v, %v, %v\n%s", name, record, err, waitErr, &p.stderr)
		}
	}
	start(t, "profile", "export", "--config", config, ref+"@sha256:"+strings.Repeat("0", 64)).wantFailure("no start of the image was recorded")
}

func addConfig(t *testing.T, config, line string) {
	t.Helper()
	f, err := os.OpenFile(config, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := fmt.Fprintln(f, line); err != nil {
		t.Fatal(err)
	}
}

func connect(t *testing.T, address string) snapshots.Snapshotter {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "streaming")
}

// streamed makes image ref and its artifact, pulls it through sn, which must stream it, and mounts a container of it.
func streamed(t *testing.T, sn snapshots.Snapshotter, ref string) (root, manifest string) {
	t.Helper()
	ctx := context.Background()
	manifest, diffIDs := push(t, ref)
	convert(t, ref)
	_, err := sn.Prepare(ctx, ref, "", snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef: diffIDs[0], snapshotters.TargetRefLabel: ref, snapshotters.TargetManifestDigestLabel: manifest,
	}))
	if !errdefs.IsAlreadyExists(err) {
		t.Fatalf("Prepare: got %v, want ErrAlreadyExists", err)
	}
	return container(t, sn, ref, "container"), manifest
}

// container mounts a container of ref, which was pulled.
func container(t *testing.T, sn snapshots.Snapshotter, ref, name string) (root string) {
	t.Helper()
	ctx := context.Background()
	top := ""
	if err := sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Parent != "" && strings.Contains(info.Name, ref) {
			top = info.Name
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	mounts, err := sn.Prepare(ctx, ref+" "+name, top)
	if err != nil {
		t.Fatal(err)
	}
	root = t.TempDir()
	if err := mount.All(mounts, root); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(root, unix.MNT_DETACH) })
	return root
}

// A root on overlayfs, on which file-backed EROFS cannot be: serve and mount choose another way, and check says so.
func TestRootOnOverlay(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	merged := filepath.Join(dir, "merged")
	if err := unix.Mount("overlay", merged, "overlay", 0, fmt.Sprintf("lowerdir=%s/lower,upperdir=%s/upper,workdir=%s/work", dir, dir, dir)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(merged, unix.MNT_DETACH) })
	reg := registrytest.Start(t, registrytest.Options{})
	ref := reg.Host() + "/app:v1"
	push(t, ref)
	convert(t, ref)
	p := start(t, "mount", "--cache", filepath.Join(merged, "cache"), ref, t.TempDir())
	line, err := p.stdout.ReadString('\n')
	if err != nil {
		p.wait()
		t.Fatalf("mount: %v\n%s", err, &p.stderr)
	}
	p.signal(os.Interrupt)
	if err := p.wait(); err != nil {
		t.Errorf("%v\n%s", err, &p.stderr)
	}
	p = start(t, "check", "--config", writeConfig(t, filepath.Join(merged, "root"), "/none"))
	said, err := p.stdout.ReadString('\n')
	if err != nil {
		t.Fatalf("check: %v\n%s", err, &p.stderr)
	}
	p.wait() // there is no daemon
	_, mode, _ := strings.Cut(strings.TrimSpace(said), "mount mode: ")
	if mode == "" || !strings.Contains(line, "("+mode+" mode") {
		t.Errorf("check says %q, mount %q", said, line)
	}
}

func TestNewSocket(t *testing.T) {
	address := filepath.Join(t.TempDir(), "sub", "s.sock")
	l, err := newSocket(address)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newSocket(address); err == nil {
		t.Error("the socket of a living process was taken")
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	l, err = newSocket(address)
	if err != nil {
		t.Fatalf("the socket of a dead process: %v", err)
	}
	l.Close()
	if err := os.WriteFile(address, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := newSocket(address); err == nil {
		t.Error("a file was replaced")
	}
}

// push pushes an image of two layers for this machine's architecture.
func push(t *testing.T, ref string) (manifest string, diffIDs []string) {
	t.Helper()
	img := pushImage(t, ref, 10_000, 2)
	dgst, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range cf.RootFS.DiffIDs {
		diffIDs = append(diffIDs, d.String())
	}
	return dgst.String(), diffIDs
}

// pushImage pushes an image of layers with one file of size bytes each.
func pushImage(t *testing.T, ref string, size, layers int64) v1.Image {
	t.Helper()
	img, err := random.Image(size, layers)
	if err != nil {
		t.Fatal(err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture = "linux", runtime.GOARCH
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		t.Fatal(err)
	}
	r, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(r, img); err != nil {
		t.Fatal(err)
	}
	return img
}

func convert(t *testing.T, ref string) {
	t.Helper()
	p, r, err := converter.Open(ref, converter.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := converter.Create(context.Background(), p, r, converter.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func TestMount(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	ref := reg.Host() + "/app:v1"
	push(t, ref)
	convert(t, ref)
	dir := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	for _, at := range []string{dir, link} {
		p := start(t, "mount", ref, at)
		line, err := p.stdout.ReadString('\n')
		if err != nil || !strings.Contains(line, ref) {
			p.wait()
			t.Fatalf("got %q, %v\n%s", line, err, &p.stderr)
		}
		if files, err := os.ReadDir(dir); err != nil || len(files) != 2 {
			t.Errorf("mounted: %v, %v, want two files", files, err)
		}
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil || st.Flags&unix.ST_NOSUID == 0 || st.Flags&unix.ST_NODEV == 0 {
			t.Errorf("programs and devices of an image have powers on the host: flags %#x, %v", st.Flags, err)
		}
		start(t, "mount", ref, at).wantFailure("mounted there already")
		p.signal(os.Interrupt)
		if err := p.wait(); err != nil {
			t.Errorf("%v\n%s", err, &p.stderr)
		}
		p.wantNothingLeft()
		if mounted, err := mountinfo.Mounted(dir); err != nil || mounted {
			t.Errorf("still mounted: %v, %v", mounted, err)
		}
	}
}

func TestMountFailures(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	plain := reg.Host() + "/plain:v1"
	push(t, plain)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cases := map[string]struct {
		args []string
		want []string
	}{
		"no arguments":    {nil, []string{"mount REF DIR"}},
		"bad reference":   {[]string{"::", dir}, []string{`"::"`}},
		"no such image":   {[]string{reg.Host() + "/gone", dir}, []string{"/gone", "404"}},
		"no artifact":     {[]string{plain, dir}, []string{plain, "no streaming artifact", "streamctl create"}},
		"no such dir":     {[]string{plain, dir + "/gone"}, []string{dir + "/gone", "no such file"}},
		"not a directory": {[]string{plain, file}, []string{file, "not a directory"}},
		"bad platform":    {[]string{plain, dir, "--platform", "a/b/c/d"}, []string{"--platform"}},
		"bad mode":        {[]string{plain, dir, "--mount-mode", "magic"}, []string{"magic", "loop"}},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			start(t, append([]string{"mount"}, c.args...)...).wantFailure(c.want...)
		})
	}
}

// Interrupted while the registry does not answer, it ends at once and leaves nothing.
func TestMountInterrupted(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	ref := reg.Host() + "/app:v1"
	push(t, ref)
	convert(t, ref)
	for name, what := range map[string]func(*http.Request) bool{
		"resolving":    registrytest.Manifests,
		"searching":    registrytest.Referrers,
		"index wanted": registrytest.Blobs,
		"supervised":   registrytest.Blobs,
	} {
		t.Run(name, func(t *testing.T) {
			var supervise []string
			if name == "supervised" {
				supervise = []string{"supervise", "--"}
			}
			asked := make(chan struct{}, 1)
			defer reg.Inject(what, -1, func(r *registrytest.Registry, next http.Handler) http.Handler {
				select {
				case asked <- struct{}{}:
				default:
				}
				return registrytest.Stall(-1)(r, next)
			})()
			p := start(t, append(supervise, "mount", ref, t.TempDir())...)
			select {
			case <-asked:
			case <-time.After(30 * time.Second):
				t.Fatal("it asks for nothing")
			}
			began := time.Now()
			p.signal(os.Interrupt)
			p.wantFailure("interrupted")
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
}

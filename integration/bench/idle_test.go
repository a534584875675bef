package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

const (
	idleImages = 100
	idleFiles  = 5000 // of each
	idleTime   = time.Minute
)

func TestMain(m *testing.M) {
	node.Isolate()
	os.Exit(m.Run())
}

// BenchmarkIdle is what the daemon of a node costs that has a hundred images of 5,000 files mounted, each read a bit, while nobody asks it for anything: once their
// starts are over, with nothing fetched in the background and after everything was; after a restart that the mounts outlive; and after one that they do not. The nodes idle
// at the same time. containerd is ended then: it asks for the snapshots every ten seconds.
func BenchmarkIdle(b *testing.B) {
	if os.Getenv("BENCH_IDLE") == "" {
		b.Skip("takes a quarter of an hour: set BENCH_IDLE=1")
	}
	reg := registrytest.Start(b, registrytest.Options{Dir: b.TempDir()})
	refs := make([]string, idleImages)
	check(b, each(refs, func(i int) error {
		refs[i] = fmt.Sprintf("%s/app%d:v1", reg.Host(), i)
		return pushIdle(b.Context(), b.TempDir(), refs[i], uint64(i))
	}))
	var nodes []*idler
	for _, mode := range []string{"file", "loop", "tree"} {
		for _, background := range []string{"0", "1GiB"} {
			nodes = append(nodes, startIdler(b, mode, background, reg.Host()))
		}
	}
	check(b, each(nodes, func(i int) error { return nodes[i].mount(b.Context(), refs) }))
	for _, state := range []struct {
		name  string
		enter func(*idler, *testing.B)
	}{{"mounted", (*idler).settle}, {"restarted", (*idler).restart}, {"unmounted", (*idler).unmount}} {
		for _, i := range nodes {
			state.enter(i, b)
		}
		for _, i := range nodes {
			i.wait(b, "nothing to do", i.hasNothingToDo())
			i.before = i.usage(b)
		}
		time.Sleep(idleTime)
		for _, i := range nodes {
			i.after = i.usage(b)
		}
		for _, i := range nodes {
			b.Run(fmt.Sprintf("%s/background=%s/%s", i.mode, i.background, state.name), i.report)
		}
	}
}

// each calls f for the elements of list, several at a time.
func each[T any](list []T, f func(i int) error) error {
	var g errgroup.Group
	g.SetLimit(8)
	for i := range list {
		g.Go(func() error { return f(i) })
	}
	return g.Wait()
}

// pushIdle makes an image, different for each seed, and pushes it with its artifact.
func pushIdle(ctx context.Context, dir, ref string, seed uint64) error {
	layer, err := ociimage.Layer(dir, func(t *ociimage.Tar) error {
		source, content := rand.New(rand.NewPCG(seed, 0)), rand.NewChaCha8([32]byte{byte(seed)})
		for i := range idleFiles {
			if i%25 == 0 {
				if err := t.Dir(0o755, fmt.Sprintf("dir%d", i/25)); err != nil {
					return err
				}
			}
			body := make([]byte, source.IntN(1024))
			content.Read(body)
			if err := t.File(fmt.Sprintf("dir%d/a-file-with-a-name-%d", i/25, i), 0o644, body); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	img, err := ociimage.Image(v1.Config{Cmd: []string{"/none"}}, layer)
	if err != nil {
		return err
	}
	if err := ociimage.Push(ctx, img, ref); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "streamctl", "create", "--record", "", ref).CombinedOutput(); err != nil {
		return fmt.Errorf("streamctl create %s: %w\n%s", ref, err, out)
	}
	return nil
}

// idler is a node with all images.
type idler struct {
	*node.Node
	mode, background string
	dirs             []string // where root file systems are mounted
	before, after    node.Usage
}

func startIdler(b *testing.B, mode, background, host string) *idler {
	b.Helper()
	n, err := node.Start(b.Context(), node.Options{Mode: mode, Stream: []string{host + "/*"}, Supervise: true, Config: fmt.Sprintf("background_bandwidth = %q", background)})
	check(b, err)
	b.Cleanup(func() {
		if b.Failed() {
			b.Log(n.Logs())
		}
		if err := n.Close(); err != nil {
			b.Error(err)
		}
	})
	return &idler{Node: n, mode: mode, background: background}
}

// mount pulls all images, mounts a root file system of each, and reads a bit of it.
func (i *idler) mount(ctx context.Context, refs []string) error {
	i.dirs = make([]string, len(refs))
	return each(refs, func(k int) error {
		i.dirs[k] = filepath.Join(i.Dir, "m", strconv.Itoa(k))
		if err := os.MkdirAll(i.dirs[k], 0o755); err != nil {
			return err
		}
		if err := i.Pull(ctx, refs[k]); err != nil {
			return err
		}
		if err := i.Mount(ctx, refs[k], i.dirs[k]); err != nil {
			return err
		}
		for part := range 4 {
			if err := node.ReadFiles(filepath.Join(i.dirs[k], fmt.Sprintf("dir%d", 50*part))); err != nil {
				return err
			}
		}
		return nil
	})
}

func check(b *testing.B, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// settle waits until the images' starts are over and what is to be fetched afterwards is here.
func (i *idler) settle(b *testing.B) {
	name := "first-use.json"
	if i.background != "0" {
		name = "completed"
	}
	i.wait(b, name+" of all images", func() bool {
		names, _ := filepath.Glob(filepath.Join(i.Dir, "s/images/*", name))
		return len(names) == len(i.dirs)
	})
	check(b, i.StopContainerd())
}

// restart restarts the daemon below its supervisor.
func (i *idler) restart(b *testing.B) {
	old := i.pid()
	check(b, i.RestartSupervised())
	i.wait(b, "another daemon", func() bool {
		_, err := i.status()
		return err == nil && i.pid() != old
	})
}

// unmount unmounts all and restarts daemon and supervisor.
func (i *idler) unmount(b *testing.B) {
	ctx := b.Context()
	check(b, i.StartContainerd(ctx))
	check(b, each(i.dirs, func(k int) error { return i.Unmount(ctx, i.dirs[k]) }))
	check(b, i.StopContainerd())
	check(b, i.StopSnapshotter())
	check(b, i.StartSnapshotter(ctx))
}

func (i *idler) wait(b *testing.B, what string, done func() bool) {
	b.Helper()
	for begin := time.Now(); !done(); time.Sleep(100 * time.Millisecond) {
		if time.Since(begin) > 10*time.Minute {
			b.Fatalf("mode %s, background_bandwidth %s, after 10 minutes there is not: %s", i.mode, i.background, what)
		}
	}
}

// hasNothingToDo returns a function that reports whether the daemon has had nothing to do for longer than it takes to come to rest.
func (i *idler) hasNothingToDo() func() bool {
	var cpu time.Duration
	var since time.Time
	return func() bool {
		u, err := node.ReadUsage(i.pid())
		if err != nil || u.CPU > cpu+10*time.Millisecond || since.IsZero() {
			cpu, since = u.CPU, time.Now()
		}
		return time.Since(since) > 75*time.Second
	}
}

// pid is the daemon's, not the supervisor's; 0 if there is none.
func (i *idler) pid() int {
	pids, err := i.Processes()
	if err != nil {
		return 0
	}
	return pids[len(pids)-1]
}

func (i *idler) usage(b *testing.B) node.Usage {
	b.Helper()
	u, err := node.ReadUsage(i.pid())
	check(b, err)
	return u
}

// status asks the daemon.
func (i *idler) status() (s struct {
	Goroutines int
	Heap       int64
	Mounted    int `json:"mounted_images"`
}, err error) {
	out, err := exec.Command("streaming-snapshotter", "status", "-o", "json", "--config", i.ConfigFile()).Output()
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(out, &s)
}

// report is no benchmark of its own: what it reports was measured beside the others.
func (i *idler) report(b *testing.B) {
	s, err := i.status()
	check(b, err)
	count := func(what string) float64 {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/%s", i.pid(), what))
		check(b, err)
		return float64(len(entries))
	}
	const mib = 1 << 20
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(s.Mounted), "mounted")
	b.ReportMetric(float64((i.after.CPU - i.before.CPU).Milliseconds()), "CPU-ms/min")
	b.ReportMetric(float64(i.after.Switches-i.before.Switches), "switches/min")
	b.ReportMetric(float64(i.after.Anonymous)/mib, "MiB")
	b.ReportMetric(float64(i.after.Shared)/mib, "shared-MiB")
	b.ReportMetric(float64(i.after.Resident)/mib, "with-maps-MiB")
	b.ReportMetric(float64(s.Heap)/mib, "heap-MiB")
	b.ReportMetric(float64(s.Goroutines), "goroutines")
	b.ReportMetric(count("task"), "threads")
	b.ReportMetric(count("fd"), "descriptors")
}

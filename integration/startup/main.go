// Command startup measures how long a container takes from `crictl pull` to its first answer, with different snapshotters side by side, over links with
// latency and limited bandwidth, and writes what it finds into docs. `make bench-startup` runs it.
//
// Each start happens on a fresh node (package node) in a fresh directory, from a registry that asks for tokens, over TLS, behind a link of package lagproxy. The
// systems take turns, so that what else the machine does hits all of them. Every start is reported; nothing is left out.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

type options struct {
	images, links, systems string
	n                      int
	everything             bool
	burst                  string
	out, docs, from, trace string
	goOn                   bool
}

func main() {
	node.Isolate()
	var o options
	flag.StringVar(&o.images, "images", "python-app,node-app,postgres,nginx", "images of integration/images to start")
	flag.StringVar(&o.links, "links", "", "links to start them over: 1ms (1 Gbit/s), 5ms (500 Mbit/s), 50ms (100 Mbit/s); default all")
	flag.StringVar(&o.systems, "systems", "", "systems to compare; default all")
	flag.IntVar(&o.n, "n", 5, "how often each")
	flag.BoolVar(&o.everything, "everything", true, "also time the reading of all of an image")
	flag.StringVar(&o.burst, "burst", "python-app", "image to start on ten nodes at once; none if empty")
	flag.StringVar(&o.out, "out", ".build/startup.json", "file for all that was measured")
	flag.StringVar(&o.docs, "docs", "", "directory whose benchmarks.md and plots are to be written")
	flag.StringVar(&o.from, "from", "", "measure nothing, write the docs from such a file")
	flag.BoolVar(&o.goOn, "continue", false, "keep what -out has, and measure what it lacks: an interrupted run, or one with fewer links or starts, goes on")
	flag.StringVar(&o.trace, "trace", "", "file to append each start's requests to")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := startup(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "startup:", err)
		os.Exit(1)
	}
}

func startup(ctx context.Context, o options) error {
	r := &results{}
	if o.from != "" {
		if err := r.read(o.from); err != nil {
			return err
		}
	} else if err := run(ctx, o, r); err != nil {
		return err
	}
	r.markdown(os.Stdout)
	if o.docs == "" {
		return nil
	}
	return r.write(o.docs)
}

// run measures, and keeps what it has in a file as it goes.
func run(ctx context.Context, opts options, r *results) (err error) {
	root, err := node.Root()
	if err != nil {
		return err
	}
	if err := os.Setenv("PATH", filepath.Join(root, ".build/bin")+":"+os.Getenv("PATH")); err != nil {
		return err
	}
	*r = results{Date: today(), Machine: machine(), Links: pick(links(), opts.links, func(l *link) string { return l.Name }), Images: strings.Split(opts.images, ","), Needed: map[string]int64{}}
	r.Load[0] = load()
	if opts.goOn {
		if err := r.goOn(opts.out); err != nil {
			return err
		}
	}
	var all []*system
	for _, s := range pick(systems(), opts.systems, func(s *system) string { return s.Name }) {
		why := s.missing()
		r.Systems = append(r.Systems, described{s.Name, s.What, why})
		if why != "" {
			say("%s is left out: %s", s.Name, why)
			continue
		}
		all = append(all, s)
	}
	o, err := startOrigin(os.TempDir(), r.Links)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.close()) }()
	if err := prepare(ctx, o, root, all, r.Images); err != nil {
		return err
	}
	o.RequireToken(registrytest.TokenOptions{})
	if len(r.Needed) == 0 && slices.ContainsFunc(all, func(s *system) bool { return s.Name == "none" }) {
		if err := r.findNeeded(ctx, o); err != nil {
			return err
		}
	}
	for _, l := range r.Links {
		for _, image := range r.Images {
			for range opts.n - r.rounds(l, image) {
				if err := r.round(ctx, o, opts, all, l, image); err != nil {
					return err
				}
			}
		}
	}
	if slices.Contains(r.Images, opts.burst) {
		return r.bursts(ctx, o, opts, all)
	}
	return nil
}

// bursts measures bursts of ours, with and without a cache before the registry.
func (r *results) bursts(ctx context.Context, o *origin, opts options, all []*system) error {
	o.RequireToken(registrytest.TokenOptions{Realm: "https://" + burstHost}) // the cache passes a challenge on as it is
	for range opts.n - r.burstRounds() {
		for _, s := range all {
			for _, cached := range []bool{false, true} {
				if !s.ours {
					continue
				}
				b, err := measureBurst(ctx, o, s, opts.burst, cached)
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if err != nil {
					r.fail("burst of %s with %s (cache: %v): %w", opts.burst, s.Name, cached, err)
					continue
				}
				r.Bursts = append(r.Bursts, b)
				fmt.Printf("burst of %s, %s, cache %v: %.2f s the median, %.2f s the last, the registry served %d requests, %.1f MB\n",
					b.Image, b.System, cached, median(b.Ready), slices.Max(b.Ready), b.Requests, float64(b.Bytes)/1e6)
			}
		}
		if err := r.save(opts.out); err != nil {
			return err
		}
	}
	return nil
}

// fail notes what could not be measured: the rest goes on, and the report says it.
func (r *results) fail(format string, args ...any) {
	err := fmt.Errorf(format, args...)
	fmt.Fprintln(os.Stderr, err)
	text, _, _ := strings.Cut(err.Error(), "\n")
	r.Failed = append(r.Failed, text)
}

// read replaces r by what is in a file of save's.
func (r *results) read(name string) error {
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	*r = results{}
	if err := json.Unmarshal(b, r); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// goOn takes over what an earlier run has measured. The report names both.
func (r *results) goOn(name string) error {
	var old results
	if err := old.read(name); err != nil {
		return err
	}
	if !slices.Equal(old.Images, r.Images) {
		return fmt.Errorf("%s is of the images %s: go on with those", name, strings.Join(old.Images, ","))
	}
	r.Date = old.Date + " and " + r.Date
	if old.Machine != r.Machine {
		r.Machine = old.Machine + " and " + r.Machine
	}
	r.Samples, r.Needed, r.Bursts, r.Failed, r.Load[0] = old.Samples, old.Needed, old.Bursts, old.Failed, max(r.Load[0], old.Load[0])
	return nil
}

// rounds is how often the systems took their turns. Each round is saved as a whole.
func (r *results) rounds(l *link, image string) (n int) {
	for _, s := range r.measured() {
		n = max(n, len(r.of(l.Name, image, s, ready)))
	}
	return n
}

func (r *results) burstRounds() (n int) {
	of := map[string]int{}
	for _, b := range r.Bursts {
		key := fmt.Sprint(b.System, b.Cached)
		of[key]++
		n = max(n, of[key])
	}
	return n
}

// save writes all that was measured so far.
func (r *results) save(name string) error {
	r.Load[1] = load()
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(name, b, 0o644)
}

// findNeeded counts the bytes of the chunks that the containers touch.
func (r *results) findNeeded(ctx context.Context, o *origin) error {
	for _, image := range r.Images {
		bytes, err := needed(ctx, o, image, o.Host()+"/bench/none/"+image+":latest")
		if err != nil {
			return fmt.Errorf("find what %s needs: %w", image, err)
		}
		r.Needed[image] = bytes
		fmt.Printf("%s needs %.1f MB to be ready\n", image, float64(bytes)/1e6)
	}
	return nil
}

// round measures each of the systems once.
func (r *results) round(ctx context.Context, o *origin, opts options, all []*system, l *link, image string) error {
	for _, s := range all {
		// Once for each image is enough: a quiet time and background_bandwidth make nearly all of it.
		complete := opts.everything && s.Name == "static" && len(r.of(l.Name, image, s.Name, completed)) == 0 && l == r.Links[0]
		m, err := measureTraced(ctx, o, s, l, image, opts.trace, complete)
		if err == nil && opts.everything && s.readAll {
			m.Everything, err = readAll(ctx, o, s, l, image)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			r.fail("%s of %s over %v: %w", s.Name, image, l, err)
			continue
		}
		r.Samples = append(r.Samples, m)
		fmt.Printf("%-11s %-10s %-17v pull %5.2f s, ready %6.2f s, %6.1f MB, %4d requests (%d after the start, misses %d), CPU %.2f s, everything %.1f s\n",
			m.Image, m.System, l, m.Pull, m.Ready, float64(m.Bytes)/1e6, m.Requests, m.AfterStart, m.Misses, m.Containerd+m.Snapshotter, m.Everything)
	}
	return r.save(opts.out)
}

// machine describes the machine.
func machine() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return runtime.GOOS
	}
	model := runtime.GOARCH
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, after, ok := strings.Cut(string(b), "model name\t: "); ok {
			model, _, _ = strings.Cut(after, "\n")
		}
	}
	return fmt.Sprintf("%d cores (%s), Linux %s", runtime.NumCPU(), model, unix.ByteSliceToString(u.Release[:]))
}

// load is the load average of the last minute.
func load() (f float64) {
	b, err := os.ReadFile("/proc/loadavg")
	if err == nil {
		fmt.Sscan(string(b), &f)
	}
	return f
}

// pick returns those of all that list names, or all if it is empty.
func pick[T any](all []T, list string, name func(T) string) []T {
	if list == "" {
		return all
	}
	wanted := strings.Split(list, ",")
	return slices.DeleteFunc(all, func(t T) bool { return !slices.Contains(wanted, name(t)) })
}

// prepare fills the registry.
func prepare(ctx context.Context, o *origin, root string, all []*system, images []string) error {
	guest, err := ociimage.Guest(ctx, root, os.TempDir())
	if err != nil {
		return err
	}
	pause, err := ociimage.Pause(os.TempDir(), guest)
	if err != nil {
		return err
	}
	if err := ociimage.Push(ctx, pause, o.Host()+"/pause:1"); err != nil {
		return err
	}
	for _, image := range images {
		for _, s := range all {
			say("prepare %s for %s", image, s.Name)
			if err := s.prepareImage(ctx, o, image); err != nil {
				return fmt.Errorf("prepare %s for %s: %w", image, s.Name, err)
			}
		}
	}
	return nil
}

func measureTraced(ctx context.Context, o *origin, s *system, l *link, image, trace string, complete bool) (sample, error) {
	if trace == "" {
		return measure(ctx, o, s, l, image, nil, complete)
	}
	f, err := os.OpenFile(trace, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return sample{}, err
	}
	defer f.Close()
	fmt.Fprintf(f, "\n%s, %s, %v\n", image, s.Name, l)
	return measure(ctx, o, s, l, image, f, complete)
}

func say(format string, args ...any) { fmt.Printf("==> "+format+"\n", args...) }

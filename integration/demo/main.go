// Command demo shows streaming-snapshotter at work on this machine, with nothing but the machine's own Go toolchain for an image: a registry behind
// a link with latency and limited bandwidth, a node with containerd's overlayfs snapshotter, and a node that streams. Each pulls the same image and runs it as the kubelet would.
//
// It is run by `make demo`, which builds what it needs first. It leaves nothing behind.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"runtime"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/google/go-containerregistry/pkg/crane"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/lagproxy"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

type options struct {
	image   string
	mode    string
	link    lagproxy.Link
	mbits   float64
	timeout time.Duration
}

func main() {
	node.Isolate()
	var o options
	flag.StringVar(&o.image, "image", "", "image to show, of any registry (default: one made of this machine's Go toolchain)")
	flag.StringVar(&o.mode, "mode", "auto", "how to mount: auto, file, loop or tree")
	flag.DurationVar(&o.link.RTT, "rtt", 20*time.Millisecond, "round trip time of the link")
	flag.Float64Var(&o.mbits, "mbits", 200, "bandwidth of the link in Mbit/s")
	flag.DurationVar(&o.timeout, "timeout", 5*time.Minute, "how long a container may take to print its first line")
	flag.Parse()
	o.link.Bandwidth = int64(o.mbits * 1e6 / 8)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// result is what one node took.
type result struct {
	pull, answer time.Duration
	count        lagproxy.Count // until the answer
	line         string
}

func run(ctx context.Context, o options) error {
	dir := os.TempDir() // Isolate's, removed at the end
	registry, err := registrytest.Run(registrytest.Options{Dir: dir + "/registry"})
	if err != nil {
		return err
	}
	defer registry.Close()
	repo := registry.Host() + "/demo/app:latest"
	pause := registry.Host() + "/demo/pause:1"
	if err := pushImages(ctx, o, dir, repo, pause); err != nil {
		return err
	}
	say("convert: streamctl create %s", repo)
	create := exec.CommandContext(ctx, "streamctl", "create", "--record", "", repo)
	create.Stdout, create.Stderr = os.Stdout, os.Stderr
	if err := create.Run(); err != nil {
		return fmt.Errorf("streamctl create: %w", err)
	}

	var results []result
	for _, pull := range []node.Pull{node.Plain, node.Transfer} {
		r, err := measure(ctx, o, registry.Host(), pause, pull)
		if err != nil {
			return err
		}
		results = append(results, r)
	}
	return table(results[0], results[1])
}

// pushImages makes or copies the image, and makes the pause image for the pods.
func pushImages(ctx context.Context, o options, dir, repo, pause string) error {
	root, err := node.Root()
	if err != nil {
		return err
	}
	guest, err := ociimage.Guest(ctx, root, dir)
	if err != nil {
		return err
	}
	p, err := ociimage.Pause(dir, guest)
	if err != nil {
		return err
	}
	if err := ociimage.Push(ctx, p, pause); err != nil {
		return err
	}
	var img v1.Image
	if o.image != "" {
		say("copy %s", o.image)
		img, err = crane.Pull(o.image, crane.WithContext(ctx), crane.WithPlatform(&v1.Platform{OS: "linux", Architecture: runtime.GOARCH}))
	} else {
		say("make an image of this machine's Go toolchain")
		img, err = ociimage.Go(ctx, dir)
	}
	if err != nil {
		return err
	}
	m, err := img.Manifest()
	if err != nil {
		return err
	}
	var size int64
	for _, l := range m.Layers {
		size += l.Size
	}
	say("push %s: %d layers, %.1f MB", repo, len(m.Layers), float64(size)/1e6)
	return ociimage.Push(ctx, img, repo)
}

// measure pulls and runs the image on a fresh node at the far end of a link of its own.
func measure(ctx context.Context, o options, registry, pause string, pull node.Pull) (r result, err error) {
	link, err := lagproxy.Listen("tcp", registry, o.link)
	if err != nil {
		return r, err
	}
	defer link.Close()
	n, err := node.Start(ctx, node.Options{Pull: pull, Mode: o.mode, Pause: pause, Stream: []string{link.Addr() + "/*"}})
	if err != nil {
		return r, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, n.Logs())
		}
		err = errors.Join(err, n.Close())
	}()
	if err := n.Pull(ctx, pause); err != nil { // a node has it already
		return r, err
	}

	ref := link.Addr() + "/demo/app:latest"
	say("crictl pull and run %s with the %s snapshotter, over %v and %.0f Mbit/s", ref, n.Snapshotter(), o.link.RTT, o.mbits)
	begin := time.Now()
	if err := n.Pull(ctx, ref); err != nil {
		return r, err
	}
	r.pull = time.Since(begin)
	fmt.Printf("pulled after %.2f s\n", r.pull.Seconds())
	c, err := n.RunPod(ctx, ref)
	if err != nil {
		return r, err
	}
	wait, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	r.line, err = c.WaitLine(wait, regexp.MustCompile(`.`))
	if err != nil && o.image == "" {
		return r, err
	}
	r.answer, r.count = time.Since(begin), link.Count()
	if err != nil {
		r.line = "(no output)"
	}
	fmt.Printf("after %.2f s the container says: %s\n", r.answer.Seconds(), r.line)
	return r, ctx.Err()
}

func table(plain, streamed result) error {
	fmt.Println()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	row := func(what, a, b string) { fmt.Fprintf(w, "%s\t%s\t%s\t\n", what, a, b) }
	seconds := func(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }
	megabytes := func(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }
	row("", "overlayfs", "streamed")
	row("time to pull", seconds(plain.pull), seconds(streamed.pull))
	row("time until the program has answered", seconds(plain.answer), seconds(streamed.answer))
	row("bytes over the link", megabytes(plain.count.Down), megabytes(streamed.count.Down))
	row("requests over the link", fmt.Sprint(plain.count.Requests), fmt.Sprint(streamed.count.Requests))
	return w.Flush()
}

// say prints what is done next.
func say(format string, args ...any) { fmt.Printf("==> "+format+"\n", args...) }

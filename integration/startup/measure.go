package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// sample is one start of a container on a fresh node.
type sample struct {
	Link, Image, System string

	Pull, Ready float64 // seconds since the pull began
	Bytes       int64   // that crossed the link towards the node until the container was ready
	Requests    int     // until the container was ready
	AfterPull   int     // of them, those that came after the pull
	AfterStart  int     // of them, those that came after the container was started
	Misses      int64   // chunks that a read waited for after the container was started; -1 is unknown
	Containerd  float64 // seconds of processor time until the container was ready
	Snapshotter float64
	Serving     float64 // of the registry and the link, which have the node's cores, in that time
	Memory      int64   // of the snapshotter when the container was ready, without what it has mapped, and at most with it; bytes
	Peak        int64
	Warm        float64 // overlayfs: seconds from create to ready of a second container of the image
	Here        float64 // overlayfs: seconds from the pull of another tag of the image, all of which is on the node, to ready of a third container
	Complete    float64 // seconds since the pull began until the node has all of the image and needs the registry no more; 0 if that was not waited for
	Everything  float64 // seconds since the pull began until every file was read, on another fresh node; overlayfs: until it was unpacked
}

// startTimeout bounds a pull and a start.
const startTimeout = 10 * time.Minute

// measure starts a container of image on a node that has nothing but the pause image, in the order of the kubelet: sandbox, pull, create, start. The node's
// daemons have just started, so that they have no connection, token or cached answer. Nothing of what they will read has been seen by the kernel, because each run has a
// new registry link and a new disk; only the programs are warm. Complete says to wait until the image is, too.
func measure(ctx context.Context, o *origin, s *system, l *link, image string, trace io.Writer, complete bool) (m sample, err error) {
	err = o.onNode(ctx, s.node(o, l), func(ctx context.Context, n *node.Node) error {
		pod, err := n.RunSandbox(ctx)
		if err != nil {
			return err
		}
		settle(n)
		begin := time.Now()
		if m, err = start(ctx, o, s, l, image, n, pod, trace); err != nil {
			return err
		}
		if complete {
			if err := waitComplete(ctx, n); err != nil {
				return err
			}
			m.Complete = time.Since(begin).Seconds()
		}
		if s.Name != "overlayfs" {
			return nil
		}
		m.Everything = m.Pull
		ref := l.Host + "/" + s.repository(image)
		if m.Warm, pod, err = startAgain(ctx, n, pod, ref+":latest", image, false); err != nil {
			return err
		}
		m.Here, _, err = startAgain(ctx, n, pod, ref+":"+again, image, true)
		return err
	})
	return m, err
}

// again is another tag of overlayfs' images.
const again = "again"

// waitComplete waits until the daemon has recorded that all of the one image is on the node.
func waitComplete(ctx context.Context, n *node.Node) error {
	poll := time.NewTicker(100 * time.Millisecond)
	defer poll.Stop()
	for {
		if done, err := filepath.Glob(filepath.Join(n.Dir, "s/images/*/completed")); err != nil || len(done) > 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the image is not complete: %w", ctx.Err())
		case <-poll.C:
		}
	}
}

// settle writes what was written before to the disk, so that it is not written meanwhile. sync(2) would also wait for file systems of others that hang.
func settle(n *node.Node) {
	for _, dir := range []string{n.Dir, os.TempDir()} { // the node's disk is a file of the other
		if f, err := os.Open(dir); err == nil {
			unix.Syncfs(int(f.Fd())) // what fails will fail where it matters
			f.Close()
		}
	}
}

// start is the part of measure that is measured.
func start(ctx context.Context, o *origin, s *system, l *link, image string, n *node.Node, pod *node.Pod, trace io.Writer) (m sample, err error) {
	ref := l.Host + "/" + s.repository(image) + ":latest"
	m = sample{Link: l.Name, Image: image, System: s.Name}
	before, err := usage(n)
	if err != nil {
		return m, err
	}
	serving, err := node.ReadUsage(os.Getpid())
	if err != nil {
		return m, err
	}
	o.Reset()
	count := l.proxy.Count()
	begin := time.Now()
	if err := n.Pull(ctx, ref); err != nil {
		return m, err
	}
	pulled := time.Now()
	c, err := pod.Create(ctx, ref)
	if err != nil {
		return m, err
	}
	missed := misses(n)
	started := time.Now()
	if err := c.Start(ctx); err != nil {
		return m, err
	}
	running := time.Now()
	if _, err := c.WaitLine(ctx, readyLine(image)); err != nil {
		return m, err
	}
	ready := time.Now()
	after, err := usage(n)
	if err != nil {
		return m, err
	}
	served, err := node.ReadUsage(os.Getpid())
	if err != nil {
		return m, err
	}
	m.Serving = (served.CPU - serving.CPU).Seconds()
	m.Bytes = l.proxy.Count().Sub(count).Down
	requests := o.Requests()
	m.Pull, m.Ready = pulled.Sub(begin).Seconds(), ready.Sub(begin).Seconds()
	m.count(requests, pulled, started, ready)
	if m.Misses = misses(n); missed >= 0 && m.Misses >= 0 {
		m.Misses -= missed
	}
	m.Containerd = (after[0].CPU - before[0].CPU).Seconds()
	if len(after) > 1 {
		m.Snapshotter = (after[1].CPU - before[1].CPU).Seconds()
		m.Memory, m.Peak = after[1].Anonymous, after[1].Peak
	}
	if trace != nil {
		fmt.Fprintf(trace, "pulled %v, created %v, started %v, ready %v\n", ms(pulled.Sub(begin)), ms(started.Sub(begin)), ms(running.Sub(begin)), ms(ready.Sub(begin)))
		traceRequests(trace, requests, begin)
	}
	return m, nil
}

// count counts the requests until ready.
func (m *sample) count(requests []registrytest.Request, pulled, started, ready time.Time) {
	for _, q := range requests {
		if q.Begin.After(ready) {
			continue
		}
		m.Requests++
		if q.Begin.After(pulled) {
			m.AfterPull++
		}
		if q.Begin.After(started) {
			m.AfterStart++
		}
	}
}

// startAgain starts another container of an image that is on the node, after the one in pod, and returns the seconds until it is ready, from its pull if that is asked for.
func startAgain(ctx context.Context, n *node.Node, pod *node.Pod, ref, image string, pull bool) (float64, *node.Pod, error) {
	if _, err := n.Crictl(ctx, "rmp", "--force", pod.ID); err != nil { // it may have a port that the next one wants
		return 0, nil, err
	}
	pod, err := n.RunSandbox(ctx)
	if err != nil {
		return 0, nil, err
	}
	begin := time.Now()
	if pull {
		err = n.Pull(ctx, ref)
	}
	if err == nil {
		err = startIn(ctx, pod, ref, image)
	}
	return time.Since(begin).Seconds(), pod, err
}

// startIn creates and starts a container and waits until it is ready.
func startIn(ctx context.Context, pod *node.Pod, ref, image string) error {
	c, err := pod.Create(ctx, ref)
	if err != nil {
		return err
	}
	if err := c.Start(ctx); err != nil {
		return err
	}
	_, err = c.WaitLine(ctx, readyLine(image))
	return err
}

// readAll pulls image on a fresh node and reads all its files through the mount that a container would have, one after the other.
func readAll(ctx context.Context, o *origin, s *system, l *link, image string) (seconds float64, err error) {
	err = o.onNode(ctx, s.node(o, l), func(ctx context.Context, n *node.Node) error {
		ref := l.Host + "/" + s.repository(image) + ":latest"
		dir := filepath.Join(n.Dir, "mnt")
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		settle(n)
		begin := time.Now()
		if err := n.Pull(ctx, ref); err != nil {
			return err
		}
		if err := n.Mount(ctx, ref, dir); err != nil {
			return err
		}
		err := node.ReadFiles(dir)
		seconds = time.Since(begin).Seconds()
		return errors.Join(err, n.Unmount(ctx, dir))
	})
	return seconds, err
}

func readyLine(image string) *regexp.Regexp { return regexp.MustCompile("^" + image + ": ready") }

// onNode runs f on a fresh node. An error of f's comes with the daemons' logs.
func (o *origin) onNode(ctx context.Context, opts node.Options, f func(context.Context, *node.Node) error) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	n, err := o.startNode(ctx, opts)
	if err != nil {
		return err
	}
	if err = f(ctx, n); err != nil {
		err = fmt.Errorf("%w\n%s", err, n.Logs())
	}
	return errors.Join(err, n.Close())
}

// nodeDisk is a node's disk, in bytes: what it does not write takes none of this machine's.
const nodeDisk = 16 << 30

// startNode starts a node that trusts the registry and has the pause image, from the front without a delay.
func (o *origin) startNode(ctx context.Context, opts node.Options) (*node.Node, error) {
	opts.Pause, opts.Disk = o.Host()+"/pause:1", nodeDisk
	n, err := node.Start(ctx, opts)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(o.trust(n.HostsDir()), n.Pull(ctx, opts.Pause)); err != nil {
		return nil, errors.Join(fmt.Errorf("%w\n%s", err, n.Logs()), n.Close())
	}
	return n, nil
}

// usage is that of containerd and, if there is one, the snapshotter.
func usage(n *node.Node) (us []node.Usage, err error) {
	pids := []int{n.ContainerdPID()}
	if n.Snapshotter() != "overlayfs" {
		more, err := n.Processes()
		if err != nil {
			return nil, err
		}
		pids = append(pids, more...)
	}
	for _, pid := range pids {
		u, err := node.ReadUsage(pid)
		if err != nil {
			return nil, err
		}
		us = append(us, u)
	}
	return us, nil
}

// misses asks our daemon how many chunks reads have waited for; -1 if it does not say.
func misses(n *node.Node) int64 {
	if n.Snapshotter() != node.Snapshotter {
		return -1
	}
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", n.Dir+"/s/admin.sock")
	}}}
	resp, err := c.Get("http://daemon/status")
	if err != nil {
		return -1
	}
	defer resp.Body.Close()
	var s struct {
		Cache *struct{ Misses int64 } `json:"cache"`
	}
	if json.NewDecoder(resp.Body).Decode(&s) != nil || s.Cache == nil {
		return -1
	}
	return s.Cache.Misses
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", d.Seconds()*1e3) }

// traceRequests prints what the registry was asked, by the time at which it was asked, half a round trip after the node has.
func traceRequests(w io.Writer, requests []registrytest.Request, begin time.Time) {
	fmt.Fprintf(w, "%9s %9s %9s  %-12s %s\n", "at ms", "took ms", "bytes", "by", "request")
	for _, q := range requests {
		took := "-"
		if !q.End.IsZero() {
			took = fmt.Sprintf("%.1f", q.End.Sub(q.Begin).Seconds()*1e3)
		}
		by, _, _ := strings.Cut(q.Header.Get("User-Agent"), "/")
		path := q.Path
		if i := strings.LastIndex(path, "sha256:"); i >= 0 && len(path) > i+19 {
			path = path[:i+19]
		}
		if q.Query != "" {
			path += "?" + q.Query
		}
		fmt.Fprintf(w, "%9.1f %9s %9d  %-12.12s %d %s %s %s\n", q.Begin.Sub(begin).Seconds()*1e3, took, q.Bytes, by, q.Status, q.Method, path, q.Range)
	}
}

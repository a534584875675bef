package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Pull pulls ref as the kubelet does, with `crictl pull`.
func (n *Node) Pull(ctx context.Context, ref string) error {
	_, err := n.Crictl(ctx, "pull", ref)
	return err
}

// Pod is a pod without containers.
type Pod struct {
	ID    string
	name  string
	node  *Node
	file  string // its configuration
	linux map[string]any
}

// Container is a container in a pod of its own.
type Container struct {
	ID, Pod string
	node    *Node
	log     string // CRI's log file
}

// RunPod runs ref's default command, or args, in a pod, as the kubelet does: `crictl runp`, `create`, `start`. The image has been pulled.
func (n *Node) RunPod(ctx context.Context, ref string, args ...string) (*Container, error) {
	return n.RunPodFrom(ctx, 0, ref, args...)
}

// RunPodFrom is RunPod, with the pod in a user namespace whose 65,536 IDs begin at base outside. Base 0 is no user namespace.
func (n *Node) RunPodFrom(ctx context.Context, base uint32, ref string, args ...string) (*Container, error) {
	p, err := n.runSandbox(ctx, base)
	if err != nil {
		return nil, err
	}
	c, err := p.Create(ctx, ref, args...)
	if err != nil {
		return nil, err
	}
	return c, c.Start(ctx)
}

// RunSandbox runs the sandbox of a pod, which the kubelet does before it pulls the images of the pod's containers.
func (n *Node) RunSandbox(ctx context.Context) (*Pod, error) { return n.runSandbox(ctx, 0) }

func (n *Node) runSandbox(ctx context.Context, base uint32) (*Pod, error) {
	n.pods++
	name := fmt.Sprintf("pod%d", n.pods)
	namespaces := map[string]any{"network": 2} // the host's
	if base != 0 {
		ids := []any{map[string]any{"host_id": base, "container_id": 0, "length": 65536}}
		namespaces["userns_options"] = map[string]any{"mode": 0, "uids": ids, "gids": ids} // the pod's
	}
	linux := map[string]any{"security_context": map[string]any{"namespace_options": namespaces}}
	config := map[string]any{
		"metadata":      map[string]any{"name": name, "uid": name, "namespace": "default", "attempt": 1},
		"log_directory": n.path("logs", name),
		"linux":         linux,
	}
	p := &Pod{name: name, node: n, file: n.path("run", name+".json"), linux: linux}
	if err := errors.Join(os.MkdirAll(n.path("logs", name), 0o755), writeJSON(p.file, config)); err != nil {
		return nil, err
	}
	id, err := n.Crictl(ctx, "runp", p.file)
	p.ID = strings.TrimSpace(id)
	return p, err
}

// Create creates a container of ref, the only one of the pod.
func (p *Pod) Create(ctx context.Context, ref string, args ...string) (*Container, error) {
	file := p.node.path("run", p.name+".main.json")
	if err := writeJSON(file, map[string]any{
		"metadata": map[string]any{"name": "main"},
		"image":    map[string]any{"image": ref},
		"command":  args,
		"log_path": "main.log",
		"linux":    p.linux,
	}); err != nil {
		return nil, err
	}
	id, err := p.node.Crictl(ctx, "create", p.ID, file, p.file)
	return &Container{ID: strings.TrimSpace(id), Pod: p.ID, node: p.node, log: p.node.path("logs", p.name, "main.log")}, err
}

// Start starts the container.
func (c *Container) Start(ctx context.Context) error {
	_, err := c.node.Crictl(ctx, "start", c.ID)
	return err
}

// PID is the ID of a container's first process; os.ErrNotExist if there is no such container.
func (n *Node) PID(container string) (int, error) {
	b, err := os.ReadFile(n.path("run/c/io.containerd.runtime.v2.task", Namespace, container, "init.pid"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(string(b))
}

// WaitLine waits until the container has printed a line that matches, and returns it; or the error that the container ended without, with all that it has printed.
func (c *Container) WaitLine(ctx context.Context, match *regexp.Regexp) (string, error) {
	for ended := false; ; {
		lines, err := c.lines()
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
		for _, l := range lines {
			if match.MatchString(l) {
				return l, nil
			}
		}
		if ended {
			return "", fmt.Errorf("container ended without a line that matches %s:\n%s", match, strings.Join(lines, "\n"))
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("no line that matches %s: %w\n%s", match, ctx.Err(), strings.Join(lines, "\n"))
		case <-time.After(5 * time.Millisecond):
		}
		if ended, err = c.ended(ctx); err != nil {
			return "", err
		}
	}
}

// Output waits until the container has ended and returns what it has printed, line by line.
func (c *Container) Output(ctx context.Context) (string, error) {
	for {
		ended, err := c.ended(ctx)
		if err != nil {
			return "", err
		}
		lines, err := c.lines()
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
		if ended {
			return strings.Join(lines, "\n"), nil
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("container does not end: %w\n%s", ctx.Err(), strings.Join(lines, "\n"))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// ended asks the kernel, not containerd: asked every few milliseconds, crictl would be the larger part of what is measured. Once the process has ended it
// is CRI that says so, when it has read all that the process has printed.
func (c *Container) ended(ctx context.Context) (bool, error) {
	pid, err := c.node.PID(c.ID)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	if err == nil {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		_, rest, _ := strings.Cut(string(stat), ") ")
		if err == nil && !strings.HasPrefix(rest, "Z") {
			return false, nil
		}
	}
	state, err := c.node.Crictl(ctx, "inspect", "--output", "go-template", "--template", "{{.status.state}}", c.ID)
	return strings.TrimSpace(state) == "CONTAINER_EXITED", err
}

// lines returns what the container has printed, from CRI's log: "TIME STREAM TAG TEXT", where tag P marks a part of a line.
func (c *Container) lines() ([]string, error) {
	b, err := os.ReadFile(c.log)
	if err != nil {
		return nil, err
	}
	var lines []string
	part := ""
	for l := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(l, "\n"), " ", 4)
		if len(f) < 4 {
			continue
		}
		if part += f[3]; f[2] == "F" {
			lines = append(lines, part)
			part = ""
		}
	}
	return lines, nil
}

// Exec runs a command in the container and returns its output.
func (c *Container) Exec(ctx context.Context, args ...string) (string, error) {
	return c.node.Crictl(ctx, append([]string{"exec", c.ID}, args...)...)
}

// Remove ends the container and its pod.
func (c *Container) Remove(ctx context.Context) error {
	_, err := c.node.Crictl(ctx, "rmp", "--force", c.Pod)
	return err
}

// Image is what CRI says of an image on the node.
type Image struct {
	ID          string   `json:"id"` // digest of the config
	RepoDigests []string `json:"repoDigests"`
	RepoTags    []string `json:"repoTags"`
}

// Inspect returns what CRI says of ref.
func (n *Node) Inspect(ctx context.Context, ref string) (Image, error) {
	out, err := n.Crictl(ctx, "inspecti", "--output", "json", ref)
	if err != nil {
		return Image{}, err
	}
	var v struct{ Status Image }
	return v.Status, json.Unmarshal([]byte(out), &v)
}

func writeJSON(name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(name, b, 0o644)
}

// NoShares is an option of `ctr run`: no share of the CPU is set, for machines without that controller.
const NoShares = "--cpu-shares=0"

// Run runs ref's default command, or args, with `ctr run` and the node's snapshotter, in a network namespace of its own, and returns what it has printed.
// It may be called from several goroutines at once.
func (n *Node) Run(ctx context.Context, ref string, env []string, args ...string) (string, error) {
	var flags []string
	for _, e := range env {
		flags = append(flags, "--env", e)
	}
	return n.RunFlags(ctx, ref, flags, args...)
}

// ID makes a name an ID for `ctr run` that no container of another node has. Their cgroups, which are named after the ID, are all of this machine's, and
// runc ends the processes of both.
func (n *Node) ID(name string) string { return filepath.Base(n.Dir) + "-" + name }

// RunFlags is Run with flags of `ctr run`.
//
// The shim writes what the container prints to a file: ctr closes its own pipes when the container has ended, and loses what it has not read yet.
func (n *Node) RunFlags(ctx context.Context, ref string, flags []string, args ...string) (string, error) {
	id := n.ID(fmt.Sprintf("run%d", n.containers.Add(1)))
	log := n.path("logs", id+".out")
	a := append([]string{"run", "--rm", NoShares, "--snapshotter", n.Snapshotter(), "--log-uri", "file://" + log}, flags...)
	_, err := n.Ctr(ctx, append(append(a, ref, id), args...)...)
	out, readErr := os.ReadFile(log)
	if err != nil {
		return string(out), fmt.Errorf("%w\n%s", err, out)
	}
	return string(out), readErr
}

// Mount mounts the root file system that a container of ref would have on dir, as `ctr images mount --rw` does.
func (n *Node) Mount(ctx context.Context, ref, dir string) error {
	_, err := n.Ctr(ctx, "images", "mount", "--snapshotter", n.Snapshotter(), "--rw", ref, dir)
	return err
}

// Unmount undoes Mount and removes the snapshot.
func (n *Node) Unmount(ctx context.Context, dir string) error {
	_, err := n.Ctr(ctx, "images", "unmount", "--snapshotter", n.Snapshotter(), "--rm", dir)
	return err
}

// ReadFiles reads every regular file below dir, one after the other.
func ReadFiles(dir string) error {
	buf := make([]byte, 1<<20)
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, buf)
		return err
	})
}

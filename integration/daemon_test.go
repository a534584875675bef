package integration_test

import (
	"bufio"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs/erofstest"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// trimPaths removes a prefix of the paths that `guest sum` prints.
func trimPaths(out, prefix string) string { return strings.ReplaceAll(out, " "+prefix+"/", " /") }

// TestMountCommand mounts an image without containerd, in each mode, and unmounts it when interrupted.
func TestMountCommand(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref := registry.Host() + "/app:v1"
	pushSmall(t, ref, 40)
	run(t, "streamctl", "create", "--record", "", ref)
	begin := time.Now()
	want := walkContainer(t, startNode(t, node.Options{Pull: node.Plain}), ref)
	untimed := unpackTimes(want, begin)
	forgetTimes(want, untimed)
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			dir := tempDir(t)
			c := exec.CommandContext(t.Context(), "streaming-snapshotter", "mount", "--mount-mode", mode, ref, dir)
			var errs strings.Builder
			c.Stderr = &errs
			out, err := c.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			line, err := bufio.NewReader(out).ReadString('\n')
			defer func() {
				for l := range strings.Lines(errs.String()) {
					if !strings.HasPrefix(l, "time=") {
						t.Errorf("a line of the log in another form: %q", l)
					}
				}
			}()
			if err != nil || !strings.Contains(line, "mounted") {
				t.Fatalf("mount said %q, %v\n%s", line, err, errs.String())
			}
			got, err := erofstest.Walk(dir, erofstest.Options{MaxContent: erofstest.AllContent, NoDirNlink: true})
			if err != nil {
				t.Fatal(err)
			}
			forgetTimes(got, untimed)
			if diff := erofstest.Diff(got, want); diff != "" {
				t.Errorf("the mount differs from the image:\n%s", diff)
			}
			if err := os.WriteFile(dir+"/new", nil, 0o644); err == nil {
				t.Error("the mount is writable")
			}
			if err := c.Process.Signal(syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
			if err := c.Wait(); err != nil {
				t.Errorf("mount ended with %v\n%s", err, errs.String())
			}
			if mounted, err := mountinfo.Mounted(dir); err != nil || mounted {
				t.Errorf("after the interrupt: mounted %v, %v", mounted, err)
			}
		})
	}
}

// TestRestart stops or kills the daemon between two containers of an image: the second runs without another pull, and reads what the first has not, in each mode.
func TestRestart(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ref := registry.Host() + "/app:v1"
	pushSmall(t, ref, 50)
	run(t, "streamctl", "create", "--record", "", ref)
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			n := startNode(t, node.Options{Mode: mode, Stream: []string{registry.Host() + "/*"}})
			pullStreamed(t, registry, n, ref)
			kill := func() error { n.KillSnapshotter(); return nil }
			for _, step := range []struct {
				name string
				end  func() error
				read string // by the container that follows
			}{
				{"stop before the first container", n.StopSnapshotter, "/data/small"},
				{"stop", n.StopSnapshotter, "/data/big"},
				{"kill", kill, "/data/replaced"},
				{"kill again", kill, "/data"},
			} {
				if err := step.end(); err != nil {
					t.Fatalf("%s: %v", step.name, err)
				}
				if err := n.StartSnapshotter(t.Context()); err != nil {
					t.Fatalf("%s: %v", step.name, err)
				}
				out, err := n.Run(t.Context(), ref, nil, "/guest", "sum", step.read)
				if err != nil {
					t.Fatalf("%s: %v", step.name, err)
				}
				checkSumsBelow(t, out, 50, step.read)
				if t.Failed() {
					t.Fatalf("after %s", step.name)
				}
			}
		})
	}
}

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	nodefs "github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// pushFiles pushes an image of some files with its artifact, and returns a directory with the same files.
func pushFiles(t *testing.T, ref string) string {
	t.Helper()
	img := pushImage(t, ref, 300_000, 25)
	convert(t, ref)
	dir := t.TempDir()
	tar := exec.Command("tar", "-xC", dir)
	tar.Stdin = mutate.Extract(img)
	if out, err := tar.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	return dir
}

// compareAgain compares a mount with a directory by `diff -r` again and again, with names and data that the kernel has forgotten, until ctx
// ends, at least once. It returns the number of passes.
func compareAgain(ctx context.Context, want, dir string) (passes int, err error) {
	for passes == 0 || ctx.Err() == nil {
		passes++
		os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0)
		if out, err := exec.Command("diff", "-r", want, dir).CombinedOutput(); err != nil {
			return passes, fmt.Errorf("pass %d: diff: %w\n%s", passes, err, out)
		}
	}
	return passes, nil
}

// wantUnmounted checks that nothing is left of a mount at dir, with its files in the TMPDIR of p.
func (p *process) wantUnmounted(dir string) {
	p.t.Helper()
	p.wantNothingLeft()
	for _, prefix := range []string{p.tmp, dir} {
		if mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(prefix)); err != nil || len(mounts) > 0 {
			p.t.Errorf("mounts are left at %s: %d, %v", prefix, len(mounts), err)
		}
	}
}

// superviseMount starts `supervise -- mount` and waits until the image is mounted at dir.
func superviseMount(t *testing.T, program, mode, ref, dir string) *process {
	t.Helper()
	p := startProgram(t, program, "supervise", "--", "mount", "--mount-mode", mode, ref, dir)
	t.Cleanup(func() { // if the test fails
		p.Process.Kill()
		p.wait()
		mounts, _ := mountinfo.GetMounts(mountinfo.PrefixFilter(p.tmp))
		for _, m := range mounts {
			unix.Unmount(m.Mountpoint, unix.MNT_DETACH)
		}
		unix.Unmount(dir, unix.MNT_DETACH)
	})
	if line, err := p.stdout.ReadString('\n'); err != nil || !strings.Contains(line, mode+" mode") {
		p.wait()
		t.Fatalf("got %q, %v\n%s", line, err, &p.stderr)
	}
	return p
}

var mountModes = [...]nodefs.Mode{nodefs.ModeFile, nodefs.ModeLoop, nodefs.ModeTree}

// TestSuperviseMount kills and upgrades the command while the mount is compared: no error, no difference; at last with a registry that is away. Then it ends the supervisor, which leaves nothing.
func TestSuperviseMount(t *testing.T) {
	kills, least, most := 5, 20*time.Millisecond, 300*time.Millisecond
	if os.Getenv("FULL") != "" {
		kills, least, most = 100, 200*time.Millisecond, 2*time.Second
	}
	for i, mode := range mountModes {
		t.Run(string(mode), func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{})
			ref := reg.Host() + "/app:v1"
			want := pushFiles(t, ref)
			dir, program := t.TempDir(), filepath.Join(t.TempDir(), "program")
			replaceProgram(t, program, "")
			p := superviseMount(t, program, string(mode), ref, dir)
			pid := p.child(0)
			ctx, stop := context.WithCancel(context.Background())
			defer stop()
			var passes int
			compared := make(chan error, 1)
			go func() {
				var err error
				passes, err = compareAgain(ctx, want, dir)
				compared <- err
			}()
			for k := range kills {
				time.Sleep(least + rand.N(most-least)) // the fault itself: at any moment of what is read
				if k == kills/2 {
					replaceProgram(t, program, "a newer one")
					p.signal(unix.SIGHUP)
				} else {
					unix.Kill(pid, unix.SIGKILL)
				}
				pid = p.child(pid)
			}
			stop()
			if err := <-compared; err != nil {
				t.Errorf("%v\n%s", err, &p.stderr)
			}
			t.Logf("%d passes", passes)

			reg.Close() // which a start does not need
			unix.Kill(pid, unix.SIGKILL)
			served := dir
			if devices, _ := filepath.Glob(filepath.Join(p.tmp, "*", "devices")); mode != nodefs.ModeTree && len(devices) == 1 {
				served = devices[0]
			}
			if _, err := os.ReadDir(served); err != nil { // by the next one
				t.Error(err)
			}
			p.signal([]os.Signal{unix.SIGTERM, os.Interrupt}[i%2])
			if err := p.wait(); err != nil {
				t.Errorf("%v\n%s", err, &p.stderr)
			}
			if strings.Contains(p.stderr.String(), "exit status") {
				t.Errorf("a command failed\n%s", &p.stderr)
			}
			if n := strings.Count(p.stderr.String(), "is ready again"); n == 0 || n > kills+1 {
				t.Errorf("it says %d times that it serves again\n%s", n, &p.stderr)
			}
			p.wantUnmounted(dir)
		})
	}
}

// TestSuperviseMountEnds ends a supervisor whose command has just been killed, with a reader inside: that gets an error, and nothing is left.
func TestSuperviseMountEnds(t *testing.T) {
	for _, mode := range mountModes {
		t.Run(string(mode), func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{})
			ref := reg.Host() + "/app:v1"
			want := pushFiles(t, ref)
			dir := t.TempDir()
			p := superviseMount(t, os.Args[0], string(mode), ref, dir)
			defer reg.Inject(registrytest.Blobs, -1, registrytest.Stall(-1))()
			reader := exec.Command("diff", "-r", want, dir)
			if err := reader.Start(); err != nil {
				t.Fatal(err)
			}
			read := make(chan error, 1)
			go func() { read <- reader.Wait() }()
			unix.Kill(p.child(0), unix.SIGKILL)
			p.signal(unix.SIGTERM)
			if err := p.wait(); err != nil && !strings.Contains(p.stderr.String(), "interrupted") { // at its start
				t.Errorf("%v\n%s", err, &p.stderr)
			}
			select {
			case err := <-read:
				if err == nil {
					t.Error("the reader saw no error")
				}
			case <-time.After(20 * time.Second):
				t.Fatal("the reader hangs")
			}
			p.wantUnmounted(dir)
		})
	}
}
